"""COCO-format annotations: read strictly, so that whatever trains on them can trust every entry."""

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from anybatch.errors import AnybatchError
from anybatch.lab.detection.annotations import Annotations, ImageEntry, Instances
from anybatch.lab.detection.faults import MARGIN, Fault, Faults, is_number, short
from anybatch.lab.detection.layout import find
from anybatch.lab.detection.masks import check_segmentation
from anybatch.lab.detection.pixels import check_file, load_image

__all__ = ["Annotations", "ImageEntry", "Instances", "find", "load_image", "read"]

Entry = dict[str, Any]
Object = tuple[list[float], int, float, bool, Any]  # box, label, area, crowd, segmentation


def read(annotation_file: Path, image_folder: Path, drop_invalid: bool = False) -> Annotations:
    """The data set in `annotation_file`, whose images lie in `image_folder`.

    Every entry is checked, and every image file's header is read. A box may reach out of its image by up to one pixel,
    as rounding does, and is then clipped. `area` may be missing (it is then the box's), and so may `iscrowd` (0) and
    `segmentation` (none; an empty list is none too). Images without objects are kept. Of entries with the same id the
    first is kept; images that share an id without being the same entry all go, with their objects.

    Args:
        annotation_file: JSON with the lists "images", "annotations" and "categories".
        image_folder: the folder that "file_name" is relative to.
        drop_invalid: leave unusable entries out and count them, instead of raising. An image takes its objects along.

    Raises:
        AnybatchError: the file cannot be used at all (not JSON, a list is missing, categories are ambiguous, nothing
            usable is in it), or, without `drop_invalid`, an entry cannot: the first is named, all are counted.
    """
    content = _bytes(annotation_file)
    document = _document(annotation_file, content)
    names = _categories(annotation_file, document["categories"])
    faults = Faults(annotation_file)
    images, lost = _images(document["images"], image_folder, faults)
    objects = _objects(document["annotations"], images, lost, {key: n for n, key in enumerate(names, 1)}, faults)
    if not drop_invalid:
        faults.raise_any()
    if not any(objects.values()):
        raise AnybatchError(f"{annotation_file}: no annotation is left to train on; dropped: {faults.summary()}")
    return Annotations(
        annotation_file,
        image_folder,
        tuple(names.values()),
        tuple(names),
        tuple(images.values()),
        tuple(_instances(objects[key]) for key in images),
        faults.counts,
        hashlib.sha256(content).hexdigest(),
    )


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        mend = "give a COCO-format JSON file that can be read"
        raise AnybatchError(f"annotation file {path} cannot be read ({error.strerror}): {mend}") from error


def _document(path: Path, content: bytes) -> Entry:
    """The parsed file, with its three lists, none of them empty."""
    if not content.strip():
        raise AnybatchError(f"annotation file {path} is empty: write or download it again")
    try:
        document = json.loads(content)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise AnybatchError(f"{path} is not valid JSON at {where} ({error.msg}): mend or download it again") from error
    except (ValueError, RecursionError) as error:  # no UTF-8, a number of thousands of digits, or brackets without end
        raise AnybatchError(f"{path} is not valid JSON ({error}): mend or download it again") from error
    if not isinstance(document, dict):
        raise AnybatchError(f"{path} holds a {type(document).__name__}, not a COCO object: give another file")
    for key in ("images", "annotations", "categories"):
        if not isinstance(document.get(key), list):
            there = "no" if key not in document else f"{short(document[key])} and no list as"
            raise AnybatchError(f"{path} has {there} '{key}': COCO format has lists images, annotations, categories")
        if not document[key]:
            raise AnybatchError(f"{path} has an empty list '{key}': there is nothing to train on; give another file")
    return document


def _categories(path: Path, entries: list[Any]) -> dict[int, str]:
    """Id -> name, by id."""
    names: dict[int, str] = {}
    for place, entry in enumerate(entries, 1):
        try:
            _require(entry, id=int, name=str)
        except Fault as fault:
            raise AnybatchError(f"{path}: {_name('category', 'categories', place, entry)}: {fault.detail}") from fault
        if entry["id"] in names:
            both = f"{names[entry['id']]!r} and {entry['name']!r}"
            raise AnybatchError(f"{path}: categories {both} both have the id {entry['id']}: give each its own")
        names[entry["id"]] = entry["name"]
    shared = Counter(names.values())
    return {key: name if shared[name] == 1 else f"{name} ({key})" for key, name in sorted(names.items())}


def _images(entries: list[Any], folder: Path, faults: Faults) -> tuple[dict[int, ImageEntry], set[Any]]:
    """The usable images by id, and the ids of the others."""
    images: dict[int, ImageEntry] = {}
    firsts: dict[int, tuple[int, Entry]] = {}  # id -> the place of the first entry with it, and the entry
    lost: set[Any] = set()
    for place, entry in enumerate(entries, 1):
        try:
            _require(entry, id=int, file_name=str, width=int, height=int)
            key = entry["id"]
            first_place, first = firsts.setdefault(key, (place, entry))
            if first_place != place:
                if first != entry and images.pop(key, None):  # whose objects are whose cannot be told
                    also = Fault("duplicate image id", f"number {place}, {short(entry['file_name'])}, has its id too")
                    faults.add(_name("image", "images", first_place, first), also)
                raise Fault("duplicate image id", f"number {first_place}, {short(first['file_name'])}, has its id too")
            image = ImageEntry(key, folder / entry["file_name"], entry["width"], entry["height"])
            check_file(image)
            images[key] = image
        except Fault as fault:
            faults.add(_name("image", "images", place, entry), fault)
            key = entry.get("id") if isinstance(entry, dict) else None
            if _is_int(key) and key not in images:
                lost.add(key)
    return images, lost


