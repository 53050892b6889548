"""Batch Renormalization against its equations, and the laws that hold it."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import anybatch as ab
from anybatch.nn import BatchRenormalization

from . import oracle
from .tolerances import LARGE_MEAN, ORACLE, REORDERED, SAME

D = torch.float64
SHAPES = [(5, 4), (3, 4, 7), (1, 4, 5, 3), (3, 4, 1, 1), (2, 4, 2, 3, 2)]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
OPEN = {"ramp_from": 0, "ramp_to": 0}


def shaken(**options: object) -> BatchRenormalization:
    """As training would leave it: random affine parameters and running statistics."""
    layer = BatchRenormalization(4, dtype=D, **options)
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_()
    layer.running_mean.normal_()
    layer.running_var.uniform_(0.05, 3)
    return layer


def written_out(layer: BatchRenormalization, x: Tensor, r_max: float, d_max: float) -> Tensor:
    mean, var = oracle.batch_moments(x)
    sigma_b, sigma = (var + layer.eps).sqrt(), (layer.running_var + layer.eps).sqrt()
    r = (sigma_b / sigma).clamp(1 / r_max, r_max).detach()
    d = ((mean - layer.running_mean) / sigma).clamp(-d_max, d_max).detach()
    mean, sigma_b, r, d = (v.view(1, -1, *[1] * (x.dim() - 2)) for v in (mean, sigma_b, r, d))
    x_hat = (x - mean) / sigma_b * r + d
    ones, zeros = x.new_ones(4), x.new_zeros(4)
    weight, bias = (p if p is not None else v for p, v in ((layer.weight, ones), (layer.bias, zeros)))
    return oracle.normalise(x_hat, zeros, ones, weight, bias, 0.0)


@every_shape
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"bias": False}, {"r_max": 1.2, "d_max": 0.3}], ids=str)
def test_outputs_and_every_gradient(shape: tuple[int, ...], options: dict) -> None:
    layer = shaken(**OPEN, **options)
    x = (torch.randn(shape, dtype=D) * 2 + 1).requires_grad_()
    expected = written_out(layer, x, options.get("r_max", 3.0), options.get("d_max", 5.0))
    out = layer(x)
    torch.testing.assert_close(out, expected, **ORACLE)
    cotangent, wanted = torch.randn_like(out), [x, *layer.parameters()]
    for mine, theirs in zip(
        torch.autograd.grad(out, wanted, cotangent), torch.autograd.grad(expected, wanted, cotangent), strict=True
    ):
        torch.testing.assert_close(mine, theirs, **ORACLE)


@pytest.mark.parametrize(
    ("forward", "r_max", "d_max"), [(1, 1, 0), (4, 1, 0), (6, 1.5, 1.25), (8, 2, 2.5), (12, 3, 5), (99, 3, 5)]
)
def test_the_bounds_open_with_the_forwards(forward: int, r_max: float, d_max: float) -> None:
    layer = shaken(ramp_from=4, ramp_to=12)
    layer.num_batches_tracked.fill_(forward - 1)
    layer.running_mean.fill_(100), layer.running_var.fill_(1e-6)
    x = torch.randn(3, 4, 5, dtype=D)
    torch.testing.assert_close(layer(x), written_out_bounds(layer, x, r_max, d_max), **ORACLE)


def written_out_bounds(layer: nn.Module, x: Tensor, r: float, d: float) -> Tensor:
    """Every correction at its bound: far too narrow and far too low against the running statistics."""
    x_hat = oracle.normalise(x, *oracle.batch_moments(x), *(x.new_full((4,), v) for v in (r, -d)), layer.eps)
    return oracle.normalise(x_hat, x.new_zeros(4), x.new_ones(4), layer.weight, layer.bias, 0.0)


@every_shape
def test_before_the_ramp_it_is_batchnorm(shape: tuple[int, ...]) -> None:
    """Outputs and gradients over several steps, and its running mean at torch's momentum."""
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(shape)]
    bn = kind(4)
    layer = ab.BatchRenorm(ramp_from=3, momentum_batch=None).build(copy.deepcopy(bn))
    for _ in range(3):
        x = (torch.randn(shape) + 1).requires_grad_()
        cotangent = torch.randn(shape)
        outs = [module(x) for module in (bn, layer)]
        torch.testing.assert_close(outs[1], outs[0], **SAME)
        grads = [
            torch.autograd.grad(out, [x, *module.parameters()], cotangent)
            for out, module in zip(outs, (bn, layer), strict=True)
        ]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(b, a, **REORDERED)
        torch.testing.assert_close(layer.running_mean, bn.running_mean, **REORDERED)
    assert layer.num_batches_tracked == 3
    with torch.no_grad():
        assert not torch.allclose(layer(x + 3), bn(x + 3))


@every_shape
def test_without_bounds_training_normalises_as_evaluation_does(shape: tuple[int, ...]) -> None:
    layer = shaken(**OPEN, r_max=1e9, d_max=1e9)
    x = torch.randn(shape, dtype=D)
    expected = copy.deepcopy(layer).eval()(x)
    torch.testing.assert_close(layer(x), expected, **ORACLE)


def test_without_running_statistics_it_is_batchnorm() -> None:
    x = torch.randn(3, 4, 5)
    layer = BatchRenormalization(4, track_running_stats=False, **OPEN)
    for _ in range(2):
        torch.testing.assert_close(layer(x), nn.BatchNorm1d(4)(x), **SAME)


