"""What a small batch does to the norms' statistics: its noise, training against evaluation, and what the past is worth.

Each against a computation by hand on what the norms and maps of a copy are given.
"""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import anybatch as ab
from anybatch.diagnose import Subject, batch_noise, evaluation_gap, history_error

from .diagnose_nets import Batch, D, batches, calls, chain, same, squares, twin
from .oracle import Past, batch_moments, normalise, run
from .small_models import ConvNorm, ResNet, SharedHead, flat, shake
from .tolerances import ORACLE, REORDERED

ce = F.cross_entropy
NORMS = ("1", "4")
MAPS = ("0", "3")


def noise_of(x: Tensor, parts: int = 4, sizes: tuple[int, ...] = (1, 2, 4)) -> batch_noise.BatchNoise:
    """Of a norm that is given x, in so many batches."""
    norm = {2: nn.BatchNorm1d, 4: nn.BatchNorm2d}[x.dim()](x.shape[1], dtype=x.dtype)
    return batch_noise.measure(Subject(nn.Sequential(norm), x.chunk(parts), squares), sizes)


@torch.no_grad()
@pytest.mark.parametrize("size", [1, 2, 5])
def test_noise_is_that_of_batches_drawn_at_random(size: int) -> None:
    """Brute force: real batches of examples drawn with replacement from the norms' inputs.

    Their means err by the examples' population variance, which is the Bessel one times (n - 1) / n. The measurement
    draws 64 batches for the variance: its mean square errs by 1/8 of one draw's deviation. Five deviations may pass.
    """
    first, second = nn.Conv2d(3, 40, 3), nn.Conv2d(40, 20, 2, 2)
    model = nn.Sequential(first, nn.BatchNorm2d(40), nn.ReLU(), second, nn.BatchNorm2d(20)).double()
    data = [x for x, _ in batches(5, 6)]
    found = batch_noise.measure(Subject(model, data, squares), sizes=(3, size))
    assert (found.names, found.examples, found.sizes) == (NORMS, 30, (3, size))
    assert found.positions.tolist() == [15, 2]
    other = twin(model)
    seen = calls(other, NORMS)
    for x in data:
        other(x)
    for place, name in enumerate(NORMS):
        x = torch.cat([given for which, _, given, _ in seen if which == name]).flatten(2)
        mean, var = batch_moments(x)
        drawn = x[torch.randint(30, (4000, size))].transpose(1, 2).flatten(2)  # (draws, C, size * positions)
        of_mean = ((drawn.mean(2) - mean).square() / var).mean(1)
        of_var = (drawn.var(2, correction=0) / var - 1).square().mean(1)
        wanted = found.mean_error[place, 1].square() * 29 / 30
        assert abs(of_mean.mean() - wanted) < 5 * of_mean.std() / 4000**0.5
        assert abs(of_var.mean() - found.var_error[place, 1].square()) < 5 * of_var.std() * (1 / 8 + 1 / 4000**0.5)
        between = x.mean(2).var(0)
        torch.testing.assert_close(found.mean_error[place, 1], (between / size / var).mean().sqrt(), **ORACLE)
        torch.testing.assert_close(found.effective[place], (var / between).median(), **ORACLE)


def test_independent_pixels_are_worth_as_many_samples() -> None:
    """The variance of 256 means is known to sqrt(2 / 255) = 9 % a channel, the median of 32 channels to 2 %."""
    found = noise_of(torch.randn(256, 32, 8, 8))
    assert float(found.effective[0]) == pytest.approx(64, rel=0.1)
    assert found.mean_error[0].tolist() == pytest.approx([1 / (64 * b) ** 0.5 for b in found.sizes], rel=0.05)


def test_constant_images_are_worth_one_sample() -> None:
    """To Bessel's factor exactly, and a batch of one has no variance at all."""
    found = noise_of(torch.randn(32, 5, 1, 1, dtype=D).expand(32, 5, 4, 4))
    torch.testing.assert_close(found.effective, torch.tensor([31 / 32], dtype=D), **ORACLE)
    assert found.mean_error[0].tolist() == pytest.approx([(32 / 31 / b) ** 0.5 for b in found.sizes])
    assert found.var_error[0, 0] == pytest.approx(1)
    same(noise_of(found_input := torch.randn(32, 5, dtype=D)), noise_of(found_input[:, :, None, None]))


