import re
from pathlib import Path

import pytest
from rich.console import Console

from anybatch.errors import AnybatchError
from anybatch.lab import plots
from anybatch.lab.report import difference_text, write_report
from anybatch.lab.statistics import Estimate
from anybatch.lab.summary import Summary, label, summarise
from anybatch.lab.training import RunResult
from anybatch.reporting import style

from . import lab_fakes

PAPER = "cbn-paper(burn_in_steps='1/3')"
METHODS = ("bn", "cbn", PAPER)


def results(seeds: int = 3) -> list[RunResult]:
    accuracies = {
        ("bn", 32): (81.0, 82.0, 81.6),
        ("bn", 1): (40.0, 42.0, 38.0),
        ("cbn", 1): (80.9, 82.3, 81.5),
        ("cbn", 4): (80.0, 81.2, 80.5),
        (PAPER, 1): (69.0, 70.0, 69.8),
    }
    return [
        lab_fakes.result(m, b, s, accuracy)
        for (m, b), row in accuracies.items()
        for s, accuracy in enumerate(row[:seeds])
    ]


def text(summary: Summary) -> str:
    return " ".join(summary.conclusions).replace("\N{NO-BREAK SPACE}", " ").replace("\N{MINUS SIGN}", "-")


def test_labels() -> None:
    assert label("bn") == "BatchNorm"
    assert label(PAPER) == "CBN as released (burn-in 1/3)"
    assert label("cbn(window=16, pooling='equal')") == "CBN (window 16, pooling equal)"
    assert label("something-new") == "something-new"


def test_rows_come_in_order_with_paired_differences() -> None:
    summary = summarise(reversed(results()), METHODS)
    assert [(row.method, row.batch) for row in summary.rows] == [
        ("bn", 32),
        ("bn", 1),
        ("cbn", 1),
        ("cbn", 4),
        (PAPER, 1),
    ]
    assert summary.rows[0].difference is None
    cbn = summary.rows[2]
    assert cbn.accuracy.mean == pytest.approx(81.5667, abs=1e-3)
    assert cbn.difference.mean == pytest.approx((-0.1 + 0.3 - 0.1) / 3)
    assert cbn.difference.half_width < cbn.accuracy.half_width


def test_conclusions_follow_from_the_numbers() -> None:
    said = text(summarise(results(), METHODS))
    assert "At batch 1, BatchNorm reaches 40.0 %, 41.5 points below BatchNorm at batch 32 " in said
    assert "(95 % interval -46.1 to -36.9, 3 seeds, paired)" in said
    assert "CBN, the best of 2 other methods there, reaches 81.6 %: no difference from BatchNorm at batch 32" in said


def test_one_seed_is_a_hint() -> None:
    said = text(summarise(results(seeds=1), METHODS))
    assert "on one seed: no interval, so take it as a hint" in said
    assert "±" not in said


def test_a_wide_interval_is_no_equality() -> None:
    rows = [lab_fakes.result("bn", 32, s, a) for s, a in enumerate((80.0, 81.0))]
    rows += [lab_fakes.result("cbn", 1, s, a) for s, a in enumerate((70.0, 81.5))]
    assert "too few seeds to tell from BatchNorm at batch 32" in text(summarise(rows))


def test_without_reference_or_with_divergence() -> None:
    assert "nothing to conclude" in text(summarise([lab_fakes.result("cbn", 1)]))
    said = text(summarise([*results(), lab_fakes.result("gn", 1, 0, None)]))
    assert "Diverged, and not in any mean: GroupNorm at batch 1." in said
    all_diverged = summarise([lab_fakes.result("bn", 32), lab_fakes.result("bn", 1, 0, None)])
    assert "At batch 1, BatchNorm diverged." in text(all_diverged)


def test_difference_text() -> None:
    assert difference_text(None) == "–"
    assert difference_text(Estimate(-0.04, 0.3, 3)) == "0.0 ± 0.3"
    assert difference_text(Estimate(-2.0, None, 1)) == "\N{MINUS SIGN}2.0"


def test_report_is_whole_and_stands_alone(tmp_path: Path) -> None:
    summary = summarise(results(), METHODS)
    path = write_report(tmp_path, summary, results(), "anybatch compare --method 'a<b>'", ["CBN at batch 2 (failed)"])
    page = path.read_text(encoding="utf-8")
    for expected in (
        "81.5 ± 1.3",
        "40.0 ± 5.0",
        "a &lt;cpu&gt;",
        "0123456789ab",
        "a&lt;b&gt;",
        "CBN at batch 2 (failed)",
    ):
        assert expected in page
    assert not re.search(r'(src|href)="(?!#)', page)  # nothing from outside: only marks within the figures
    assert "@import" not in page
    assert page.count("<svg") == 2
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert not any(colour in page[page.index("<body>") :] for colour in style.LIGHT)
    assert (tmp_path / "accuracy.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "accuracy.svg").read_text().startswith("<svg")


@pytest.mark.parametrize("runs", [results(1)[:1], results(1)[1:], [lab_fakes.result("bn", 1, 0, None)]])
def test_report_of_part_of_the_runs(tmp_path: Path, runs: list[RunResult]) -> None:
    assert write_report(tmp_path, summarise(runs), runs, "anybatch compare").exists()


def test_report_on_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(AnybatchError, match=r"the report cannot be written .* the runs in runs.jsonl are safe"):
        write_report(tmp_path / "gone", summarise(results()), results(), "anybatch compare")


def test_same_numbers_same_figure() -> None:
    summary = summarise(results(), METHODS)
    assert style.svg(plots.accuracy_figure(summary)) == style.svg(plots.accuracy_figure(summary))


def test_many_methods_get_a_panel_each() -> None:
    """Each under its name, on shared scales; one that diverged everywhere has its panel too."""
    methods = ["bn", "cbn", "gn", *(f"cbn(window={w})" for w in (2, 3, 4, 5, 6))]
    runs = [lab_fakes.result("bn", 32, 0, 81.0)]
    runs += [lab_fakes.result(m, b, 0, None if m == "gn" else 70.0 + b) for m in methods for b in (1, 4)]
    summary = summarise(runs, methods)
    for figure in (plots.accuracy_figure(summary), plots.curves_figure(summary, runs)):
        shown = [axes for axes in figure.axes if axes.get_visible()]
        assert [axes.get_title(loc="left").replace("\n", " ") for axes in shown] == [label(m) for m in methods]
        assert len({axes.get_ylim() for axes in shown}) == 1
        assert style.png(figure).startswith(b"\x89PNG")


def test_display_without_a_terminal_is_plain_lines() -> None:
    from anybatch.lab.display import Display

    console = Console(record=True, width=100)
    display = Display(console, 2)
    result = lab_fakes.result("cbn", 1)
    with display.showing({result.config: 100}, {result.config: 1.0}, 3):
        display.start(result.config)
        display.advance(result.config, lab_fakes.progress(50))
        display.finish(result.config, result)
    assert "1 runs to do, 3 already done; 2 at a time" in console.export_text(clear=False)
    assert "[1/1] CBN at batch 1, seed 0" in console.export_text()
