"""Segmentation as a task of the lab: training, resuming, measuring, pictures, the command."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

import anybatch as ab
from anybatch.errors import AnybatchError
from anybatch.lab.run_report import write_run_report
from anybatch.lab.segmentation.config import SegmentConfig
from anybatch.lab.segmentation.examples import IGNORE, Examples, example
from anybatch.lab.segmentation.generated import generated
from anybatch.lab.segmentation.losses import dice_ce
from anybatch.lab.segmentation.networks import NETWORKS
from anybatch.lab.segmentation.scores import counts, dice, iou
from anybatch.lab.segmentation.task import Segment, open_segment
from anybatch.lab.tasks import config_of, open_task
from anybatch.lab.training import Stopped, run_key, train_run

from .segment_files import image_folder, pair, volume_folder


def made(shape: tuple[int, ...], train: int = 8, test: int = 3, patch: int = 8) -> Examples:
    def split(start: int, count: int) -> list:
        pairs = [pair(place, shape) for place in range(start, start + count)]
        return [example(torch.from_numpy(i).float().unsqueeze(0), torch.from_numpy(m)) for i, m in pairs]

    return Examples("made up", ("nothing", "left", "right"), split(0, train), split(train, test), patch, "0" * 12)


VOLUMES, PICTURES = made((8, 8, 8)), made((21, 17), patch=16)
CONFIG = SegmentConfig(method="bn", batch=4, epochs=2, width=4, lr=0.05, gradient_batch=4)


def of_models(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("method", ["bn", "cbn"])
def test_stop_and_resume_is_bit_identical(tmp_path: Path, method: str) -> None:
    """Patches are drawn by what was seen: smaller than the images here, so that another draw would show."""
    task = Segment(replace(CONFIG, method=method, batch=1, epochs=3), PICTURES)
    whole = train_run(task, checkpoint=tmp_path / "whole")
    assert len(whole.curve) == 3
    asked = iter([False, False, True])
    with pytest.raises(Stopped):
        train_run(task, checkpoint=tmp_path / "parts", stop=lambda: next(asked))
    torch.manual_seed(999)
    parts = train_run(task, checkpoint=tmp_path / "parts", resume=True)
    assert (parts.accuracy, parts.curve, parts.train_loss) == (whole.accuracy, whole.curve, whole.train_loss)
    assert of_models(tmp_path / "parts") == of_models(tmp_path / "whole")


def test_training_learns_and_is_recorded(tmp_path: Path) -> None:
    told: dict[str, float] = {}
    result = train_run(Segment(replace(CONFIG, epochs=12), VOLUMES), watch=lambda seen, values: told.update(values))
    assert result.status == "finished"
    assert result.train_loss[-1][1] < 0.7 * result.train_loss[0][1]
    assert set(told) == {"train loss", "mean Dice", "test loss", "mean IoU", "Dice of left", "Dice of right"}
    assert result.more["Dice of left"] == told["Dice of left"]
    record = json.loads(json.dumps(result.record(), allow_nan=False))
    assert config_of(record["config"]) == result.config
    assert result.key == run_key(Segment(replace(CONFIG, epochs=12), VOLUMES))


def test_micro_batches_add_up_to_the_whole_batch() -> None:
    """GroupNorm sees an example at a time, so batch sizes differ in the order of sums alone; patches are the same."""
    tasks = [Segment(replace(CONFIG, method="gn(groups=2)", batch=b), PICTURES) for b in (1, 4)]
    gradients = []
    for task, count in zip(tasks, (4, 1), strict=True):
        model = task.build()
        for batch in task.batches(torch.arange(4), count, seen=16):
            (task.loss(model, batch) / count).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)
    images = [task.batch(torch.tensor([3]), seen)[0] for task in tasks for seen in (0, 0, 8)]
    assert torch.equal(images[0], images[4])
    assert not torch.equal(images[0], images[2])


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("dims", [2, 3])
def test_networks_convert_and_run(name: str, dims: int) -> None:
    side = NETWORKS[name].multiple
    data = made((side,) * dims, train=2, test=1, patch=side)
    task = Segment(replace(CONFIG, network=name, method="cbn", batch=1), data)
    model = task.build()
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert len(norms) >= 13
    assert all(isinstance(norm, ab.nn.CrossIterationBatchNorm) for norm in norms)
    assert "0 left alone" in task.conversion
    images, masks = task.generated(2)
    assert images.shape == (2, 1, *(side,) * dims)
    assert masks.shape == (2, *(side,) * dims)
    assert set(masks.unique().tolist()) == {0, 1, 2}
    loss = task.loss(model, (images, masks))
    loss.backward()
    assert math.isfinite(float(loss.detach()))
    assert task.predict(model, data.test[0]).shape == (3, *(side,) * dims)


# Measures


def by_loops(predicted: np.ndarray, mask: np.ndarray, kind: int) -> tuple[int, int, int]:
    """Pixels of a class in the mask, in the prediction, in both."""
    true = found = both = 0
    for p, m in zip(predicted.ravel().tolist(), mask.ravel().tolist(), strict=True):
        if m == IGNORE:
            continue
        true += m == kind
        found += p == kind
        both += p == kind and m == kind
    return true, found, both


def test_evaluation_against_loops() -> None:
    data = made((21, 17), test=5, patch=16)
    masks = [each.mask.clone() for each in data.test]
    masks[0][masks[0] == 2] = 0  # one example without a class
    masks[1][:4] = IGNORE
    test = [each._replace(mask=mask) for each, mask in zip(data.test, masks, strict=True)]
    task = Segment(CONFIG, replace(data, test=test))
    model = task.build()
    scores = task.evaluate(model, "test")
    assert not model.training
    answers = [task.predict(model, each).argmax(0).numpy() for each in test]
    per_class, unions = {1: [], 2: []}, {1: [0, 0], 2: [0, 0]}
    for answer, mask in zip(answers, masks, strict=True):
        for kind in (1, 2):
            true, found, both = by_loops(answer, mask.numpy(), kind)
            unions[kind][0] += both
            unions[kind][1] += true + found - both
            if true:
                per_class[kind].append(2 * both / (true + found))
    assert (len(per_class[1]), len(per_class[2])) == (5, 4)
    expected = {kind: 100 * np.mean(values) for kind, values in per_class.items()}
    assert scores.score == pytest.approx(np.mean(list(expected.values())), abs=1e-3)
    assert scores.score > 0
    assert scores.more["Dice of left"] == pytest.approx(expected[1], abs=1e-3)
    assert scores.more["Dice of right"] == pytest.approx(expected[2], abs=1e-3)
    ious = [100 * both / union for both, union in unions.values() if union]
    assert scores.more["mean IoU"] == pytest.approx(np.mean(ious), abs=1e-3)
    assert task.evaluate(model, "train").score is not None


def test_examples_with_nothing_to_find(tmp_path: Path) -> None:
    """Of a few training examples a score may be nobody's; of test examples it may not."""
    data = made((16, 16), train=4, test=2, patch=16)
    empty = [each._replace(mask=torch.zeros_like(each.mask)) for each in data.train]
    task = Segment(CONFIG, replace(data, train=empty))
    assert task.evaluate(task.build(), "train").score is None
    none = replace(data, test=[data.test[0]._replace(mask=torch.zeros_like(data.test[0].mask)), data.test[1]])
    assert len(none.first(None, 2).test) == 2
    with pytest.raises(AnybatchError, match=r"the first 1 test examples of '.*' hold background alone: give more"):
        none.first(None, 1)


