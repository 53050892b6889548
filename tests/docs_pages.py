"""The pages of the site, and the blocks of code on them."""

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
FENCE = re.compile(r"^( *)```(\S*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"(?<!`)`(anybatch [^`]+)`(?!`)")


class Block(NamedTuple):
    """One fenced block.

    Args:
        page: below the root of the repository.
        number: among the page's blocks in this language, from 0.
        language: as written after the fence.
        code: without the fence's own indentation.
    """

    page: str
    number: int
    language: str
    code: str

    def __str__(self) -> str:
        return f"{self.page}:{self.language}-{self.number}"


def pages() -> list[Path]:
    """All pages that the site shows, those of the repository's root included."""
    return [*(ROOT / f"{name}.md" for name in ("README", "CHANGELOG", "CONTRIBUTING")), *sorted(DOCS.rglob("*.md"))]


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    found, seen = [], dict[str, int]()
    for indent, language, code in FENCE.findall(page.read_text(encoding="utf-8")):
        number = seen[language] = seen.get(language, -1) + 1
        plain = re.sub(rf"^{indent}", "", code, flags=re.MULTILINE)
        found.append(Block(str(page.relative_to(ROOT)), number, language, plain))
    return found


def inline_commands(page: Path) -> list[str]:
    """What stands as `anybatch ...` in running text."""
    return [" ".join(found.split()) for found in INLINE.findall(FENCE.sub("", page.read_text(encoding="utf-8")))]
