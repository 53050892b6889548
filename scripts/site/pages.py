"""Pages of the site: what stands at the repository's root is included, and links lead where the site has the page.

``<!-- include: CHANGELOG.md -->`` on a line of its own is replaced by that file. Links that lead out of docs/ lead to
the site's page of that file, if it has one; else the bare name in the repository is left of them. Studies that
`anybatch study --publish` has written come into the navigation by themselves.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
# Pages of the site for files outside of docs/.
ON_THE_SITE = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
INCLUDE = re.compile(r"^<!-- include: (\S+) -->$", re.MULTILINE)
LINK = re.compile(r"(?<!!)\[((?:[^\[\]`]|`[^`]*`)+)\]\(([^()\s#]*)(#[^()\s]*)?\)")


def on_config(config: Any) -> None:
    """The published studies, below the page that says what a study is."""
    published = sorted((ROOT / "docs" / "results" / "studies").glob("*.md"))
    results = next(section["Results"] for section in config.nav if "Results" in section)
    study = results.index({"The study": "study.md"})
    results[study + 1 : study + 1] = [f"results/studies/{page.name}" for page in published]


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """The page's text with files included and links mended."""
    source = page.file.src_uri
    included = INCLUDE.sub(lambda found: moved((ROOT / found[1]).read_text(encoding="utf-8"), "", source), markdown)
    return moved(included, "docs", source)


def moved(text: str, folder: str, page: str) -> str:
    """``text`` of a file in ``folder`` of the repository, as part of ``page`` of the site.

    Args:
        text: Markdown.
        folder: that its links start from: "" for the root; "docs" for the page itself.
        page: its path under docs/.
    """
    here = posixpath.dirname(page)

    def mend(link: re.Match[str]) -> str:
        label, target, anchor = link[1], link[2], link[3] or ""
        if not target or ":" in target:
            return link[0]
        path = posixpath.normpath(posixpath.join(folder, here if folder else "", target))
        if path in ON_THE_SITE:
            path, anchor = f"docs/{ON_THE_SITE[path]}", ""
        if path.startswith("docs/"):
            return f"[{label}]({posixpath.relpath(path.removeprefix('docs/'), here or '.')}{anchor})"
        return label if "`" in label else f"{label} (`{path}`)"

    return LINK.sub(mend, text)