def test_a_run_that_diverges_after_an_epoch_has_its_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([1.0, 1.0])
    whole = Segment.loss
    monkeypatch.setattr(Segment, "loss", lambda self, *given: whole(self, *given) * next(losses, math.nan))
    result = train_run(Segment(CONFIG, PICTURES))
    assert (result.status, len(result.curve), result.accuracy, result.more) == ("diverged", 1, None, {})
    page = write_run_report(tmp_path, result, {}, "", "anybatch segment").read_text()
    assert "It diverged" in page


def test_dice_is_monais() -> None:
    from monai.metrics import DiceMetric

    predicted, masks = torch.randint(4, (2, 3, 6, 5, 7))
    masks[1][masks[1] == 3] = 0
    metric = DiceMetric(include_background=False, reduction="none", num_classes=4)
    theirs = metric(predicted.unsqueeze(1), masks.unsqueeze(1))
    ours = dice(torch.stack([counts(p, m, 4) for p, m in zip(predicted, masks, strict=True)]))
    assert int(theirs.isnan().sum()) == 1
    torch.testing.assert_close(ours.float(), theirs, equal_nan=True)


def test_scores_of_a_class_that_is_nowhere() -> None:
    mask = torch.tensor([[0, 1], [1, 255]])
    counted = counts(torch.tensor([[0, 1], [0, 2]]), mask, 4)
    assert counted.tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0] * 4, [0] * 4]
    assert dice(counted)[0] == pytest.approx(2 / 3)
    assert iou(counted)[0] == pytest.approx(1 / 2)
    assert dice(counted)[1:].isnan().all()
    assert iou(counted)[1:].isnan().all()


@pytest.mark.parametrize("shape", [(5, 7), (3, 5, 4)])
def test_loss_is_monais_without_ignored_pixels(shape: tuple[int, ...]) -> None:
    from monai.losses import DiceCELoss

    logits, masks = torch.randn(3, 4, *shape, dtype=torch.float64), torch.randint(4, (3, *shape))
    expected = DiceCELoss(to_onehot_y=True, softmax=True)(logits, masks.unsqueeze(1))
    torch.testing.assert_close(dice_ce(logits, masks), expected)
    cut_masks = masks.clone()
    cut_masks[:, -1] = IGNORE  # as if that part were not there
    rest = DiceCELoss(to_onehot_y=True, softmax=True)(logits[:, :, :-1], masks[:, None, :-1])
    torch.testing.assert_close(dice_ce(logits, cut_masks), rest)
    assert dice_ce(logits, torch.full_like(masks, IGNORE)).isfinite()


