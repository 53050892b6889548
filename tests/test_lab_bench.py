"""The logic of `anybatch bench`; no time is asserted."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist

from anybatch.errors import AnybatchError
from anybatch.lab.bench import BenchConfig, Outcome, Row, Timing, bench, gate, save, subjects, timing, traffic
from anybatch.lab.bench.config import DTYPES, FORMATS
from anybatch.lab.bench.gate import disagreement
from anybatch.lab.bench.records import name_of
from anybatch.lab.bench.subjects import Steps, batches_of, subject
from anybatch.lab.bench.synced import _like, process_group
from anybatch.lab.bench.traffic import Traffic
from anybatch.lab.released import ReleasedCBN
from anybatch.methods import METHODS

SMALL = BenchConfig(methods=("gn(groups=4)",), network="small-resnet", image_size=8, batch=2, rounds=3)
ONLY_CUDA = "torch's SyncBatchNorm takes CUDA tensors only"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traffic, "COPIED", 2**16)
    monkeypatch.setattr(timing, "LEAST", 1e-9)


def test_every_method_of_the_table_passes_the_gate() -> None:
    timings = bench(replace(SMALL, methods=("all",), rounds=2)).timings
    assert [t.row.method for t in timings] == [*(row.trial for row in METHODS.values()), "released", "syncbn"]
    assert [(t.refused, t.failed) for t in timings if t.refused] == [(ONLY_CUDA, False)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_layer_in_every_dtype(dtype: str) -> None:
    config = BenchConfig(("all",), "layer", channels=8, image_size=6, rounds=2, dtype=dtype)
    timings = bench(config).timings
    assert [t.row.method for t in timings if t.refused] == ["syncbn"]
    x, gradient = batches_of(config)[0]
    assert (x.shape, gradient.dtype) == ((4, 8, 6, 6), DTYPES[dtype])


def test_a_step_in_bfloat16() -> None:
    methods = "cbn", "released"
    assert all(t.ratios for t in bench(replace(SMALL, methods=methods, dtype="bfloat16", rounds=2)).timings)


def test_inference_is_timed_folded_too() -> None:
    timings = bench(replace(SMALL, methods=("cbn", "iebn", "released"), what="inference", rounds=2)).timings
    assert [(t.row.method, t.row.how, bool(t.ratios)) for t in timings] == [
        ("bn", "", True),
        ("bn", "folded", True),
        ("cbn", "", True),
        ("cbn", "folded", True),
        ("iebn", "", True),
        ("released", "", False),
    ]
    assert "in inference it is BatchNorm" in timings[-1].refused


@pytest.mark.parametrize("memory_format", FORMATS)
def test_ratios_are_taken_within_a_round(memory_format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that slows down with every round cancels; the order within a round is shuffled."""
    calls: list[Steps] = []

    def ticks(steps: Steps, device: str, repeats: int) -> float:
        steps()
        calls.append(steps)
        slow = 1.0 + max(0, len(calls) - 1 - subjects.WARM_UP) // 2
        return slow * (3.0 if isinstance(steps.model.bn1, nn.GroupNorm) else 2.0)

    monkeypatch.setattr(timing, "_time", ticks)
    seen: list[tuple[int, int]] = []
    threads = torch.get_num_threads()
    bn, gn = bench(replace(SMALL, rounds=8, format=memory_format), lambda *done: seen.append(done)).timings
    assert torch.get_num_threads() == threads
    assert (bn.ratios, gn.ratios) == ((1.0,) * 8, (1.5,) * 8)
    assert gn.quartiles == (1.5, 1.5, 1.5)
    assert bn.milliseconds == pytest.approx(1e3 * 2.0 * 4.5)
    first = subjects.WARM_UP  # before, the reference alone, to see how many fill a turn
    assert len({calls[i] is calls[first] for i in range(first, first + 16, 2)}) == 2
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1]


