"""Laws of Cross-Iteration BatchNorm, whichever way it keeps the past."""

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn

import anybatch as ab
from anybatch.nn import CrossIterationBatchNorm

from . import oracle
from .test_cbn import LAST, D, channels_of, every_map, every_way, gradients, last_moments, make, move  # noqa: F401
from .test_history import assert_equal
from .tolerances import ORACLE, SAME


@pytest.mark.parametrize("shape", [(5, 3, 4, 7), (9, 3), (2, 3, 11), (2, 3, 3, 2, 5)], ids=str)
@pytest.mark.parametrize("momentum", [0.1, None])
@every_way
def test_window_one_is_torchs_batchnorm(shape: tuple[int, ...], momentum: float | None, way: str) -> None:
    """Outputs, every gradient and running statistics, in float32, over several batches."""
    theirs = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(shape)](
        3, momentum=momentum
    )
    mine = ab.CBN(kind=way, window=1).build(theirs.__class__(3, momentum=momentum))
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
@every_way
def test_moved_weights_mean_exact_variance_below_within_second_order(kind: str, way: str) -> None:
    """d = W - W_t: the carried mean is the true one; the true variance exceeds the carried, by at most Var(d p).

    For the deviation's expansion by var (1 - correlation^2) of the outputs under W_t and W, exactly.
    """
    module, shape = make(kind)
    c = channels_of(module)
    x = torch.randn(6, *shape, dtype=D).relu()
    past = oracle.Past(
        module, module.weight.detach().clone(), None if module.bias is None else module.bias.detach().clone(), x
    )
    norm = CrossIterationBatchNorm(c, kind=way, window=2, dtype=D, pooling="equal", positions=None).follows(module)
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
    share = 1 / 2 if way == "ring" else 1 / (1 + 1 / 2)  # of the second batch
    carried_var = (pooled_var - share * var) / (1 - share)
    assert (carried_var <= var + 1e-12).all()
    assert (var - carried_var <= second_order + 1e-12).all()
    torch.testing.assert_close(var - carried_var, var * unexplained, rtol=1e-6, atol=1e-12)
    assert (unexplained > 1e-6).any()


@pytest.mark.parametrize(("gradient", "vanishes"), [("history", True), ("current", False)])
@pytest.mark.parametrize("average_reductions", [0, 8])
@every_way
def test_loss_is_blind_to_the_weights_scale(gradient: str, vanishes: bool, average_reductions: int, way: str) -> None:
    """<dL/dW_c, W_c> is zero up to eps with the gradient through the history, and not without."""
    module = nn.Conv2d(3, 4, 3, bias=False, dtype=D)
    norm = CrossIterationBatchNorm(
        4, kind=way, window=5, eps=1e-12, dtype=D, gradient=gradient, average_reductions=average_reductions
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


@every_way
def test_naive_history_pools_what_was(way: str) -> None:
    norm = CrossIterationBatchNorm(3, kind=way, window=3, dtype=D, compensate=False)
    batches = [torch.randn(2, 3, 4, dtype=D) + i for i in range(4)]
    outs = [norm(y) for y in batches]
    mean, var = oracle.weighted_moments(batches, [0, 1, 1, 1] if way == "ring" else [8 / 27, 4 / 9, 2 / 3, 1])
    torch.testing.assert_close(
        outs[-1], oracle.normalise(batches[-1], mean, var, norm.weight, norm.bias, norm.eps), **ORACLE
    )


@every_way
def test_burn_in_is_batchnorm_and_then_the_window(way: str) -> None:
    module = nn.Conv1d(2, 3, 2, dtype=D)
    norm = CrossIterationBatchNorm(3, kind=way, window=4, dtype=D, burn_in_steps=3).follows(module)
    for step in range(4):
        x = torch.randn(2, 2, 5, dtype=D)
        y = module(x)
        own = oracle.normalise(y, *oracle.batch_moments(y), norm.weight, norm.bias, norm.eps)
        same = torch.allclose(norm(y), own, rtol=1e-9)
        assert same == (step < 3), step


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e25])  # the last overflows in the variance alone
@every_way
def test_a_batch_that_is_not_finite_leaves_no_trace(bad: float, way: str) -> None:
    """History, running statistics and averages go on as if it had not been; its own output says what it was."""
    pair = []
    for poison in (False, True):
        torch.manual_seed(3)
        module = nn.Conv2d(2, 3, 3)
        norm = CrossIterationBatchNorm(3, kind=way, window=3, average_reductions=4).follows(module)
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


@every_way
def test_an_empty_batch_passes_and_pushes_nothing(way: str) -> None:
    module = nn.Conv2d(2, 3, 3)
    norm = CrossIterationBatchNorm(3, kind=way, window=3).follows(module)
    norm(module(torch.randn(2, 2, 5, 5)))
    before = ab.history_state_dict(nn.Sequential(module, norm))
    out = norm(module(torch.randn(0, 2, 5, 5)))
    assert out.shape == (0, 3, 3, 3)
    out.backward(torch.randn_like(out))
    assert (norm.weight.grad == 0).all()
    after = ab.history_state_dict(nn.Sequential(module, norm))
    assert_equal(before, after)
    assert norm.num_batches_tracked == 1


