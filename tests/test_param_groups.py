"""Decay of gamma towards 1 and beta towards 0, against the optimizers' equations written out."""

import copy

import pytest
import torch
from torch import Tensor, nn

import anybatch as ab
from anybatch.nn import CrossIterationBatchNorm

from .small_models import ResNet, shake
from .tolerances import ORACLE, SAME

WD, NORM_WD, LR = 0.03, 0.2, 0.1


def sgd(p: Tensor, g: Tensor, state: dict, decay: float, target: float) -> Tensor:
    """Momentum 0.9, coupled decay."""
    g = g + decay * (p - target)
    state["buffer"] = g if "buffer" not in state else 0.9 * state["buffer"] + g
    return p - LR * state["buffer"]


def adamw(p: Tensor, g: Tensor, state: dict, decay: float, target: float) -> Tensor:
    """Decoupled decay; betas 0.9, 0.999."""
    t = state["t"] = state.get("t", 0) + 1
    state["m"] = 0.9 * state.get("m", 0) + 0.1 * g
    state["v"] = 0.999 * state.get("v", 0) + 0.001 * g * g
    p = p - LR * decay * (p - target)
    return p - LR * (state["m"] / (1 - 0.9**t)) / ((state["v"] / (1 - 0.999**t)).sqrt() + 1e-8)


OPTIMIZERS = {
    "sgd": (lambda groups: torch.optim.SGD(groups, lr=LR, momentum=0.9), sgd),
    "sgd one by one": (lambda groups: torch.optim.SGD(groups, lr=LR, momentum=0.9, foreach=False), sgd),
    "adamw": (lambda groups: torch.optim.AdamW(groups, lr=LR), adamw),
    "adamw fused": (lambda groups: torch.optim.AdamW(groups, lr=LR, fused=True), adamw),
}


def decay_of(model: nn.Module, name: str) -> tuple[float, float]:
    owner, _, kind = name.rpartition(".")
    if not isinstance(model.get_submodule(owner), nn.modules.batchnorm._BatchNorm):
        return WD, 0.0
    return NORM_WD, 1.0 if kind == "weight" else 0.0


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("closure", [False, True])
def test_decay_is_exact(kind: str, closure: bool) -> None:
    """Several steps in float64 against the written-out update; a closure sees the true gammas."""
    make, update = OPTIMIZERS[kind]
    model = shake(ResNet()).double()
    optimizer = make(ab.param_groups(model, WD, NORM_WD))
    names = dict(model.named_parameters())
    mine = {name: p.detach().clone() for name, p in names.items()}
    states: dict[str, dict] = {name: {} for name in names}
    for _ in range(4):
        grads = {name: torch.randn_like(p) for name, p in names.items()}
        for name, p in names.items():
            p.grad = grads[name].clone()

        def look() -> Tensor:
            for name, p in names.items():
                torch.testing.assert_close(p.detach(), mine[name], **ORACLE)
            return torch.zeros(())

        optimizer.step(look) if closure else optimizer.step()
        for name in mine:
            mine[name] = update(mine[name], grads[name], states[name], *decay_of(model, name))
            torch.testing.assert_close(names[name].detach(), mine[name], **ORACLE)


def test_other_hooks_see_the_true_gammas() -> None:
    """Whenever they were registered: averages taken in a hook must not be of shifted parameters."""
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))
    optimizer = torch.optim.SGD(ab.param_groups(model, WD, NORM_WD), lr=LR)
    seen = []

    def look(*_: object) -> None:
        seen.append(model[1].weight.detach().clone())

    optimizer.register_step_pre_hook(look)
    optimizer.register_step_post_hook(look)
    for step in range(2):
        model(torch.randn(4, 2, 3, 3)).backward(torch.randn(4, 3, 3, 3))
        optimizer.step()
        if step == 0:
            optimizer.register_step_pre_hook(look)
            optimizer.register_step_post_hook(look)
    assert len(seen) == 6
    assert all((gamma > 0.3).all() for gamma in seen)


def test_a_closure_that_raises_leaves_the_parameters() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))
    optimizer = torch.optim.SGD(ab.param_groups(model, WD, NORM_WD), lr=LR)

    def fails() -> Tensor:
        raise RuntimeError("out of data")

    with pytest.raises(RuntimeError, match="out of data"):
        optimizer.step(fails)
    assert torch.equal(model[1].weight, torch.ones(3))


def test_other_optimizers_are_left_alone() -> None:
    ab.param_groups(nn.BatchNorm2d(3), WD, NORM_WD)
    gamma = nn.Parameter(torch.tensor([3.0]))
    optimizer = torch.optim.SGD([gamma], lr=1.0, weight_decay=0.5)
    gamma.grad = torch.zeros(1)
    optimizer.step()
    assert gamma.item() == 1.5


