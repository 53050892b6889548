"""Every block of code on the site is covered by a test, and the site builds without a broken link."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.main import get_command
from typer.testing import CliRunner

import anybatch as ab
from anybatch.cli import app
from anybatch.lab.recipes import read_recipe
from anybatch.lab.studies.reading import read_study

from . import test_extend, test_hosts, test_readme
from .docs_pages import ROOT, Block, blocks, inline_commands, pages
from .docs_shell import check, commands

BLOCKS = [block for page in pages() for block in blocks(page)]


def in_language(*languages: str) -> list[Any]:
    return [pytest.param(block, id=str(block)) for block in BLOCKS if block.language in languages]


# Python


def test_every_python_block_is_run_by_one_test() -> None:
    """By test_readme.py with a reader's model and loader, by test_hosts.py alone, by test_extend.py in a copy."""
    run = {
        *(block.id for block in test_readme.BLOCKS),
        *(f"docs/hosts/{host}.md:{i}" for host in test_hosts.HOSTS for i in range(len(test_hosts.blocks(host)))),
        *(f"docs/extend.md:{i}" for i in range(len(test_extend.BLOCKS))),
    }
    assert run == {f"{block.page}:{block.number}" for block in BLOCKS if block.language == "python"}


def test_there_is_no_block_that_nothing_covers() -> None:
    """What is no code at all, such as what a command prints, says ``text``."""
    assert {block.language for block in BLOCKS} <= {"python", "py", "sh", "console", "toml", "text"}
    assert {block.page for block in BLOCKS if block.language == "py"} <= set(COMPANY)


class Detector(nn.Module):
    """A frozen body under the names of torchvision's detectors, and a loss."""

    def __init__(self) -> None:
        super().__init__()
        from torchvision.models import resnet18
        from torchvision.ops import FrozenBatchNorm2d

        self.backbone = nn.Module()
        self.backbone.body = resnet18(norm_layer=FrozenBatchNorm2d)

    def forward(self, images: list[Tensor], targets: Any = None) -> Tensor:
        return self.backbone.body(torch.stack(images)).mean()


def of_a_detector() -> dict[str, Any]:
    from torchvision.models import resnet18

    return {
        "ab": ab,
        "torch": torch,
        "model": Detector(),
        "images": [torch.rand(3, 64, 64)],
        "targets": [{}],
        "resnet18": resnet18,
    }


def of_a_volume() -> dict[str, Any]:
    from monai.networks.nets import UNet

    shape = dict(in_channels=1, out_channels=2, channels=(4, 8), strides=(2,), num_res_units=1)
    return {"UNet": UNet, "shape": shape, "volume": torch.randn(1, 1, 16, 16, 16)}


# Of pages with blocks in ``py``, which go on from code around them: what they find there.
COMPANY: dict[str, Callable[[], dict[str, Any]]] = {
    "docs/training.md": test_readme.company,
    "docs/guides/devices.md": test_readme.company,
    "docs/hosts/README.md": of_a_detector,
    "docs/hosts/torchvision.md": of_a_detector,
    "docs/hosts/monai.md": of_a_volume,
}


