"""Cross-Iteration BatchNorm against its equations, and the laws that hold it."""

import copy
import itertools

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
from .tolerances import ORACLE, REORDERED, SAME

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
        c, window=4, dtype=D, gradient=gradient, pooling=pooling, expansion=expansion, average_reductions=0
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
def test_averaged_reductions_change_what_flows_on_and_nothing_else(kind: str) -> None:
    """Own gradients stay; the input's gains (1 - s) a (-R1 - y_hat R2) through the map, R the running averages."""
    module, shape = make(kind)
    c = channels_of(module)
    plain = CrossIterationBatchNorm(c, window=3, dtype=D, average_reductions=0).follows(module)
    norm = CrossIterationBatchNorm(c, window=3, dtype=D, average_reductions=4)
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
            share = m / sum(sizes[-3:])
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


@pytest.mark.parametrize("shape", [(5, 3, 4, 7), (9, 3), (2, 3, 11), (2, 3, 3, 2, 5)], ids=str)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_window_one_is_torchs_batchnorm(shape: tuple[int, ...], momentum: float | None) -> None:
    """Outputs, every gradient and running statistics, in float32, over several batches."""
    theirs = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(shape)](
        3, momentum=momentum
    )
    mine = ab.CBN(window=1).build(theirs.__class__(3, momentum=momentum))
    with torch.no_grad():
        for p, q in zip(theirs.parameters(), mine.parameters(), strict=True):
            q.copy_(p.normal_())
    for _ in range(4):
        x = (torch.randn(shape) * 2 + 1).requires_grad_()
        cotangent = torch.randn(shape)
        a, b = theirs(x), mine(x)
        torch.testing.assert_close(b, a, **SAME)
        for g, h in zip(
            gradients(a, [x, *theirs.parameters()], cotangent),
            gradients(b, [x, *mine.parameters()], cotangent),
            strict=True,
        ):
            torch.testing.assert_close(h, g, rtol=1e-6, atol=1e-6 * float(g.abs().max().clamp_min(1)))
    for name, buffer in theirs.named_buffers():
        torch.testing.assert_close(mine.get_buffer(name), buffer, **SAME)


@every_map
def test_still_weights_make_it_batchnorm_on_the_concatenation(kind: str) -> None:
    """Batches of unequal size; outputs in float32, and the gradient of gamma and beta."""
    module, shape = make(kind, torch.float32)
    c = channels_of(module)
    norm = CrossIterationBatchNorm(c, window=4).follows(module)
    batches = [torch.randn(n, *shape) * 2 + 1 for n in (7, 1, 3, 2, 4)]
    with torch.no_grad():
        outs = [norm(module(x)) for x in batches]
        y = module(torch.cat(batches[1:]))
        mean, var = oracle.batch_moments(y.double())
        expected = oracle.normalise(y[-4:].double(), mean, var, norm.weight, norm.bias, norm.eps)
    torch.testing.assert_close(outs[-1], expected.float(), **REORDERED)


@every_map
def test_moved_weights_mean_exact_variance_below_within_second_order(kind: str) -> None:
    """d = W - W_t: the carried mean is the true one; the true variance exceeds the carried, by at most Var(d p).

    For the deviation's expansion by var (1 - correlation^2) of the outputs under W_t and W, exactly.
    """
    module, shape = make(kind)
    c = channels_of(module)
    x = torch.randn(6, *shape, dtype=D).relu()
    past = oracle.Past(
        module, module.weight.detach().clone(), None if module.bias is None else module.bias.detach().clone(), x
    )
    norm = CrossIterationBatchNorm(c, window=2, dtype=D, pooling="equal").follows(module)
    norm(module(x))
    move(module, 0.01)
    with torch.no_grad():
        d = module.weight - past.weight
        mean, var = oracle.batch_moments(module(x))
        moved = oracle.run(module, d, None if module.bias is None else torch.zeros(c, dtype=D), x)
        _, second_order = oracle.batch_moments(moved)
        before, after = (
            t.transpose(0, 1).flatten(1) for t in (oracle.run(module, past.weight, past.bias, x), module(x))
        )
        unexplained = torch.stack(
            [1 - torch.corrcoef(torch.stack(p))[0, 1] ** 2 for p in zip(before, after, strict=True)]
        )
        norm(module(x))
        pooled_mean, pooled_var = LAST[norm]
    torch.testing.assert_close(pooled_mean, mean, **ORACLE)  # both entries have the true mean
    carried_var = 2 * pooled_var - var
    assert (carried_var <= var + 1e-12).all()
    assert (var - carried_var <= second_order + 1e-12).all()
    torch.testing.assert_close(var - carried_var, var * unexplained, rtol=1e-6, atol=1e-12)
    assert (unexplained > 1e-6).any()


