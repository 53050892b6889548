"""The table of architectures: a sample of its rows examined anew, and the page that is made of them."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from scripts import make_architectures
from scripts.architectures.examine import Reason, Result, difference, examine, read
from scripts.architectures.page import cause, page
from scripts.architectures.rows import ROWS, SAMPLE, Row
from torch import nn

from .selection import usually

KEPT = {result.key: result for result in read(make_architectures.PAGE.with_suffix(".jsonl"))}
BY_KEY = {row.key: row for row in ROWS}


@pytest.mark.parametrize("key", usually(SAMPLE[::3], SAMPLE))
def test_a_row_comes_out_as_it_was_written_down(key: str) -> None:
    found, kept = examine(BY_KEY[key]), KEPT[key]
    assert found.holds
    assert found.counts == kept.counts
    assert found.reasons == kept.reasons


def test_the_table_has_every_architecture_and_every_one_holds_or_says_why() -> None:
    assert list(KEPT) == list(BY_KEY)
    with_norms = [result for result in KEPT.values() if result.norms]
    assert len(with_norms) >= 60
    for result in KEPT.values():
        assert result.holds, result
        assert result.perfect or result.reasons
        explained = sum(reason.norms for reason in result.reasons)
        assert result.norms == 0 or result.norms - min(result.paired, result.folded) <= explained <= result.norms


def test_the_page_is_made_of_the_rows() -> None:
    assert make_architectures.PAGE.read_text() == page(list(KEPT.values()))


def test_a_reason_that_nothing_explains_is_not_passed_over() -> None:
    with pytest.raises(LookupError, match="explains 'it is Tuesday'"):
        cause("it is Tuesday")


class Net(nn.Module):
    """Slightly another where its norm is of the class ``slips``."""

    def __init__(self, slips: str = "") -> None:
        super().__init__()
        self.conv, self.bn, self.slips = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), slips

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.bn(self.conv(x))
        return out + 1e-2 * (type(self.bn).__name__ == self.slips)


class Diverges(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = super().forward(x)
        return out * torch.inf if self.training and torch.is_grad_enabled() else out


def row(build: Callable[[], nn.Module]) -> Row:
    return Row("torch", "net", build, lambda: torch.randn(2, 3, 9, 7))


@pytest.mark.parametrize(
    ("build", "broken"),
    [
        (lambda: Net("CrossIterationBatchNorm"), {"before", "fold", "reverted"}),
        (lambda: Net("Identity"), {"fold"}),
        (Diverges, {"finite", "fold", "reverted"}),
        (Net, set()),
    ],
)
def test_what_does_not_hold_is_seen(build: Callable[[], nn.Module], broken: set[str]) -> None:
    found = examine(row(build))
    checks = {"before": found.before == 0, "finite": found.finite, "fold": found.fold <= 1e-4}
    checks["reverted"] = found.reverted
    assert {name for name, holds in checks.items() if not holds} == broken
    assert found.holds == (not broken)
    assert found.perfect


def test_difference() -> None:
    a = torch.tensor([1.0, -4.0])
    assert difference([a], [a.clone()]) == 0
    assert difference([a + 1e-2], [a]) == pytest.approx(1e-2 / 4, rel=1e-3)
    assert difference([a], [a[:1]]) == difference([a], []) == difference([a * torch.nan], [a]) == float("inf")


def test_a_run_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys) -> None:
    def raises() -> nn.Module:
        raise RuntimeError("out of cheese\nand of wine")

    rows = (row(Net), replace(row(raises), name="raises"), replace(row(lambda: nn.Linear(2, 2)), name="bare"))
    monkeypatch.setattr(make_architectures, "ROWS", rows)
    out = tmp_path / "page.md"
    make_architectures.main(["--out", str(out), "--only", "torch/raises"])
    assert [result.key for result in read(tmp_path / "page.jsonl")] == ["torch/raises"]
    make_architectures.main(["--out", str(out)])
    assert "torch/raises" not in capsys.readouterr().out.split("\n", 1)[1]
    results = read(tmp_path / "page.jsonl")
    assert [result.name for result in results] == ["net", "raises", "bare"]
    assert results[1] == Result("torch", "raises", error="RuntimeError: out of cheese")
    assert results[2].reasons == (
        Reason("convert_: the model has no BatchNorm; it has no norm of any kind", 0, "", 0, 0, 0),
    )
    text = out.read_text()
    assert "Not so: torch/raises." in text
    assert "| raises |  |  |  |  |  |  |  |  |  | RuntimeError: out of cheese |" in text
    assert "| torch: bare | it has no norm of any kind |" in text
    with pytest.raises(SystemExit):
        make_architectures.main(["--out", str(out), "--only", "torch/nothing"])
    assert "no row is called 'torch/nothing'; there are 3, such as torch/" in capsys.readouterr().err