@pytest.mark.parametrize("block", in_language("py"))
def test_code_in_company_runs(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    """On one process, where it speaks of several; that several do what one does is test_ddp.py's."""
    one = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    for name, value in one.items():
        monkeypatch.setenv(name, value)
    names = {"__name__": "example", **COMPANY[block.page]()}
    try:
        exec(compile(block.code, str(block), "exec"), names)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


# Commands


@pytest.mark.parametrize("block", in_language("sh", "console"))
def test_commands_parse(block: Block) -> None:
    found = list(commands(block.code if block.language == "sh" else typed(block)))
    assert found
    for words in found:
        if block.page != "docs/extend.md":
            check(words)
        else:  # of a method that only its copy has
            check(["bn" if word == "l1" else word for word in words if word != "tests/test_l1.py"])


def typed(block: Block) -> str:
    return "\n".join(line for line in block.code.splitlines() if line.startswith("$ "))


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_in_running_text_parse(page: Path) -> None:
    """A command's bare name is a name, and need not have what the command asks for."""
    for line in inline_commands(page):
        for words in commands(line):
            if len(words) > 2:
                check(words)
            else:
                assert words[1].startswith("-") or words[1] in get_command(app).commands


def test_the_blocks_of_what_is_printed_are_what_is_printed() -> None:
    """But for numbers, which differ from machine to machine in their last digits."""
    shown = [block for block in BLOCKS if block.language == "console"]
    assert shown
    for block in shown:
        (words,) = commands(typed(block))
        result = CliRunner().invoke(app, words[1:], env={"COLUMNS": "200", "NO_COLOR": "1"})
        assert result.exit_code == 0, result.output
        wanted = block.code.partition("\n")[2]
        printed = (re.sub(r"\d+(\.\d+)?", "#", text.strip()) for text in (result.output, wanted))
        assert next(printed) == next(printed)


@pytest.mark.parametrize("block", in_language("toml"))
def test_recipes_and_studies_are_read(block: Block, tmp_path: Path) -> None:
    """As the command that takes such a file reads it, which refuses what it does not know."""
    reader: dict[str, Callable[[Path], object]] = {"docs/recipes.md": read_recipe, "docs/study.md": read_study}
    file = tmp_path / "of-a-page.toml"
    file.write_text(block.code)
    assert reader[block.page](file)


# Pages


METHOD_PAGES = {page.stem for page in (ROOT / "docs" / "methods").glob("*.md")} - {"README"}


@pytest.mark.parametrize("name", sorted(METHOD_PAGES))
def test_a_methods_page_has_all_of_it(name: str) -> None:
    text = (ROOT / "docs" / "methods" / f"{name}.md").read_text()
    assert "arxiv.org" in text
    assert "```python\n" in text
    for heading in ("What it computes", "What it costs", "When not to use it", "In our runs"):
        assert f"\n## {heading}\n" in text, heading


def test_the_table_of_methods_leads_to_every_page() -> None:
    text = (ROOT / "docs" / "methods" / "README.md").read_text()
    assert set(re.findall(r"\]\((\w[\w-]*)\.md\)", text)) == METHOD_PAGES


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` does: every warning, of a link or of the navigation, is an error."""
    out = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_the_site_builds_and_fetches_nothing(site: Path) -> None:
    built = sorted(site.rglob("*.html"))
    assert len(built) >= len(list((ROOT / "docs").rglob("*.md")))
    for page in built:
        html = page.read_text()
        assert not re.findall(r'<(?:script|img|iframe)[^>]*\ssrc="?(?:https?:)?//[^>]*>', html), page
        assert not re.findall(r'<link[^>]*rel="?stylesheet"?[^>]*href="?(?:https?:)?//[^>]*>', html), page


def test_pages_are_rendered_whole(site: Path) -> None:
    """No Markdown is left over in the text of a page."""
    for page in site.rglob("*.html"):
        text = page.read_text().partition("<article")[2].partition("</article>")[0]
        text = re.sub(r"<(pre|code)\b.*?</\1>|<[^>]+>", "", text, flags=re.DOTALL)
        assert not re.findall(r"```|\]\(|\*\*|^:::", text, re.MULTILINE), page


def test_the_reference_has_every_public_name(site: Path) -> None:
    ids = set(re.findall(r'id="(anybatch\.[\w.]+)"', "".join(p.read_text() for p in (site / "api").glob("*.html"))))
    functions = {f"anybatch.{name}" for name in ab.__all__} - {"anybatch.METHODS", "anybatch.kernels", "anybatch.nn"}
    assert functions | {f"anybatch.nn.{name}" for name in ab.nn.__all__} | {"anybatch.kernels.use"} <= ids
