"""Classification from files: what is listed, what is drawn of an image, and that a run does not depend on when."""

import math
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from anybatch.errors import AnybatchError
from anybatch.lab.streaming import task as streaming
from anybatch.lab.streaming.config import StreamConfig
from anybatch.lab.streaming.listing import list_folder
from anybatch.lab.streaming.pixels import middle_pixels, random_part, training_pixels
from anybatch.lab.streaming.task import Stream, open_stream
from anybatch.lab.tasks import config_of, open_task
from anybatch.lab.trained import open_trained
from anybatch.lab.training import Progress, train_run

SIZES = ((40, 30), (31, 47), (64, 8), (20, 20), (9, 50))  # width, height


def write(root: Path, classes: int = 3, train: int = 8, val: int = 3) -> Path:
    """Images of odd sizes and kinds; a class is a colour."""
    random = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for place in range(classes):
            folder = root / split / f"n{place:02}"
            folder.mkdir(parents=True)
            for index in range(count):
                width, height = SIZES[index % len(SIZES)]
                pixels = random.integers(0, 60, (height, width, 3), dtype=np.uint8)
                pixels[..., place % 3] += 60 * (place % 3 + 1)
                image = Image.fromarray(pixels)
                if index == 1:
                    image.convert("L").save(folder / f"{index}.PNG", "PNG")
                elif index == 2:
                    image.convert("CMYK").save(folder / f"{index}.jpeg")
                else:
                    image.save(folder / f"{index}.jpg")
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("streaming") / "images")


@pytest.fixture(scope="module")
def config(folder: Path) -> StreamConfig:
    return StreamConfig(
        data=str(folder),
        network="shufflenet_v2_x0_5",
        image_size=24,
        batch=4,
        gradient_batch=8,
        epochs=2,
        lr=0.5,
        method="cbn",
    )


@pytest.fixture(scope="module")
def task(config: StreamConfig) -> Stream:
    return open_stream(config)


def test_listing_is_sorted_and_labelled(folder: Path) -> None:
    listing = list_folder(str(folder))
    assert listing.classes == ("n00", "n01", "n02")
    assert listing.train.names[:3] == ("n00/0.jpg", "n00/1.PNG", "n00/2.jpeg")
    assert listing.train.labels == (0,) * 8 + (1,) * 8 + (2,) * 8
    assert (len(listing.train), len(listing.val), listing.others) == (24, 9, 0)
    assert listing.val.path(3) == folder / "val" / "n01" / "0.jpg"


def test_fingerprint_is_of_names_and_sizes(tmp_path: Path) -> None:
    one, two = write(tmp_path / "one"), write(tmp_path / "two")
    before = list_folder(str(one)).fingerprint
    assert list_folder(str(two)).fingerprint == before
    (two / "train" / "n00" / "0.jpg").rename(two / "train" / "n00" / "00.jpg")
    with (one / "val" / "n02" / "0.jpg").open("ab") as file:
        file.write(b"x")
    assert len({before, list_folder(str(one)).fingerprint, list_folder(str(two)).fingerprint}) == 3


def test_files_that_are_no_images_are_counted(tmp_path: Path, config: StreamConfig) -> None:
    root = write(tmp_path / "images")
    (root / "train" / "n00" / "list.txt").write_text("")
    (root / "train" / "n00" / ".hidden").write_text("")
    (root / "val" / "readme.md").write_text("")
    task = open_stream(replace(config, data=str(root)))
    assert task.notes == (f"{root}: 1 files in class folders are no images, by their names",)


def remove_val(root: Path) -> None:
    (root / "val").rename(root / "valid")