def test_noise_of_statistics_and_of_what_they_normalise() -> None:
    """hypot(mean error, variance error / 2), mean over the norms; a channel that never varies has no part in it."""
    x = torch.randn(12, 3, 4, 4, dtype=D)
    found = noise_of(x)
    constant = noise_of(torch.cat([x, torch.full((12, 1, 4, 4), 7.0, dtype=D)], 1))
    for field in ("effective", "mean_error", "var_error"):
        torch.testing.assert_close(getattr(constant, field), getattr(found, field), **ORACLE)
    assert noise_of(torch.ones(12, 3, 4, 4)).noise.tolist() == [0, 0, 0]
    mean_error, var_error = torch.tensor([[3.0, 0.3], [0.0, 0.0]]), torch.tensor([[8.0, 0.8], [2.0, 0.4]])
    two = batch_noise.BatchNoise(("a", "b"), found.positions, found.effective, (1, 2), mean_error, var_error, 12)
    assert two.noise.tolist() == pytest.approx([3.0, 0.35])
    assert two.noise_at(2) == pytest.approx(0.35)


def prepared(kind: str, taken: list[Batch]) -> nn.Module:
    """A model with random running statistics, converted, after a few batches of training."""
    model = shake(chain().double())
    config = {"bn": None, "cbn": ab.CBN(), "renorm": ab.BatchRenorm(), "iebn": ab.IEBN(window=4)}[kind]
    if config is not None:
        ab.convert_(model, config, example_inputs=taken[0][0])
        for x, t in taken:
            ce(model(x + 1), t).backward()
    return model


def score(model: nn.Module, taken: list[Batch]) -> tuple[float, float]:
    """Mean loss and accuracy over the batches, in the model's mode."""
    with torch.no_grad():
        outputs = [(model(x), t) for x, t in taken]
    loss, accuracy = np.mean([(ce(z, t).item(), 100 * (z.argmax(1) == t).double().mean()) for z, t in outputs], 0)
    return loss, accuracy


@pytest.mark.parametrize("kind", ["bn", "cbn", "renorm", "iebn"])
def test_evaluation_gap(kind: str) -> None:
    """What the norms put out in both modes, recorded; alone, on what they are given in training; losses by mode."""
    taken = batches(3, 4)
    model = prepared(kind, taken)
    found = evaluation_gap.measure(Subject(model, taken, ce))
    other, still = twin(model), twin(model).eval()
    seen, running = calls(other, NORMS), {key: buffer.clone() for key, buffer in other.named_buffers()}
    evaluated = calls(still, NORMS)
    scores = {"training": [], "evaluation": score(still, taken)}
    for batch in taken:
        scores["training"].append(score(other, [batch]))
        for key, buffer in other.named_buffers():
            buffer.copy_(running[key])
    scores["training"] = np.mean(scores["training"], 0)
    assert found.names == NORMS
    for place, name in enumerate(NORMS):
        norm, rows = still.get_submodule(name), []
        at, outputs = norm.running_var + norm.eps, [y for which, _, _, y in evaluated if which == name]
        for (x, y), both in zip([(x, y) for which, _, x, y in seen if which == name], outputs, strict=True):
            mean, var = batch_moments(x)
            own = norm.forward(x)
            if kind == "bn":
                torch.testing.assert_close(y, normalise(x, mean, var, norm.weight, norm.bias, norm.eps), **ORACLE)
                moments = norm.running_mean, norm.running_var
                torch.testing.assert_close(own, normalise(x, *moments, norm.weight, norm.bias, norm.eps), **ORACLE)
            gaps = [(y - z).square().mean() / batch_moments(z)[1].mean() for z in (both, own)]
            of_mean, of_sd = (mean - norm.running_mean).square() / at, ((var + norm.eps) / at).sqrt().log().square()
            rows.append(torch.stack([*gaps, of_mean.mean(), of_sd.mean()]))
        wanted = torch.stack(rows).mean(0).sqrt().detach()
        fields = (found.gap, found.own_gap, found.mean_gap, found.sd_gap)
        torch.testing.assert_close(torch.stack([field[place] for field in fields]), wanted, **ORACLE)
    assert found.overall == pytest.approx(float(found.gap.mean()))
    ab.recalibrate_(still, [x for x, _ in taken])
    scores["recalibrated"] = score(still, taken)
    for column, results in enumerate((found.losses, found.accuracies)):
        assert results == pytest.approx({mode: pair[column] for mode, pair in scores.items()})


