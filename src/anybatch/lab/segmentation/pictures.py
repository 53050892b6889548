"""Pictures of what a segmenter finds: the image, the mask, the answer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from anybatch.lab.segmentation.examples import IGNORE, Example
from anybatch.reporting.files import write_atomically
from anybatch.reporting.style import MUTED, SERIES, STYLE, png

__all__ = ["draw"]

Pixels = npt.NDArray[Any]

FILE = "segmented.png"
CAPTION = "Test examples, their masks, and what the trained network makes of them"


def draw(
    examples: Sequence[Example], found: Sequence[Tensor], classes: tuple[str, ...], folder: Path
) -> dict[str, str]:
    """Writes one picture, a row an example; of a volume, the slice with the most foreground.

    Args:
        examples: to show.
        found: the class of each of their pixels.
        classes: their names.
        folder: to write to.

    Returns:
        The file's name by its caption.
    """
    colours = ListedColormap([SERIES[place % len(SERIES)] for place in range(max(len(classes) - 1, 1))])
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 2.4 * len(examples) + 0.6), layout="constrained")
        grid = figure.subplots(len(examples), 3, squeeze=False)
        for row, each, answer in zip(grid, examples, found, strict=True):
            for axes, painted in zip(row, (None, each.mask, answer), strict=True):
                _panel(axes, each, painted, colours, len(classes))
        for axes, title in zip(grid[0], ("image", "mask", "found"), strict=True):
            axes.set_title(title, loc="left", fontsize=12, color=MUTED)
        keys = [Patch(color=colours(place), label=name) for place, name in enumerate(classes[1:])]
        figure.legend(handles=keys, loc="outside lower left", ncols=4, frameon=False, fontsize=10.5)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / FILE, png(figure))
    return {CAPTION: FILE}


def _panel(axes: Axes, each: Example, painted: Tensor | None, colours: ListedColormap, classes: int) -> None:
    image, *masks = _planes(each, painted)
    axes.imshow(_grey(image), cmap="gray", interpolation="nearest")
    for mask in masks:
        shown = np.ma.masked_where((mask == 0) | (mask == IGNORE), mask)
        axes.imshow(shown, cmap=colours, vmin=0.5, vmax=classes - 0.5, alpha=0.7, interpolation="nearest")
    axes.set_axis_off()


def _planes(each: Example, painted: Tensor | None) -> list[Pixels]:
    """The mean of the image's channels, and what is painted on it; of a volume, one slice, anterior up."""
    planes = [each.image.float().mean(0), *([] if painted is None else [painted])]
    if each.mask.dim() == 2:
        return [plane.numpy() for plane in planes]
    foreground = (each.mask > 0) & (each.mask != IGNORE)
    place = int(foreground.sum((0, 1)).argmax())
    return [np.rot90(plane[..., place].numpy()) for plane in planes]


def _grey(plane: Pixels) -> Pixels:
    """0 to 1 between the first and the last percent of the values."""
    low, high = np.percentile(plane, (1, 99))
    shades: Pixels = np.clip((plane - low) / max(high - low, 1e-6), 0, 1)
    return shades
