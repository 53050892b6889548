"""Every fault that an entry of a COCO-format file can have: told in one error, or dropped and counted."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from anybatch.errors import AnybatchError

from .coco_files import Document, read_document, sound


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("coco")


def edit(listed: str, place: int, **values: Any) -> Callable[[Document], None]:
    return lambda document: document[listed][place].update(values)


def remove(listed: str, place: int, key: str) -> Callable[[Document], None]:
    return lambda document: document[listed][place].pop(key)


def repeat(listed: str, place: int, **values: Any) -> Callable[[Document], None]:
    return lambda document: document[listed].append({**document[listed][place], **values})


def become(listed: str, place: int, value: Any) -> Callable[[Document], None]:
    return lambda document: document[listed].__setitem__(place, value)


def segmented(value: Any) -> Callable[[Document], None]:
    return edit("annotations", 0, segmentation=value)


def encoded(counts: Any, size: Any = (41, 20)) -> Callable[[Document], None]:
    return segmented({"size": list(size) if isinstance(size, tuple) else size, "counts": counts})


A30 = r"annotation 30 \(number 1 in 'annotations', image_id 3\): "
A10 = r"annotation 10 \(number 2 in 'annotations', image_id 7\): "
ORPHAN = "annotation of an unusable image"
SHAPES = "malformed mask"
BOX = "malformed box"
THIN = "box without area"
OUTSIDE = "box outside the image"
FLAT = "mask without pixels"
TYPE = "wrong type"

FAULTS: dict[str, tuple[Callable[[Document], Any], str, dict[str, int]]] = {
    "missing image file": (
        edit("images", 1, file_name="gone.png"),
        r"image 3 \(number 2 in 'images', file_name 'gone.png'\): there is no file .*gone.png\. ",
        {"missing image file": 1, ORPHAN: 2},
    ),
    "folder as image": (edit("images", 2, file_name=""), r"image 11 .*cannot be read", {"unreadable image": 1}),
    "null byte": (edit("images", 2, file_name="\0"), r"image 11 .*cannot be read", {"unreadable image": 1}),
    "long name": (edit("images", 2, file_name="n" * 999), "image 11 .*cannot be read", {"unreadable image": 1}),
    "other size": (
        edit("images", 0, width=17, height=33),
        r"image 7 .*7.png is 33 x 17 pixels, recorded is 17 x 33\. ",
        {"image of another size": 1, ORPHAN: 1},
    ),
    "no width": (remove("images", 0, "width"), "image 7 .*: it has no 'width'", {"missing key": 1, ORPHAN: 1}),
    "image without id": (
        remove("images", 2, "id"),
        r"image without an id \(number 3 in 'images', file_name '11.png'\): it has no 'id'",
        {"missing key": 1},
    ),
    "text as width": (edit("images", 2, width="1"), "its width is '1', not of type int", {TYPE: 1}),
    "bool as id": (edit("images", 2, id=True), "its id is True, not of type int", {TYPE: 1}),
    "number as name": (edit("images", 2, file_name=4), "its file_name is 4, not of type str", {TYPE: 1}),
    "list as image": (become("images", 2, [1]), r"image without an id \(number 3 .*it is \[1\]", {TYPE: 1}),
    "image twice": (
        repeat("images", 0),
        "image 7 .number 4 .*number 1, '7.png', has its id too",
        {"duplicate image id": 1},
    ),
    "image id twice": (
        edit("images", 2, id=3),
        "image 3 .number 2 .*number 3, '11.png', has its id too",
        {"duplicate image id": 2, ORPHAN: 2},
    ),
    "annotation id twice": (
        repeat("annotations", 0, category_id=4),
        r"annotation 30 \(number 4 .*an earlier annotation has its id too",
        {"duplicate annotation id": 1},
    ),
    "unknown image": (
        edit("annotations", 0, image_id=99),
        r"annotation 30 \(number 1 .*its image_id 99 is not in 'images'",
        {"unknown image id": 1},
    ),
    "unknown category": (
        edit("annotations", 0, category_id=6),
        A30 + "its category_id 6 is not in 'categories'",
        {"unknown category": 1},
    ),
    "null annotation": (become("annotations", 0, None), "annotation without an id .*: it is None, not an", {TYPE: 1}),
    "no box": (remove("annotations", 1, "bbox"), A10 + "it has no 'bbox'", {"missing key": 1}),
    "box as text": (edit("annotations", 1, bbox="0,0,1,1"), A10 + "its bbox is '0,0,1,1', not of type list", {TYPE: 1}),
    "three numbers": (edit("annotations", 1, bbox=[1, 2, 3]), A10 + r"its bbox \[1, 2, 3\] is not four", {BOX: 1}),
    "nan": (edit("annotations", 1, bbox=[math.nan, 2, 3, 4]), A10 + r"its bbox \[nan, 2, 3, 4\] is not", {BOX: 1}),
    "infinite": (edit("annotations", 1, bbox=[1, 2, 3, math.inf]), A10 + "its bbox .* four finite", {BOX: 1}),
    "huge": (edit("annotations", 1, bbox=[1, 2, 10**400, 4]), A10 + "its bbox .* four finite", {BOX: 1}),
    "null in box": (edit("annotations", 1, bbox=[1, None, 3, 4]), A10 + "its bbox .* four finite", {BOX: 1}),
    "zero width": (edit("annotations", 1, bbox=[1, 2, 0, 4]), A10 + r"its bbox \[1, 2, 0, 4\] has width 0", {THIN: 1}),
    "negative": (edit("annotations", 1, bbox=[5, 5, 2, -3]), A10 + ".* height -3: both must be above 0", {THIN: 1}),
    "thinner than float32": (edit("annotations", 1, bbox=[9, 2, 1e-9, 4]), A10 + ".*too thin for float32", {THIN: 1}),
    "right of image": (
        edit("annotations", 1, bbox=[3, 2, 31.5, 4]),
        A10 + r"its bbox \[3, 2, 31.5, 4\] reaches 1.5 pixels outside its image of 33 x 17",
        {OUTSIDE: 1},
    ),
    "above image": (edit("annotations", 1, bbox=[3, -1.25, 3, 4]), A10 + ".*reaches 1.25 pixels outside", {OUTSIDE: 1}),
    "in the margin": (edit("annotations", 1, bbox=[-0.75, 3, 0.5, 4]), A10 + ".*reaches 0.75 pixels", {OUTSIDE: 1}),
    "corners as box": (edit("annotations", 1, bbox=[20, 10, 30, 16]), A10 + ".*reaches 17 pixels", {OUTSIDE: 1}),
    "no area": (edit("annotations", 1, area=0), A10 + "its area is 0", {"area that is not positive": 1}),
    "nan area": (edit("annotations", 1, area=math.nan), A10 + "its area is nan", {"area that is not positive": 1}),
    "crowd of two": (edit("annotations", 1, iscrowd=2), A10 + "its iscrowd is 2, not 0 or 1", {TYPE: 1}),
    "crowd as list": (edit("annotations", 1, iscrowd=[]), A10 + r"its iscrowd is \[\], not 0 or 1", {TYPE: 1}),
    "two points": (segmented([[1, 1, 5, 5]]), A30 + r"its polygon \[1, 1, 5, 5\] has fewer than 3 points", {FLAT: 1}),
    "empty polygon": (segmented([[]]), A30 + r"its polygon \[\] has fewer than 3 points", {FLAT: 1}),
    "tiny polygon": (
        segmented([[1.1, 1.1, 1.2, 1.1, 1.2, 1.2]]),
        A30 + "its polygons cover no pixel",
        {FLAT: 1},
    ),
    "odd coordinates": (segmented([[1, 1, 5, 1, 5, 5, 1]]), A30 + "its polygon .* is not a list of", {SHAPES: 1}),
    "flat polygon": (segmented([1, 1, 5, 1, 5, 5]), A30 + "its polygon 1 is not a list of numbers", {SHAPES: 1}),
    "nan polygon": (segmented([[1, 1, 5, 1, math.nan, 5]]), A30 + "its polygon .* is not a list", {SHAPES: 1}),
    "far polygon": (
        segmented([[1, 1, 5, 1, 5, 5], [1, 1, 9e8, 1, 5, 5]]),
        A30 + "its polygon spans x 1 to 900000000.0 and y 1 to 5, the image is 20 x 41",
        {"mask outside the image": 1},
    ),
    "text as mask": (segmented("mask.png"), A30 + "its segmentation is 'mask.png', neither polygons", {SHAPES: 1}),
    "encoding of zeros": (encoded([820]), A30 + "its encoding has no pixel set", {FLAT: 1}),
    "encoding of another size": (
        encoded([1, 2, 817], (20, 41)),
        A30 + r"its encoding has size \[20, 41\], the image has \[height, width\] \[41, 20\]",
        {SHAPES: 1},
    ),
    "encoding without size": (encoded([1, 2, 817], None), A30 + "its encoding has size None", {SHAPES: 1}),
    "short encoding": (encoded([1, 2]), A30 + r"its counts \[1, 2\] cannot be decoded", {SHAPES: 1}),
    "long encoding": (encoded([1, 2, 9999]), A30 + "its counts .* cannot be decoded", {SHAPES: 1}),
    "negative run": (encoded([-1, 821]), A30 + "its counts .* cannot be decoded", {SHAPES: 1}),
    "null counts": (encoded(None), A30 + "its counts None cannot be decoded", {SHAPES: 1}),
    "mad counts": (encoded("0oooooo"), A30 + "its counts '0oooooo' cannot be decoded", {SHAPES: 1}),
    "cut counts": (encoded("`"), A30 + "its counts '`' cannot be decoded", {SHAPES: 1}),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_named_or_dropped(shared: Path, name: str) -> None:
    damage, message, counts = FAULTS[name]
    document = sound()
    damage(document)
    with pytest.raises(AnybatchError, match=message) as raised:
        read_document(shared, document)
    assert str(raised.value).startswith(f"{shared / 'instances.json'}: ")
    assert "Mend it, or leave all such entries out with --drop-invalid; this file has: " in str(raised.value)
    for kind, count in counts.items():
        assert f"{count} x {kind}" in str(raised.value)

    data = read_document(shared, document, drop_invalid=True)
    assert data.dropped == counts
    lost = {"images": 0, "annotations": counts.get(ORPHAN, 0)}
    lost[f"{str(raised.value).split(': ')[1].split()[0]}s"] += sum(counts.values()) - counts.get(ORPHAN, 0)
    assert len(data.images) == len(document["images"]) - lost["images"]
    assert sum(map(len, data.instances)) == len(document["annotations"]) - lost["annotations"]


def test_several_faults_name_the_first_and_count_all(shared: Path) -> None:
    document = sound()
    document["annotations"] += [{"id": key, "image_id": 3, "category_id": 9, "bbox": [2, 3, 4, 99]} for key in range(5)]
    document["annotations"][1]["category_id"] = 0
    with pytest.raises(AnybatchError, match=A10) as raised:
        read_document(shared, document)
    assert str(raised.value).endswith("this file has: 5 x box outside the image, 1 x unknown category")
    assert read_document(shared, document, drop_invalid=True).dropped == {OUTSIDE: 5, "unknown category": 1}


def test_nothing_left(shared: Path) -> None:
    document = sound()
    for entry in document["annotations"]:
        entry["category_id"] = 0
    with pytest.raises(AnybatchError, match="no annotation is left to train on; dropped: 3 x unknown category"):
        read_document(shared, document, drop_invalid=True)