@pytest.mark.parametrize(("gradient", "vanishes"), [("history", True), ("current", False)])
@pytest.mark.parametrize("average_reductions", [0, 8])
def test_loss_is_blind_to_the_weights_scale(gradient: str, vanishes: bool, average_reductions: int) -> None:
    """<dL/dW_c, W_c> is zero up to eps with the gradient through the history, and not without."""
    module = nn.Conv2d(3, 4, 3, bias=False, dtype=D)
    norm = CrossIterationBatchNorm(
        4, window=5, eps=1e-12, dtype=D, gradient=gradient, average_reductions=average_reductions
    ).follows(module)
    for _ in range(6):
        out = norm(module(torch.randn(2, 3, 6, 5, dtype=D)))
        module.zero_grad()
        out.backward(torch.randn_like(out))
        move(module, 0.005)
    out = norm(module(torch.randn(2, 3, 6, 5, dtype=D)))
    (grad,) = torch.autograd.grad(out, module.weight, torch.randn_like(out))
    along = (grad * module.weight).sum((1, 2, 3)).abs() / (
        grad.flatten(1).norm(dim=1) * module.weight.flatten(1).norm(dim=1)
    )
    assert bool((along < 1e-8).all()) == vanishes
    assert vanishes or (along > 1e-3).any()


def test_naive_history_pools_what_was() -> None:
    norm = CrossIterationBatchNorm(3, window=3, dtype=D, compensate=False)
    batches = [torch.randn(2, 3, 4, dtype=D) + i for i in range(4)]
    outs = [norm(y) for y in batches]
    mean, var = oracle.batch_moments(torch.cat(batches[1:]))
    torch.testing.assert_close(
        outs[-1], oracle.normalise(batches[-1], mean, var, norm.weight, norm.bias, norm.eps), **ORACLE
    )


def test_burn_in_is_batchnorm_and_then_the_window() -> None:
    module = nn.Conv1d(2, 3, 2, dtype=D)
    norm = CrossIterationBatchNorm(3, window=4, dtype=D, burn_in_steps=3).follows(module)
    for step in range(4):
        x = torch.randn(2, 2, 5, dtype=D)
        y = module(x)
        own = oracle.normalise(y, *oracle.batch_moments(y), norm.weight, norm.bias, norm.eps)
        same = torch.allclose(norm(y), own, rtol=1e-9)
        assert same == (step < 3), step


def test_paper_form_by_name() -> None:
    paper = ab.CBN.paper(window=4, burn_in_steps=7)
    assert (paper.gradient, paper.pooling, paper.expansion) == ("current", "equal", "second_moment")
    assert (paper.average_reductions, paper.running, paper.window, paper.burn_in_steps) == (0, "torch", 4, 7)
    assert paper.compensate


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e25])  # the last overflows in the variance alone
def test_a_batch_that_is_not_finite_leaves_no_trace(bad: float) -> None:
    """History, running statistics and averages go on as if it had not been; its own output says what it was."""
    pair = []
    for poison in (False, True):
        torch.manual_seed(3)
        module = nn.Conv2d(2, 3, 3)
        norm = CrossIterationBatchNorm(3, window=3, average_reductions=4).follows(module)
        outs = []
        for step in range(5):
            x = torch.randn(2, 2, 5, 5, generator=torch.Generator().manual_seed(step))
            if step == 3 and not poison:
                continue
            if step == 3:
                x = x.index_fill(0, torch.tensor([0]), bad)
            x.requires_grad_()
            out = norm(module(x))
            cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(step))
            grad = torch.autograd.grad(out, [x, module.weight], cotangent)
            outs.append((out, *grad))
        pair.append((outs[-1], [b.clone() for b in norm.buffers()]))
    for a, b in itertools.chain(zip(pair[0][0], pair[1][0], strict=True), zip(pair[0][1], pair[1][1], strict=True)):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_an_empty_batch_passes_and_pushes_nothing() -> None:
    module = nn.Conv2d(2, 3, 3)
    norm = CrossIterationBatchNorm(3, window=3).follows(module)
    norm(module(torch.randn(2, 2, 5, 5)))
    before = ab.history_state_dict(nn.Sequential(module, norm))
    out = norm(module(torch.randn(0, 2, 5, 5)))
    assert out.shape == (0, 3, 3, 3)
    out.backward(torch.randn_like(out))
    assert (norm.weight.grad == 0).all()
    after = ab.history_state_dict(nn.Sequential(module, norm))
    assert_same_state(before, after)
    assert norm.num_batches_tracked == 1