def empty_class(root: Path) -> None:
    for file in (root / "train" / "n01").iterdir():
        file.unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda root: (root / "train").rename(root / "training"),
            "there is no folder .*train: put images into FOLDER/",
        ),
        (remove_val, "there is no folder .*val: put images"),
        (
            lambda root: (root / "val" / "n02").rename(root / "val" / "n03"),
            "class 'n02' is in .*train and not in .*val",
        ),
        (lambda root: (root / "val" / "n03").mkdir(), "class 'n03' is in .*val and not in .*train: both need it"),
        (empty_class, "class folder .*n01 has no images .*add some, or remove it"),
        (
            lambda root: (root / "train" / "n01" / "lost.jpg").symlink_to(root / "nowhere"),
            "lost.jpg cannot be read .No",
        ),
    ],
)
def test_folders_that_do_not_serve(tmp_path: Path, spoil: Callable[[Path], object], message: str) -> None:
    root = write(tmp_path / "images")
    spoil(root)
    with pytest.raises(AnybatchError, match=message):
        list_folder(str(root))


def test_folders_that_are_not_there_or_one_class(tmp_path: Path) -> None:
    with pytest.raises(AnybatchError, match=r"there is no data folder .*nowhere: put images into FOLDER/train/CLASS"):
        list_folder(str(tmp_path / "nowhere"))
    with pytest.raises(AnybatchError, match="has 1 class folders: at least two are needed"):
        list_folder(str(write(tmp_path / "one", classes=1)))


def test_an_unreadable_image_is_named_when_it_is_met(tmp_path: Path, config: StreamConfig) -> None:
    root = write(tmp_path / "images")
    damaged = root / "train" / "n01" / "3.jpg"
    damaged.write_bytes(damaged.read_bytes()[:200])
    task = open_stream(replace(config, data=str(root)))
    with pytest.raises(AnybatchError, match=r"image .*n01.3\.jpg cannot be read .*put a whole one there"):
        train_run(task)
    damaged.write_bytes(b"no image")
    with pytest.raises(AnybatchError, match=r"3\.jpg cannot be read"):
        task.batches(torch.tensor([11, 0]), 1, 0)


@pytest.mark.parametrize("size", [(40, 30), (31, 47), (500, 375), (7, 5)])
def test_random_parts_are_of_the_size_and_shape_asked_for(size: tuple[int, int]) -> None:
    width, height = size
    shares, ratios = [], []
    for seed in range(300):
        left, top, right, bottom = random_part(width, height, Random(seed))
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        shares.append((right - left) * (bottom - top) / (width * height))
        ratios.append((right - left) / (bottom - top))
    if width > 100:  # whole pixels do not matter
        assert 0.079 < min(shares) < 0.12
        assert 0.9 < max(shares) <= 1
        assert 0.745 < min(ratios) < 0.8
        assert 1.25 < max(ratios) < 1.34
        assert sum(r < 1 for r in ratios) == pytest.approx(150, abs=45)  # evenly in the logarithm


def test_images_too_long_give_their_middle() -> None:
    for width, height in ((900, 10), (10, 900)):
        left, top, right, bottom = random_part(width, height, Random(0))
        assert (right - left, bottom - top) in {(13, 10), (10, 13)}
        assert (left + right, top + bottom) == pytest.approx((width, height), abs=1)


def test_half_of_the_parts_are_mirrored(tmp_path: Path) -> None:
    ramp = np.tile(np.arange(0, 250, 5, dtype=np.uint8), (50, 1))
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    rising = [
        bool(p[0, 0, -1] > p[0, 0, 0])
        for p in (training_pixels(tmp_path / "ramp.png", 8, Random(i)) for i in range(200))
    ]
    assert 70 < sum(rising) < 130


def test_a_part_is_the_image_there(tmp_path: Path) -> None:
    """Column and row are written into the pixels: what is read back is where the part lies."""
    pixels = np.zeros((60, 80, 3), dtype=np.uint8)
    pixels[..., 0], pixels[..., 1] = 3 * np.arange(80)[None], 4 * np.arange(60)[:, None]
    Image.fromarray(pixels).save(tmp_path / "map.png")
    for seed in range(20):
        left, top, right, bottom = random_part(80, 60, Random(seed))
        part = training_pixels(tmp_path / "map.png", 24, Random(seed)).float()
        across = part[0].amax() / 3 - part[0].amin() / 3
        assert part[0].mean() / 3 == pytest.approx((left + right - 1) / 2, abs=0.6)
        assert part[1].mean() / 4 == pytest.approx((top + bottom - 1) / 2, abs=0.6)
        assert across == pytest.approx((right - left) * 23 / 24, abs=2.5)