def test_every_batch_meets_the_models_own_running_statistics() -> None:
    """Three batches are the mean square of each alone, also for a norm whose average is cumulative."""
    taken, model = batches(3, 4), shake(chain(norm=lambda c: nn.BatchNorm2d(c, momentum=None)).double())
    together = evaluation_gap.measure(Subject(model, taken, ce))
    alone = [evaluation_gap.measure(Subject(model, [batch], ce)) for batch in taken]
    for field in ("gap", "own_gap", "mean_gap", "sd_gap"):
        squares = torch.stack([getattr(one, field).square() for one in alone])
        torch.testing.assert_close(getattr(together, field), squares.mean(0).sqrt(), **ORACLE)
    for mode in ("training", "evaluation"):
        assert together.losses[mode] == pytest.approx(np.mean([one.losses[mode] for one in alone]))


def test_a_head_of_training_alone_has_no_gap() -> None:
    """Its norm does not run in evaluation, and the others' calls are still told apart."""
    x = torch.randn(4, 3, 15, 13)
    found = evaluation_gap.measure(Subject(ResNet(), [x], lambda z, _: flat(z)[0].square().mean()))
    assert found.names == (
        "stem.1",
        *(f"blocks.{n}" for n in ("0.bn1", "0.bn2", "1.bn1", "1.bn2", "1.downsample.1")),
        "bn",
    )
    shared = evaluation_gap.measure(Subject(SharedHead(per_level=False), [x], lambda z, _: z[0].square().mean()))
    assert shared.names == ("norms.0",)


def test_recalibration_on_one_batch_closes_the_gap() -> None:
    taken = batches(1, 8)
    model = chain().double()
    ab.recalibrate_(model, [taken[0][0]])
    found = evaluation_gap.measure(Subject(model, taken, ce))
    assert found.overall < 1e-6
    assert found.losses["training"] == pytest.approx(found.losses["recalibrated"])


def test_gap_of_norms_without_running_statistics() -> None:
    """None: evaluation is by the batch too, and there is nothing to recalibrate."""
    model = chain(norm=lambda c: nn.BatchNorm2d(c, track_running_stats=False)).double()
    found = evaluation_gap.measure(Subject(model, batches(2, 4), ce))
    assert found.gap.tolist() == [0, 0]
    assert found.mean_gap.isnan().all()
    assert found.sd_gap.isnan().all()
    assert set(found.losses) == {"training", "evaluation"}


@pytest.mark.parametrize("config", [ab.NoNorm(), ab.ProxyNorm(), ab.BGN()], ids=lambda config: type(config).__name__)
def test_gap_of_norms_that_use_running_statistics_otherwise_or_not_at_all(config: object) -> None:
    """They do the same in evaluation; a layer that is not set up before its first batch is no obstacle."""
    found = evaluation_gap.measure(Subject(shake(chain().double()), batches(2, 4), ce).converted(config))
    assert found.gap.isfinite().all()
    if not isinstance(config, ab.BGN):
        assert found.overall == pytest.approx(0, abs=1e-9)


def errors(mean: Tensor, var: Tensor, true_mean: Tensor, true_var: Tensor) -> list[float]:
    of_mean, of_var = (mean - true_mean).square() / true_var, (var / true_var - 1).square()
    return [of_mean.mean().sqrt().item(), of_var.mean().sqrt().item()]