def test_large_examples_are_predicted_by_windows() -> None:
    """A network of 1x1 convolutions answers the same, however the image is cut up."""
    data = made((37, 29), patch=16)
    task = Segment(CONFIG, data)
    model = nn.Conv2d(1, 3, 1)
    each = data.test[0]
    expected = model(each.normalise(each.image).unsqueeze(0))[0]
    torch.testing.assert_close(task.predict(model, each), expected.detach(), rtol=1e-4, atol=1e-5)


# From the data to the pictures


@pytest.mark.parametrize("kind", ["images", "volumes"])
def test_a_folder_trains_and_shows(tmp_path: Path, kind: str) -> None:
    root = image_folder(tmp_path / "data") if kind == "images" else volume_folder(tmp_path / "data")
    config = replace(CONFIG, data=str(root), patch=16, epochs=1, method="cbn", batch=1)
    task = open_task(config)
    assert isinstance(task, Segment)
    model = task.build()
    result = train_run(task, finish=lambda trained: model.load_state_dict(trained.state_dict()))
    assert result.accuracy is not None
    shown = task.show(model, tmp_path / "pictures")
    assert len(shown) == 1
    for name in shown.values():
        with Image.open(tmp_path / "pictures" / name) as picture:
            assert picture.format == "PNG"
            values = np.asarray(picture.convert("RGB")).reshape(-1, 3)
        assert len(np.unique(values, axis=0)) > 50
    task.other(replace(config, seed=1)).build()


def test_default_task() -> None:
    task = open_segment(SegmentConfig())
    assert task.config.measure == "mean Dice"
    assert task.patch == 24
    assert task.norm().startswith("CBN(")
    images, masks = task.batch(torch.tensor([0, 5]), 0)
    assert images.shape == (2, 1, 24, 24, 24)
    assert torch.equal(masks[1], generated("volumes").train[5].mask.long())
    some = open_segment(SegmentConfig(train_examples=16, test_examples=4))
    assert (some.train_count, len(some.examples.test)) == (16, 4)
    assert some.fingerprint != task.fingerprint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"network": "vnet"}, "there is no network 'vnet': choose one of unet, basic-unet, segresnet"),
        ({"patch": 12}, "patch is 12: unet halves it until 8 pixels are one: give a multiple of 8"),
        ({"patch": 0}, "patch is 0"),
        ({"width": 0}, "width is 0: give at least 1"),
        ({"image_size": 4}, "image_size is 4: give at least 8"),
        ({"train_examples": 0}, "train_examples is 0: give at least 1"),
        ({"spacing": 0.0}, "spacing is 0.0: give millimetres"),
        ({"intensity": "mine"}, "there is no intensity 'mine': choose example or data"),
        ({"batch": 3}, "batch 3 does not divide the gradient batch 8: choose one of 1, 2, 4, 8"),
    ],
)
def test_configurations_that_do_not_fit(change: dict[str, object], message: str) -> None:
    with pytest.raises(AnybatchError, match=re.escape(message)):
        replace(SegmentConfig(), **change)


def test_what_does_not_fit_the_data(tmp_path: Path) -> None:
    with pytest.raises(AnybatchError, match="basic-unet needs patches of a multiple of 16, 'volumes' has 24: give"):
        open_segment(SegmentConfig(network="basic-unet"))
    with pytest.raises(AnybatchError, match="3 training examples do not fill one gradient batch of 8"):
        train_run(Segment(replace(CONFIG, gradient_batch=8), made((8, 8, 8), train=3)))


def test_missing_monai_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    for name in ("monai", "monai.networks", "monai.networks.nets"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(AnybatchError, match=re.escape("pip install 'anybatch[segment]'")):
        Segment(CONFIG, VOLUMES).build()


def test_the_command_trains_and_goes_on(tmp_path: Path) -> None:
    from anybatch.cli import app
    from anybatch.cli import segment as segment

    root = image_folder(tmp_path / "data")
    options = ["--data", str(root), "--patch", "16", "--width", "4", "--epochs", "1", "--gradient-batch", "4"]
    command = ["segment", *options, "--method", "gn(groups=2)", "--out", str(tmp_path / "run")]
    ran = CliRunner().invoke(app, command)
    assert ran.exit_code == 0, ran.output
    assert "% mean Dice" in ran.output
    assert "Dice of class 1" in ran.output
    page = (tmp_path / "run" / "report.html").read_text()
    assert "what the trained network makes of them" in page
    assert "mean Dice" in page
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 2
    assert "holds a checkpoint" in again.output
    assert CliRunner().invoke(app, [*command, "--resume"]).exit_code == 0
    wrong = CliRunner().invoke(app, ["segment", "--data", str(tmp_path / "none"), "--out", str(tmp_path / "other")])
    assert wrong.exit_code == 2
    assert "none has no folder images" in wrong.output
