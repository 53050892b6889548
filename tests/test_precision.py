"""Mixed precision: statistics in float32, steps near float32's, and steps that a gradient scaler skips."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler

import anybatch as ab

from .test_contract import every_method, example
from .test_history import assert_equal
from .tolerances import HALF, SAME

C = 8
either_half = pytest.mark.parametrize("dtype", HALF, ids=str)


def converted(name: str, layers: int = 2) -> nn.Sequential:
    """Smooth: a rectifier's gradient jumps where a rounded value changes its sign."""
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(3, C, 3, stride=2, bias=False), nn.BatchNorm2d(C), nn.SiLU()),
        *(nn.Conv2d(C, C, 3, padding=1), nn.BatchNorm2d(C)),
    )
    report = ab.convert_(net, ab.METHODS[name].small, example_inputs=example())
    assert len(report.converted) == (0 if name == "bn" else layers), str(report)
    return net


class Run:
    """A net in training with a gradient scaler, or without one, on batches told apart by their number."""

    def __init__(
        self,
        name: str,
        scaler: GradScaler | None = None,
        autocast: torch.dtype | None = None,
        fused: bool = False,
    ) -> None:
        self.net, self.scaler, self.autocast = converted(name), scaler, autocast
        groups = ab.param_groups(self.net, 1e-3, 1e-3)
        # No more, or four steps make other weights, and what the first says of the last is ill-conditioned.
        self.optimizer = torch.optim.SGD(groups, lr=0.01, momentum=0.9, fused=fused)
        ab.attach(self.net, self.optimizer, scaler=scaler)

    def forward(self, number: int, spoil: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
        """The loss of a batch that ``spoil`` has changed."""
        generator = torch.Generator().manual_seed(number)
        x = spoil(torch.randn(3, 3, 9, 7, generator=generator))
        with nullcontext() if self.autocast is None else torch.autocast("cpu", self.autocast):
            out = self.net(x)
        return (out.float() * torch.randn(out.shape, generator=generator)).sum()

    def backward(self, loss: Tensor) -> None:
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def step(self) -> None:
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad()

    def train(self, *numbers: int) -> None:
        for number in numbers:
            self.backward(self.forward(number))
            self.step()

    def state(self) -> list[Any]:
        """All that training goes on from, but for the scaler; copies."""
        return copy.deepcopy([self.net.state_dict(), self.optimizer.state_dict(), ab.history_state_dict(self.net)])


def assert_same_state(a: list[Any], b: list[Any], but_free_slots: bool = False) -> None:
    """Bit for bit; what the free slot of a history's ring holds is nothing."""
    assert a[0].keys() == b[0].keys()
    for key, value in a[0].items():
        assert torch.equal(value, b[0][key]), key
    assert a[1]["param_groups"] == b[1]["param_groups"]
    for i, moments in a[1]["state"].items():
        assert torch.equal(moments["momentum_buffer"], b[1]["state"][i]["momentum_buffer"]), i
    if but_free_slots:
        clear_free_slots(a[2]), clear_free_slots(b[2])
    assert_equal(a[2], b[2])


def clear_free_slots(state: dict[str, Any]) -> None:
    for histories in state["layers"].values():
        for history in histories.values():
            if "slot" not in history:
                continue
            history["scalars"].index_fill_(2, history["slot"], 0)
            for field in ("patch", "covariance"):
                history[field].index_fill_(1, history["slot"], 0)


def assert_finite(state: list[Any]) -> None:
    tensors = [*state[0].values(), *(m["momentum_buffer"] for m in state[1]["state"].values())]
    tensors += [t for layer in state[2]["layers"].values() for history in layer.values() for t in history.values()]
    assert all(t.isfinite().all() for t in tensors)


def assert_near(got: Tensor, expected: Tensor, dtype: torch.dtype, what: str = "") -> None:
    """Some ten independent roundings of up to u each come to about 2 u of the whole's length; 8 u are allowed."""
    u = torch.finfo(dtype).eps / 2
    assert (got.float() - expected).norm() <= 8 * u * expected.norm(), what


def change(net: nn.Module, since: nn.Module) -> Tensor:
    return torch.cat([(a - b).flatten() for a, b in zip(net.parameters(), since.parameters(), strict=True)]).detach()


@every_method
@either_half
def test_everything_kept_is_float32_under_autocast(name: str, dtype: torch.dtype) -> None:
    run = Run(name, autocast=dtype)
    run.train(0, 1, 2)
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in run.net.parameters())
    model, optimizer, history = run.state()
    tensors = [*model.values(), *(m["momentum_buffer"] for m in optimizer["state"].values())]
    tensors += [t for layer in history["layers"].values() for entry in layer.values() for t in entry.values()]
    assert {t.dtype for t in tensors} <= {torch.float32, torch.int64}