def test_one_value_per_channel_is_normalised_by_what_is_known() -> None:
    """By the running statistics while there is no history, then by the pooled ones; never an error."""
    norm = CrossIterationBatchNorm(3, window=4, dtype=D, compensate=False)
    with torch.no_grad():
        norm.running_mean.fill_(2.0), norm.running_var.fill_(4.0)
    first = torch.randn(1, 3, dtype=D).requires_grad_()
    out = norm(first)
    torch.testing.assert_close(out, (first - 2) / (4 + norm.eps) ** 0.5, **ORACLE)
    cotangent = torch.randn_like(out)
    (grad,) = torch.autograd.grad(out, first, cotangent)
    torch.testing.assert_close(grad, cotangent / (4 + norm.eps) ** 0.5, **ORACLE)
    second = torch.randn(1, 3, dtype=D)
    both = torch.cat([first.detach(), second])
    expected = oracle.normalise(second, *oracle.batch_moments(both), norm.weight, norm.bias, norm.eps)
    torch.testing.assert_close(norm(second), expected, **ORACLE)


def test_evaluation_pushes_nothing_and_is_torchs() -> None:
    module = nn.Conv2d(2, 3, 3)
    norm = CrossIterationBatchNorm(3, window=3).follows(module)
    norm(module(torch.randn(2, 2, 5, 5)))
    model = nn.Sequential(module, norm).eval()
    before = ab.history_state_dict(model)
    x = torch.randn(1, 2, 5, 5)
    torch.testing.assert_close(model(x), norm.to_batchnorm()(module(x)), rtol=0, atol=0)
    assert_same_state(before, ab.history_state_dict(model))


def test_running_momentum_counts_examples() -> None:
    """Two batches of 2 move the running mean as the examples do: 1 - 0.9^(2/32) each."""
    norm = CrossIterationBatchNorm(3, window=4, compensate=False, dtype=D)
    y = torch.randn(2, 3, 5, dtype=D)
    norm(y)
    rate = 1 - 0.9 ** (2 / 32)
    torch.testing.assert_close(norm.running_mean, rate * oracle.batch_moments(y)[0], **ORACLE)


def test_shared_norm_keeps_a_history_a_map() -> None:
    one, two = nn.Conv2d(2, 3, 3), nn.Conv2d(4, 3, 1)
    norm = CrossIterationBatchNorm(3, window=3).follows(one).follows(two)
    for _ in range(3):
        norm(one(torch.randn(2, 2, 5, 5)))
        norm(two(torch.randn(2, 4, 5, 5)))
    assert set(norm.histories) == {0, 1}
    assert [h.covariance.shape[2] for h in norm.histories.values()] == [18, 4]


def assert_same_state(a: dict, b: dict) -> None:
    assert a["layers"].keys() == b["layers"].keys()
    for name, layer in a["layers"].items():
        for index, tensors in layer.items():
            for field, tensor in tensors.items():
                assert torch.equal(tensor, b["layers"][name][index][field]), (name, field)


