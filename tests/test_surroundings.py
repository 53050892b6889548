"""A converted layer among what real programs do around it: hooks, inference mode, half precision, large means."""

import io

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import anybatch as ab
from anybatch.core.linear_map import LinearMap
from anybatch.nn import CrossIterationBatchNorm

from .tolerances import ORACLE, SAME


def pair(window: int = 4, **options) -> nn.Sequential:
    """A convolution and its norm, seeded."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    ab.convert_(model, ab.CBN(window=window, **options), example_inputs=torch.randn(1, 3, 6, 6))
    return model


def steps(model: nn.Module, count: int = 4, first: int = 0) -> list[Tensor]:
    """Outputs and gradients of a few training steps on seeded batches."""
    seen = []
    for step in range(first, first + count):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(2, 3, 6, 6, generator=generator).requires_grad_()
        out = model(x)
        model.zero_grad()
        out.backward(torch.randn(out.shape, generator=generator))
        seen += [out.detach(), x.grad, *(p.grad.clone() for p in model.parameters())]
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.01 * p.grad
    return seen


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("where", [0, 1], ids=["on the map", "on the norm"])
@pytest.mark.parametrize("kind", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_backward_hooks_change_nothing(where: int, kind: str) -> None:
    hooked, calls = pair(), []
    getattr(hooked[where], kind)(lambda *args: calls.append(1) or None)
    assert same(steps(hooked), steps(pair()))
    assert len(calls) == 4


def test_evaluation_in_inference_mode() -> None:
    model = pair()
    steps(model)
    model.eval()
    x = torch.randn(2, 3, 6, 6)
    with torch.inference_mode():
        assert torch.equal(model(x), model(x))
    with torch.no_grad():
        assert torch.equal(model(x), model[1].to_batchnorm()(model[0](x)))


def test_training_goes_on_after_a_training_forward_in_inference_mode() -> None:
    """The batch counts, as it does for torch's BatchNorm; what was made then can be written later."""
    model = pair()
    with torch.inference_mode():
        model(torch.randn(2, 3, 6, 6))
    steps(model)
    assert model[1].histories[0].forwards == 5
    assert model[1].num_batches_tracked == 5


def test_nothing_hangs_on_a_maps_output_in_evaluation() -> None:
    """It can be saved and loaded like any tensor."""
    model = pair().eval()
    y = model[0](torch.randn(2, 3, 6, 6)).detach()
    file = io.BytesIO()
    torch.save(y, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True), y)


@pytest.mark.filterwarnings("default")  # the compiler reads .grad of non-leaf tensors, and says so
def test_evaluation_compiles_without_a_break() -> None:
    model = pair().eval()
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), model(x), **SAME)


def test_a_map_without_gradients_gets_none_through_its_norm() -> None:
    model = pair()
    steps(model)
    model.zero_grad()
    with torch.no_grad():
        y = model[0](torch.randn(2, 3, 6, 6))
    out = model[1](y)
    out.backward(torch.randn_like(out))
    assert model[0].weight.grad is None
    assert model[1].weight.grad is not None


def test_a_sanity_forward_before_checkpointing_is_not_mistaken_for_it() -> None:
    """Both saw the same batch, with different histories behind them."""
    results = []
    for checkpointing in (False, True):
        model = pair()
        steps(model)
        x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(9)).requires_grad_()
        with torch.no_grad():
            model(x)
        out = checkpoint(model, x, use_reentrant=False) if checkpointing else model(x)
        out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(10)))
        results.append([out.detach(), x.grad, *(p.grad for p in model.parameters())])
    assert same(*results)


@pytest.mark.parametrize("spread", [0.3, 1.0])
@pytest.mark.parametrize("mean", [10.0, 1e3, 1e4])
@pytest.mark.parametrize("positions", [None, 32])
def test_covariance_at_large_means(mean: float, spread: float, positions: int | None) -> None:
    """<E[(y - mean) p], W> is the variance seen; in float32 too, where the inputs are far from zero."""
    model = pair(positions=positions)
    model(torch.randn(1, 3, 20, 20) * spread + mean)
    history = model[1].histories[0]
    var_at = (history.covariance * model[0].weight.detach().flatten(1)).sum(1)
    var = history.scalars[3]
    torch.testing.assert_close(var_at, var, rtol=2e-2, atol=0)


