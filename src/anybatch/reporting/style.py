"""How every figure looks, and how it gets onto a page in light and dark. Colours are colour-blind safe."""

import io
import re
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

__all__ = ["DARK", "GRID", "INK", "LIGHT", "MARKERS", "MUTED", "SERIES", "STYLE", "png", "svg", "themed"]

# Ink, muted ink, grid, then one colour a method (after Okabe and Ito, darkened or lightened for contrast).
# Both themes list the same roles: `themed` makes one into the other.
LIGHT = ("#1c2024", "#666d76", "#dfe2e6", "#0068b0", "#c8500a", "#00805e", "#a8478a", "#94690a", "#3d8fc0", "#6b6b6b")
DARK = ("#e9ecef", "#9aa3ad", "#343a42", "#62b5f5", "#ff9252", "#3fd0a4", "#ea9fd0", "#edc14d", "#9ad6f7", "#b9b9b9")
INK, MUTED, GRID, *SERIES = LIGHT
MARKERS = "osD^vPX"
STYLE: Any = {
    "font.family": ["DejaVu Sans", "sans-serif"],
    "font.size": 12,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "ytick.left": False,
    "svg.hashsalt": "anybatch",
}


def png(figure: Figure) -> bytes:
    """The figure on white, 200 dots an inch."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=200)
    return buffer.getvalue()


def svg(figure: Figure, transparent: bool = False, prefix: str = "") -> str:
    """The figure as an <svg> element, text as outlines, without a date: the same numbers give the same bytes.

    Args:
        figure: what to draw.
        transparent: leave out the white ground.
        prefix: of every id in it, so that several fit into one page.
    """
    buffer = io.StringIO()
    with mpl.rc_context(STYLE):
        figure.savefig(buffer, format="svg", transparent=transparent, metadata={"Date": None})
    drawn = re.sub(r' id="image\w+"', "", buffer.getvalue())  # of what the image shows: two alike would share it
    text = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{prefix}", drawn)
    return text[text.index("<svg") :]


def themed(element: str) -> str:
    """The <svg> element for a page: as wide as its place, the colours of LIGHT as CSS variables --c0, --c1, ..."""
    for place, colour in enumerate(LIGHT):
        element = element.replace(colour, f"var(--c{place})")
    return re.sub(r' (width|height)="[^"]*pt"', "", element, count=2)
