"""What cannot be measured is refused by an error of ours that says why, and what to do."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import anybatch as ab
from anybatch.diagnose import Subject, batch_noise

from .diagnose_nets import EVERY, batches, chain, measured, squares

ce = F.cross_entropy


class Locked(nn.Linear):
    """What copy.deepcopy cannot do."""

    def __init__(self) -> None:
        super().__init__(3, 2)
        self.lock = threading.Lock()


class Functional(nn.Module):
    """Its modules hold parameters, and never run."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.bn = nn.Linear(105, 5), nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.flatten(1), self.fc.weight, self.bn.bias)


def failing() -> Iterator[Any]:
    yield batches(1)[0]
    raise OSError("disk full")


def with_nan(module: int) -> nn.Module:
    model = chain().double()
    nn.init.constant_(model[module].weight, torch.nan)
    return model


def of(model: object = None, loader: object = None, loss: Callable = ce, **more: Any) -> Subject:
    model, loader = chain().double() if model is None else model, batches(2, 8) if loader is None else loader
    return Subject(model, loader, loss, **more)


def by_parts(model: nn.Module, batch: Any) -> Tensor:
    return model[7:](model[6](model[:6](batch[0])))


def grouped() -> nn.Module:
    return chain(norm=lambda c: nn.GroupNorm(2, c)).double()


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    # of a subject
    "no model": (lambda: of(3), "the model is a int; give a module, or a function"),
    "a function of no module": (lambda: of(lambda: 3), "the function built a int; it must return a module"),
    "no copy": (lambda: of(Locked()), r"cannot be copied \(TypeError.*give a function that builds it"),
    "no loss": (lambda: of(loss=0.1), "the loss is a float; give a function"),
    "no batch": (lambda: of(loader=iter(())), "the loader gave no batch"),
    "no loader": (lambda: of(loader=torch.zeros(2, 3, 5, 7)), "the loader is a Tensor; give something that yields"),
    "batches": (lambda: of(batches=0), "batches=0; give at least 1"),
    "a loader that raises": (lambda: of(loader=failing()), "OSError: disk full"),
    # of its check
    "nan images": (lambda: of(loader=[(torch.full((2, 3, 5, 7), torch.nan), 0)]).check(), "first batch holds values"),
    "nan weight": (lambda: of(with_nan(3)).check(), r"is nan; .* output of '3' \(Conv2d; its weight is not finite\)"),
    "nan gamma": (lambda: of(with_nan(4)).check(), r"output of '4' \(BatchNorm2d; its weight is not finite\)"),
    "nan loss": (lambda: of(loss=lambda z, _: z.sum() * torch.nan).check(), "is nan; .*so the loss function itself"),
    "a vector": (lambda: of(loss=lambda z, t: z[:, 0]).check(), r"the loss is a tensor of shape \(8,\); give one"),
    "a float": (lambda: of(loss=lambda z, t: 0.5).check(), "the loss is a float; give one"),
    "a raising loss": (lambda: of(loss=lambda z, t: z[:, 9]).check(), "the loss raised IndexError.*second item"),
    "another input": (lambda: of(loader=[{"x": 1}]).check(), "model raised TypeError.*forward=lambda model, batch"),
    # of its derivatives
    "few examples": (lambda: of().regrouped(17), "16 examples make no batch of 17; keep more batches"),
    "odd batches": (lambda: of(loader=[{"image": 1}]).regrouped(2), "cannot be made of the loader's"),
    "size 0": (lambda: of().regrouped(0), "batches of 0"),
    "targets of other lengths": (lambda: of(loader=[(torch.zeros(4, 3), torch.zeros(8))]).regrouped(2), "batches of 2"),
    "parts": (lambda: of(forward=by_parts).converted(ab.CBN()), "only parts of it; call model"),
    # of a measurement
    "a constant": (lambda: measured("step_size", of(loss=lambda z, t: t.sum() * 1.0)), "depend on any parameter"),
    "no such layer": (lambda: EVERY["weight_gradients"][0].measure(of(), "7"), "no linear map '7'; there are 0, 3, 8"),
    "no such layers": (lambda: EVERY["diverging_step"][0].measure(of(), layers=["0", "x"]), "no linear map 'x'"),
    "a frozen layer": (
        lambda: EVERY["weight_gradients"][0].measure(of(chain().double().requires_grad_(False)), "0"),
        "the weight of '0' is not trained",
    ),
    "a scalar": (
        lambda: measured("logit_gradients", of(forward=lambda m, b: ce(m(b[0]), b[1]), loss=lambda z, _: z)),
        r"puts out a tensor of shape \(\)",
    ),
    "no examples": (
        lambda: measured("gradient_noise", of(forward=lambda m, b: ce(m(b[0]), b[1]), loss=lambda z, _: z)),
        "one output",
    ),
    "two outputs": (
        lambda: measured("gradient_noise", of(forward=lambda m, b: (m(b[0]), 0), loss=lambda z, t: ce(z[0], t))),
        "one output tensor, not a tuple; give forward=",
    ),
    "a batch of one": (
        lambda: measured("gradient_noise", of(loader=batches(1, 1))),
        "of 4 examples in a batch of 1; give two or more",
    ),
    "no sizes": (lambda: EVERY["batch_noise"][0].measure(of(), sizes=()), r"sizes=\(\); give numbers of examples"),
    "sizes of none": (lambda: EVERY["batch_noise"][0].measure(of(), sizes=(2, 0)), r"\(2, 0\); give numbers"),
    "few examples of a population": (lambda: measured("batch_noise", of(loader=batches(1, 7))), "7 examples say too"),
    "steps that diverge": (
        lambda: EVERY["history_error"][0].measure(of(), rate=1e200, ages=2),
        r"2 steps at learning rate 1e\+200 diverge",
    ),
    "norms of no map": (
        lambda: measured("history_error", of(nn.Sequential(nn.BatchNorm2d(3)).double(), loss=squares)),
        "no norm follows a linear map",
    ),
}
NO_MAPS = ("depth", "diverging_step", "weight_gradients", "cancellation")
NO_NORMS = ("batch_noise", "evaluation_gap", "history_error")
NEVER_RUN = ("depth", "diverging_step", "cancellation", "batch_noise", "evaluation_gap", "history_error")
NO_PARAMETER = ("step_size", "diverging_step", "cancellation", "gradient_noise", "learning_rate", "history_error")


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    call, words = REFUSED[case]
    with pytest.raises(ab.AnybatchError, match=words):
        call()