def history_by_hand(
    model: nn.Module, taken: list[Batch], rate: float, ages: int
) -> tuple[dict[str, list[list[list[float]]]], list[list[float]]]:
    """By kind, map and age, errors of mean and variance; and the shares of floored channels."""
    other, past = twin(model), []
    optimizer = torch.optim.SGD(other.parameters(), lr=rate, momentum=0.9)
    seen = calls(other, MAPS)
    for step in range(ages):
        x, t = taken[step % len(taken)]
        optimizer.zero_grad()
        loss = ce(other(x), t)
        past.append({name: Past(*wide(module), given.double()) for name, module, given, _ in seen})
        seen.clear()
        loss.backward()
        optimizer.step()
    found, floored = {kind: [] for kind in history_error.KINDS}, []
    for name in MAPS:
        rows, shares = {kind: [] for kind in found}, []
        for age in range(1, ages + 1):
            seen.clear()
            other(taken[(ages - age) % len(taken)][0])
            network = batch_moments(next(y for which, _, _, y in seen if which == name).detach().double())
            then, (module, weight, bias) = past[-age][name], wide(other.get_submodule(name))
            own = batch_moments(run(module, weight, bias, then.x))
            carried, paper = (then.at(weight, bias, second_moment) for second_moment in (False, True))
            moments = {"naive": (then.mean, then.var), "carried": carried, "paper": paper}
            for kind, column in rows.items():
                which, _, against = kind.split()
                column.append(errors(*moments[which], *(own if against == "own" else network)))
            shares.append((paper[1] == 0).double().mean().item())
        for kind, column in rows.items():
            found[kind].append(column)
        floored.append(shares)
    return found, floored


def wide(module: nn.Module) -> tuple[nn.Module, Tensor, Tensor | None]:
    """A copy of the map in float64, its weight and its bias, as they are now."""
    other = copy.deepcopy(module).double()
    other._forward_hooks.clear()
    return other, other.weight.detach(), None if other.bias is None else other.bias.detach()


@pytest.mark.parametrize(("rate", "ages"), [(0.05, 1), (0.05, 3), (1.0, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, D], ids=str)
def test_history_error(dtype: torch.dtype, rate: float, ages: int) -> None:
    """Moments at old weights, their expansions by autograd, and both truths, in float64."""
    taken, model = batches(2, 8, dtype), chain().to(dtype)
    found = history_error.measure(Subject(model, taken, ce), rate, ages)
    wanted, floored = history_by_hand(model, taken, rate, ages)
    assert (found.names, found.ages.tolist(), found.rate) == (MAPS, list(range(1, ages + 1)), rate)
    for kind in history_error.KINDS:
        both = torch.stack([found.mean_error[kind], found.var_error[kind]], -1)
        torch.testing.assert_close(both, torch.tensor(wanted[kind], dtype=D), **REORDERED, msg=kind)
    assert found.floored.tolist() == floored
    assert found.mean_error["carried against own"].max() < 1e-6
    assert found.mean_error["naive against own"].min() > 1e-3
    kind = "carried against network"
    drift = [math.hypot(m, v / 2) for m, v in zip(found.mean_error[kind][0], found.var_error[kind][0], strict=True)]
    more = [math.hypot(m, v / 2) for m, v in zip(found.mean_error[kind][1], found.var_error[kind][1], strict=True)]
    assert found.drift().tolist() == pytest.approx([(a + b) / 2 for a, b in zip(drift, more, strict=True)])


def test_history_of_a_map_around_its_norm() -> None:
    """The carried mean is exact, whatever the map's module does after its map."""
    model = nn.Sequential(ConvNorm(3, 4, 3, norm=nn.BatchNorm2d(4)), nn.Flatten(), nn.Linear(60, 5))
    found = history_error.measure(Subject(model, batches(2, 4, torch.float32), ce), ages=2)
    assert found.mean_error["carried against own"].max() < 1e-6


def test_history_where_a_maps_output_never_varies() -> None:
    """Such a channel has no part in the errors; a map with no other is no sign of divergence."""
    model = chain()
    nn.init.zeros_(model[1].weight)
    found = history_error.measure(Subject(model, batches(2, 4, torch.float32), ce), rate=1e-9, ages=1)
    assert found.names == MAPS