def test_what_rounding_ate_is_not_extrapolated() -> None:
    """A model in bfloat16 at a mean of ten: the pooled variance stays near the batches' own."""
    model = pair().bfloat16()
    for _ in range(5):
        x = (torch.randn(1, 3, 20, 20) * 0.3 + 10).bfloat16()
        model(x)
        with torch.no_grad():
            model[0].weight.add_(0.002 * torch.randn_like(model[0].weight))
    history = model[1].histories[0]
    own = history.scalars[1]
    model(x)
    out = model(x).float()
    assert out.isfinite().all()
    assert (out.var((0, 2, 3)) > 0.2).all()
    assert (own > 0).all()


@pytest.mark.parametrize("mean", [0.0, 10.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_in_half_precision_sum_to_as_little_as_torchs(dtype: torch.dtype, mean: float) -> None:
    """BatchNorm's input gradient sums to zero over a channel; rounding may leave its square root's worth, no bias."""
    y = (torch.randn(4, 3, 16, 16) + mean).to(dtype)
    g = torch.randn(4, 3, 16, 16).to(dtype)
    sums = []
    for layer in (nn.BatchNorm2d(3), ab.CBN(window=1).build(nn.BatchNorm2d(3))):
        x = y.clone().requires_grad_()
        layer(x).backward(g)
        sums.append(x.grad.float().sum((0, 2, 3)).abs().max())
    assert sums[1] <= 4 * sums[0] + 0.05, sums


def test_transposed_convolution_with_an_output_size_of_the_call() -> None:
    """The covariance follows from the sizes, not from the module's output_padding."""
    module = nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1, dtype=torch.float64)
    norm = CrossIterationBatchNorm(4, kind="ring", dtype=torch.float64).follows(module)
    for size in ((9, 9), (10, 9), (10, 10)):
        norm(module(torch.randn(2, 3, 5, 5, dtype=torch.float64), output_size=size))
    _, var, _, var_at = norm.histories[0].scalars[:, :, :3]
    torch.testing.assert_close(var_at, var, **ORACLE)


def test_a_second_of_audio_needs_no_memory_to_speak_of() -> None:
    module = nn.Conv1d(1, 2, 80, stride=4)
    geometry = LinearMap.of(module)
    x = torch.randn(2, 1, 16000)
    patch = geometry.mean_patch(x, tuple(module(x).shape[2:]))
    torch.testing.assert_close(patch[0], x[:, 0].unfold(1, 80, 4).mean((0, 1)), rtol=1e-4, atol=1e-5)


def test_linear_on_sequences_by_hand_is_refused() -> None:
    linear = nn.Linear(5, 6)
    norm = CrossIterationBatchNorm(6).follows(linear)
    with pytest.raises(ab.AnybatchError, match="untouched output of Linear"):
        norm(linear(torch.randn(2, 6, 5)))


def test_following_twice_is_following_once() -> None:
    conv = nn.Conv2d(2, 3, 3)
    norm = CrossIterationBatchNorm(3).follows(conv).follows(conv)
    assert norm.maps == (conv,)
    assert len(conv._forward_hooks) == 1
    norm.unfollow()
    assert not conv._forward_hooks
    with pytest.raises(ab.AnybatchError, match="not made yet"):
        norm.follows(nn.LazyConv2d(3, 3))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_features": 0}, "num_features=0"),
        ({"num_features": 2.5}, "num_features=2.5"),
        ({"num_features": 3, "momentum": -1}, "momentum=-1"),
        ({"num_features": 3, "momentum": "a"}, "momentum='a'"),
        ({"num_features": 3, "compensate": "yes"}, "compensate='yes'"),
    ],
    ids=str,
)
def test_options_of_the_layer_are_checked(options: dict, said: str) -> None:
    with pytest.raises(ab.AnybatchError, match=said):
        CrossIterationBatchNorm(**options)


@pytest.mark.parametrize("config", [ab.CBN(compensate=False), ab.BatchRenorm()], ids=str)
def test_running_statistics_move_in_bfloat16(config: object) -> None:
    """At batch 1 their rate is a few thousandths, which bfloat16 cannot add: it would stand still far from the mean."""
    norm = config.build(nn.BatchNorm2d(4)).bfloat16()
    for _ in range(300):
        norm((torch.randn(1, 4, 6, 6) * 2 + 3).bfloat16())
    torch.testing.assert_close(norm.running_mean.float(), torch.full((4,), 3.0), rtol=0.0, atol=0.5)
    torch.testing.assert_close(norm.running_var.float(), torch.full((4,), 4.0), rtol=0.0, atol=1.0)
