"""ab.Monitor: what it warns of and what not; how it ends; copies of what it watches; what it refuses."""

import copy
import io
import pickle
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import anybatch as ab

from .diagnose_nets import Batch, chain
from .test_monitor import hooks, small

ce = F.cross_entropy
COLLAPSE = r"accuracy is likely to collapse in evaluation.*ab\.CBN\(\)"


def deep(momentum: float = 0.1) -> nn.Sequential:
    norms = [nn.BatchNorm2d(6, momentum=momentum) for _ in range(5)]
    widths = [3, 6, 6, 6, 6]
    body = [
        part
        for width, norm in zip(widths, norms, strict=True)
        for part in (nn.Conv2d(width, 6, 3, padding=1, bias=False), norm, nn.ReLU())
    ]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))


def stream(examples: int) -> Iterator[Batch]:
    """Images each as bright as it happens to be."""
    while True:
        bright = 1.5 * torch.randn(examples, 1, 1, 1)
        yield torch.randn(examples, 3, 8, 8) + bright, torch.randint(3, (examples,))


def warned(examples: int, config: Any = None, steps: int = 42, **of_norms: float) -> list[str]:
    """What a training says, observed at every step."""
    model, taken = deep(**of_norms), stream(examples)
    if config is not None:
        ab.convert_(model, config, example_inputs=next(taken)[0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    ab.attach(model, optimizer)
    with warnings.catch_warnings(record=True) as seen, ab.Monitor(model, every=1):
        warnings.simplefilter("always")
        for _ in range(steps):
            x, t = next(taken)
            optimizer.zero_grad()
            ce(model(x), t).backward()
            optimizer.step()
    return [str(warning.message) for warning in seen]


def test_it_warns_once_of_batches_of_one_bright_image() -> None:
    (said,) = warned(1)
    assert said.startswith("anybatch.Monitor: after 20 training forwards")
    assert "after recalibration" in said
    assert "train with ab.CBN() or what `anybatch advise` says" in said


@pytest.mark.parametrize(
    ("examples", "more"), [(1, {"config": ab.CBN()}), (8, {}), (8, {"momentum": 0.0})], ids=["cbn", "batch 8", "behind"]
)
def test_it_does_not_warn(examples: int, more: dict[str, Any]) -> None:
    """Of CBN, of a larger batch, of running statistics that are just behind."""
    assert warned(examples, **more) == []


def test_where_the_warning_is_of() -> None:
    """The line that called the model, for whoever turns the warnings of one module off."""
    model, taken = deep(), stream(1)
    ab.Monitor(model, every=1)
    for _ in range(19):
        model(next(taken)[0])
    with pytest.warns(UserWarning, match=COLLAPSE) as seen:
        model(next(taken)[0])
    assert seen[0].filename == __file__


def test_it_can_be_told_not_to_warn() -> None:
    model, taken = deep(), stream(1)
    with ab.Monitor(model, every=1, warn=False) as monitor:
        for _ in range(20):
            model(next(taken)[0])
    assert monitor.last["anybatch/gap"] > 0.65


@pytest.mark.parametrize("way", ["remove", "with", "error"])
def test_nothing_stays(way: str) -> None:
    """No hook, and nothing is logged any more; removing it again does nothing."""
    model, logged, x = chain().double(), [], small()[0][0]
    model[0].register_forward_hook(lambda *_: None)
    before = hooks(model)
    if way == "remove":
        monitor = ab.Monitor(model, logged.append, every=1)
        model(x)
        monitor.remove()
        monitor.remove()
    else:
        try:
            with ab.Monitor(model, logged.append, every=1) as monitor:
                model(x)
                if way == "error":
                    raise ZeroDivisionError
        except ZeroDivisionError:
            pass
    assert hooks(model) == before
    model(x)
    assert (len(logged), monitor.forwards) == (1, 1)


class Fails(nn.Module):
    """At a training forward, once."""

    error: BaseException | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.error is not None:
            error, self.error = self.error, None
            raise error
        return x


@pytest.mark.parametrize("kind", [ZeroDivisionError, KeyboardInterrupt])
def test_a_forward_that_breaks_off(kind: type[BaseException]) -> None:
    """Is not logged, not even of the norms that ran; the next ones are as if it had not been."""
    fails, logged, (x, y) = Fails(), [], (batch[0] for batch in small(2))
    model = nn.Sequential(*chain()[:3], fails, *chain()[3:]).double()
    other = copy.deepcopy(model)
    ab.Monitor(model, logged.append, every=2)
    for net in (model, other):
        net(x)
        net[3].error = kind()
        with pytest.raises(kind):
            net(y)
    model.eval()(y)
    model.train()
    assert hooks(model) == 2
    assert logged == []
    for net in (model, other):
        net(y)
    ab.Monitor(other, logged.append, every=1)
    model(x)
    other(x)
    assert len(logged) == 2
    assert logged[0] == logged[1]


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_watched_by_nobody(how: str) -> None:
    """They run, and the original is watched as before."""
    model, logged, x = chain().double(), [], small()[0][0]
    ab.Monitor(model, logged.append, every=1)
    model(x)
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        torch.save(model, file := io.BytesIO())
        file.seek(0)
        other = torch.load(file, weights_only=False)
    torch.testing.assert_close(other.train()(x), model(x))
    assert len(logged) == 2
    other.eval()(x)
    other.train()
    other(x)
    assert len(logged) == 2
    model(x)
    assert len(logged) == 3


class OnlyTrains(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            raise NotImplementedError("beam search")
        return x


def test_a_model_that_raises_in_evaluation() -> None:
    """One warning, of the line that called the model, and it is gone; training goes on."""
    model, x = nn.Sequential(*chain(), OnlyTrains()).double(), small()[0][0]
    ab.Monitor(model, every=2)
    model(x)
    with pytest.warns(
        UserWarning, match="stops: in evaluation mode the model raised NotImplementedError: beam"
    ) as seen:
        model(x)
    assert len(seen) == 1
    assert seen[0].filename == __file__
    assert hooks(model) == 0
    assert all(module.training for module in model.modules())
    model(x)
    model(x)


class Large(nn.Module):
    """Of which a copy finds no memory."""

    def __init__(self, copied: bool = False) -> None:
        super().__init__()
        self.copied = copied

    def __deepcopy__(self, memo: dict[int, Any]) -> "Large":
        return Large(copied=True)

    def forward(self, x: Tensor) -> Tensor:
        if self.copied:
            raise RuntimeError("out of memory")
        return x


def test_a_check_that_fails_does_not_stop_the_training() -> None:
    model, taken = nn.Sequential(Large(), *deep()), stream(1)
    with ab.Monitor(model, every=1) as monitor:
        for _ in range(12):
            model(next(taken)[0])
    assert monitor.forwards == 12


@pytest.mark.parametrize(("config", "observed"), [(ab.CBN(), 1), (ab.GN(groups=2), 0)], ids=["cbn", "gn"])
def test_a_model_that_is_converted_while_it_is_watched(config: Any, observed: int) -> None:
    """Its norms are those it has now; without any there is nothing to observe."""
    model, logged, x = chain().double(), [], small()[0][0]
    ab.Monitor(model, logged.append, every=1)
    ab.convert_(model, config, example_inputs=x)
    model(x)
    assert len(logged) == observed


def test_what_is_refused() -> None:
    for every in (0, -1):
        with pytest.raises(ab.AnybatchError, match=f"Monitor: every={every}; give at least 1"):
            ab.Monitor(chain(), every=every)
    with pytest.raises(ab.AnybatchError, match=r"has no BatchNorm.*it has GroupNorm"):
        ab.Monitor(chain(norm=lambda c: nn.GroupNorm(2, c)))


@pytest.mark.filterwarnings("default")  # the compiler's own
@pytest.mark.parametrize("what", ["whole", "in place", "a part", "wrapped"])
def test_compiled_models_are_refused(what: str) -> None:
    """Their graphs would not call the hooks."""
    model = chain()
    if what == "whole":
        model = torch.compile(model)
    elif what == "in place":
        model.compile()
    elif what == "a part":
        model = nn.Sequential(torch.compile(model[:6]), model[6:])
    else:
        model = nn.DataParallel(torch.compile(model))
    with pytest.raises(ab.AnybatchError, match=r"Monitor.*compile"):
        ab.Monitor(model)