def test_a_turn_is_many_short_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock on which a step takes 3 ms and what is not timed of it 50."""
    now = 0.0

    class Fake:
        steps = 0

        def timed(self) -> None:
            nonlocal now
            now += 0.003
            Fake.steps += 1

        def between(self) -> None:
            nonlocal now
            now += 0.05

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now)
    assert timing._time(Fake(), "cpu", 7) == pytest.approx(0.003)
    assert Fake.steps == 7


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
                case "autocast" if torch.is_autocast_enabled("cpu"):
                    return y * 1.5
        return y


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("right", ""),
        ("loss", "step 1: the loss is off"),
        ("not finite", "step 1: the loss is off"),
        ("gradient", "step 1: the gradient is off"),
        ("no gradient", "step 1: 'idle' has no gradient"),
        ("autocast", "step 1: the loss is off"),
    ],
)
def test_gate(how: str, said: str) -> None:
    batches = [(torch.randn(2, 4), torch.tensor([0, 2])) for _ in range(2)]
    found = disagreement(Steps(Wrong(how), batches, autocast=torch.bfloat16 if how == "autocast" else None))
    assert found.startswith(said)
    assert bool(found) == bool(said)


def test_what_is_refused_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "disagreement", lambda s: "wrong" if isinstance(s.model.bn1, nn.GroupNorm) else "")
    bn, gn = bench(SMALL).timings
    assert (len(bn.ratios), bn.refused) == (3, "")
    assert (gn.seconds, gn.ratios, gn.traffic, gn.refused, gn.failed) == ((), (), None, "wrong", True)
    monkeypatch.setattr(gate, "disagreement", lambda s: "wrong")
    with pytest.raises(AnybatchError, match="BatchNorm itself does not pass: wrong"):
        bench(SMALL)


def test_a_broken_method_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """One in float32 only, and one that is wrong in every dtype: it is no longer what cbn-paper computes."""
    forward = ReleasedCBN.forward
    monkeypatch.setattr(ReleasedCBN, "forward", lambda self, x: forward(self, x) * (1 + 1e-2 * (x.dtype.itemsize == 4)))
    assert "off float64's" in bench(replace(SMALL, methods=("released",))).timings[1].refused
    monkeypatch.setattr(ReleasedCBN, "forward", lambda self, x: forward(self, x) * 1.01)
    released = bench(replace(SMALL, methods=("released",))).timings[1]
    assert "off cbn-paper's" in released.refused
    assert (released.failed, released.ratios) == (True, ())


def test_a_fold_that_changes_the_output_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fold = subjects.fold

    def broken(model: nn.Module, example_inputs: Tensor) -> nn.Module:
        folded = fold(model, example_inputs)
        with torch.no_grad():
            folded.fc.bias += 1e-3
        return folded

    monkeypatch.setattr(subjects, "fold", broken)
    bn, folded = bench(replace(SMALL, methods=(), what="inference")).timings
    assert (bn.refused, folded.failed) == ("", True)
    assert "folded, the output is off the unfolded model's" in folded.refused


def test_one_value_a_channel_is_too_few_for_the_reference() -> None:
    with pytest.raises(AnybatchError, match="BatchNorm itself does not pass: Expected more than 1 value"):
        bench(replace(SMALL, network="resnet18", batch=1))


def test_a_layers_weights_move_between_its_passes() -> None:
    config = BenchConfig(what="layer", channels=4, image_size=6)
    steps = subject(config, Row("bn"), batches_of(config))
    before = steps.model.conv.weight.clone()
    steps.timed()
    assert torch.equal(steps.model.conv.weight, before)
    assert steps.batches[0][0].grad is not None
    steps.between()
    assert not torch.equal(steps.model.conv.weight, before)


@pytest.fixture
def alone() -> Iterator[None]:
    with process_group("cpu"):
        yield


def test_syncbn_takes_over_the_norm() -> None:
    """All that can be seen of it without CUDA."""
    norm = nn.BatchNorm2d(4, eps=1e-3, momentum=0.2).eval()
    norm.running_mean.uniform_()
    layer = _like(norm)
    assert layer.weight is norm.weight
    assert layer.running_mean is norm.running_mean
    assert list(layer.state_dict()) == list(norm.state_dict())
    x = torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(layer(x), norm(x), rtol=0, atol=0)


@pytest.mark.usefixtures("alone")
def test_process_group_of_one() -> None:
    assert dist.get_world_size() == 1
    with process_group("cpu"):  # there is one already
        assert dist.is_initialized()
    assert dist.is_initialized()


def test_names() -> None:
    assert name_of(Row("released(window=4)", "compiled")) == "CBN, the authors' way (window 4), compiled"
    assert name_of(Row("cbn(window=4)")) == "CBN (window 4)"
    assert name_of(Row("syncbn")) == "SyncBatchNorm"


def test_saving_adds_and_never_loses(tmp_path: Path) -> None:
    timings = (
        Timing(Row("bn"), "BN()", (0.1, 0.3), (1.0, 1.0), Traffic(100, 0, 400, 600)),
        Timing(Row("gn", "compiled"), "GN(groups=32)", refused="wrong", failed=True),
    )
    outcome = Outcome(SMALL, timings, 4, 6000.0)
    assert outcome.share(timings[0]) == pytest.approx(0.5)
    path = save(tmp_path / "new", outcome, "anybatch bench")
    assert save(tmp_path / "new", outcome, "anybatch bench") == path
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 6
    assert set(lines[3]) == {
        *("machine", "versions", "commit", "date", "config", "copy_bandwidth", "repeats", "command"),
    }
    assert lines[4]["peak_bytes"] == 400
    assert lines[5] == {
        **{"method": "gn", "how": "compiled", "norm": "GN(groups=32)", "seconds": [], "ratios": []},
        **{"refused": "wrong", "failed": True},
        **dict.fromkeys(["weights_bytes", "history_bytes", "peak_bytes", "moved_bytes"]),
    }
    with pytest.raises(AnybatchError, match="give --out"):
        save(path, outcome, "anybatch bench")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"network": "vgg"}, "vgg"),
        ({"batch": 0}, "batch is 0"),
        ({"image_size": 4}, "image size is 4"),
        ({"dtype": "float8"}, "there is no dtype 'float8': choose float32 or bfloat16"),
        ({"what": "epoch"}, "there is no what 'epoch'"),
        ({"cuda_graphs": True}, "CUDA graphs on device 'cpu'"),
        ({"cuda_graphs": True, "device": "cuda", "dtype": "float16"}, "take bfloat16"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(wrong: dict, said: str) -> None:
    with pytest.raises(AnybatchError, match=said):
        replace(SMALL, **wrong)


def test_rows() -> None:
    config = replace(SMALL, methods=("cbn", "cbn", "bn"), device="cuda", compile=True, cuda_graphs=True)
    ways = "", "compiled", "CUDA graph"
    assert config.rows() == [Row(method, how) for method in ("bn", "cbn") for how in ways]
    config = replace(SMALL, methods=("iebn",), what="inference", compile=True)
    assert [row.how for row in config.rows()] == ["", "compiled", "folded", "folded, compiled", "", "compiled"]


@pytest.mark.parametrize("method", ["cnb", "syncbn(groups=2)"])
def test_unknown_methods_are_refused_before_anything_runs(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_bench", None)
    with pytest.raises(AnybatchError, match="did you mean cbn" if method == "cnb" else "has no options"):
        bench(replace(SMALL, methods=(method,)))
