"""Cross-Iteration BatchNorm against its equations, and the laws that hold it."""

import hypothesis
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import anybatch as ab
from anybatch.nn import CrossIterationBatchNorm

from . import oracle
from .test_linear_map import CONVS, convolutions
from .tolerances import ORACLE, REORDERED

D = torch.float64
MAPS = {
    "conv2d grouped strided": (lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=1, groups=2), (4, 5, 7)),
    "conv2d no bias": (lambda: nn.Conv2d(3, 5, 3, padding="same", dilation=2, bias=False), (3, 7, 5)),
    "conv2d reflect": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (2, 4, 5)),
    "conv1d circular": (lambda: nn.Conv1d(3, 4, 3, padding=2, padding_mode="circular"), (3, 7)),
    "conv3d depthwise": (lambda: nn.Conv3d(3, 3, 2, groups=3), (3, 3, 4, 3)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2), (4, 3, 4)),
    "linear": (lambda: nn.Linear(7, 5), (7,)),
}
every_map = pytest.mark.parametrize("kind", MAPS)
every_way = pytest.mark.parametrize("way", ["exponential", "ring"])  # of keeping the past


def make(kind: str, dtype: torch.dtype = D) -> tuple[nn.Module, tuple[int, ...]]:
    build, shape = MAPS[kind]
    return build().to(dtype), shape


def channels_of(module: nn.Module) -> int:
    return module.out_features if isinstance(module, nn.Linear) else module.out_channels


def move(module: nn.Module, by: float) -> None:
    with torch.no_grad():
        for p in module.parameters():
            p.add_(by * torch.randn_like(p))


def trained(norm: nn.Module, module: nn.Module, batches: list[Tensor], step: float) -> list[oracle.Past]:
    """Run over batches with the weights moved after each; the past as the oracle sees it."""
    past = []
    for x in batches:
        norm(module(x))
        bias = None if module.bias is None else module.bias.detach().clone()
        past.append(oracle.Past(module, module.weight.detach().clone(), bias, x))
        move(module, step)
    return past


def gradients(out: Tensor, wanted: list[Tensor | None], cotangent: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(out, [w for w in wanted if w is not None], cotangent))


@every_map
@pytest.mark.parametrize("gradient", ["history", "current"])
@pytest.mark.parametrize(("pooling", "expansion"), [("samples", "deviation"), ("equal", "second_moment")])
def test_outputs_and_every_gradient(kind: str, gradient: str, pooling: str, expansion: str) -> None:
    """Against float64 autograd through the written-out expression, weights moving under a window of unequal batches."""
    module, shape = make(kind)
    c = channels_of(module)
    norm = CrossIterationBatchNorm(
        c, 4, dtype=D, kind="ring", gradient=gradient, pooling=pooling, expansion=expansion, average_reductions=0
    ).follows(module)
    with torch.no_grad():
        norm.weight.normal_(), norm.bias.normal_()
    batches = [torch.randn(n, *shape, dtype=D) + 0.7 for n in (3, 2, 5, 4, 3)]
    past = trained(norm, module, batches, 0.02)[-3:]  # the window counts the batch to come
    x = (torch.randn(3, *shape, dtype=D) + 0.7).requires_grad_()

    out = norm(module(x))
    y = oracle.run(module, module.weight, module.bias, x)
    mean, var = oracle.pooled_moments(
        y, past, module.weight, module.bias,
        equal=pooling == "equal", second_moment=expansion == "second_moment", detach=gradient == "current",
    )  # fmt: skip
    expected = oracle.normalise(y, mean, var, norm.weight, norm.bias, norm.eps)

    torch.testing.assert_close(out, expected, **ORACLE)
    wanted = [x, module.weight, module.bias, norm.weight, norm.bias]
    cotangent = torch.randn_like(out)
    for mine, theirs in zip(gradients(out, wanted, cotangent), gradients(expected, wanted, cotangent), strict=True):
        torch.testing.assert_close(mine, theirs, **ORACLE)