def test_resumes_from_the_optimizers_state() -> None:
    """Saved, loaded into a new optimizer with new groups, and gone on with: the same to the bit."""

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
        torch.manual_seed(seed)
        optimizer.zero_grad()
        model(torch.randn(4, 2, 3, 3)).backward(torch.randn(4, 3, 3, 3))
        optimizer.step()

    def made() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))
        return model, torch.optim.AdamW(ab.param_groups(model, WD, NORM_WD), lr=LR)

    model, optimizer = made()
    step(model, optimizer, 1)
    other, again = made()
    other.load_state_dict(model.state_dict())
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for seed in (2, 3):
        step(model, optimizer, seed)
        step(other, again, seed)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ab.METHODS)
def test_every_parameter_once(name: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.LayerNorm(4))
    model.append(model[0])
    model[1] = ab.METHODS[name].small.build(model[1])
    groups = ab.param_groups(model, WD, NORM_WD)
    listed = [id(p) for group in groups for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in model.parameters())
    one = next(group for group in groups if group["decays_to"] == 1.0)
    assert any(p is model[4].weight for p in one["params"])


def test_bad_input_is_refused() -> None:
    with pytest.raises(ab.AnybatchError, match=r"norm_weight_decay=-1; give a number of at least 0"):
        ab.param_groups(nn.BatchNorm2d(3), 0.0, -1)
    with pytest.raises(ab.AnybatchError, match="no parameters"):
        ab.param_groups(nn.ReLU(), 0.0)


def test_gamma_of_float32_goes_to_one() -> None:
    """With no gradient, decay alone takes gamma to 1 and beta to 0."""
    model = nn.Sequential(shake(CrossIterationBatchNorm(3)))
    optimizer = torch.optim.SGD(ab.param_groups(model, 0.0, 1.0), lr=0.5)
    for _ in range(40):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    torch.testing.assert_close(model[0].weight.detach(), torch.ones(3), **SAME)
    torch.testing.assert_close(model[0].bias.detach(), torch.zeros(3), **SAME)


class Outer(torch.optim.Optimizer):
    """An optimizer around another one with the same groups, as sharpness-aware minimisation is."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        self.param_groups, self.inner = inner.param_groups, inner

    def step(self, closure: object = None) -> None:
        self.inner.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_step_of_length_zero_changes_no_bit(dtype: torch.dtype, wrapped: bool) -> None:
    """Nor does any step a gamma without gradient."""
    start = torch.tensor([0.01, 0.1, 0.3, 1e-3, 1e-9, -7.7], dtype=dtype)
    trained, frozen = nn.BatchNorm2d(6), nn.BatchNorm2d(6)
    model = nn.ModuleList([trained, frozen]).to(dtype)
    with torch.no_grad():
        trained.weight.copy_(start), frozen.weight.copy_(start)
    optimizer = torch.optim.AdamW(ab.param_groups(model, 0.0, NORM_WD), lr=0.0)
    for _ in range(3):
        trained.weight.grad = torch.zeros_like(start)
        (Outer(optimizer) if wrapped else optimizer).step()
    assert torch.equal(trained.weight, start)
    for group in optimizer.param_groups:
        group["lr"] = 0.5
    optimizer.step()
    assert torch.equal(frozen.weight, start)
    assert not torch.equal(trained.weight, start)


def test_an_optimizer_in_an_optimizer_shifts_once() -> None:
    norm = nn.BatchNorm2d(3)
    optimizer = Outer(torch.optim.SGD(ab.param_groups(norm, 0.0, 1.0), lr=0.5))
    nn.init.constant_(norm.weight, 3.0)
    for _ in range(40):
        norm.weight.grad, norm.bias.grad = torch.zeros(3), torch.zeros(3)
        optimizer.step()
    torch.testing.assert_close(norm.weight.detach(), torch.ones(3), **SAME)


@pytest.mark.parametrize("kept", [False, True])
def test_a_step_that_raises_leaves_the_gammas(kept: bool) -> None:
    """Back once the error is handled, and at the next step at the latest where someone keeps its traceback."""
    norm = nn.BatchNorm2d(3)
    optimizer = torch.optim.AdamW(ab.param_groups(norm, 0.0, NORM_WD), lr=0.0)
    norm.weight.grad = torch.zeros(3)
    norm.bias.grad = torch.zeros(3).to_sparse()  # which AdamW refuses
    error = None
    try:
        optimizer.step()
    except RuntimeError as caught:
        error = caught if kept else str(caught)
    assert error is not None
    norm.bias.grad = torch.zeros(3)
    if kept:
        optimizer.step()
    assert torch.equal(norm.weight, torch.ones(3))
