"""A window in examples: CBN pools as many, whatever the batch; from a full window on it is BatchNorm."""

import pytest
import torch
from torch import Tensor, nn

import anybatch as ab
from anybatch.nn import CrossIterationBatchNorm

from . import oracle
from .test_cbn import D, channels_of, every_map, gradients, make, trained
from .tolerances import ORACLE

SIZES = (7, 2, 3, 12, 2, 4)


@every_map
def test_still_weights_make_it_batchnorm_on_all_examples_each_batch_leaving_what_the_window_has_room_for(
    kind: str,
) -> None:
    """A batch of n in a window of 9 leaves 1 - n/9 of the weight of all before it, and nothing from 9 on."""
    module, shape = make(kind)
    norm = CrossIterationBatchNorm(channels_of(module), window_examples=9, dtype=D).follows(module)
    batches = [torch.randn(n, *shape, dtype=D) * 2 + 1 for n in SIZES]
    weights: list[float] = []
    with torch.no_grad():
        for x in batches:
            out = norm(module(x))
            weights = [weight * max(0, 1 - len(x) / 9) for weight in weights] + [1.0]
            ys = [module(each) for each in batches[: len(weights)]]
            expected = oracle.normalise(ys[-1], *oracle.weighted_moments(ys, weights), norm.weight, norm.bias, norm.eps)
            torch.testing.assert_close(out, expected, **ORACLE)
    assert weights[2] == 0  # the batch of 12 ended what was before it


@every_map
@pytest.mark.parametrize("batch", [1, 2, 4])
def test_in_batches_of_one_size_it_is_that_window_in_batches(kind: str, batch: int) -> None:
    """Reductions averaged over as many backwards as make the examples, too."""
    states = []
    for options in ({"window_examples": 8}, {"window": 8 // batch, "average_reductions": 8 // batch}):
        torch.manual_seed(3)
        module, shape = make(kind)
        norm = CrossIterationBatchNorm(channels_of(module), dtype=D, **options).follows(module)
        trained(norm, module, [torch.randn(batch, *shape, dtype=D) for _ in range(5)], 0.01)
        states.append([*norm.histories[0].tensors(), *norm.state_dict().values(), *module.parameters()])
    for mine, theirs in zip(*states, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


@every_map
@pytest.mark.parametrize("before", [0, 3])
def test_a_batch_that_fills_the_window_is_batchnorms(kind: str, before: int) -> None:
    """Output and every gradient, with a past or without, after the weights have moved."""
    module, shape = make(kind)
    norm = CrossIterationBatchNorm(channels_of(module), window_examples=4, dtype=D).follows(module)
    bn = {1: nn.BatchNorm1d, 2: nn.BatchNorm1d, 3: nn.BatchNorm2d, 4: nn.BatchNorm3d}[len(shape)](
        norm.num_features, dtype=D
    )
    bn.load_state_dict(norm.state_dict())
    trained(norm, module, [torch.randn(2, *shape, dtype=D) for _ in range(before)], 0.05)
    x = torch.randn(5, *shape, dtype=D, requires_grad=True)
    outs = []
    for layer in (norm, bn):
        out = layer(module(x))
        torch.manual_seed(5)
        cotangent = torch.randn_like(out)
        wanted = [x, module.weight, module.bias, layer.weight, layer.bias]
        outs.append([out.detach(), *gradients(out, wanted, cotangent)])
    for mine, theirs in zip(*outs, strict=True):
        torch.testing.assert_close(mine, theirs, **ORACLE)


def test_batches_that_fill_the_window_cost_no_look_at_the_map() -> None:
    """Nothing of the size of its weight is ever written, and a smaller last batch is pooled all the same."""
    conv = nn.Conv2d(3, 5, 3, dtype=D)
    norm = CrossIterationBatchNorm(5, window_examples=4, dtype=D).follows(conv)
    batches = [torch.randn(n, 3, 6, 6, dtype=D) for n in (4, 7, 1)]
    trained(norm, conv, batches[:2], 0.0)
    assert not norm.histories[0].covariance.any()
    out = norm(conv(batches[2]))
    ys = [conv(x).detach() for x in batches]
    expected = oracle.normalise(ys[2], *oracle.weighted_moments(ys[1:], [0.75, 1.0]), norm.weight, norm.bias, norm.eps)
    torch.testing.assert_close(out, expected, **ORACLE)
    out.square().sum().backward()
    assert conv.weight.grad is not None
    assert conv.weight.grad.isfinite().all()


class Regions(nn.Module):
    """A head over several regions of each image, as detectors have one."""

    def __init__(self, regions: int) -> None:
        super().__init__()
        self.regions = regions
        self.stem, self.stem_norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.head, self.head_norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, images: Tensor | list[Tensor]) -> Tensor:
        x = torch.stack(images) if isinstance(images, list) else images
        x = self.stem_norm(self.stem(x)).relu()
        x = x.unflatten(3, (self.regions, -1)).movedim(3, 1).flatten(0, 1)
        return self.head_norm(self.head(x.contiguous()))


@pytest.mark.parametrize("as_list", [False, True])
def test_regions_of_one_image_count_as_one_example(as_list: bool) -> None:
    """The converter sees how many rows each norm gets for an example, and says so."""
    images = torch.randn(2, 3, 8, 12)
    model = Regions(6)
    report = ab.convert_(model, ab.CBN(), example_inputs=(list(images),) if as_list else images)
    assert (model.stem_norm.rows_per_example, model.head_norm.rows_per_example) == (1, 6)
    assert "6 rows of its input count as one example" in str(report)
    model.train()(images)
    assert model.head_norm.share(12) == model.stem_norm.share(2) == 2 / 64


def test_running_statistics_count_examples_and_not_their_rows() -> None:
    """One image moves them by 1 - 0.9^(1/32), of however many regions it is."""
    model = Regions(6)
    ab.convert_(model, ab.CBN(), example_inputs=torch.randn(2, 3, 8, 12))
    model.train()(torch.randn(1, 3, 8, 12))
    kept = 0.9 ** (1 / 32)
    for norm in (model.stem_norm, model.head_norm):
        mean, batch_mean = norm.running_mean, norm.histories[0].scalars[0]
        torch.testing.assert_close(mean, (1 - kept) * batch_mean, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("value", [0, -1, 2.5, True, None])
def test_bad_windows_are_refused(value: object) -> None:
    with pytest.raises(ab.AnybatchError, match=f"window_examples={value!r}; give a whole number of at least 1"):
        ab.CBN(window_examples=value)  # type: ignore[arg-type]


def test_a_ring_without_a_window_has_eight() -> None:
    norm = CrossIterationBatchNorm(3, kind="ring")
    assert norm.window == 8
    assert eval(repr(norm), vars(ab.nn)).window == 8
