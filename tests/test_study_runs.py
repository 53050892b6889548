"""anybatch study runs, resumes and shares its runs, writes its page and publishes it."""

import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from anybatch.cli import app
from anybatch.errors import AnybatchError
from anybatch.lab import compare
from anybatch.lab.config import ClassifyConfig
from anybatch.lab.results import RUNS
from anybatch.lab.studies.figure import study_figure
from anybatch.lab.studies.page import page
from anybatch.lab.studies.planning import runs
from anybatch.lab.studies.publishing import publish, published_runs, published_study
from anybatch.lab.studies.reading import read_study
from anybatch.lab.tasks import open_task
from anybatch.lab.training import run_key
from anybatch.lab.workers import Event, Failed, Finished, Started

from .lab_fakes import interrupted, result
from .study_files import ROOT, TINY, VARY, is_a_picture, made_up, publish_tiny, run, work_here, written

PUBLISHED = sorted((ROOT / "docs" / "results" / "studies").glob("*.jsonl"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return work_here(tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return publish_tiny(tmp_path_factory.mktemp("published"))


def test_a_study_runs_resumes_and_shares_its_runs(folder: Path) -> None:
    written(folder, TINY)
    code, output = run("tiny.toml", "--jobs", "1", "--seeds", "1")
    assert code == 0
    assert "Tiny. Does it run?" in output
    assert "4 runs to do; 1 at a time" in output
    out = folder / "results" / "studies"
    assert is_a_picture(out / "tiny.png")
    assert (out / "tiny.svg").read_text().startswith("<svg")
    text = (out / "tiny.md").read_text()
    assert "anybatch study tiny.toml --seeds 1\n" in text
    assert "| BatchNorm | " in text
    assert "runs are finished" not in text
    before = (out / RUNS).read_bytes()

    code, output = run("tiny.toml", "--seeds", "1")
    assert (code, (out / RUNS).read_bytes()) == (0, before)
    assert "0 runs to do, 4 already done" in output

    # Another study of the same base: its reference and what else they share is there; what compare finds, too.
    written(folder, TINY.replace('"cbn"', '"gn(groups=4)"').replace("[16, 32]", "[16]"), "other")
    code, output = run("other.toml", "--seeds", "1")
    assert "1 runs to do, 2 already done" in output
    typed = [
        "compare",
        "--train-images",
        "64",
        "--test-images",
        "100",
        "--epochs",
        "1",
        "--seeds",
        "1",
        "--method",
        "bn",
    ]
    done = CliRunner().invoke(app, [*typed, "--batch", "16", "--out", str(out)], env={"NO_COLOR": "1"})
    assert "0 runs to do, 2 already done" in done.output


def test_varied_runs_have_their_own_reference_in_the_tables(folder: Path) -> None:
    study = read_study(written(folder, TINY + VARY))
    results = [
        replace(each, accuracy=(each.accuracy or 0) - (20 if each.config.lr == 0.05 else 0)) for each in made_up(study)
    ]
    text = page(study, results)
    (row,) = {line for line in text.splitlines() if line.startswith("| **reference** ")}
    assert row == "| **reference** | 58.2 ± 3.2 | 78.2 ± 3.2 |"
    assert "| CBN | −4.00 ± 0.00 | −4.00 ± 0.00 |" in text  # at batch 16, paired at each rate
    assert "learning rate 0.05: At batch 16, BatchNorm reaches" in text
    assert len(study_figure(study, results).axes) == 2


def test_a_page_counts_what_diverged_and_what_is_missing(folder: Path) -> None:
    study = read_study(written(folder))
    results = made_up(study)
    first = next(place for place, each in enumerate(results) if each.config.method == "cbn")
    results[first] = replace(results[first], accuracy=None, status="diverged")
    text = page(study, results[:-1], seeds=2)
    assert f"**{len(results) - 1} of {len(results)} runs are finished.**" in text
    assert "(1 of 2 diverged)" in text
    assert "(1 seed)" in text


def test_the_page_says_all_that_is_needed_to_make_it_again(folder: Path) -> None:
    study = read_study(written(folder))
    facts = {"machine": {"cpu": "one"}, "versions": {"torch": "2.13"}, "commit": "abc", "date": "2026-01-02T03:04:05"}
    results = [replace(each, facts=facts) for each in made_up(study)]
    results[0] = replace(results[0], facts={**facts, "machine": {"cpu": "two"}, "commit": "def"})
    text = page(study, results)
    for line in ("| seeds | 0, 1 |", "| cpu | two, one |", "| torch | 2.13 |", "| dates | 2026-01-02 to 2026-01-02 |"):
        assert line in text
    assert f"| commit | def (1 runs), abc ({len(results) - 1} runs) |" in text
    assert "```sh\nanybatch study tiny.toml\n```" in text
    assert "- `cbn`: `<" in text


def test_nothing_is_run_without_data_and_the_error_says_how_to_get_them(folder: Path) -> None:
    text = TINY.replace("[base]", 'get = "git clone somewhere"\n[base]\ndata = "some-images"')
    written(folder, text)
    written(folder, text.replace('get = "git clone somewhere"\n', ""), "unsaid")
    code, output = run("tiny.toml")
    assert code == 2
    assert "study tiny: there is no data folder 'some-images' here: get it with: git clone somewhere" in output
    assert "make it, or change 'data' in unsaid.toml" in run("unsaid.toml")[1]
    assert not (folder / "results").exists()


def test_a_failed_run_leaves_a_page_and_nothing_is_published(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def some_fail(configs: Sequence[ClassifyConfig], jobs: int, pictures: Path) -> Iterator[Event]:
        fake = {config: replace(result(), config=config, key=run_key(open_task(config))) for config in configs}
        for config in configs:
            yield Started(config)
            yield Failed(config, "no memory") if config.method == "cbn" else Finished(config, fake[config])

    monkeypatch.setattr(compare, "run_all", some_fail)
    written(folder)
    code, output = run("tiny.toml", "--publish", "there")
    assert code == 1
    assert "4 of 8 runs failed; the same command tries them again; a study is published when it is whole." in output
    assert "**4 of 8 runs are finished.**" in (folder / "results" / "studies" / "tiny.md").read_text()
    assert not (folder / "there").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_ctrl_c_leaves_a_page_of_what_is_done_and_the_same_command_goes_on(folder: Path) -> None:
    written(folder, TINY.replace('"cbn"', '"cbn", "ghost"').replace("[16, 32]", "[1, 2, 4, 8, 16, 32]"))
    command = [sys.executable, "-m", "anybatch", "study", "tiny.toml", "--jobs", "1", "--publish", "there"]
    code, rest = interrupted(command, "[1/", limit=300)
    assert code == 130
    assert "Traceback" not in rest
    assert re.search(r"[12] of 36 runs are finished and safe in results/studies; a study is published when", rest)
    assert "To go on: anybatch study tiny.toml --jobs 1 --publish there" in rest
    out = folder / "results" / "studies"
    assert "of 36 runs are finished.**" in (out / "tiny.md").read_text()
    done = len(published_runs(out / RUNS))

    written(folder, TINY.replace("[16, 32]", "[32]").replace("seeds = 2", "seeds = 1"))
    code, rest = run(*command[4:])
    assert code == 0
    assert re.search(rf"[01] runs to do, {done} already done", rest)
    assert len(published_runs(folder / "there" / "tiny.jsonl")) == 2


@pytest.mark.parametrize("file", [*PUBLISHED, None], ids=lambda file: file.stem if file else "tiny")
def test_published_pages_are_what_the_published_runs_make(file: Path | None, published: Path) -> None:
    file = file or published / "tiny.jsonl"
    study, results = published_study(file), published_runs(file)
    assert file.with_suffix(".md").read_text(encoding="utf-8") == page(study, results)
    seeds = 1 + max(each.config.seed for each in results)
    assert [each.config for each in results] == runs(study, seeds, results[0].config.device)
    assert is_a_picture(file.with_suffix(".png"))
    assert file.with_suffix(".svg").read_text(encoding="utf-8").startswith("<svg")


def test_a_page_with_another_number_is_not_what_the_runs_make(published: Path) -> None:
    study, results = published_study(published / "tiny.jsonl"), published_runs(published / "tiny.jsonl")
    other = [replace(results[0], accuracy=99.0), *results[1:]]
    assert page(study, other) != (published / "tiny.md").read_text()


def test_publishing(folder: Path, published: Path) -> None:
    path = written(folder)
    out = folder / "results" / "studies"
    out.mkdir(parents=True)
    lines = (published / "tiny.jsonl").read_text().splitlines()
    foreign = json.loads(lines[0]) | {"key": "0" * 16}
    (out / RUNS).write_text("\n".join([*reversed(lines), json.dumps(foreign)]) + "\n")
    code, output = run("tiny.toml", "--publish", "there")
    assert code == 0
    assert "Published: there/tiny.md" in output
    there = folder / "there"
    assert sorted(each.name for each in there.iterdir()) == [f"tiny.{e}" for e in ("jsonl", "md", "png", "svg", "toml")]
    for suffix in ("jsonl", "md"):
        assert (there / f"tiny.{suffix}").read_text() == (published / f"tiny.{suffix}").read_text()
    assert (there / "tiny.toml").read_text() == path.read_text()


def test_what_cannot_be_published(folder: Path) -> None:
    code, output = run(str(written(folder)), "--seeds", "1", "--publish", "there")
    assert code == 2
    assert "--publish takes the 2 seeds that tiny.toml says: leave out --seeds 1" in output
    study = read_study(written(folder, TINY, "window"))
    with pytest.raises(AnybatchError, match=r"window.toml has the name of a study in the package: rename it"):
        publish(folder / "there", study, made_up(study))
    study = read_study(written(folder))
    (folder / "taken").write_text("a file")
    with pytest.raises(AnybatchError, match=r"the study's page cannot be written to .*taken .*the runs are safe"):
        publish(folder / "taken", study, made_up(study))
    (folder / "others").mkdir()
    written(folder / "others", TINY.replace('"Tiny"', '"Another"'))
    with pytest.raises(AnybatchError, match=r"others has another study named tiny, 'Another': rename .*tiny.toml"):
        publish(folder / "others", study, made_up(study))
    (folder / "there" / "tiny.toml").mkdir(parents=True)
    with pytest.raises(AnybatchError, match=r"the study cannot be published in .*there .*: allow writing there"):
        publish(folder / "there", study, made_up(study))
