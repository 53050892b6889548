"""Whether a configuration trains as its reference does, up to rounding."""

import re
from typing import NamedTuple

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from ..ranks import on_ranks
from .configurations import Configuration, refusal
from .training import Results, build, reference, trained

__all__ = ["Outcome", "check"]

# Half the distance of neighbouring numbers around one.
ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
SAMPLES = 4  # runs of the reference with rounding errors
# Errors are put into maps and activations, and the largest of four samples is not the largest there is: twice for each.
# In float32 and float64 norms round as often again, and sums over a batch besides: twice more for each. Under autocast
# what they round is nothing beside the maps' half precision.
FACTOR = {"float64": 16.0, "float32": 16.0, "float16": 4.0, "bfloat16": 4.0}
# And where the maps' errors do not get to: roundings, of the largest value of its kind, in the precision of the kind.
FLOOR = {"float64": 16.0, "float32": 16.0, "float16": 2.0, "bfloat16": 2.0}
KEPT = ("parameter", "statistic")  # in float32 under autocast


class Outcome(NamedTuple):
    """What came of a configuration.

    Args:
        reached: by kind of result, the largest part of its tolerance that an error came to.
        tolerance: by kind, the largest tolerance, of the kind's largest value.
        refused: what the documented refusal says, where there is one.
    """

    reached: dict[str, float]
    tolerance: dict[str, float]
    refused: str | None = None


def check(configuration: Configuration) -> Outcome:
    """Train, and compare every result with the reference's.

    An AssertionError where one is further off than rounding takes it, where ranks differ in what they should share, or
    where a configuration is refused, or is not, against what the documentation says.
    """
    expected = refusal(configuration)
    try:
        results = run(configuration)
    except Exception as error:
        if expected is None or not re.search(expected, str(error)):
            raise
        return Outcome({}, {}, expected)
    assert expected is None, f"not refused with {expected!r}"
    return compare(results, configuration)


def run(configuration: Configuration) -> list[Results]:
    """Every rank's results."""
    if configuration.world == 1:
        return [trained(0, 1, configuration)]
    return on_ranks(configuration.world, trained, configuration, limit=240)


def compare(results: list[Results], configuration: Configuration) -> Outcome:
    """Every result with the reference's, to the tolerance that the reference with errors gives it."""
    precision = configuration.precision
    roundoff = ROUNDOFF[precision]
    wanted = reference(configuration)
    samples = [reference(configuration, roundoff, seed) for seed in range(SAMPLES)]
    skipped = counted_twice(configuration)
    reached: dict[str, float] = {}
    tolerances: dict[str, float] = {}
    wrong = []
    for rank, (got, right) in enumerate(zip(results, wanted, strict=True)):
        assert got.keys() == right.keys(), got.keys() ^ right.keys()
        scales = largest(right)
        for name, value in right.items():
            if name in skipped or not value.numel():
                continue
            assert got[name].isfinite().all(), f"{name} of rank {rank} is not finite"
            if not value.is_floating_point():
                assert torch.equal(got[name], value), f"{name} of rank {rank}: {got[name]} instead of {value}"
                continue
            assert got[name].shape == value.shape, f"{name} of rank {rank} has shape {tuple(got[name].shape)}"
            kind = name.split()[0]
            spread = max(float((sample[rank][name] - value).abs().max()) for sample in samples)
            floor = FLOOR[precision] * (min(roundoff, ROUNDOFF["float32"]) if kind in KEPT else roundoff)
            tolerance = FACTOR[precision] * spread + floor * scales[kind]
            error = float((got[name].double() - value).abs().max())
            reached[kind] = max(reached.get(kind, 0.0), error / tolerance)
            tolerances[kind] = max(tolerances.get(kind, 0.0), tolerance / scales[kind])
            if error > tolerance:
                wrong.append(f"{name} of rank {rank} is off by {error:.2g}, and rounding may take {tolerance:.2g}")
    assert not wrong, f"{len(wrong)} results of {len(results[0]) * len(results)}: " + "; ".join(wrong[:4])
    return Outcome(reached, tolerances)


def largest(results: Results) -> dict[str, float]:
    """The largest value of every kind."""
    scales: dict[str, float] = {}
    for name, value in results.items():
        if value.numel():
            kind = name.split()[0]
            scales[kind] = max(scales.get(kind, 0.0), float(value.abs().max()))
    return scales


def counted_twice(configuration: Configuration) -> set[str]:
    """The statistics of torch's own BatchNorms under a checkpoint, which take a batch in once a run.

    See docs/training.md, activation checkpointing. What evaluation makes of them is off too.
    """
    if configuration.checkpointing == "none":
        return set()
    net = build(configuration, torch.float64)
    own = [name for name, m in net.named_modules() if isinstance(m, _BatchNorm) and type(m).__module__[:6] == "torch."]
    names = {f"statistic {module}.{name}" for module in own for name, _ in net.get_submodule(module).named_buffers()}
    return {"evaluated", *names} if names else set()
