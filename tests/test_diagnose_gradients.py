"""The experiments of "Understanding Batch Normalization", each against its equations: those of gradients."""

import copy
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anybatch.diagnose import Subject, cancellation, gradient_noise, logit_gradients, weight_gradients

from .diagnose_nets import D, Small, batches, calls, same, small, twin
from .small_models import ConvNorm
from .tolerances import ORACLE

ce = F.cross_entropy


@pytest.mark.parametrize("layer", [None, "conv"])
def test_weight_gradients(layer: str | None) -> None:
    """By numpy, of loss.backward(); the middle convolution by default."""
    model, subject = small(2)
    found = weight_gradients.measure(subject, layer, batch=1, bins=21)
    other = twin(model)
    ce(other(subject.batches[1][0]), subject.batches[1][1]).backward()
    g = other.get_submodule(layer or "twice").weight.grad.numpy().ravel()
    counts, edges = np.histogram(g, 21, (-np.abs(g).max(), np.abs(g).max()))
    assert found.layer == (layer or "twice")
    assert found.max == pytest.approx(np.abs(g).max())
    assert found.std == pytest.approx(g.std())
    assert found.kurtosis == pytest.approx(((g - g.mean()) ** 4).mean() / g.var() ** 2)
    assert found.counts.tolist() == counts.tolist()
    assert found.counts.sum() == g.size
    np.testing.assert_allclose(found.edges.numpy(), edges)


@pytest.mark.parametrize("dense", [False, True])
def test_logit_gradients(dense: bool) -> None:
    """By autograd on the output; of dense ones every position is an example."""
    model = nn.Conv2d(3, 5, 3).double() if dense else Small().double()
    x = torch.randn(4, 3, 5, 7, dtype=D)
    t = torch.randint(5, (4, 3, 5) if dense else (4,))
    found = logit_gradients.measure(Subject(model, [(x, t)], ce))
    z = twin(model)(x)
    z.retain_grad()
    ce(z, t).backward()
    rows = [z.grad[n, :, i, j] for n in range(4) for i in range(3) for j in range(5)] if dense else list(z.grad)
    g = len(rows) * np.stack([row.numpy() for row in rows])
    np.testing.assert_allclose(found.matrix.numpy(), g, **ORACLE)
    assert found.common == pytest.approx(len(rows) * (g.mean(0) ** 2).sum() / (g**2).sum())
    assert 0 <= found.common <= 1


@pytest.mark.parametrize("blind", [False, True])
def test_the_common_share_at_its_ends(blind: bool) -> None:
    """1 where every example pushes the same way, 0 where the pushes cancel."""
    model = nn.Linear(3, 2).double()
    sign = torch.tensor([[1.0], [1.0], [1.0], [1.0]] if blind else [[1.0], [-1.0], [1.0], [-1.0]], dtype=D)
    batch = (torch.randn(4, 3, dtype=D), sign)
    assert logit_gradients.measure(Subject(model, [batch], lambda z, t: (z * t).mean())).common == float(blind)


def term_sums(module: nn.Module, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over examples and positions, one at a time, of the terms of the weight's gradient: absolute and plain."""
    y, last = module(x), isinstance(module, nn.Linear)
    absolute, plain = torch.zeros_like(module.weight), torch.zeros_like(module.weight)
    for place in itertools.product(*map(range, (y if last else y.movedim(1, -1)).shape[:-1])):
        at = place if last else (place[0], slice(None), *place[1:])
        only = torch.zeros_like(g)
        only[at] = g[at]
        (term,) = torch.autograd.grad(y, module.weight, only, retain_graph=True)
        absolute, plain = absolute + term.abs(), plain + term
    return absolute, plain


every_map = pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Conv2d(3, 4, 3, 2, 1), (2, 3, 5, 7)),
        (nn.Conv2d(4, 6, (3, 2), padding=(0, 1), groups=2, bias=False), (2, 4, 5, 4)),
        (nn.Conv2d(3, 4, 2, dilation=2, padding="same"), (2, 3, 4, 5)),
        (nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (2, 2, 4, 3)),
        (nn.ConvTranspose2d(4, 6, 3, 2, 1, output_padding=1, groups=2), (2, 4, 3, 2)),
        (nn.Conv1d(3, 4, 3, 2), (3, 3, 9)),
        (nn.Conv3d(2, 3, 2, (1, 2, 1)), (2, 2, 3, 4, 2)),
        (nn.Linear(3, 4), (3, 5, 3)),
        (nn.Linear(3, 4, bias=False), (6, 3)),
    ],
    ids=str,
)