@pytest.mark.parametrize("name", NO_MAPS)
def test_a_model_without_maps(name: str) -> None:
    with pytest.raises(ab.AnybatchError, match="Sequential has no convolution and no Linear"):
        measured(name, of(nn.Sequential(nn.BatchNorm2d(3)).double(), loss=squares))


@pytest.mark.parametrize("name", NO_NORMS)
def test_a_model_without_batchnorm(name: str) -> None:
    """The error says what norms there are."""
    with pytest.raises(ab.AnybatchError, match=r"has no BatchNorm.*it has GroupNorm"):
        measured(name, of(grouped()))
    with pytest.raises(ab.AnybatchError, match="it has no norm of any kind"):
        measured(name, of(nn.Conv2d(3, 2, 3).double(), loss=squares))


@pytest.mark.parametrize("name", NEVER_RUN)
def test_maps_and_norms_that_never_run(name: str) -> None:
    with pytest.raises(ab.AnybatchError):
        measured(name, of(Functional().double()))


@pytest.mark.parametrize("name", NO_PARAMETER)
def test_a_model_without_trained_parameters(name: str) -> None:
    with pytest.raises(ab.AnybatchError, match="does not depend on any parameter that is trained"):
        measured(name, of(chain().double().requires_grad_(False)))


def test_cancellation_where_no_map_is_trained() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3).requires_grad_(False), nn.BatchNorm2d(4)).double()
    with pytest.raises(ab.AnybatchError):
        measured("cancellation", of(model, loss=squares))


def test_check_names_an_input_that_was_given_by_name() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(input=x * torch.inf)

    with pytest.raises(ab.AnybatchError, match=r"'conv' \(Conv2d; its input is not\)"):
        of(Named().double(), loss=squares).check()


def test_noise_counts_every_example_once() -> None:
    norm = nn.BatchNorm2d(3)
    found = batch_noise.measure(of(nn.Sequential(norm, nn.ReLU(), norm).double(), loss=squares), sizes=(1,))
    assert found.examples == 16