@every_method
@either_half
def test_statistics_of_half_precision_inputs_are_float32s(name: str, dtype: torch.dtype) -> None:
    """Of the very same values: rounded nowhere but in the output."""
    layers = [ab.METHODS[name].small.build(nn.BatchNorm2d(C)) for _ in range(2)]
    optimizer = torch.optim.SGD([torch.zeros((), requires_grad=True)], lr=0.1)
    for layer in layers:
        ab.attach(layer, optimizer)
    for _ in range(3):
        x = (torch.randn(2, C, 7, 5) * 3 + 5).to(dtype)
        for layer, y in zip(layers, (x, x.float()), strict=True):
            layer(y)
    for (key, a), b in zip(layers[0].state_dict().items(), layers[1].state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, **SAME, msg=key)
    for layer in layers:
        for history in getattr(layer, "histories", {}).values():
            assert history.scalars.dtype == torch.float32


@every_method
@either_half
def test_training_a_half_precision_model(name: str, dtype: torch.dtype) -> None:
    """Its statistics have the model's dtype, as torch's do; what pools over batches stays in float32."""
    net = converted(name).to(dtype)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    ab.attach(net, optimizer)
    for _ in range(3):
        out = net(example(3, dtype))
        out.backward(torch.randn_like(out))
        optimizer.step()
        optimizer.zero_grad()
    assert all(t.isfinite().all() for t in net.state_dict().values())
    assert {b.dtype for b in net.buffers()} <= {dtype, torch.int64}
    for layer in ab.history_state_dict(net)["layers"].values():
        assert layer
        for history in layer.values():
            assert {t.dtype for t in history.values()} == {torch.float32, torch.int64}


@every_method
@either_half
def test_a_few_steps_stay_near_float32s(name: str, dtype: torch.dtype) -> None:
    """The weights' whole change, and the statistics."""
    start = converted(name)
    runs = [Run(name), Run(name, GradScaler("cpu", init_scale=2.0**6), dtype)]
    for run in runs:
        run.train(0, 1, 2, 3)
    expected, got = (run.net for run in runs)
    assert_near(change(got, start), change(expected, start), dtype)
    for (key, value), other in zip(expected.named_buffers(), got.buffers(), strict=True):
        assert_near(other, value.float(), dtype, key)


@every_method
@either_half
def test_models_in_half_precision(name: str, dtype: torch.dtype) -> None:
    """Evaluation near float32's: as trained, recalibrated in half precision, and folded."""
    run = Run(name)
    run.train(0, 1, 2)
    net, half = run.net.eval(), copy.deepcopy(run.net).to(dtype).eval()
    x = example(4).to(dtype)
    assert_near(half(x), net(x.float()), dtype, "as trained")
    with torch.autocast("cpu", dtype):
        under_autocast = net(x.float())
    assert under_autocast.dtype == dtype
    assert_near(under_autocast, net(x.float()), dtype, "under autocast")
    if any(getattr(m, "uses_running", isinstance(m, nn.BatchNorm2d)) for m in net.modules()):
        images = [example(8).to(dtype) for _ in range(3)]
        ab.recalibrate_(net, [i.float() for i in images])
        ab.recalibrate_(half, images)
        assert_near(half(x), net(x.float()), dtype, "recalibrated")
    if ab.METHODS[name].foldable:
        folded = ab.fold(half, example_inputs=x)
        assert all(t.dtype == dtype for t in (*folded.parameters(), folded(x)))
        assert_near(folded(x), net(x.float()), dtype, "folded")


@every_method
@pytest.mark.parametrize(
    ("bad", "at", "fused"), [(float("nan"), 0, False), (float("inf"), 3, False), (float("nan"), 3, True)]
)
def test_a_skipped_batch_leaves_no_trace(name: str, bad: float, at: int, fused: bool) -> None:
    """One bad pixel, and everything is bit for bit as if the batch had not been, and so are the next steps.

    The scaler halves its scale, which is exact in float32. A fused optimizer skips the step by itself.
    """
    runs = [Run(name, GradScaler("cpu"), fused=fused) for _ in range(2)]

    def spoil(x: Tensor) -> Tensor:
        x[1, 2, 4, 3] = bad
        return x

    for run in runs:
        run.train(*range(at))
    loss = runs[1].forward(99, spoil)
    assert not loss.isfinite()
    runs[1].backward(loss)
    runs[1].step()
    assert runs[1].scaler.get_scale() == 2.0**15
    if name == "bn":  # torch's own running statistics are lost
        assert not runs[1].net[1].running_mean.isfinite().any()
        return
    if at:
        assert_same_state(runs[1].state(), runs[0].state(), but_free_slots=True)
    for run in runs:
        run.train(*range(at, at + 3))
    assert_same_state(runs[1].state(), runs[0].state())
    assert_finite(runs[1].state())