def _objects(
    entries: list[Any], images: dict[int, ImageEntry], lost: set[Any], labels: dict[int, int], faults: Faults
) -> dict[int, list[Object]]:
    """The usable objects, by image id."""
    objects: dict[int, list[Object]] = {key: [] for key in images}
    seen: set[int] = set()
    for place, entry in enumerate(entries, 1):
        try:
            _require(entry, id=int, image_id=int, category_id=int, bbox=list)
            if entry["id"] in seen:
                raise Fault("duplicate annotation id", "an earlier annotation has its id too")
            seen.add(entry["id"])
            if (image := images.get(entry["image_id"])) is None:
                if entry["image_id"] in lost:
                    raise Fault("annotation of an unusable image", f"its image {entry['image_id']} cannot be used")
                raise Fault("unknown image id", f"its image_id {entry['image_id']} is not in 'images'")
            if entry["category_id"] not in labels:
                raise Fault("unknown category", f"its category_id {entry['category_id']} is not in 'categories'")
            objects[image.id].append(_object(entry, image, labels[entry["category_id"]]))
        except Fault as fault:
            faults.add(_name("annotation", "annotations", place, entry), fault)
    return objects


def _object(entry: Entry, image: ImageEntry, label: int) -> Object:
    box = _box(entry["bbox"], image.width, image.height)
    area = entry.get("area", (box[2] - box[0]) * (box[3] - box[1]))
    if not is_number(area) or area <= 0:
        raise Fault("area that is not positive", f"its area is {short(area)}")
    crowd = entry.get("iscrowd", 0)
    if not isinstance(crowd, int) or crowd not in (0, 1):
        raise Fault("wrong type", f"its iscrowd is {short(crowd)}, not 0 or 1")
    segmentation = entry.get("segmentation")
    if segmentation is not None and segmentation != []:
        check_segmentation(segmentation, image.height, image.width)
    return box, label, area, bool(crowd), segmentation or None


def _box(bbox: list[Any], image_width: int, image_height: int) -> list[float]:
    """x1, y1, x2, y2, clipped to the image."""
    if len(bbox) != 4 or not all(map(is_number, bbox)):
        raise Fault("malformed box", f"its bbox {short(bbox)} is not four finite numbers x, y, width, height")
    x, y, width, height = bbox
    if width <= 0 or height <= 0:
        raise Fault("box without area", f"its bbox {bbox} has width {width} and height {height}: both must be above 0")
    box = [max(x, 0), max(y, 0), min(x + width, image_width), min(y + height, image_height)]
    reach = max(-x, -y, x + width - image_width, y + height - image_height)
    if reach > MARGIN or box[0] >= box[2] or box[1] >= box[3]:
        where = f"outside its image of {image_width} x {image_height}"
        raise Fault("box outside the image", f"its bbox {bbox} reaches {reach:g} pixels {where}")
    x1, y1, x2, y2 = torch.tensor(box, dtype=torch.float32).tolist()
    if x1 >= x2 or y1 >= y2:
        raise Fault("box without area", f"its bbox {bbox} is too thin for float32")
    return box


def _instances(objects: list[Object]) -> Instances:
    boxes, labels, areas, crowd, segmentations = zip(*objects, strict=True) if objects else ((), (), (), (), ())
    return Instances(
        torch.tensor(boxes, dtype=torch.float32).view(-1, 4),
        torch.tensor(labels, dtype=torch.int64),
        torch.tensor(areas, dtype=torch.float32),
        torch.tensor(crowd, dtype=torch.bool),
        segmentations,
    )


def _require(entry: Any, **types: type) -> None:
    """Raises Fault unless the entry is an object with these keys, of these types."""
    if not isinstance(entry, dict):
        raise Fault("wrong type", f"it is {short(entry)}, not an object")
    for key, kind in types.items():
        if key not in entry:
            raise Fault("missing key", f"it has no '{key}'")
        if not (_is_int(entry[key]) if kind is int else isinstance(entry[key], kind)):
            raise Fault("wrong type", f"its {key} is {short(entry[key])}, not of type {kind.__name__}")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _name(what: str, listed: str, place: int, entry: Any) -> str:
    """Which entry it is: its id, its place in the file, and the image it belongs to."""
    known = entry if isinstance(entry, dict) else {}
    of = "".join(f", {key} {short(known[key])}" for key in ("file_name", "image_id") if key in known)
    own = f"{what} {short(known['id'])}" if "id" in known else f"{what} without an id"
    return f"{own} (number {place} in '{listed}'{of})"