@every_way
def test_one_value_per_channel_is_normalised_by_what_is_known(way: str) -> None:
    """By the running statistics while fewer than the window or 16 are pooled, then by these; never an error."""
    norm = CrossIterationBatchNorm(3, kind=way, window=4, dtype=D, compensate=False)
    with torch.no_grad():
        norm.running_mean.fill_(2.0), norm.running_var.fill_(4.0)
    ys: list[Tensor] = []
    for count in range(1, 10):
        y = torch.randn(1, 3, dtype=D).requires_grad_()
        known = norm.running_mean.clone(), norm.running_var.clone()
        out = norm(y)
        cotangent = torch.randn_like(out)
        (grad,) = torch.autograd.grad(out, y, cotangent)
        ys.append(y.detach())
        weights = [float(age < 4) if way == "ring" else 0.75**age for age in range(count)][::-1]
        enough = 1 / sum(weights) <= 1.25 / 4
        assert enough == (count >= (4 if way == "ring" else 6))
        mean, var = oracle.weighted_moments(ys, weights) if enough else known
        torch.testing.assert_close(out, oracle.normalise(y, mean, var, norm.weight, norm.bias, norm.eps), **ORACLE)
        if not enough:  # by constants: nothing of the batch's mean is taken back
            torch.testing.assert_close(grad, cotangent / (var + norm.eps).sqrt(), **ORACLE)


def test_single_values_in_many_norms_in_a_row_do_not_explode() -> None:
    """Two values that happen to be close are no variance: forty norms in a row made a gradient of 1e8 of it."""
    torch.manual_seed(0)
    maps = [nn.Linear(32, 32) for _ in range(40)]
    model = nn.Sequential(*(nn.Sequential(m, nn.BatchNorm1d(32), nn.ReLU()) for m in maps))
    ab.convert_(model, ab.CBN(), example_inputs=torch.randn(2, 32))
    for _ in range(6):
        x = torch.randn(1, 32, requires_grad=True)
        (grad,) = torch.autograd.grad(model(x).square().sum(), x)
        assert grad.norm() < 1e2


@every_way
def test_evaluation_pushes_nothing_and_is_torchs(way: str) -> None:
    module = nn.Conv2d(2, 3, 3)
    norm = CrossIterationBatchNorm(3, kind=way, window=3).follows(module)
    norm(module(torch.randn(2, 2, 5, 5)))
    model = nn.Sequential(module, norm).eval()
    before = ab.history_state_dict(model)
    x = torch.randn(1, 2, 5, 5)
    torch.testing.assert_close(model(x), norm.to_batchnorm()(module(x)), rtol=0, atol=0)
    assert_equal(before, ab.history_state_dict(model))


@every_way
def test_running_momentum_counts_examples(way: str) -> None:
    """Two batches of 2 move the running mean as the examples do: 1 - 0.9^(2/32) each."""
    norm = CrossIterationBatchNorm(3, kind=way, window=4, compensate=False, dtype=D)
    y = torch.randn(2, 3, 5, dtype=D)
    norm(y)
    rate = 1 - 0.9 ** (2 / 32)
    torch.testing.assert_close(norm.running_mean, rate * oracle.batch_moments(y)[0], **ORACLE)


@every_way
def test_shared_norm_keeps_a_history_a_map(way: str) -> None:
    one, two = nn.Conv2d(2, 3, 3), nn.Conv2d(4, 3, 1)
    norm = CrossIterationBatchNorm(3, kind=way, window=3).follows(one).follows(two)
    for _ in range(3):
        norm(one(torch.randn(2, 2, 5, 5)))
        norm(two(torch.randn(2, 4, 5, 5)))
    assert set(norm.histories) == {0, 1}
    assert [h.covariance.shape[-1] for h in norm.histories.values()] == [18, 4]


@every_way
def test_statistics_stay_in_float32_under_autocast(way: str) -> None:
    """The map runs in bfloat16; what is pooled, carried and kept differs from float32 by the map's rounding alone."""
    pooled = []
    for enabled in (False, True):
        torch.manual_seed(1)
        module = nn.Conv2d(3, 4, 3)
        norm = CrossIterationBatchNorm(4, kind=way, window=3).follows(module)
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
@every_way
def test_moved_to_another_dtype_in_mid_window(dtype: torch.dtype, way: str) -> None:
    """The history follows; it stays in float32 for a model in half precision."""
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3))
    ab.convert_(model, ab.CBN(kind=way, window=3), example_inputs=torch.randn(2, 2, 5, 5))
    model(torch.randn(2, 2, 5, 5))
    model.to(dtype)
    out = model(torch.randn(2, 2, 5, 5, dtype=dtype))
    out.backward(torch.randn_like(out))
    assert out.dtype == model[0].weight.grad.dtype == dtype
    assert model[1].histories[0].covariance.dtype == torch.promote_types(dtype, torch.float32)
    assert model[1].histories[0].forwards == 2


@every_map
@pytest.mark.parametrize("options", [{"gradient": "history"}, {"gradient": "current"}, {"compensate": False}], ids=str)
@every_way
def test_groups_of_a_batch_are_batches_one_after_another(kind: str, options: dict, way: str) -> None:
    """A batch of 5 in groups of 2 is three batches without a step between: outputs, gradients, statistics, history."""
    module, shape = make(kind, torch.float64)
    c = channels_of(module)
    other = copy.deepcopy(module)
    grouped = CrossIterationBatchNorm(
        c, kind=way, window=4, examples_per_group=2, average_reductions=0, dtype=torch.float64, **options
    ).follows(module)
    plain = CrossIterationBatchNorm(
        c, kind=way, window=4, average_reductions=0, dtype=torch.float64, **options
    ).follows(other)
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