@pytest.mark.parametrize("kind", ["weight norm", "none"])
def test_parametrized_weight_gets_its_gradient(kind: str) -> None:
    """Under weight norm the effective weight is compensated and the gradient reaches g and v."""
    module = nn.Conv2d(2, 3, 3, dtype=D)
    if kind == "weight norm":
        nn.utils.parametrizations.weight_norm(module)
    norm = CrossIterationBatchNorm(3, window=3, dtype=D, average_reductions=0).follows(module)
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


def test_statistics_stay_in_float32_under_autocast() -> None:
    """The map runs in bfloat16; what is pooled, carried and kept differs from float32 by the map's rounding alone."""
    pooled = []
    for enabled in (False, True):
        torch.manual_seed(1)
        module = nn.Conv2d(3, 4, 3)
        norm = CrossIterationBatchNorm(4, window=3).follows(module)
        for step in range(4):
            x = torch.randn(2, 3, 7, 7, generator=torch.Generator().manual_seed(step)) + 1
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                out = norm(module(x))
            out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(step)).to(out.dtype))
            with torch.no_grad():
                module.weight.add_(
                    0.01 * torch.randn(module.weight.shape, generator=torch.Generator().manual_seed(step))
                )
        assert out.dtype == (torch.bfloat16 if enabled else torch.float32)
        history = norm.histories[0]
        assert history.covariance.dtype == history.scalars.dtype == torch.float32
        pooled.append((*LAST[norm], history.covariance, norm.running_var, module.weight.grad))
    for a, b in zip(*pooled, strict=True):
        torch.testing.assert_close(b, a, rtol=3e-2, atol=3e-2 * float(a.abs().max()))
    # Were the carried moments computed in bfloat16 too, they would be off by its 4e-3 and not by an average of it.
    torch.testing.assert_close(pooled[1][1], pooled[0][1], rtol=2e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_moved_to_another_dtype_in_mid_window(dtype: torch.dtype) -> None:
    """The history follows; it stays in float32 for a model in half precision."""
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3))
    ab.convert_(model, ab.CBN(window=3), example_inputs=torch.randn(2, 2, 5, 5))
    model(torch.randn(2, 2, 5, 5))
    model.to(dtype)
    out = model(torch.randn(2, 2, 5, 5, dtype=dtype))
    out.backward(torch.randn_like(out))
    assert out.dtype == model[0].weight.grad.dtype == dtype
    assert model[1].histories[0].covariance.dtype == torch.promote_types(dtype, torch.float32)
    assert model[1].histories[0].forwards == 2


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


@every_map
@pytest.mark.parametrize("options", [{"gradient": "history"}, {"gradient": "current"}, {"compensate": False}], ids=str)
def test_groups_of_a_batch_are_batches_one_after_another(kind: str, options: dict) -> None:
    """A batch of 5 in groups of 2 is three batches without a step between: outputs, gradients, statistics, history."""
    module, shape = make(kind, torch.float64)
    c = channels_of(module)
    other = copy.deepcopy(module)
    grouped = CrossIterationBatchNorm(
        c, window=4, examples_per_group=2, average_reductions=0, dtype=torch.float64, **options
    ).follows(module)
    plain = CrossIterationBatchNorm(c, window=4, average_reductions=0, dtype=torch.float64, **options).follows(other)
    for _ in range(3):
        x = torch.randn(5, *shape, dtype=torch.float64)
        g = torch.randn_like(module(x))
        out = grouped(module(x))
        out.backward(g)
        for x_part, g_part, out_part in zip(x.split(2), g.split(2), out.split(2), strict=True):
            theirs = plain(other(x_part))
            theirs.backward(g_part)
            torch.testing.assert_close(out_part, theirs, **ORACLE)
        mine = [*module.parameters(), *grouped.parameters()]
        for a, b in zip(mine, [*other.parameters(), *plain.parameters()], strict=True):
            torch.testing.assert_close(a.grad, b.grad, **ORACLE)
            with torch.no_grad():
                a -= 0.01 * a.grad
                b.copy_(a)
        for a, b in zip(grouped.buffers(), plain.buffers(), strict=True):
            torch.testing.assert_close(a, b, **ORACLE)
    for index, history in grouped.histories.items():
        for key, value in history.state_dict().items():
            torch.testing.assert_close(value, plain.histories[index].state_dict()[key], **ORACLE)