@every_method
def test_a_batch_that_overflows_float16(name: str) -> None:
    """An input beyond its range under autocast; the step is skipped, and all state is as it was."""
    run = Run(name, GradScaler("cpu", init_scale=2.0**6), torch.float16)
    run.train(0, 1)
    before = run.state()
    loss = run.forward(2, lambda x: x * 1e5)
    assert not loss.isfinite()
    run.backward(loss)
    run.step()
    if name != "bn":  # as above
        assert_same_state(run.state(), before, but_free_slots=True)
    run.train(3)
    assert all(p.isfinite().all() for p in run.net.parameters())


@every_method
def test_a_bad_micro_batch_costs_its_step_and_nothing_else(name: str) -> None:
    """The scaler skips the whole accumulated batch; what its good micro-batches gave to the statistics stays."""
    if name == "bn":  # as above
        return
    runs = [Run(name, GradScaler("cpu")) for _ in range(2)]
    for run, numbers in zip(runs, [(2, 3), (2, None, 3)], strict=True):
        run.train(0, 1)
        for number in numbers:
            loss = run.forward(99, lambda x: x * float("nan")) if number is None else run.forward(number)
            run.backward(loss)
        if None in numbers:
            run.step()
        else:
            run.optimizer.zero_grad()
        run.train(4, 5)
    assert_same_state(runs[1].state(), runs[0].state())


@every_method
def test_an_overflow_in_the_gradient_alone(name: str) -> None:
    """The weights stay, the finite forward counts, and training goes on as if there had been no backward."""
    runs = [Run(name, GradScaler("cpu")) for _ in range(2)]
    for run in runs:
        run.train(0, 1)
    before = copy.deepcopy(list(runs[1].net.parameters()))
    losses = [run.forward(2) for run in runs]
    assert losses[1].isfinite()
    runs[1].backward(losses[1] * float("inf"))
    runs[1].step()
    assert runs[1].scaler.get_scale() == 2.0**15
    assert all(torch.equal(a, b) for a, b in zip(runs[1].net.parameters(), before, strict=True))
    for run in runs:
        run.train(3, 4, 5)
    assert_same_state(runs[1].state(), runs[0].state())
    assert_finite(runs[1].state())


@every_method
def test_float16_finds_its_scale(name: str) -> None:
    """From one at which float16 gradients overflow down to one at which they do not; then the weights move."""
    run = Run(name, GradScaler("cpu", init_scale=2.0**24), torch.float16)
    start = copy.deepcopy(run.net)
    run.train(*range(20))
    assert run.scaler.get_scale() < 2.0**20
    assert_finite(run.state())
    assert change(run.net, start).norm() > 0.1


@every_method
def test_a_scale_leaves_no_trace(name: str) -> None:
    """Fixed, doubled every other step, or none at all: bit for bit the same."""
    scalers = [None, GradScaler("cpu"), GradScaler("cpu", init_scale=4.0, growth_interval=2)]
    states = []
    for scaler in scalers:
        run = Run(name, scaler)
        run.train(*range(8))
        states.append(run.state())
    assert scalers[2].get_scale() == 64.0
    for state in states[1:]:
        assert_same_state(state, states[0])


def test_attach_leaves_what_is_not_its_own() -> None:
    """A module of the user's may have a loss_scale; a second call without a scaler keeps the first's."""
    net = converted("cbn")
    net.loss_scale = 4.0
    optimizer, scaler = torch.optim.SGD(net.parameters(), lr=0.1), torch.amp.GradScaler("cpu")
    ab.attach(net, optimizer, scaler=scaler)
    ab.attach(net, optimizer)
    assert net.loss_scale == 4.0
    layers = [m for m in net.modules() if isinstance(m, ab.nn.CrossIterationBatchNorm)]
    assert layers
    assert all(layer.loss_scale is scaler._scale for layer in layers)
