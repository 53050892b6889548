"""A page that stands on its own: one file, light and dark, on paper and phone."""

from datetime import UTC, datetime
from typing import Any

import jinja2
from markupsafe import Markup
from matplotlib.figure import Figure

from . import style

__all__ = ["duration", "figure_element", "render"]


def duration(seconds: float) -> str:
    """12 -> "12 s", 192 -> "3 min 12 s", 900 -> "15 min", 7260 -> "2 h 1 min", 180000 -> "2 d 2 h"."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        parts = (seconds // 60, "min"), (seconds % 60, "s")
    elif seconds < 2 * 86400:
        parts = (seconds // 3600, "h"), (seconds % 3600 // 60, "min")
    else:
        parts = (seconds // 86400, "d"), (seconds % 86400 // 3600, "h")
    return " ".join(f"{count} {unit}" for count, unit in parts if count)


def figure_element(figure: Figure, prefix: str, scale: float | None = None) -> Markup:
    """The figure as it stands on a page, in the page's colours.

    Args:
        figure: what to draw.
        prefix: of every id in it, another for each figure of a page.
        scale: rem an inch that it takes at most; None: as wide as its place.
    """
    element = style.themed(style.svg(figure, transparent=True, prefix=prefix))
    if scale is not None:
        element = element.replace("<svg", f'<svg style="max-width: {scale * figure.get_figwidth():.1f}rem"', 1)
    return Markup(element)


def render(package: str, template: str, **values: Any) -> str:
    """The page that a template makes, itself an extension of page.html.j2.

    Args:
        package: whose folder assets/ holds the template.
        template: its name.
        values: what it is filled with, besides the date and the colours.
    """
    folders = [jinja2.PackageLoader(name, "assets") for name in (package, "anybatch.reporting")]
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader(folders),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["duration"] = duration
    return environment.get_template(template).render(
        light=list(enumerate(style.LIGHT)),
        dark=list(enumerate(style.DARK)),
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        **values,
    )
