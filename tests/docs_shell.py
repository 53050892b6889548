"""Reads the shell commands of a page as a shell and the command line would, and runs none of them."""

import ast
import inspect
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

from typer.main import get_command

import anybatch as ab
from anybatch.cli import app

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BESIDE_THE_TABLE = {"all", "frozen", "released", "syncbn"}  # methods that single commands know
FOREIGN = {"git", "cd", "source"}


def commands(block: str) -> Iterator[list[str]]:
    """The commands of a block, word by word; comments left out, lines joined, variables put in."""
    variables: dict[str, str] = {}
    for line in block.replace("\\\n", " ").splitlines():
        line = re.sub(r"^\$ ", "", line)
        for name, value in variables.items():
            line = re.sub(rf"\${name}\b", value, line)
        words = shlex.split(line, comments=True)
        while words and (assigned := re.fullmatch(r"([A-Z_]+)=(.*)", words[0])):
            variables[assigned[1]] = assigned[2]
            words = words[1:]
        if words:
            yield words


def check(words: list[str]) -> None:
    """An error if a command of this project would not take these words."""
    program, rest = words[0].removeprefix(".venv/bin/"), words[1:]
    if program == "anybatch":
        check_anybatch(rest)
    elif program == "torchrun":
        options, module, rest = rest[: rest.index("-m")], rest[rest.index("-m") + 1], rest[rest.index("-m") + 2 :]
        assert all(re.fullmatch(r"--nproc-per-node(=\d+)?|\d+", option) for option in options), words
        assert module == "anybatch", words
        check_anybatch(rest)
    elif program in ("python", "python3"):
        check_python(rest)
    elif program == "pip":
        assert rest[0] == "install", words
        for target in re.findall(r"(?:\.|anybatch)\[([\w,]+)\]", " ".join(rest)):
            assert set(target.split(",")) <= set(PROJECT["optional-dependencies"]), words
    elif program == "make":
        makefile = (ROOT / "Makefile").read_text()
        assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in rest if "=" not in target), words
    elif program == "pytest":
        assert all((ROOT / word.partition("::")[0]).exists() for word in rest if word.startswith("tests/")), words
    else:
        assert program in FOREIGN or (ROOT / program).is_file(), f"what is {program!r}? teach tests/docs_shell.py"


def check_anybatch(words: list[str]) -> None:
    """By the command line's own parser, and its methods by the table."""
    group = get_command(app)
    if words in (["--help"], ["--version"]):
        return
    assert words[0] in group.commands, words
    context = group.commands[words[0]].make_context(words[0], words[1:])
    method = context.params.get("method") or []
    for text in [method] if isinstance(method, str) else method:
        check_method(text)


def check_method(text: str) -> None:
    """A method of the table with options that it has, or one that single commands know."""
    name, _, rest = text.strip().partition("(")
    if name in BESIDE_THE_TABLE:
        return
    assert name in ab.METHODS, text
    call = ast.parse(f"f({rest}" if rest else "f()", mode="eval").body
    assert isinstance(call, ast.Call), text
    assert {keyword.arg for keyword in call.keywords} <= set(inspect.signature(ab.METHODS[name].make).parameters), text


def check_python(words: list[str]) -> None:
    """A module or file of the repository, or one of Python's own."""
    if words[0] == "-m" and words[1] == "tests.with_torchvision":
        check_python(words[2:]) if words[2] == "-m" else check_anybatch(words[2:])
    elif words[0] == "-m" and words[1] not in ("venv", "build", "pip", "pytest", "anybatch"):
        module = ROOT / words[1].replace(".", "/")
        assert module.with_suffix(".py").is_file() or (module / "__main__.py").is_file(), words
    elif words[0] != "-m":
        assert (ROOT / words[0]).is_file(), words
