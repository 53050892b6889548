"""Folders of images and volumes with masks: what is read, and what is said about what cannot be."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from anybatch.errors import AnybatchError
from anybatch.lab.segmentation import examples as storing
from anybatch.lab.segmentation.data import load
from anybatch.lab.segmentation.examples import IGNORE, Moments, example, pooled
from anybatch.lab.segmentation.generated import GENERATED, compose, generated
from anybatch.lab.segmentation.patches import cut, generator_for

from .segment_files import image_folder, pair, save_image, save_volume, volume_folder


def mask_of(values: list[int], shape: tuple[int, ...] = (19, 23)) -> np.ndarray:
    mask = np.zeros(shape, dtype=np.uint8)
    mask.flat[: len(values)] = values
    return mask


# Images


def test_image_folder_is_split_by_name(tmp_path: Path) -> None:
    data = load(str(image_folder(tmp_path)))
    assert (len(data.train), len(data.test), data.channels, data.dims, data.patch) == (8, 2, 3, 2, 128)
    assert data.classes == ("background", "class 1", "class 2")
    assert data.train[0].image.shape == (3, 19, 23)
    assert data.train[0].mask.shape == (19, 23)
    again = load(str(tmp_path))
    assert again.fingerprint == data.fingerprint
    assert all(torch.equal(a.image, b.image) for a, b in zip(again.test, data.test, strict=True))
    save_image(tmp_path / "masks" / "case3.png", mask_of([1, 2, 2]))
    assert load(str(tmp_path)).fingerprint != data.fingerprint


def test_images_are_normalised_by_all_or_by_their_own(tmp_path: Path) -> None:
    folder = str(image_folder(tmp_path))
    shared, own = load(folder), load(folder, intensity="example")
    pixels = torch.cat([each.normalise(each.image).flatten(1) for each in shared.train], dim=1)
    torch.testing.assert_close(pixels.mean(1), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(pixels.std(1, correction=0), torch.ones(3), atol=1e-5, rtol=0)
    assert all(each.moments == shared.train[0].moments for each in shared.test)
    values = own.test[0].normalise(own.test[0].image).flatten(1)
    torch.testing.assert_close(values.mean(1), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(values.std(1, correction=0), torch.ones(3), atol=1e-5, rtol=0)
    assert own.fingerprint != shared.fingerprint


def test_pooled_moments_far_from_zero() -> None:
    parts = [1e4 + torch.randn(2, size, dtype=torch.float64) for size in (3, 50, 7)]
    own = [Moments(p.mean(1).float(), p.std(1, correction=0).float(), p.shape[1]) for p in parts]
    whole = torch.cat(parts, dim=1)
    found = pooled(own)
    torch.testing.assert_close(found.mean.double(), whole.mean(1), rtol=1e-7, atol=0)
    torch.testing.assert_close(found.std.double(), whole.std(1, correction=0), rtol=1e-2, atol=0)
    assert found.pixels == 60


def test_a_constant_channel_is_zero() -> None:
    each = example(torch.full((1, 4, 4), 7, dtype=torch.uint8), torch.zeros(4, 4, dtype=torch.uint8))
    assert torch.equal(each.normalise(each.image), torch.zeros(1, 4, 4))


@pytest.mark.parametrize("test_name", ["test", "val"])
def test_image_folder_with_splits_names_and_grey_images(tmp_path: Path, test_name: str) -> None:
    image_folder(tmp_path / "train", 6, colours=1)
    image_folder(tmp_path / test_name, 3, colours=1)
    (tmp_path / "classes.txt").write_text("nothing\nleft\n\nright\n")
    data = load(str(tmp_path), image_size=16)
    assert (len(data.train), len(data.test), data.channels) == (6, 3, 1)
    assert data.classes == ("nothing", "left", "right")
    assert data.train[0].image.shape == (1, 16, 16)
    assert set(data.train[0].mask.unique().tolist()) <= {0, 1, 2}


def test_palette_masks_and_pixels_to_ignore(tmp_path: Path) -> None:
    image_folder(tmp_path)
    mask = Image.new("P", (23, 19))
    mask.putdata([1, 2, 255] + [0] * (19 * 23 - 3))
    mask.putpalette([255 - value // 3 for value in range(768)])  # an index is no brightness
    mask.save(tmp_path / "masks" / "case0.png")
    data = load(str(tmp_path))
    assert data.classes == ("background", "class 1", "class 2")
    found = [each.mask for part in (data.train, data.test) for each in part if (each.mask == IGNORE).any()]
    assert len(found) == 1
    assert found[0].flatten()[:4].tolist() == [1, 2, 255, 0]


@pytest.mark.parametrize("mode", ["L", "1"])
def test_black_and_white_masks_have_one_class(tmp_path: Path, mode: str) -> None:
    image_folder(tmp_path, 5)
    for place in range(5):
        save_image(tmp_path / "masks" / f"case{place}.png", mask_of([255] * 9), mode)
    data = load(str(tmp_path))
    assert len(data.classes) == 2
    assert all(int(each.mask.sum()) == 9 for part in (data.train, data.test) for each in part)


def test_what_does_not_fit_into_memory_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(image_folder(tmp_path))
    everything = load(folder)
    monkeypatch.setattr(storing, "MEMORY", 3 * 19 * 23 * 4)
    part = load(folder)
    assert part.fingerprint == everything.fingerprint
    assert len(part.train._kept.examples) == 3
    assert all(torch.equal(a.mask, b.mask) for a, b in zip(part.train, everything.train, strict=True))
    assert len(part.first(2, 1).train) == 2
    assert part.first(2, 1).fingerprint != part.fingerprint
    with pytest.raises(AnybatchError, match=r"9 train examples are asked for, .* has 8: give fewer"):
        part.first(9, None)


def test_grey_images_of_sixteen_bits_are_resized(tmp_path: Path) -> None:
    image_folder(tmp_path, 5, colours=1)
    for place in range(5):
        image, mask = pair(place, (19, 23))
        save_image(tmp_path / "images" / f"case{place}.png", (60000 * image).astype(np.uint16))
        save_image(tmp_path / "masks" / f"case{place}.png", mask.astype(np.uint16))
    data = load(str(tmp_path), image_size=32)
    assert data.train[0].image.dtype == torch.float32
    assert data.train[0].image.shape == (1, 32, 32)
    assert 20000 < float(data.train[0].image.max()) <= 60000
    assert set(data.train[0].mask.unique().tolist()) <= {0, 1, 2}


def edit(path: str, values: np.ndarray, mode: str | None = None) -> Callable[[Path], None]:
    return lambda root: save_image(root / path, values, mode)


def every_mask(values: np.ndarray) -> Callable[[Path], None]:
    return lambda root: [save_image(path, values) for path in (root / "masks").iterdir()] and None


def write(path: str, content: bytes) -> Callable[[Path], None]:
    return lambda root: (root / path).write_bytes(content) and None


def remove(path: str) -> Callable[[Path], None]:
    return lambda root: shutil.rmtree(root / path) if (root / path).is_dir() else (root / path).unlink()


IMAGE_FAULTS: list[tuple[Callable[[Path], None], str]] = [
    (remove("masks"), "has no folder masks: give 'volumes', 'scenes', or a folder"),
    (remove("masks/case2.png"), r"image \S+images/case2.png has no mask in \S+masks: add case2.png"),
    (remove("images/case2.png"), r"mask \S+masks/case2.png has no image"),
    (edit("masks/case4.png", mask_of([1], (19, 22))), r"case4.png is 22 x 19 pixels, its image \S+ is 23 x 19"),
    (edit("masks/case4.png", mask_of([1, 7])), r"mask \S+case4.png has the value 7, no training mask has 3"),
    (edit("masks/case4.png", np.full((19, 23), 300, np.uint16)), r"mask \S+case4.png has the value 300"),
    (edit("masks/case4.png", mask_of([1]), "RGB"), r"mask \S+case4.png has colours \(mode RGB\)"),
    (edit("images/case4.png", mask_of([1])), r"case\d.png has [13] channels?, \S+case\d.png has [13]: give all"),
    (edit("images/case4.tif", np.full((19, 23), np.nan, np.float32)), r"case4.png and \S+case4.tif have the same name"),
    (write("images/case4.png", b"\x89PNG no more"), r"images/case4.png cannot be read"),
    (write("masks/case4.png", b""), r"masks/case4.png cannot be read"),
    (every_mask(mask_of([])), r"no training mask has any foreground, \S+case\d.png and the 7 others"),
    (write("classes.txt", b"background\nleft\n"), r"case\d.png has the value 2, the 2 classes are 0 to 1 \(backgr"),
    (write("classes.txt", b"\xff\xfe\xff"), r"classes.txt cannot be read"),
    (write("classes.txt", b"background\n"), r"classes.txt has 1 names: give 2 to 255 different"),
]


@pytest.mark.parametrize(("spoil", "message"), IMAGE_FAULTS)
def test_image_folders_that_do_not_serve(tmp_path: Path, spoil: Callable[[Path], None], message: str) -> None:
    spoil(image_folder(tmp_path))
    with pytest.raises(AnybatchError, match=message):
        load(str(tmp_path))


def test_image_folders_that_do_not_serve_for_other_reasons(tmp_path: Path) -> None:
    with pytest.raises(AnybatchError, match="nowhere has no folder images"):
        load(str(tmp_path / "nowhere"))
    one = image_folder(tmp_path / "one", 1)
    with pytest.raises(AnybatchError, match="has one example only, which cannot be in both splits"):
        load(str(one))
    empty = tmp_path / "empty"
    (empty / "images").mkdir(parents=True)
    (empty / "masks").mkdir()
    with pytest.raises(AnybatchError, match=r"images has no images \(.bmp"):
        load(str(empty))
    broken = image_folder(tmp_path / "broken", 4, colours=1)
    for place in range(4):
        (broken / "images" / f"case{place}.png").unlink()
        save_image(broken / "images" / f"case{place}.tif", np.full((19, 23), np.nan, np.float32))
    with pytest.raises(AnybatchError, match=r"image \S+case\d.tif holds nan or infinity"):
        load(str(broken))
    lossy = image_folder(tmp_path / "lossy", 4)
    for path in list((lossy / "masks").iterdir()):
        save_image(path.with_suffix(".jpg"), mask_of([1]))
        path.unlink()
    with pytest.raises(AnybatchError, match=r"mask \S+.jpg is of a kind that changes class numbers: save masks as PNG"):
        load(str(lossy))
    halves = tmp_path / "halves"
    image_folder(halves / "train", 4)
    image_folder(halves / "val", 2)
    for path in (halves / "val" / "masks").iterdir():
        save_image(path, mask_of([255]))
    with pytest.raises(AnybatchError, match="no test mask has any foreground"):
        load(str(halves))
    for option, value, what in (("spacing", 1.5, "NIfTI volumes"), ("image_size", 32, "image folders")):
        with pytest.raises(AnybatchError, match=f"{option} {value} is for {what} alone"):
            load("volumes", **{option: value})
    with pytest.raises(AnybatchError, match=r"spacing 2.0 is for NIfTI"):
        load(str(lossy), spacing=2.0)


# Volumes


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_volume_folder(tmp_path: Path, suffix: str) -> None:
    data = load(str(volume_folder(tmp_path, suffix=suffix)))
    assert (len(data.train), len(data.test), data.channels, data.dims, data.patch) == (4, 1, 1, 3, 64)
    assert data.classes == ("background", "class 1", "class 2")
    images = [1000 * pair(place, (9, 11, 10))[0] for place in range(5)]
    for each in (*data.train, *data.test):
        assert any(np.allclose(each.image[0], image, atol=1e-3) for image in images)
        values = each.normalise(each.image)
        assert abs(float(values.mean())) < 1e-5
        assert float(values.std(correction=0)) == pytest.approx(1, abs=1e-5)


def test_decathlon_and_nnunet_facts(tmp_path: Path) -> None:
    for name, facts in (
        ("decathlon", {"labels": {"0": "background", "1": "liver", "2": "tumour"}, "modality": {"0": "CT"}}),
        ("nnunet", {"labels": {"background": 0, "liver": 1, "tumour": 2}, "channel_names": {"0": "CT"}}),
    ):
        root = volume_folder(tmp_path / name)
        (root / "dataset.json").write_text(json.dumps(facts))
        data = load(str(root))
        assert data.classes == ("background", "liver", "tumour")
        assert all(each.moments == data.train[0].moments for each in data.test)  # CT: its numbers mean something
        assert load(str(root), intensity="example").test[0].moments != data.train[0].moments


def test_channels_as_files_or_as_a_fourth_dimension(tmp_path: Path) -> None:
    facts = json.dumps({"labels": {"0": "a", "1": "b", "2": "c"}, "modality": {"0": "T1", "1": "T2"}})
    for name in ("files", "dimension"):
        root = volume_folder(tmp_path / name, 3)
        (root / "dataset.json").write_text(facts)
        for place in range(3):
            image = pair(place, (9, 11, 10))[0].astype(np.float32)
            (root / "imagesTr" / f"case{place}.nii.gz").unlink()
            if name == "files":
                for channel in (0, 1):
                    save_volume(root / "imagesTr" / f"case{place}_000{channel}.nii.gz", image + channel)
            else:
                save_volume(root / "imagesTr" / f"case{place}.nii.gz", np.stack([image, image + 1], axis=-1))
    parts, whole = (load(str(tmp_path / name)) for name in ("files", "dimension"))
    assert parts.channels == whole.channels == 2
    assert torch.equal(parts.train[0].image, whole.train[0].image)


def test_volumes_to_test_on_and_axes(tmp_path: Path) -> None:
    root = volume_folder(tmp_path, 4)
    image, mask = pair(1, (9, 11, 10))
    turned = np.diag([-2.0, 3.0, 1.0, 1.0])  # to the left, 2 mm a voxel
    save_volume(root / "imagesTs" / "last.nii", image.astype(np.float32), turned)
    save_volume(root / "labelsTs" / "last.nii", mask, turned)
    data = load(str(root))
    assert (len(data.train), len(data.test)) == (4, 1)
    assert np.array_equal(data.test[0].mask, mask[::-1])
    coarse = load(str(root), spacing=2.0)
    assert coarse.test[0].mask.shape == coarse.test[0].image.shape[1:] == (9, 16, 6)
    assert set(coarse.test[0].mask.unique().tolist()) == {0, 1, 2}
    assert coarse.train[0].mask.shape == (5, 6, 6)


def volume(path: str, values: np.ndarray, affine: np.ndarray | None = None) -> Callable[[Path], None]:
    return lambda root: save_volume(root / path, values, affine)


IMAGE, MASK = "imagesTr/case2.nii.gz", "labelsTr/case2.nii.gz"
ONES = np.ones((9, 11, 10), dtype=np.float32)
VOLUME_FAULTS: list[tuple[Callable[[Path], None], str]] = [
    (remove("labelsTr"), r"there is no folder \S+labelsTr"),
    (remove(MASK), r"image \S+imagesTr/case2.nii.gz has no mask in \S+labelsTr: add case2.nii.gz"),
    (remove(IMAGE), r"mask \S+labelsTr/case2.nii.gz has no image"),
    (volume(MASK, ONES[:8]), r"labelsTr/case2.nii.gz is 8 x 11 x 10 voxels, its image \S+ is 9 x 11 x 10"),
    (volume(MASK, ONES, np.diag([-1.0, 1, 1, 1])), r"labelsTr/case2.nii.gz has the axes LAS, its image \S+ has RAS"),
    (volume(MASK, ONES / 2), r"labelsTr/case2.nii.gz has the value 0.5: masks hold class numbers"),
    (volume(MASK, -ONES), r"labelsTr/case2.nii.gz has the value -1"),
    (volume(MASK, ONES * np.nan), r"labelsTr/case2.nii.gz has the value nan"),
    (volume(MASK, 9 * ONES), r"labelsTr/case2.nii.gz has the value 9, the 3 classes are 0 to 2"),
    (volume(MASK, ONES[..., None].repeat(2, -1)), r"labelsTr/case2.nii.gz has 4 dimensions \(9, 11, 10, 2\)"),
    (volume(IMAGE, ONES[..., None].repeat(2, -1)), r"imagesTr/case2.nii.gz has 4 dimensions .*: volumes have three"),
    (volume(IMAGE, ONES * np.nan), r"imagesTr/case2.nii.gz holds nan or infinity"),
    (write(IMAGE, b"\x1f\x8bno more"), r"imagesTr/case2.nii.gz cannot be read \(\w+"),
    (write(MASK, b""), r"labelsTr/case2.nii.gz cannot be read \(\w+"),
    (volume("imagesTr/case2_0001.nii.gz", ONES), r"case\d(_0001)?.nii.gz has [12] channels?, \S+ has [12]: give all"),
    (write("dataset.json", b"{"), r"dataset.json cannot be read \(JSONDecodeError"),
    (write("dataset.json", b'{"labels": {"background": 0, "whole": [1, 2]}}'), r"regions of several numbers are not"),
    (write("dataset.json", b'{"labels": {"0": "background", "2": "liver"}}'), r"has the labels \[0, 2\]: give 0"),
    (
        write("dataset.json", b'{"labels": {"background": 0, "liver": 1, "ignore": 2}}'),
        r"has the label 'ignore': store",
    ),
    (write("dataset.json", b'{"labels": {"0": "background", "1": "liver"}}'), r"has the value 2, the 2 classes are"),
]


@pytest.mark.parametrize(("spoil", "message"), VOLUME_FAULTS)
def test_volume_folders_that_do_not_serve(tmp_path: Path, spoil: Callable[[Path], None], message: str) -> None:
    spoil(volume_folder(tmp_path))
    with pytest.raises(AnybatchError, match=message):
        load(str(tmp_path))


def test_empty_volume_folder(tmp_path: Path) -> None:
    (tmp_path / "imagesTr").mkdir()
    (tmp_path / "labelsTr").mkdir()
    with pytest.raises(AnybatchError, match=r"imagesTr has no volumes \(.nii.gz or .nii\)"):
        load(str(tmp_path))
    with pytest.raises(AnybatchError, match="image_size 32 is for image folders alone"):
        load(str(tmp_path), image_size=32)


# Generated data


@pytest.mark.parametrize("name", GENERATED)
def test_generated_data(name: str) -> None:
    data, recipe = generated(name), GENERATED[name]
    assert (len(data.train), len(data.test)) == (recipe.train, recipe.test)
    assert data.train[0].image.shape == (1, *recipe.shape)
    seen = [set(each.mask.unique().tolist()) for each in (*data.train, *data.test)]
    assert set().union(*seen) == set(range(len(data.classes)))
    assert all(0 in values and len(values) > 1 for values in seen)
    inside = [
        float(e.image[0][e.mask == kind].mean()) for e in data.train for kind in (1, 2, 3) if (e.mask == kind).any()
    ]
    outside = [float(e.image[0][e.mask == 0].mean()) for e in data.train]
    assert np.mean(inside) > np.mean(outside) + 1
    assert data.fingerprint != generated(name, "example").fingerprint


def test_generated_examples_depend_on_their_number_alone() -> None:
    recipe = GENERATED["volumes"]
    pictures = [np.random.default_rng(0).random((4, 28, 28), dtype=np.float32)] * 3
    one, same, other = (compose(recipe, pictures, np.random.default_rng([0, n])) for n in (5, 5, 6))
    assert torch.equal(one.image, same.image)
    assert torch.equal(one.mask, same.mask)
    assert not torch.equal(one.image, other.image)


# Patches


def test_patches_are_parts_of_the_example() -> None:
    image = torch.arange(2 * 30 * 20, dtype=torch.float32).view(2, 30, 20)
    mask = torch.zeros(30, 20, dtype=torch.uint8)
    mask[25, 17] = 1
    each = example(image, mask)
    whole, held, corners = each.normalise(image), 0, set()
    for seed in range(200):
        patch, cutout = cut(each, 8, generator_for(seed))
        place = (whole[0] == patch[0, 0, 0]).nonzero()[0].tolist()
        window = (..., slice(place[0], place[0] + 8), slice(place[1], place[1] + 8))
        assert torch.equal(patch, whole[window])
        assert torch.equal(cutout, mask[window].long())
        held += int(cutout.sum())
        corners.add(tuple(place))
    assert 90 < held < 130  # half of them on purpose, some of the others by chance
    assert len(corners) > 80
    assert min(c[0] for c in corners) == 0
    assert max(c[0] for c in corners) == 22
    assert torch.equal(cut(each, 8, generator_for(1, 2, 3))[0], cut(each, 8, generator_for(1, 2, 3))[0])


def test_patches_larger_than_the_example_are_padded() -> None:
    each = example(torch.rand(1, 5, 9, 4), torch.ones(5, 9, 4, dtype=torch.uint8))
    patch, mask = cut(each, 8, generator_for(0))
    assert patch.shape == (1, 8, 8, 8)
    assert int((mask == 1).sum()) == 5 * 8 * 4
    assert int((mask == IGNORE).sum()) == 512 - 160
    assert torch.equal(patch[0] != 0, mask == 1)
