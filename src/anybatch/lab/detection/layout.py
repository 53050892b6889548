"""Where a COCO-format folder keeps its annotation files and its images."""

from pathlib import Path

from anybatch.errors import AnybatchError

__all__ = ["find"]

TRAIN, VAL = ("train",), ("val", "valid", "test")

# Per split name: an annotation file, and the folders its images may lie in, the first that is there.
LAYOUTS = (
    ("annotations/instances_{}2017.json", ("{}2017", "images/{}2017", "images")),
    ("annotations/instances_{}.json", ("{}", "images/{}", "images")),
    ("annotations/{}.json", ("{}", "images/{}", "images")),
    ("instances_{}.json", ("{}", "images/{}", "images")),
    ("{}.json", ("{}", "images/{}", "images")),
    ("{}/_annotations.coco.json", ("{}",)),  # Roboflow's
)

Pair = tuple[Path, Path]


def find(folder: Path) -> tuple[Pair, Pair]:
    """The annotation file and the image folder to train on, then those to evaluate on.

    The layout of the first annotation file in `LAYOUTS` that is there counts, for either split; what to evaluate on
    may be called val, valid or test, and the first of these that is there counts.

    Raises:
        AnybatchError: there is no such folder, or no annotation file, or no folder with its images.
    """
    if not folder.is_dir():
        raise AnybatchError(f"there is no folder {folder}: give one with COCO-format annotations and images")
    return _pair(folder, TRAIN), _pair(folder, VAL)


def _pair(folder: Path, names: tuple[str, ...]) -> Pair:
    for name in names:
        for file, image_folders in LAYOUTS:
            path = folder / file.format(name)
            if not path.is_file():
                continue
            candidates = [folder / images.format(name) for images in image_folders]
            for candidate in candidates:
                if candidate.is_dir():
                    return path, candidate
            looked = ", ".join(str(candidate.relative_to(folder)) for candidate in candidates)
            raise AnybatchError(f"{path} has no folder with its images: put them into one of {looked} in {folder}")
    looked = ", ".join(file.format(name) for name in names for file, _ in LAYOUTS)
    raise AnybatchError(f"{folder} has no annotations to {_purpose(names)}: looked for {looked}")


def _purpose(names: tuple[str, ...]) -> str:
    return "train on" if names is TRAIN else "evaluate on"