@every_map
@every_way
def test_averaged_reductions_change_what_flows_on_and_nothing_else(kind: str, way: str) -> None:
    """Own gradients stay; the input's gains (1 - s) a (-R1 - y_hat R2) through the map, R the running averages."""
    module, shape = make(kind)
    c = channels_of(module)
    plain = CrossIterationBatchNorm(
        c, window=3, dtype=D, kind=way, positions=None, refresh=1, average_reductions=0
    ).follows(module)
    norm = CrossIterationBatchNorm(c, window=3, dtype=D, kind=way, positions=None, refresh=1, average_reductions=4)
    with torch.no_grad():
        for p, q in zip(plain.parameters(), norm.parameters(), strict=True):
            q.copy_(p.normal_())
    norm.follows(module)
    sums: list[Tensor] = []
    sizes: list[float] = []
    for step in range(6):
        x = (torch.randn(2 + step % 3, *shape, dtype=D) + 0.3).requires_grad_()
        y = module(x)
        cotangent = torch.randn_like(y)
        # The hooks tie the map's run to y, so both norms can read it.
        wanted = [x, module.weight, module.bias, norm.weight, norm.bias]
        mine = gradients(norm(y), wanted, cotangent)
        own = gradients(plain(y2 := module(x)), [*wanted[:3], plain.weight, plain.bias], cotangent)
        assert y2.shape == y.shape
        for a, b in zip(mine[1:], own[1:], strict=True):
            torch.testing.assert_close(a, b, **ORACLE)

        shape_c = (1, -1, *[1] * (y.dim() - 2))
        with torch.no_grad():
            mean, var = (v.view(shape_c) for v in LAST[plain])
            inverse = (var + plain.eps).rsqrt()
            y_hat, a = (y - mean) * inverse, plain.weight.view(shape_c) * inverse
            m = y.numel() // c
            new = torch.stack([t.transpose(0, 1).flatten(1).sum(1) / m for t in (cotangent, cotangent * y_hat)])
            sums.append(new)
            n = min(len(sums), 4)
            average = new if len(sums) == 1 else average + (new - average) / n  # noqa: F821
            r1, r2 = (r.view(shape_c) for r in average)
            sizes.append(float(m))
            share = m / (
                sum(sizes[-3:]) if way == "ring" else sum(s * (2 / 3) ** age for age, s in enumerate(sizes[::-1]))
            )
            later = (1 - share) * a * (-r1 - y_hat * r2)
        (later,) = torch.autograd.grad(oracle.run(module, module.weight, module.bias, x), x, later)
        torch.testing.assert_close(mine[0], own[0] + later, **ORACLE)
        move(module, 0.01)


LAST: dict[nn.Module, tuple[Tensor, Tensor]] = {}


