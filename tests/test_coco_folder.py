"""Where a COCO-format folder keeps its parts, and its images as tensors."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from anybatch.errors import AnybatchError
from anybatch.lab.detection.coco import ImageEntry, find, load_image, read

from .coco_files import sound, write


@pytest.mark.parametrize(
    ("files", "folders", "train", "val"),
    [
        (
            ["annotations/instances_train2017.json", "annotations/instances_val2017.json"],
            ["train2017", "val2017"],
            ("annotations/instances_train2017.json", "train2017"),
            ("annotations/instances_val2017.json", "val2017"),
        ),
        (
            ["annotations/instances_train.json", "annotations/instances_val.json"],
            ["train", "val"],
            ("annotations/instances_train.json", "train"),
            ("annotations/instances_val.json", "val"),
        ),
        (["train.json", "valid.json"], ["images"], ("train.json", "images"), ("valid.json", "images")),
        (
            ["train.json", "test.json", "val.json"],
            ["images/train", "images/val", "test"],
            ("train.json", "images/train"),
            ("val.json", "images/val"),
        ),
        (
            ["train/_annotations.coco.json", "valid/_annotations.coco.json", "test/_annotations.coco.json"],
            [],
            ("train/_annotations.coco.json", "train"),
            ("valid/_annotations.coco.json", "valid"),
        ),
        (
            ["train/_annotations.coco.json", "test/_annotations.coco.json"],
            [],
            ("train/_annotations.coco.json", "train"),
            ("test/_annotations.coco.json", "test"),
        ),
    ],
)
def test_layouts(
    tmp_path: Path, files: list[str], folders: list[str], train: tuple[str, str], val: tuple[str, str]
) -> None:
    for name in folders:
        (tmp_path / name).mkdir(parents=True)
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert find(tmp_path) == tuple((tmp_path / file, tmp_path / images) for file, images in (train, val))


def test_layout_that_does_not_serve(tmp_path: Path) -> None:
    with pytest.raises(AnybatchError, match=r"there is no folder .*gone: give one with COCO-format annotations"):
        find(tmp_path / "gone")
    with pytest.raises(AnybatchError) as raised:
        find(tmp_path)
    assert str(raised.value) == (
        f"{tmp_path} has no annotations to train on: looked for annotations/instances_train2017.json, "
        "annotations/instances_train.json, annotations/train.json, instances_train.json, train.json, "
        "train/_annotations.coco.json"
    )
    (tmp_path / "train.json").write_text("{}")
    with pytest.raises(AnybatchError, match=r"train\.json has no folder .*: put them into one of train, im"):
        find(tmp_path)
    (tmp_path / "images").mkdir()
    with pytest.raises(AnybatchError, match=r"no annotations to evaluate on: looked for .*val2017.*, valid\.j"):
        find(tmp_path)


GREY = np.arange(15, dtype=np.uint8).reshape(3, 5) * 17
COLOUR = np.stack([GREY, 255 - GREY, GREY // 2], -1)


def palette() -> Image.Image:
    image = Image.fromarray(GREY // 17).convert("L")
    image.putpalette([value for index in range(16) for value in (index, 2 * index, 255 - index)])
    return image


def with_alpha(mode: str) -> Image.Image:
    image = Image.fromarray(COLOUR).convert(mode)
    image.putalpha(Image.fromarray(255 - GREY))
    return image


def thrice(grey: np.ndarray) -> np.ndarray:
    return np.stack([grey] * 3)


LUMA = np.array(Image.fromarray(COLOUR).convert("L"))
INDEXED = np.stack([GREY // 17, GREY // 17 * 2, 255 - GREY // 17])


@pytest.mark.parametrize(
    ("make", "suffix", "options", "wanted"),
    [
        (lambda: Image.fromarray(COLOUR), "png", {}, COLOUR.transpose(2, 0, 1) / 255),
        (lambda: Image.fromarray(COLOUR), "bmp", {}, COLOUR.transpose(2, 0, 1) / 255),
        (lambda: Image.fromarray(GREY), "png", {}, thrice(GREY) / 255),
        (lambda: with_alpha("RGB"), "png", {}, COLOUR.transpose(2, 0, 1) / 255),
        (lambda: with_alpha("L"), "png", {}, thrice(LUMA) / 255),
        (palette, "png", {}, INDEXED / 255),
        (palette, "png", {"transparency": bytes(range(16))}, INDEXED / 255),
        (palette, "gif", {"transparency": 3}, INDEXED / 255),
        (lambda: Image.fromarray(GREY > 90), "png", {}, thrice(GREY > 90)),
        (lambda: Image.fromarray(GREY.astype(np.uint16) * 257 + 3), "png", {}, thrice(GREY * 257.0 + 3) / 65535),
        (lambda: Image.fromarray(GREY.astype(np.uint16) * 257 + 3), "tiff", {}, thrice(GREY * 257.0 + 3) / 65535),
        (lambda: Image.fromarray(GREY.astype(np.int32) * 257), "tiff", {}, thrice(GREY * 257.0) / 65535),
        (lambda: Image.fromarray(COLOUR).convert("CMYK"), "tiff", {}, COLOUR.transpose(2, 0, 1) / 255),
    ],
)
def test_every_mode_becomes_three_channels(
    tmp_path: Path, make: Callable[[], Image.Image], suffix: str, options: dict[str, object], wanted: np.ndarray
) -> None:
    path = tmp_path / f"a.{suffix}"
    make().save(path, **options)
    pixels = load_image(ImageEntry(1, path, 5, 3))
    assert (pixels.shape, pixels.dtype) == ((3, 3, 5), torch.float32)
    assert pixels.is_contiguous()
    np.testing.assert_allclose(pixels.numpy(), wanted, atol=1e-6)


def test_pixels_of_no_known_range(tmp_path: Path) -> None:
    for array in (GREY.astype(np.float32), GREY.astype(np.int32) - 3, GREY.astype(np.int32) * 70000):
        Image.fromarray(array).save(tmp_path / "a.tiff")
        with pytest.raises(AnybatchError, match=r"image .*a\.tiff cannot be read \(its . pixels are neither of 8 nor"):
            load_image(ImageEntry(1, tmp_path / "a.tiff", 5, 3))


def turned(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (33, 17, 3), dtype=np.uint8)).save(path, exif=exif)


def test_exif_orientation_is_left_to_displays(tmp_path: Path) -> None:
    document = sound()
    document["images"][0]["file_name"] = "turned.jpg"
    turned(write(tmp_path, document)[1] / "turned.jpg")
    with pytest.raises(AnybatchError, match="is 17 x 33 pixels, recorded is 33 x 17; its EXIF entry turns it for disp"):
        read(tmp_path / "instances.json", tmp_path / "images")
    document["images"][0].update(width=17, height=33)
    document["annotations"][1]["bbox"] = [1, 2, 16, 31]
    (tmp_path / "instances.json").write_text(json.dumps(document))
    data = read(tmp_path / "instances.json", tmp_path / "images")
    assert load_image(data.images[0]).shape == (3, 33, 17)


def test_image_that_changed_after_reading(tmp_path: Path) -> None:
    data = read(*write(tmp_path, sound()))
    file = data.images[0].file
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(AnybatchError, match=r"image .*7\.png cannot be read .*: mend or remove it"):
        load_image(data.images[0])
    Image.new("RGB", (4, 6)).save(file)
    with pytest.raises(AnybatchError, match=r"7\.png is 4 x 6 pixels, and was 33 x 17 when its annotations were read"):
        load_image(data.images[0])
    file.unlink()
    with pytest.raises(AnybatchError, match=r"image .*7\.png cannot be read \(.*No such file"):
        load_image(data.images[0])


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0"])
def test_file_that_is_no_image(tmp_path: Path, content: bytes) -> None:
    path, images = write(tmp_path, sound())
    (images / "3.png").write_bytes(content)
    with pytest.raises(AnybatchError, match=r"image 3 .*3\.png cannot be read.*1 x unreadable image"):
        read(path, images)
    assert read(path, images, drop_invalid=True).dropped["unreadable image"] == 1
