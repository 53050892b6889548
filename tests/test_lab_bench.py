"""The logic of `anybatch bench`; no time is asserted."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from anybatch.errors import AnybatchError
from anybatch.lab import bench as lab
from anybatch.lab.bench import BenchConfig, Steps, Timing, bench, disagreement, save
from anybatch.methods import METHODS

SMALL = BenchConfig(methods=("gn(groups=4)",), network="small-resnet", image_size=8, batch=2, rounds=3)


def test_every_method_of_the_table_passes_the_gate() -> None:
    timings = bench(replace(SMALL, methods=("all",), rounds=2))
    assert [t.method for t in timings] == [row.trial for row in METHODS.values()]
    assert [t.refused for t in timings if t.refused] == []


@pytest.mark.parametrize("memory_format", lab.FORMATS)
def test_ratios_are_taken_within_a_round(memory_format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that slows down with every round cancels; the order within a round is shuffled."""
    calls: list[Steps] = []

    def ticks(steps: Steps, device: str) -> float:
        steps()
        calls.append(steps)
        slow = 1.0 + (len(calls) - 1) // 2
        return slow * (3.0 if isinstance(steps.model.bn1, nn.GroupNorm) else 2.0)

    monkeypatch.setattr(lab, "_time", ticks)
    seen: list[tuple[int, int]] = []
    threads = torch.get_num_threads()
    bn, gn = bench(replace(SMALL, rounds=8, format=memory_format), lambda *done: seen.append(done))
    assert torch.get_num_threads() == threads
    assert (bn.ratios, gn.ratios) == ((1.0,) * 8, (1.5,) * 8)
    assert gn.quartiles == (1.5, 1.5, 1.5)
    assert bn.milliseconds == pytest.approx(1e3 * 2.0 * 4.5)
    assert len({calls[i] is calls[0] for i in range(0, 16, 2)}) == 2
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1]


class Wrong(nn.Module):
    """In float32 something else than in float64."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.linear, self.idle, self.how = nn.Linear(4, 3), nn.Parameter(torch.zeros(())), how

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x) + (0 if self.how == "no gradient" else self.idle * x.sum())
        if x.dtype == torch.float32:
            match self.how:
                case "loss":
                    return y * 1.5
                case "not finite":
                    return y * torch.inf
                case "gradient":
                    return y + (y - y.detach())  # the value is right
        return y


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("right", ""),
        ("loss", "step 1: the loss is off"),
        ("not finite", "step 1: the loss is off"),
        ("gradient", "step 1: the gradient is off"),
        ("no gradient", "step 1: 'idle' has no gradient"),
    ],
)
def test_gate(how: str, said: str) -> None:
    batches = [(torch.randn(2, 4), torch.tensor([0, 2])) for _ in range(2)]
    found = disagreement(Steps(Wrong(how), batches))
    assert found.startswith(said)
    assert bool(found) == bool(said)


def test_what_is_refused_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lab, "disagreement", lambda s: "wrong" if isinstance(s.model.bn1, nn.GroupNorm) else "")
    bn, gn = bench(SMALL)
    assert (len(bn.ratios), bn.refused) == (3, "")
    assert (gn.seconds, gn.ratios, gn.refused) == ((), (), "wrong")
    monkeypatch.setattr(lab, "disagreement", lambda s: "wrong")
    with pytest.raises(AnybatchError, match="BatchNorm itself does not pass: wrong"):
        bench(SMALL)


def test_one_value_a_channel_is_too_few_for_the_reference() -> None:
    with pytest.raises(AnybatchError, match="BatchNorm itself does not pass: Expected more than 1 value"):
        bench(replace(SMALL, network="resnet18", batch=1))


def test_saving_adds_and_never_loses(tmp_path: Path) -> None:
    timings = [Timing("bn", "BN()", (0.1, 0.2), (1.0, 1.0)), Timing("gn", "GN(groups=32)", refused="wrong")]
    path = save(tmp_path / "new", SMALL, timings, "anybatch bench")
    assert save(tmp_path / "new", SMALL, timings, "anybatch bench") == path
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 6
    assert {"machine", "versions", "commit", "date", "config", "command"} == set(lines[3])
    assert lines[5] == {
        "method": "gn",
        "norm": "GN(groups=32)",
        "seconds": [],
        "ratios": [],
        "refused": "wrong",
    }
    with pytest.raises(AnybatchError, match="give --out"):
        save(path, SMALL, timings, "anybatch bench")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [({"network": "vgg"}, "vgg"), ({"batch": 0}, "batch is 0"), ({"image_size": 4}, "image size is 4")],
    ids=str,
)
def test_settings_out_of_range_are_refused(wrong: dict, said: str) -> None:
    with pytest.raises(AnybatchError, match=said):
        replace(SMALL, **wrong)


def test_unknown_methods_are_refused_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lab, "_bench", None)
    with pytest.raises(AnybatchError, match="did you mean cbn"):
        bench(replace(SMALL, methods=("cnb",)))