@pytest.mark.parametrize("size", [(400, 300), (260, 500)])
def test_the_middle_is_resized_and_cut(tmp_path: Path, size: tuple[int, int]) -> None:
    """As Pillow does it in two steps, with its own rounding."""
    width, height = size
    y, x = np.mgrid[:height, :width]
    smooth = np.stack([127 + 100 * np.sin(x / 60), 127 + 100 * np.cos(y / 70), 50 + (x + y) / 10], axis=-1)
    image = Image.fromarray(smooth.astype(np.uint8))
    image.save(tmp_path / "smooth.png")
    scale = 256 / min(size)
    scaled = image.resize((round(width * scale), round(height * scale)), Image.Resampling.BILINEAR)
    left, top = (scaled.width - 224) // 2, (scaled.height - 224) // 2
    expected = np.asarray(scaled.crop((left, top, left + 224, top + 224))).astype(int)
    found = middle_pixels(tmp_path / "smooth.png", 224).permute(1, 2, 0).numpy().astype(int)
    assert np.abs(found - expected).max() <= 3
    assert np.abs(found - expected).mean() < 0.6


def test_what_is_drawn_depends_on_seed_step_and_image_alone(task: Stream, config: StreamConfig) -> None:
    indices = torch.tensor([5, 0, 17, 9])
    first, labels = task.batch(indices, 16)
    assert labels.tolist() == [0, 0, 2, 1]
    assert first.dtype == torch.float32
    again = torch.cat([images for images, _ in task.batches(indices, 2, 16)])
    torch.testing.assert_close(again, first, rtol=0, atol=0)
    torch.testing.assert_close(task.batch(indices[2:], 16)[0], first[2:], rtol=0, atol=0)
    assert not torch.equal(task.batch(indices, 24)[0], first)
    assert not torch.equal(task.other(replace(config, seed=1)).batch(indices, 16)[0], first)