@every_map
def test_cancellation(module: nn.Module, shape: tuple[int, ...]) -> None:
    """A and B by explicit sums."""
    model, x = nn.Sequential(copy.deepcopy(module), nn.ReLU()).double(), torch.randn(shape, dtype=D)
    found = cancellation.measure(Subject(model, [x], lambda z, _: z.sin().mean()))
    y = model[0](x)
    y.retain_grad()
    F.relu(y).sin().mean().backward()
    absolute, plain = term_sums(model[0], x, y.grad)
    torch.testing.assert_close(plain, model[0].weight.grad, **ORACLE)
    torch.testing.assert_close(found.a, absolute.mean()[None], **ORACLE)
    torch.testing.assert_close(found.b, plain.abs().mean()[None], **ORACLE)
    assert 0 < found.ratio < 1


@every_map
def test_cancellation_where_the_output_is_changed_in_place(module: nn.Module, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=D)
    models = [nn.Sequential(copy.deepcopy(module), nn.ReLU(inplace)).double() for inplace in (False, True)]
    same(*(cancellation.measure(Subject(model, [x], lambda z, _: z.sin().mean())) for model in models))


def test_cancellation_of_a_map_that_runs_twice() -> None:
    """The terms of both calls; B is the mean absolute gradient; what no gradient reaches is left out."""
    model, subject = small()
    model.idle = nn.Linear(3, 2).double()
    model.conv.requires_grad_(False)
    subject = Subject(model, subject.batches, ce)
    found = cancellation.measure(subject)
    assert found.names == ("twice", "fc")
    other = twin(model)
    seen = calls(other, found.names)
    z = other(subject.batches[0][0])
    for *_, y in seen:
        y.retain_grad()
    ce(z, subject.batches[0][1]).backward()
    for place, name in enumerate(found.names):
        sums = [term_sums(module, x, y.grad) for which, module, x, y in tuple(seen) if which == name]
        absolute, plain = (sum(parts) for parts in zip(*sums, strict=True))
        torch.testing.assert_close(found.a[place], absolute.mean(), **ORACLE)
        torch.testing.assert_close(found.b[place], plain.abs().mean(), **ORACLE)
        torch.testing.assert_close(found.b[place], other.get_submodule(name).weight.grad.abs().mean(), **ORACLE)


def test_cancellation_of_a_map_around_its_norm() -> None:
    """B is the mean absolute gradient, whatever the map's module does after its map."""
    model = nn.Sequential(ConvNorm(3, 4, 3, norm=nn.BatchNorm2d(4)), nn.Flatten(), nn.Linear(60, 5)).double()
    subject = Subject(model, batches(1), ce)
    found, other = cancellation.measure(subject), twin(model)
    ce(other(subject.batches[0][0]), subject.batches[0][1]).backward()
    torch.testing.assert_close(found.b[0], other[0].weight.grad.abs().mean(), **ORACLE)


@pytest.mark.parametrize("examples", [2, 32])
def test_gradient_noise(examples: int) -> None:
    """A backward an example, each of a whole forward: with batch statistics the examples are not on their own."""
    model, subject = small(2, 5)
    found = gradient_noise.measure(subject, batch=1, examples=examples)
    x, t = subject.batches[1]
    rows = []
    for i in range(min(examples, 5)):
        other = twin(model)
        ce(other(x)[i : i + 1], t[i : i + 1]).backward()
        rows.append(torch.cat([p.grad.flatten() for p in other.parameters()]).numpy())
    g = np.mean(rows, 0)
    distances = [((row - g) ** 2).sum() for row in rows]
    np.testing.assert_allclose(found.distances.numpy(), distances, **ORACLE)
    assert found.gradient == pytest.approx((g**2).sum())
    assert found.noise == pytest.approx(np.mean(distances))
    assert found.bound(0.3, 8) == pytest.approx(0.09 * np.mean(distances) / 8)