@pytest.mark.parametrize(("n", "counted"), [(1, 1 / 4), (2, 1 / 2), (4, 1), (9, 1)])
def test_running_statistics_are_total_and_count_examples(n: int, counted: float) -> None:
    layer = shaken(momentum_batch=4, momentum=0.3)
    mean, var = layer.running_mean.clone(), layer.running_var.clone()
    x = torch.randn(n, 4, 6, dtype=D) + 2
    now_mean, now_var = oracle.batch_moments(x)
    layer(x)
    rate = 1 - 0.7**counted
    new = (1 - rate) * mean + rate * now_mean
    second = (1 - rate) * (var + mean.square()) + rate * (now_var + now_mean.square())
    torch.testing.assert_close(layer.running_mean, new, **ORACLE)
    torch.testing.assert_close(layer.running_var, second - new.square(), **ORACLE)


def test_a_batch_that_is_not_finite_moves_nothing() -> None:
    layer = shaken(**OPEN)
    before = copy.deepcopy(layer.state_dict())
    layer(torch.full((2, 4, 3), float("inf"), dtype=D))
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


def test_one_value_a_channel_is_normalised_by_the_running_statistics() -> None:
    """By its own moments it would be a constant: no gradient would pass."""
    layer = shaken(**OPEN)
    x = torch.randn(1, 4, dtype=D, requires_grad=True)
    out = layer(x)
    torch.testing.assert_close(out, copy.deepcopy(layer).eval()(x), **ORACLE)
    assert torch.autograd.grad(out, x, torch.randn_like(out))[0].abs().min() > 0


@given(st.integers(1, 4), st.integers(2, 6), st.floats(1, 4), st.floats(0, 4))
def test_any_bounds(n: int, positions: int, r_max: float, d_max: float) -> None:
    layer = shaken(**OPEN, r_max=r_max, d_max=d_max)
    x = torch.randn(n, 4, positions, dtype=D) * 3
    expected = written_out(layer, x, r_max, d_max)
    torch.testing.assert_close(layer(x), expected, **ORACLE)


def test_resumes_in_mid_ramp() -> None:
    layers = [shaken(ramp_from=1, ramp_to=9, r_max=2.0) for _ in range(2)]
    for _ in range(4):
        layers[0](torch.randn(2, 4, 3, dtype=D))
    layers[1].load_state_dict(layers[0].state_dict())
    x = torch.randn(2, 4, 3, dtype=D)
    assert torch.equal(layers[0](x), layers[1](x))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_training_is_plain_training(reentrant: bool) -> None:
    """Bit for bit: the second run is corrected as the first was, though the running statistics have moved."""
    results = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4), nn.Tanh())
        ab.convert_(model, ab.BatchRenorm(ramp_from=1, ramp_to=4))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        seen = []
        for _ in range(5):
            optimizer.zero_grad()
            for n in (1, 3):
                x = torch.randn(n, 4, 3, requires_grad=True)
                out = checkpoint(model, x, use_reentrant=reentrant) if checkpointed else model(x)
                out.backward(torch.randn_like(out))
                seen += [out.detach(), x.grad]
            seen += [p.grad.clone() for p in model.parameters()]
            optimizer.step()
            seen += [b.clone() for b in model.buffers()]
        results.append(seen)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.filterwarnings("default")  # the compiler reads .grad of non-leaf tensors, and says so
def test_compiled_in_the_ramp() -> None:
    results = []
    for compiling in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4), nn.Tanh())
        ab.convert_(model, ab.BatchRenorm(ramp_from=1, ramp_to=3))
        run = torch.compile(model, backend="aot_eager") if compiling else model
        for _ in range(4):
            x = torch.randn(2, 4, 3, requires_grad=True)
            out = run(x)
            out.backward(torch.randn_like(out))
            results.append([out.detach(), x.grad])
    for eager, compiled in zip(results[:4], results[4:], strict=True):
        for a, b in zip(eager, compiled, strict=True):
            torch.testing.assert_close(b, a, **REORDERED)


def test_large_mean_in_full() -> None:
    """In float32 as in float64 where the correction is at work, at mean 1e4."""
    outs = []
    for dtype in (D, torch.float32):
        torch.manual_seed(0)
        layer = shaken(**OPEN).to(dtype)
        layer.running_mean.add_(1e4), layer.running_var.fill_(1.5)
        outs.append(layer((torch.randn(3, 4, 5, dtype=D) + 1e4).to(dtype)))
    torch.testing.assert_close(outs[1].double(), outs[0], **LARGE_MEAN)


def test_the_counter_is_read_without_a_look_at_the_values() -> None:
    """Fake tensors have none to look at: what runs on them makes no host wait for a device."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        layer = BatchRenormalization(4, ramp_from=0, ramp_to=2)
        for _ in range(3):
            layer(torch.randn(2, 4, 3)).sum().backward()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"r_max": 0.5}, "r_max=0.5; give a number of at least 1"),
        ({"d_max": -1}, "d_max=-1; give a number of at least 0"),
        ({"r_max": float("inf")}, "r_max=inf; give a number of at least 1, and finite"),
        ({"d_max": float("inf")}, "d_max=inf; give a number of at least 0, and finite"),
        ({"r_max": float("nan")}, "r_max=nan; give a number"),
        ({"ramp_from": -1}, "ramp_from=-1; give a whole number of at least 0"),
        ({"ramp_to": 10}, "ramp_to=10 is before ramp_from=1000; give at least 1000"),
        ({"momentum_batch": 0}, "momentum_batch=0"),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(options: dict, said: str) -> None:
    for make in (ab.BatchRenorm, lambda **o: BatchRenormalization(3, **o)):
        with pytest.raises(ab.AnybatchError, match=said):
            make(**options)