def test_each_image_is_decoded_once_and_ahead(task: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = [task.batch(torch.tensor([1, 2]), 8), task.batch(torch.tensor([3, 4]), 16)]
    decoded: list[tuple[str, bool]] = []

    def counted(path: Path, size: int, random: Random) -> Tensor:
        decoded.append((path.name, threading.current_thread() is threading.main_thread()))
        return training_pixels(path, size, random)

    monkeypatch.setattr(streaming, "training_pixels", counted)
    first = task.batches(torch.tensor([1, 2]), 1, 8)
    task.expect(torch.tensor([3, 4]), 16)
    second = task.batches(torch.tensor([3, 4]), 2, 16)
    assert len(decoded) == 4
    assert not any(on_main for _, on_main in decoded)
    torch.testing.assert_close(first[0], plain[0], rtol=0, atol=0)
    torch.testing.assert_close(torch.cat([x for x, _ in second]), plain[1][0], rtol=0, atol=0)
    task.expect(torch.tensor([3, 4]), 16)
    torch.testing.assert_close(task.batch(torch.tensor([1, 2]), 8), plain[0], rtol=0, atol=0)  # another step came


@pytest.mark.parametrize("method", ["cbn", "gn"])
def test_resume_is_bit_identical(config: StreamConfig, tmp_path: Path, method: str) -> None:
    config = replace(config, method=method)
    whole = train_run(open_task(config), checkpoint=tmp_path / "whole")

    def stop_in_the_second_epoch(progress: Progress) -> None:
        if progress.images == 32:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_run(open_task(config), stop_in_the_second_epoch, checkpoint=tmp_path / "parts", save_every=1)
    torch.manual_seed(999)
    parts = train_run(open_task(config), checkpoint=tmp_path / "parts", resume=True)
    assert (parts.loss, parts.curve, parts.more, parts.key) == (whole.loss, whole.curve, whole.more, whole.key)
    assert [list(p) for p in parts.train_loss] == [list(p) for p in whole.train_loss]
    files = [(tmp_path / run / "model.safetensors").read_bytes() for run in ("whole", "parts")]
    assert files[0] == files[1]
    opened, model = open_trained(tmp_path / "whole")
    assert opened.evaluate(model, "test") == (whole.accuracy, whole.loss, whole.more)
    assert opened.evaluate(model, "train").score is None


def test_it_learns(config: StreamConfig) -> None:
    config = replace(config, network="resnet18", image_size=16, method="gn", batch=8, epochs=4, lr=0.05)
    result = train_run(open_stream(config))
    assert result.accuracy is not None
    assert result.accuracy > 70  # a class is a colour, but for a grey image; a third is chance
    assert result.train_loss[-1][1] < 0.3 * result.train_loss[0][1]
    assert config_of(result.record()["config"]) == result.config
    assert result.train_accuracy is None


class Fixed(nn.Module):
    """Logits by the order of the calls."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits, self.place = logits, 0

    def forward(self, x: Tensor) -> Tensor:
        assert not self.training
        self.place += len(x)
        return self.logits[self.place - len(x) : self.place]


def test_scores_are_top_1_top_5_and_the_mean_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "EVALUATION_BATCH", 4)
    root = write(tmp_path / "images", classes=7, train=1, val=3)
    task = open_stream(StreamConfig(data=str(root), network="resnet18", image_size=8))
    logits, labels = torch.randn(21, 7), torch.arange(21) // 3
    scores = task.evaluate(Fixed(logits), "test")
    rank = (logits > logits.gather(1, labels[:, None])).sum(1)
    assert scores.score == pytest.approx(100 * float((rank == 0).float().mean()), abs=1e-3)
    assert scores.more == {"top-5 accuracy": pytest.approx(100 * float((rank < 5).float().mean()), abs=1e-3)}
    expected = -logits.double().log_softmax(1).gather(1, labels[:, None]).mean()
    assert scores.loss == pytest.approx(float(expected), abs=1e-4)
    assert task.evaluate(Fixed(torch.full((21, 7), math.nan)), "test").loss is None


def test_few_classes_have_no_top_5(task: Stream) -> None:
    assert task.evaluate(Fixed(torch.randn(9, 3)), "test").more == {}


def test_label_smoothing_is_in_the_loss(task: Stream, config: StreamConfig) -> None:
    logits, labels = torch.randn(4, 3), torch.tensor([0, 2, 1, 1])
    model = nn.Identity()
    smooth = task.other(replace(config, label_smoothing=0.3)).loss(model, (logits, labels))
    target = 0.7 * torch.eye(3)[labels] + 0.1
    torch.testing.assert_close(smooth, -(target * logits.log_softmax(1)).sum(1).mean())
    torch.testing.assert_close(task.loss(model, (logits, labels)), nn.functional.cross_entropy(logits, labels))


@pytest.mark.parametrize("network", ["googlenet", "mobilenet_v3_small"])
def test_networks_of_torchvision_have_one_output(config: StreamConfig, network: str) -> None:
    task = open_stream(replace(config, network=network, image_size=33, method="bn"))
    model = task.build()
    assert "left alone" in task.conversion
    assert bool(task.loss(model, task.generated(2)).isfinite())
    assert task.example().shape == (1, 3, 33, 33)


def test_networks_that_are_none(config: StreamConfig) -> None:
    with pytest.raises(AnybatchError, match=r"torchvision has no classifier 'resnet51': choose one .*resnet50"):
        open_stream(replace(config, network="resnet51"))
    with pytest.raises(AnybatchError, match="torchvision has no classifier 'fasterrcnn_resnet50_fpn'"):
        open_stream(replace(config, network="fasterrcnn_resnet50_fpn"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 7}, "image_size is 7: give at least 8"),
        ({"label_smoothing": 1.0}, "label_smoothing is 1.0: give a share from 0 to below 1"),
    ],
)
def test_configurations_that_do_not_fit(config: StreamConfig, change: dict[str, object], message: str) -> None:
    with pytest.raises(AnybatchError, match=message):
        replace(config, **change)
