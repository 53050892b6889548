"""A window in examples: CBN pools as many, whatever the batch; from a full window on it is BatchNorm."""

import copy

import pytest
import torch
from torch import Tensor, nn

import anybatch as ab
from anybatch.convert.tracing import tensors_in
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


def test_a_small_batch_after_full_ones_is_carried_from_them() -> None:
    """They are looked at as others are: the loss is blind to the scale of the weights, which have moved."""
    conv = nn.Conv2d(3, 5, 3, bias=False, dtype=D)
    norm = CrossIterationBatchNorm(5, window_examples=4, eps=1e-12, dtype=D, refresh=1).follows(conv)
    for _ in range(2):
        trained(norm, conv, [torch.randn(n, 3, 6, 6, dtype=D) for n in (4, 7, 5)], 0.05)
        out = norm(conv(torch.randn(1, 3, 6, 6, dtype=D)))
        (grad,) = gradients(out, [conv.weight], torch.randn_like(out))
        along = (grad * conv.weight).sum()
        assert abs(along) < 1e-9 * grad.norm() * conv.weight.norm()


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


FORMS = {
    "a batch": lambda images: images,
    "a list of images": lambda images: (list(images),),
    "a list of dicts": lambda images: ([{"image": image} for image in images],),
    "a dict in a dict": lambda images: ({"anchors": torch.ones(3, 4), "batch": {"image": images}},),
    "a batch beside other things": lambda images: ({"anchors": torch.ones(3, 4), "images": images},),
    "a pair": lambda images: ((images, torch.ones(())),),
    "nothing": lambda images: (),
}


def images_in(value: object) -> Tensor:
    """The images in any of the forms."""
    found = [t for t in tensors_in(value) if t.dim() >= 3]
    return found[0] if found[0].dim() == 4 else torch.stack(found)


@pytest.mark.parametrize("form", FORMS)
def test_regions_of_one_image_count_as_one_example(form: str) -> None:
    """The converter sees how many rows each norm gets for an example, and says so."""
    images = torch.randn(2, 3, 8, 12)
    model = Regions(6)
    model.register_forward_pre_hook(lambda _, args: (images_in(args),) if args else (images,))
    report = ab.convert_(model, ab.CBN(), example_inputs=FORMS[form](images))
    assert (model.stem_norm.rows_per_example, model.head_norm.rows_per_example) == (1, 6)
    assert "6 rows of its input count as one example" in str(report)
    model.train()(images)
    assert model.head_norm.share(12) == model.stem_norm.share(2) == 2 / 64
    assert copy.deepcopy(model).head_norm.rows_per_example == 6
    ab.convert_(model, ab.CBN(compensate=False))  # no run is needed for this one, and it keeps what is known
    assert model.head_norm.rows_per_example == 6


def test_a_group_of_examples_has_all_their_rows() -> None:
    model = Regions(6)
    ab.convert_(model, ab.CBN(examples_per_group=1), example_inputs=torch.randn(2, 3, 8, 12))
    model.train()(torch.randn(3, 3, 8, 12))
    assert [int(norm.histories[0].forwards) for norm in (model.stem_norm, model.head_norm)] == [3, 3]


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
