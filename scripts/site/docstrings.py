"""The library's docstrings as the site's Markdown: a Griffe extension.

Sections beside Google's (Shape, State, Source) become paragraphs of their own, Sphinx' roles links, and what Markdown
would take for emphasis or HTML stays the character it is. What a module's first lines explain, the method's page does.
"""

import re
from typing import Any

import griffe

SECTION = re.compile(r"^(Shape|State|Source): (.+(?:\n {4,}\S.*)*)", re.MULTILINE)
ROLE = re.compile(r":(?:class|func|meth|mod|attr):`([\w.]+)`")
CODE = re.compile(r"(``.+?``|`[^`\n]+`|(?<=\n\n)(?: {4,}.+\n?)+)")


class Docstrings(griffe.Extension):
    """Rewrites every docstring as it is read."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring and not obj.is_alias:
            obj.docstring.value = mended(obj.docstring.value)


def mended(text: str) -> str:
    """A docstring whose text is Markdown."""
    text = text.replace("at the top of this file", "on the method's page")
    text = SECTION.sub(lambda found: f"**{found[1]}:** " + re.sub(r"\n +", "\n", found[2]), text)
    text = ROLE.sub(lambda found: linked(found[1]), text)
    bold = text.replace("**", "\0")
    parts = CODE.split(bold)
    parts[::2] = [re.sub(r"(?<!\\)\*", r"\\*", part).replace("<", "&lt;") for part in parts[::2]]
    return "".join(parts).replace("\0", "**")


def linked(name: str) -> str:
    """A name that a role gives: a link where it is public, and as it is used."""
    short = name.removeprefix("anybatch.")
    return f"`{name}`" if short == name else f"[`ab.{short}`][{name}]"
