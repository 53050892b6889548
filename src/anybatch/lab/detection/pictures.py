"""Test images with what is in them and what a detector finds."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from anybatch.lab.detection.annotations import Annotations
from anybatch.reporting import style
from anybatch.reporting.files import write_atomically

__all__ = ["SURE", "draw"]

SURE = 0.5  # what scores less is not drawn
COLUMNS = 4
RIGHT, WRONG, MISSED = style.LIGHT[5], style.LIGHT[4], style.LIGHT[6]


def draw(
    images: Sequence[Tensor], truth: Annotations, found: Sequence[dict[str, Tensor]], folder: Path
) -> dict[str, str]:
    """Draws the first images of `truth`: detections that are right or wrong, and objects that none is right for.

    A detection is right if it overlaps an object of its class by half, and no better one does. Returns the file's name
    in `folder` by its caption.
    """
    rows = -(-len(images) // COLUMNS)
    with mpl.rc_context(style.STYLE):
        figure = Figure(figsize=(10, 2.6 * rows), layout="constrained")
        grid = figure.subplots(rows, min(COLUMNS, len(images)), squeeze=False)
        for place, axes in enumerate(grid.flat):
            axes.set_axis_off()
            if place < len(images):
                axes.imshow(images[place].permute(1, 2, 0).numpy(), interpolation="nearest")
                objects = truth.instances[place]
                _boxes(axes, found[place], objects.boxes, objects.labels, truth.categories)
    write_atomically(folder / "detections.png", style.png(figure))
    caption = (
        f"What is found with a score of at least {SURE}: green right, orange wrong; pink and dashed, what is missed"
    )
    return {caption: "detections.png"}


def _boxes(axes: Axes, found: dict[str, Tensor], boxes: Tensor, labels: Tensor, categories: Sequence[str]) -> None:
    taken: set[int] = set()
    for box, label, score in zip(found["boxes"].cpu(), found["labels"].tolist(), found["scores"].tolist(), strict=True):
        if score < SURE:
            continue
        overlaps = _overlaps(box, boxes)
        match = [k for k in range(len(boxes)) if k not in taken and labels[k] == label and overlaps[k] >= 0.5]
        if match:
            taken.add(max(match, key=lambda k: float(overlaps[k])))
        _box(axes, box, RIGHT if match else WRONG, f"{categories[label - 1]} {score:.2f}")
    for place in set(range(len(boxes))) - taken:
        _box(axes, boxes[place], MISSED, categories[int(labels[place]) - 1], dashed=True)


def _overlaps(box: Tensor, boxes: Tensor) -> Tensor:
    """Intersection over union with each of `boxes`. Shape: (4,), (n, 4) -> (n,)."""
    sides = (box[2:].minimum(boxes[:, 2:]) - box[:2].maximum(boxes[:, :2])).clamp(min=0)
    common = sides.prod(1)
    return common / ((box[2:] - box[:2]).prod() + (boxes[:, 2:] - boxes[:, :2]).prod(1) - common)


def _box(axes: Axes, box: Tensor, colour: str, text: str, dashed: bool = False) -> None:
    x1, y1, x2, y2 = box.tolist()
    line = "--" if dashed else "-"
    axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, linewidth=1.4, linestyle=line))
    ground = {"facecolor": colour, "edgecolor": "none", "pad": 0.6}
    axes.text(x1, y1, text, color="white", fontsize=5.5, va="bottom", bbox=ground, clip_on=True)