@pytest.fixture(autouse=True)
def last_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Note the pooled moments of every forward."""
    first = CrossIterationBatchNorm._first

    def noting(self, *args):
        pooled, response = first(self, *args)
        LAST[self] = (pooled.mean, pooled.var)
        return pooled, response

    monkeypatch.setattr(CrossIterationBatchNorm, "_first", noting)


@every_map
def test_still_weights_make_it_batchnorm_on_the_concatenation(kind: str) -> None:
    """Batches of unequal size; outputs in float32, and the gradient of gamma and beta."""
    module, shape = make(kind, torch.float32)
    c = channels_of(module)
    norm = CrossIterationBatchNorm(c, window=4, kind="ring").follows(module)
    batches = [torch.randn(n, *shape) * 2 + 1 for n in (7, 1, 3, 2, 4)]
    with torch.no_grad():
        outs = [norm(module(x)) for x in batches]
        y = module(torch.cat(batches[1:]))
        mean, var = oracle.batch_moments(y.double())
        expected = oracle.normalise(y[-4:].double(), mean, var, norm.weight, norm.bias, norm.eps)
    torch.testing.assert_close(outs[-1], expected.float(), **REORDERED)


def test_paper_form_by_name() -> None:
    paper = ab.CBN.paper(window=4, burn_in_steps=7)
    assert (paper.gradient, paper.pooling, paper.expansion) == ("current", "equal", "second_moment")
    assert (paper.average_reductions, paper.running, paper.window, paper.burn_in_steps) == (0, "torch", 4, 7)
    assert paper.compensate
    assert paper.kind == "ring"


@pytest.mark.parametrize("kind", ["weight norm", "none"])
def test_parametrized_weight_gets_its_gradient(kind: str) -> None:
    """Under weight norm the effective weight is compensated and the gradient reaches g and v."""
    module = nn.Conv2d(2, 3, 3, dtype=D)
    if kind == "weight norm":
        nn.utils.parametrizations.weight_norm(module)
    norm = CrossIterationBatchNorm(3, window=3, dtype=D, kind="ring", average_reductions=0).follows(module)
    past = []
    for _ in range(3):
        x = torch.randn(2, 2, 5, 5, dtype=D)
        norm(module(x))
        plain = nn.Conv2d(2, 3, 3, dtype=D)
        past.append(oracle.Past(plain, module.weight.detach().clone(), module.bias.detach().clone(), x))
        move(module, 0.02)
    x = torch.randn(2, 2, 5, 5, dtype=D)
    out = norm(module(x))
    weight, bias = module.weight, module.bias
    y = oracle.run(plain, weight, bias, x)
    mean, var = oracle.pooled_moments(y, past[-2:], weight, bias, equal=False, second_moment=False, detach=False)
    expected = oracle.normalise(y, mean, var, norm.weight, norm.bias, norm.eps)
    torch.testing.assert_close(out, expected, **ORACLE)
    cotangent = torch.randn_like(out)
    parameters = list(module.parameters())
    for a, b in zip(gradients(out, parameters, cotangent), gradients(expected, parameters, cotangent), strict=True):
        torch.testing.assert_close(a, b, **ORACLE)


@given(convolutions(CONVS, ["zeros", "circular", "reflect"]), st.data())
@hypothesis.settings(max_examples=25)
def test_any_convolution_under_any_window(case: tuple[nn.Module, Tensor], data: st.DataObject) -> None:
    """Shapes, strides, groups, paddings and options searched: outputs and every gradient against the oracle."""
    module, x = case
    equal, second_moment = data.draw(st.booleans()), data.draw(st.booleans())
    window, before = data.draw(st.integers(1, 4)), data.draw(st.integers(0, 5))
    norm = CrossIterationBatchNorm(
        module.out_channels,
        window=window,
        dtype=D,
        kind="ring",
        pooling="equal" if equal else "samples",
        expansion="second_moment" if second_moment else "deviation",
        average_reductions=0,
    ).follows(module)
    batches = [torch.randn(data.draw(st.integers(1, 3)), *x.shape[1:], dtype=D) + 0.5 for _ in range(before)]
    past = trained(norm, module, batches, 0.01)
    y = oracle.run(module, module.weight, module.bias, x)
    hypothesis.assume(y.numel() // y.shape[1] > 1)
    hypothesis.assume(all(bool((entry.var > 1e-3).all()) for entry in past))
    x.requires_grad_()
    out, y = norm(module(x)), oracle.run(module, module.weight, module.bias, x)
    mean, var = oracle.pooled_moments(
        y, past[max(0, len(past) - window + 1) :], module.weight, module.bias,
        equal=equal, second_moment=second_moment, detach=False,
    )  # fmt: skip
    expected = oracle.normalise(y, mean, var, norm.weight, norm.bias, norm.eps)
    torch.testing.assert_close(out, expected, rtol=1e-8, atol=1e-9)
    wanted = [x, *module.parameters(), *norm.parameters()]
    cotangent = torch.randn_like(out)
    for mine, theirs in zip(gradients(out, wanted, cotangent), gradients(expected, wanted, cotangent), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-8 * float(theirs.abs().max().clamp_min(1)))
