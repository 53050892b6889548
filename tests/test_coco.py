"""The COCO reader: what a sound file gives, what no file may do to it, and files that cannot be used at all."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anybatch.errors import AnybatchError
from anybatch.lab.detection.coco import read
from anybatch.lab.detection.masks import to_pixels

from .coco_files import Document, read_document, sound


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("coco")


def test_sound_file(shared: Path) -> None:
    data = read_document(shared, sound())
    assert data.categories == ("dog", "cat", "eel")  # by id
    assert data.category_ids == (4, 5, 9)
    assert [(image.id, image.width, image.height) for image in data.images] == [(7, 33, 17), (3, 20, 41), (11, 1, 5)]
    assert all(image.file.is_file() for image in data.images)
    assert data.dropped == {}
    first, second, empty = data.instances
    assert first.boxes.tolist() == [[0.5, 1.25, 30.5, 11.25]]
    assert first.labels.tolist() == [1]
    assert first.areas.tolist() == [150.5]
    assert first.segmentations == (None,)
    assert second.boxes.tolist() == [[2, 3, 6, 8], [0, 0, 20, 41]]
    assert second.labels.tolist() == [3, 2]
    assert second.crowd.tolist() == [False, True]
    for instances, count in zip(data.instances, (1, 2, 0), strict=True):
        assert len(instances) == count
        assert (instances.boxes.shape, instances.boxes.dtype) == ((count, 4), torch.float32)
        assert (instances.labels.shape, instances.labels.dtype) == ((count,), torch.int64)
        assert (instances.areas.shape, instances.areas.dtype) == ((count,), torch.float32)
        assert (instances.crowd.shape, instances.crowd.dtype) == ((count,), torch.bool)
    assert empty.masks(5, 1).shape == (0, 5, 1)


def test_masks_are_the_pixels_of_polygon_and_encoding(shared: Path) -> None:
    data = read_document(shared, sound())
    masks = data.instances[1].masks(41, 20)
    rectangle = np.zeros((41, 20), np.uint8)
    rectangle[3:8, 2:6] = 1
    runs = np.repeat([0, 1, 0, 1, 0], [1, 2, 41, 1, 775]).reshape(20, 41).T  # COCO's runs go down the columns
    assert masks.dtype == torch.uint8
    assert np.array_equal(masks.numpy(), np.stack([rectangle, runs]))
    assert not data.has_masks
    with pytest.raises(AnybatchError, match="object 1 of 1 has a box and no segmentation: add one, or train a model"):
        data.instances[0].masks(17, 33)


def test_what_may_be_missing(shared: Path) -> None:
    document = sound()
    for entry in document["annotations"]:
        entry.pop("area"), entry.pop("iscrowd")
        entry["segmentation"] = []
    data = read_document(shared, document)
    assert data.instances[0].areas.tolist() == [300]
    assert not data.instances[1].crowd.any()
    assert data.instances[1].segmentations == (None, None)


def test_shared_category_names_are_told_apart(shared: Path) -> None:
    document = sound()
    document["categories"][0]["name"] = "dog"
    assert read_document(shared, document).categories == ("dog (4)", "cat", "dog (9)")


def test_boxes_a_rounding_outside_are_clipped(shared: Path) -> None:
    document = sound()
    document["annotations"][1]["bbox"] = [-0.75, -1, 34.5, 18.9]
    assert read_document(shared, document).instances[0].boxes.tolist() == [[0, 0, 33, 17]]


def test_fingerprint_changes_with_any_annotation_and_any_pixel(tmp_path: Path) -> None:
    fingerprint = read_document(tmp_path, sound()).fingerprint
    assert len(fingerprint) == 64
    assert read_document(tmp_path / "elsewhere", sound()).fingerprint == fingerprint
    data = read_document(tmp_path, sound())
    image = data.images[2].file
    content = image.read_bytes()
    image.write_bytes(content[:-20] + bytes([content[-20] ^ 1]) + content[-19:])  # same length, one bit
    assert data.fingerprint != fingerprint
    document = sound()
    document["annotations"][1]["bbox"][0] += 0.01
    assert read_document(tmp_path, document).fingerprint != fingerprint
    data = read_document(tmp_path, sound())
    image.unlink()
    with pytest.raises(AnybatchError, match=r"image .*11.png cannot be read \(No such file or directory\): put it"):
        _ = data.fingerprint


def test_as_coco_reads_back_the_same(shared: Path) -> None:
    data = read_document(shared, sound())
    again = read_document(shared, data.as_coco())
    assert [entry["id"] for entry in data.as_coco()["annotations"]] == [1, 2, 3]
    assert (again.categories, again.category_ids, again.images) == (data.categories, data.category_ids, data.images)
    for one, other in zip(data.instances, again.instances, strict=True):
        for name in ("boxes", "labels", "areas", "crowd"):
            assert torch.equal(getattr(one, name), getattr(other, name))
        assert one.segmentations == other.segmentations


def without(key: str) -> str:
    return json.dumps({name: entries for name, entries in sound().items() if name != key})


STRUCTURE = {
    "": "annotation file .*instances.json is empty",
    " \n": "annotation file .*instances.json is empty",
    '{"images": [],\n "annotations": [}': r"is not valid JSON at line 2, column 18 \(Expecting value\)",
    "[" * 100_000: "is not valid JSON",
    '{"a": 1' + "0" * 5000 + "}": "is not valid JSON",
    "[]": "holds a list, not a COCO object",
    without("images"): "has no 'images': COCO format has lists images, annotations, categories",
    without("annotations"): "has no 'annotations'",
    without("categories"): "has no 'categories'",
    json.dumps({**sound(), "images": {}}): r"has \{\} and no list as 'images'",
    json.dumps({**sound(), "images": []}): "has an empty list 'images': there is nothing to train on",
    json.dumps({**sound(), "annotations": []}): "has an empty list 'annotations'",
    json.dumps({**sound(), "categories": []}): "has an empty list 'categories'",
    json.dumps({**sound(), "categories": ["dog"]}): r"category without an id \(number 1 in 'categories'\): it is 'dog'",
    json.dumps({**sound(), "categories": [{"id": 4}]}): r"category 4 \(number 1 in 'categories'\): it has no 'name'",
    json.dumps({**sound(), "categories": [{"id": 4, "name": "dog"}, {"id": 4, "name": "eel"}]}): (
        "categories 'dog' and 'eel' both have the id 4: give each its own"
    ),
}


@pytest.mark.parametrize("drop_invalid", [False, True])
@pytest.mark.parametrize("place", range(len(STRUCTURE)))
def test_file_that_cannot_be_used_at_all(shared: Path, place: int, drop_invalid: bool) -> None:
    content, message = list(STRUCTURE.items())[place]
    with pytest.raises(AnybatchError, match=message):
        read_document(shared, content, drop_invalid)


def test_no_file_and_no_text(tmp_path: Path) -> None:
    with pytest.raises(AnybatchError, match=r"annotation file .*a.json cannot be read \(No such file"):
        read(tmp_path / "a.json", tmp_path)
    with pytest.raises(AnybatchError, match=r"annotation file .* cannot be read \(Is a directory"):
        read(tmp_path, tmp_path)
    (tmp_path / "a.json").write_bytes(b'{"images": "\xff\xff"}')
    with pytest.raises(AnybatchError, match="json is not valid JSON"):
        read(tmp_path / "a.json", tmp_path)


def test_segmentations_without_their_library(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faster_coco_eval.core.mask", None)
    with pytest.raises(AnybatchError, match=r"faster_coco_eval.core.mask is not installed.*'anybatch\[detect\]'"):
        read_document(shared, sound())


coordinates = st.floats(-3, 45) | st.integers(-3, 45) | st.just(1e-8)


@given(st.tuples(coordinates, coordinates, coordinates, coordinates))
def test_boxes_come_out_clipped_and_sound_or_not_at_all(shared: Path, bbox: tuple[float, float, float, float]) -> None:
    document = sound()
    document["annotations"][0].update(bbox=bbox, segmentation=None)
    x, y, width, height = bbox
    corners = np.array([x, y, x + width, y + height])
    clipped = np.clip(corners, 0, [20, 41, 20, 41])
    single = clipped.astype(np.float32)
    kept = (np.abs(corners - clipped) <= 1).all() and (single[:2] < single[2:]).all() and width > 0 and height > 0
    data = read_document(shared, document, drop_invalid=True)
    assert len(data.instances[1]) == 1 + kept
    if kept:
        assert data.instances[1].boxes[0].tolist() == single.tolist()
        assert data.dropped == {}
        again = read_document(shared, data.as_coco()).instances[1].boxes
        assert torch.allclose(again, data.instances[1].boxes, atol=4e-6, rtol=0)
    else:
        assert set(data.dropped) <= {"box outside the image", "box without area"}
        assert sum(data.dropped.values()) == 1


numbers = st.floats(-60, 60) | st.floats() | st.integers(-3, 900)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
segmentations = (
    st.lists(st.lists(numbers, max_size=10), max_size=3)
    | st.fixed_dictionaries({"size": st.just([41, 20]), "counts": st.lists(numbers, max_size=6) | st.text(max_size=8)})
    | st.fixed_dictionaries({"size": st.just([41, 20]), "counts": st.text("0123456789`abcdeno", max_size=8)})
)
PLACES = [(listed, place, key) for listed, entries in sound().items() for place in range(3) for key in entries[0]]


@given(st.sampled_from(PLACES), anything)
def test_whatever_stands_anywhere_is_read_or_told(shared: Path, where: tuple[str, int, str], value: Any) -> None:
    listed, place, key = where
    document = sound()
    document[listed][place][key] = value
    read_or_told(shared, document)


@given(segmentations)
def test_whatever_segmentation_is_read_or_told(shared: Path, segmentation: Any) -> None:
    document = sound()
    document["annotations"][0]["segmentation"] = segmentation
    read_or_told(shared, document)


def read_or_told(folder: Path, document: Document) -> None:
    """What is kept serves; without dropping, the file is refused just when something would be dropped."""
    try:
        data = read_document(folder, document, drop_invalid=True)
    except AnybatchError:
        with pytest.raises(AnybatchError):
            read_document(folder, document)
        return
    for image, instances in zip(data.images, data.instances, strict=True):
        assert (instances.boxes[:, :2] < instances.boxes[:, 2:]).all()
        assert (instances.boxes >= 0).all()
        assert (instances.boxes <= torch.tensor([image.width, image.height] * 2)).all()
        assert (instances.areas >= 0).all()  # 1e-300 is nothing in float32
        for segmentation in filter(None, instances.segmentations):
            mask = to_pixels(segmentation, image.height, image.width)
            assert mask.shape == (image.height, image.width)
            assert mask.any()
    if data.dropped:
        with pytest.raises(AnybatchError, match="--drop-invalid"):
            read_document(folder, document)
    else:
        assert len(read_document(folder, document).images) == len(document["images"])
