"""Detectors with norms by part, on scenes of real garments."""

from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock
from urllib.error import URLError

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import anybatch as ab
from anybatch.errors import AnybatchError
from anybatch.lab.detection import scoring
from anybatch.lab.detection.config import DetectConfig
from anybatch.lab.detection.detectors import DETECTORS
from anybatch.lab.detection.networks import NETWORKS, SmallBody
from anybatch.lab.detection.scenes import SceneConfig, write_scenes
from anybatch.lab.detection.task import Detect, _mirrored, open_detect
from anybatch.lab.detection.weights import body_weights, freeze_norms_
from anybatch.lab.tasks import config_of
from anybatch.lab.training import Stopped, run_key, train_run
from anybatch.layers.base import NormLayer

SCENES = SceneConfig(train=16, val=5, size=65, objects=(1, 3), scale=(0.6, 1.1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("detect") / "scenes", SCENES)


@pytest.fixture(scope="module")
def config(folder: Path) -> DetectConfig:
    return DetectConfig(
        data=str(folder), image_size=65, weights="none", backbone="method", gradient_batch=4, batch=2, epochs=1
    )


@pytest.fixture(scope="module")
def task(config: DetectConfig) -> Detect:
    return open_detect(config)


def norms(model: nn.Module) -> dict[str, str]:
    kinds = (nn.BatchNorm2d, nn.GroupNorm, NormLayer)
    return {
        name: type(module).__name__
        for name, module in model.named_modules()
        if isinstance(module, kinds) or type(module).__name__ == "FrozenBatchNorm2d"
    }


def part(name: str) -> str:
    return "neck" if ".fpn." in name else "backbone" if name.startswith("backbone") else "heads"


@pytest.mark.parametrize("detector", DETECTORS)
@pytest.mark.parametrize("method", ["bn", "cbn", "gn(groups=4)", "iebn"])
def test_every_detector_trains_with_every_kind_of_method(task: Detect, detector: str, method: str) -> None:
    chosen = task.other(replace(task.config, detector=detector, method=method))
    model = chosen.build()
    there = norms(model)
    assert {part(name) for name in there} == {"backbone", "neck", "heads"}
    kinds = set(there.values()) - ({"BatchNorm2d"} if method == "iebn" else set())  # which leaves shortcuts alone
    assert len(kinds) == 1
    assert (kinds == {"BatchNorm2d"}) is (method == "bn")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for step in range(2):
        loss = chosen.loss(model, chosen.batch(torch.arange(2) + step, 0))
        optimizer.zero_grad()
        loss.backward()
        assert bool(loss.isfinite())
        assert all(bool(p.grad.isfinite().all()) for p in model.parameters())
        optimizer.step()
    found = chosen.detect(model, [torch.rand(3, 65, 65)])
    assert set(found[0]) == {"boxes", "labels", "scores"} | ({"masks"} if detector == "mask-rcnn" else set())


def test_norms_that_would_be_none_are_refused(task: Detect) -> None:
    with pytest.raises(AnybatchError, match="frozen norms of an untrained backbone"):
        replace(task.config, method="frozen")
    with pytest.raises(AnybatchError, match="neck 'frozen' would normalise nothing"):
        replace(task.config, neck="frozen")
    with pytest.raises(AnybatchError, match="backbone 'none': its convolutions are nothing without their norms"):
        replace(task.config, backbone="none")


def test_mask_heads_are_paired_however_many_classes(task: Detect) -> None:
    """Of 200 classes an untrained detector is sure of none, and would not run its mask head in evaluation."""
    many = replace(task.train, categories=tuple(map(str, range(200))), category_ids=tuple(range(1, 201)))
    config = replace(task.config, detector="mask-rcnn", method="cbn")
    chosen = Detect(config, many, many, ({}, ""))
    model = chosen.build()
    assert model.training
    paired = [line for line in chosen.conversion.splitlines() if line.startswith("roi_heads.mask_head")]
    assert len(paired) == 2
    assert all("fed by" not in line and "no values" not in line for line in paired)
    assert "without compensation" not in chosen.conversion


def test_crowds_alone_measure_nothing(task: Detect) -> None:
    crowds = tuple(replace(each, crowd=torch.ones_like(each.crowd)) for each in task.test.instances)
    with pytest.raises(AnybatchError, match="has crowds alone, which are not measured"):
        Detect(task.config, task.train, replace(task.test, instances=crowds), ({}, ""))


def test_frozen_backbone_and_mixed_parts(task: Detect, tmp_path: Path) -> None:
    body = SmallBody()
    with torch.no_grad():
        for name, value in body.named_buffers():
            value.copy_(torch.rand_like(value.float()) + 0.5 if "running" in name else value)
    file = tmp_path / "body.pt"
    torch.save({f"backbone.body.{name}": value for name, value in body.state_dict().items()}, file)
    base = replace(task.config, weights=str(file), backbone="frozen", method="cbn", heads="gn(groups=4)")
    chosen = Detect(base, task.train, task.test, body_weights(base.weights, base.network))
    model = chosen.build()
    kinds = {part(name): kind for name, kind in norms(model).items()}
    assert kinds == {"backbone": "FrozenBatchNorm2d", "neck": "CrossIterationBatchNorm", "heads": "GroupNorm"}
    assert chosen.norm().startswith("backbone: 'frozen', neck: CBN(")
    x = torch.randn(2, 3, 33, 47)
    for wanted, got in zip(body.eval()(x).values(), model.backbone.body(x).values(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    before = {name: value.clone() for name, value in model.backbone.body.named_buffers()}
    chosen.loss(model, chosen.batch(torch.arange(2), 0)).backward()
    assert all(torch.equal(before[name], value) for name, value in model.backbone.body.named_buffers())
    assert chosen.fingerprint != task.fingerprint
    assert run_key(chosen) != run_key(task)
    frozen = chosen.other(replace(base, method="frozen", heads="method"))
    assert set(norms(frozen.build()).values()) == {"FrozenBatchNorm2d"}


def test_frozen_norms_are_evaluation() -> None:
    body = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, eps=1e-3)).double()
    body(torch.randn(4, 3, 9, 7, dtype=torch.float64))
    x = torch.randn(2, 3, 9, 7, dtype=torch.float64)
    wanted = body.eval()(x)
    freeze_norms_(body)
    torch.testing.assert_close(body.double().train()(x).float(), wanted.float(), rtol=1e-6, atol=1e-6)
    assert len(list(body.parameters())) == 2


def test_large_networks_are_the_papers() -> None:
    """Four convolutions and a layer of 1024 in the box head, as in the paper; names that ImageNet's weights fit."""
    from torchvision.models import resnet18

    body = NETWORKS["resnet18"].build()
    weights = {name: value for name, value in resnet18().state_dict().items() if not name.startswith("fc.")}
    assert set(body.state_dict()) == set(weights)
    model = DETECTORS["faster-rcnn"](NETWORKS["resnet18"], body, 5, nn.BatchNorm2d, nn.BatchNorm2d, {"min_size": 64})
    head = model.roi_heads.box_head
    assert [type(m).__name__ for m in head.modules()].count("Conv2d") == 4
    first = ("conv1.", "bn1.", "layer1.")
    assert {name for name in weights if name.startswith(NETWORKS["resnet18"].fixed)} == {
        name for name in weights if name.startswith(first)
    }
    assert next(m for m in head.modules() if isinstance(m, nn.Linear)).out_features == 1024
    dense = DETECTORS["fcos"](NETWORKS["resnet18"], body, 5, None, None, {"min_size": 64})
    assert not [m for m in dense.head.modules() if isinstance(m, nn.GroupNorm)]  # none means none


def test_weights_that_cannot_be_used(task: Detect, tmp_path: Path) -> None:
    with pytest.raises(AnybatchError, match=r"there is no file .*nothing\.pt"):
        body_weights(str(tmp_path / "nothing.pt"), "small-resnet")
    (tmp_path / "bad.pt").write_bytes(b"no weights")
    with pytest.raises(AnybatchError, match=r"bad\.pt cannot be read"):
        body_weights(str(tmp_path / "bad.pt"), "small-resnet")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(AnybatchError, match="hold no state_dict"):
        body_weights(str(tmp_path / "list.pt"), "small-resnet")
    with pytest.raises(AnybatchError, match="'garments' are for small-resnet, not resnet50"):
        body_weights("garments", "resnet50")
    with pytest.raises(AnybatchError, match="no weights 'imagenet' for small-resnet"):
        body_weights("imagenet", "small-resnet")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torchvision.models._api.load_state_dict_from_url", Mock(side_effect=URLError("no route")))
        with pytest.raises(
            AnybatchError, match=r"'imagenet' of resnet18 cannot be downloaded \(.*no route.*\): go online"
        ):
            body_weights("imagenet", "resnet18")
    torch.save({"conv1.weight": torch.ones(3)}, tmp_path / "other.pt")
    config = replace(task.config, weights=str(tmp_path / "other.pt"))
    with pytest.raises(AnybatchError, match=r"other\.pt' do not fit small-resnet: "):
        Detect(config, task.train, task.test, body_weights(config.weights, config.network)).build()


def test_bad_options_are_named() -> None:
    with pytest.raises(AnybatchError, match="there is no detector 'yolo': choose one of faster-rcnn, mask-rcnn"):
        DetectConfig(detector="yolo")
    with pytest.raises(AnybatchError, match="there is no network 'vgg'"):
        DetectConfig(network="vgg")
    with pytest.raises(AnybatchError, match="image_size is 8"):
        DetectConfig(image_size=8)
    with pytest.raises(AnybatchError, match="there is no folder /nowhere"):
        open_detect(DetectConfig(data="/nowhere", weights="none", backbone="method"))


def test_a_record_is_read_back(config: DetectConfig) -> None:
    assert config_of(config.record()) == config
    assert config.record()["task"] == "detect"


def test_images_without_objects_are_not_trained_on(task: Detect) -> None:
    empty = replace(
        task.train.instances[0],
        boxes=torch.zeros(0, 4),
        labels=torch.zeros(0, dtype=torch.int64),
        areas=torch.zeros(0),
        crowd=torch.zeros(0, dtype=torch.bool),
        segmentations=(),
    )
    train = replace(task.train, instances=(empty, *task.train.instances[1:]))
    fewer = Detect(task.config, train, task.test, ({}, ""))
    assert fewer.train_count == task.train_count - 1
    torch.testing.assert_close(fewer.batch(torch.tensor([0]), 0)[1][0]["labels"], train.instances[1].labels)


def test_mirrored_boxes_are_tight_around_mirrored_masks() -> None:
    mask = torch.zeros(1, 20, 31, dtype=torch.uint8)
    mask[0, 4:9, 3:13] = 1
    target = {"boxes": torch.tensor([[3.0, 4.0, 13.0, 9.0]]), "labels": torch.tensor([1]), "masks": mask}
    image, turned = _mirrored(mask.float().expand(3, -1, -1), target)
    rows, columns = turned["masks"][0].nonzero().unbind(1)
    box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    assert turned["boxes"][0].tolist() == [float(side) for side in box]
    assert torch.equal(image[0] > 0, turned["masks"][0] > 0)


def test_mirroring_depends_on_place_and_time_alone(task: Detect) -> None:
    indices = torch.arange(8)
    first, again, later = (task.batch(indices, seen)[0] for seen in (0, 0, 16))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    changed = [not torch.equal(a, b) for a, b in zip(first, later, strict=True)]
    assert any(changed)
    assert not all(changed)


def perfect(task: Detect) -> list[dict[str, Tensor]]:
    return [
        {"boxes": objects.boxes, "labels": objects.labels, "scores": torch.linspace(0.9, 0.6, len(objects))}
        for objects in task.test.instances
    ]


def listed(task: Detect, outputs: list[dict[str, Tensor]]) -> list[scoring.Detection]:
    return [
        found
        for entry, output in zip(task.test.images, outputs, strict=True)
        for found in scoring.detection(entry.id, output, task.test.category_ids)
    ]


def test_the_truth_itself_scores_100(task: Detect) -> None:
    outputs = perfect(task)
    for output, objects, entry in zip(outputs, task.test.instances, task.test.images, strict=True):
        output["masks"] = objects.masks(entry.height, entry.width)[:, None].float()
    measures = scoring.score(task.test, listed(task, outputs), masks=True)
    assert measures["AP"] == measures["AP50"] == measures["mask AP"] == measures["mask AP75"] == 100.0


def test_masks_are_small_or_large_by_their_own_area(task: Detect) -> None:
    """What is found beside the truth in the right class: a mask of 100 pixels in a box of 1,600, a small mask."""
    (entry, objects), *_ = zip(task.test.images, task.test.instances, strict=True)
    masks = torch.cat([objects.masks(entry.height, entry.width), torch.zeros(1, entry.height, entry.width)])
    masks[-1, :5, :20] = 1
    output = {
        "boxes": torch.cat([objects.boxes, torch.tensor([[0.0, 0.0, 40.0, 40.0]])]),
        "labels": torch.cat([objects.labels, objects.labels[:1]]),
        "scores": torch.cat([torch.full((len(objects),), 0.5), torch.ones(1)]),
        "masks": masks[:, None].float(),
    }
    one = replace(task.test, images=(entry,), instances=(objects,))
    found = scoring.detection(entry.id, output, task.test.category_ids)
    measures = scoring.score(one, found, masks=True)
    assert measures["AP small"] == 100.0  # the wrong box is of medium size, and not counted there
    assert measures["mask AP small"] < 100.0


def test_nothing_found_is_0(task: Detect) -> None:
    assert scoring.score(task.test, [], masks=True) == {
        "AP": 0.0, "AP50": 0.0, "AP75": 0.0, "mask AP": 0.0, "mask AP50": 0.0, "mask AP75": 0.0,
    }  # fmt: skip


def average_precision(task: Detect, outputs: list[dict[str, Tensor]], threshold: float) -> float:
    """Written out: per class, precision made monotone, at 101 recalls; the mean over classes that occur."""
    results = []
    for label in sorted({int(v) for objects in task.test.instances for v in objects.labels}):
        hits: list[tuple[float, bool]] = []
        for output, objects in zip(outputs, task.test.instances, strict=True):
            boxes = [b.tolist() for b, v in zip(objects.boxes, objects.labels, strict=True) if int(v) == label]
            taken = [False] * len(boxes)
            mine = [k for k, v in enumerate(output["labels"].tolist()) if v == label]
            for k in sorted(mine, key=lambda k: -float(output["scores"][k])):
                x1, y1, x2, y2 = output["boxes"][k].tolist()
                best, at = threshold, -1
                for place, (a1, b1, a2, b2) in enumerate(boxes):
                    common = max(0.0, min(x2, a2) - max(x1, a1)) * max(0.0, min(y2, b2) - max(y1, b1))
                    overlap = common / ((x2 - x1) * (y2 - y1) + (a2 - a1) * (b2 - b1) - common)
                    if not taken[place] and overlap >= best:
                        best, at = overlap, place
                if at >= 0:
                    taken[at] = True
                hits.append((float(output["scores"][k]), at >= 0))
        count = sum(int((objects.labels == label).sum()) for objects in task.test.instances)
        right = np.array([hit for _, hit in sorted(hits, key=lambda h: -h[0])], dtype=float)
        cumulated = np.cumsum(right)
        recall, precision = cumulated / count, cumulated / np.arange(1, len(right) + 1)
        precision = np.maximum.accumulate(precision[::-1])[::-1]
        places = np.searchsorted(recall, np.linspace(0, 1, 101), side="left")
        results.append(np.mean([precision[p] if p < len(precision) else 0.0 for p in places]))
    return 100 * float(np.mean(results))


def test_scores_are_those_written_out(task: Detect) -> None:
    torch.manual_seed(5)
    outputs = []
    for output in perfect(task):
        boxes = torch.cat([output["boxes"] + 3 * torch.randn_like(output["boxes"]), output["boxes"] + 20])
        boxes[:, 2:] = torch.maximum(boxes[:, 2:], boxes[:, :2] + 2)
        labels = torch.cat([output["labels"], output["labels"]])
        outputs.append({"boxes": boxes, "labels": labels, "scores": torch.rand(len(boxes))})
    measures = scoring.score(task.test, listed(task, outputs), masks=False)
    for name, threshold in (("AP50", 0.5), ("AP75", 0.75)):
        assert measures[name] == pytest.approx(average_precision(task, outputs, threshold), abs=1e-3)
    assert 0 < measures["AP75"] < measures["AP50"] < 100


@pytest.mark.parametrize("detector", ["faster-rcnn", "fcos"])
def test_stopped_and_resumed_is_never_stopped(task: Detect, tmp_path: Path, detector: str) -> None:
    """The sampling of proposals draws random numbers: they go on too."""
    chosen = task.other(replace(task.config, detector=detector, method="cbn(window=3)", batch=1))
    train_run(chosen, checkpoint=tmp_path / "whole")
    asked = iter([False, True])
    with pytest.raises(Stopped):
        train_run(chosen, checkpoint=tmp_path / "parts", stop=lambda: next(asked))
    train_run(chosen, checkpoint=tmp_path / "parts", resume=True)
    ends = [torch.load(tmp_path / name / "training.pt", weights_only=True) for name in ("whole", "parts")]
    assert all(torch.equal(ends[0]["model"][name], ends[1]["model"][name]) for name in ends[0]["model"])
    histories = [end["processes"][0]["history"] for end in ends]
    torch.testing.assert_close(histories[0], histories[1], rtol=0, atol=0)


def test_pictures_show_the_test_images(task: Detect, tmp_path: Path) -> None:
    shown = task.show(task.build(), tmp_path)
    assert list(shown.values()) == ["detections.png"]
    assert (tmp_path / "detections.png").read_bytes().startswith(b"\x89PNG")


def test_generated_batches_have_the_real_shape(task: Detect) -> None:
    for detector in ("faster-rcnn", "mask-rcnn"):
        chosen = task.other(replace(task.config, detector=detector))
        images, targets = chosen.generated(2)
        assert [image.shape for image in images] == [(3, 65, 108)] * 2
        assert bool(chosen.loss(chosen.build(), (images, targets)).isfinite())
        for target in targets:
            assert bool((target["boxes"][:, 2:] > target["boxes"][:, :2]).all())


def test_folds_where_the_method_does(task: Detect) -> None:
    chosen = task.other(replace(task.config, method="cbn", detector="retinanet"))
    model = chosen.build()
    chosen.loss(model, chosen.batch(torch.arange(4), 0)).backward()
    images = [torch.rand(3, 65, 71)]
    before = chosen.detect(model, images)[0]
    folded = ab.fold(model.eval(), example_inputs=(images,))
    assert not norms(folded)
    for name, value in chosen.detect(folded, images)[0].items():
        torch.testing.assert_close(value, before[name], rtol=1e-3, atol=1e-3)
