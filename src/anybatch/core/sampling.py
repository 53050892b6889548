"""What a batch says of its map y = W p + b, from some of its output positions or from all.

    covariance = E[(y - E[y]) (p - E[p])],   patch = E[p]

over S positions: the batch, N examples of L positions, is cut into S stretches of N L / S positions, and one is taken
from each, at a place that changes from batch to batch (multiples of the golden ratio, which fill the stretch evenly).
Where one has S positions and W, <covariance, W> is the variance of y at just these, and <patch, W> + b their mean.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .affine import per_channel
from .linear_map import LinearMap
from .moments import channel_mean, moments
from .pooled import spread
from .tensors import at_hand

__all__ = [
    "Seen",
    "SeenOfEach",
    "enough",
    "everywhere",
    "looks",
    "nothing",
    "nothing_of_each",
    "positions",
    "sampled",
    "sampled_of_each",
]

_GOLDEN = 2654435769  # 2^32 / golden ratio
_SILVER = 1779033704  # 2^32 (sqrt(2) - 1)
_BITS = 16
_PERIOD = 32  # batches, after which the places come again
_ONE_IN = 64  # positions of an example
_MOST = 256


class Seen(NamedTuple):
    """Moments of outputs and patches together, over some positions."""

    offset: Tensor  # (C,) their mean output less a reference
    spread: Tensor | None  # (C,) the variance of their outputs; None: rounded, to be had from W
    patch: Tensor  # (G, K)
    left: Tensor  # (S, C), right: (S, G, K); sum_s left_s right_s is the covariance
    right: Tensor
    covariance: Tensor | None = None  # (C, K) itself, in their place
    looked: Tensor | bool = True  # False: nothing of this counts


class SeenOfEach(NamedTuple):
    """The same of J batches, over some positions of each."""

    which: Tensor  # (J,) of how many there are
    offset: Tensor  # (J, C)
    spread: Tensor  # (J, C)
    patch: Tensor  # (J, G, K)
    left: Tensor  # (J, S, C), right: (J, S, G, K)
    right: Tensor


class _Places(NamedTuple):
    outputs: list[Tensor]  # indices of examples and coordinates, (S,)
    inputs: list[Tensor]  # and of the patches, see LinearMap.reading
    outside: Tensor | None


def looks(forwards: Any, refresh: int) -> tuple[Any, Any]:
    """How many batches were looked at before, and whether to look at this one: at one of every ``refresh``.

    Which of them changes from one such stretch to the next, or of two inputs in turn (a discriminator's, the levels of
    a shared head) one would never be seen; of the first it is the first.

    Args:
        forwards: batches before this one; an int, or () int64.
        refresh: batches in a stretch.
    """
    stretch = forwards // refresh
    place = ((stretch * _GOLDEN) % (1 << 32) * refresh) >> 32
    return stretch, forwards - stretch * refresh == place


def enough(least: int, size: tuple[int, ...]) -> int:
    """How many positions to look at, of batches whose examples have outputs of ``size``: more where there are many.

    A gradient is a sum over all positions, and what it owes to the history is as noisy as those that were looked at
    are few: 16 of a volume's thousands drown what they are to correct.

    Args:
        least: at any size.
        size: spatial.
    """
    return max(least, min(math.prod(size) // _ONE_IN, _MOST))


def positions(examples: int, size: tuple[int, ...], samples: int, number: Tensor) -> Tensor:
    """Examples and coordinates (1 + dimensions, S) of at most ``samples`` output positions, of batches ``number``.

    Args:
        examples: of a batch, N.
        size: spatial, of its outputs.
        samples: S, at most.
        number: of the batch, () int64, or (B, 1) of several: then there are B S.
    """
    every = examples * math.prod(size)
    if samples < every:
        index = torch.arange(samples, device=number.device)
        # Of one stretch from batch to batch by one ratio, in one batch from stretch to stretch by another: multiples of
        # a single one by ``samples`` a batch would stay in a part of it where ``samples`` is a Fibonacci number.
        place = ((number * _GOLDEN + index * _SILVER) % (1 << 32)) >> (32 - _BITS)
        at = ((index << _BITS) + place) * every // (samples << _BITS)
    else:
        at = torch.arange(every, device=number.device) + 0 * number
    at = at.flatten()
    found = []
    for length in reversed(size):
        found.append(at % length)
        at = at // length
    return torch.stack([at, *reversed(found)])


def _places(
    geometry: LinearMap, examples: int, inputs: tuple[int, ...], outputs: tuple[int, ...], samples: int, number: Tensor
) -> _Places:
    at = positions(examples, outputs, samples, number).unbind()
    return _Places(list(at), *geometry.reading(inputs, outputs, at))


# What is cached must serve training too.
@lru_cache(maxsize=512)
@torch.inference_mode(False)
def _places_of_period(
    geometry: LinearMap,
    examples: int,
    inputs: tuple[int, ...],
    outputs: tuple[int, ...],
    samples: int,
    device: torch.device,
) -> _Places:
    """Those of a whole period, in one more dimension before the others."""
    every = torch.arange(_PERIOD, device=device).unsqueeze(1)
    of_outputs, of_inputs, outside = _places(geometry, examples, inputs, outputs, samples, every)
    apart = [t.view(_PERIOD, -1, *t.shape[1:]) for t in (*of_outputs, *of_inputs)]
    n = len(of_outputs)
    return _Places(apart[:n], apart[n:], None if outside is None else outside.view(_PERIOD, -1, *outside.shape[1:]))


@lru_cache(maxsize=512)
def _each_of_period(*sizes: Any) -> list[_Places]:
    """The same, batch by batch."""
    outputs, inputs, outside = _places_of_period(*sizes)
    return [
        _Places([t[i] for t in outputs], [t[i] for t in inputs], None if outside is None else outside[i])
        for i in range(_PERIOD)
    ]


def _find(x: Tensor, y: Tensor, geometry: LinearMap, samples: int, number: Tensor) -> _Places:
    sizes = geometry, len(y), tuple(x.shape[2:]) if geometry.kernel else (), tuple(y.shape[2:]), samples
    if torch.compiler.is_compiling():
        return _places(*sizes, number % _PERIOD)
    if at_hand(number):
        return _each_of_period(*sizes, number.device)[int(number) % _PERIOD]
    outputs, inputs, outside = _places_of_period(*sizes, number.device)
    i = (number % _PERIOD).view(1)

    def of(t: Tensor) -> Tensor:
        return t.index_select(0, i).squeeze(0)

    return _Places([of(t) for t in outputs], [of(t) for t in inputs], None if outside is None else of(outside))


def sampled(x: Tensor, y: Tensor, reference: Tensor, geometry: LinearMap, samples: int, number: Tensor) -> Seen:
    """From at most ``samples`` positions of y (N, C, *) and the map's input x.

    Args:
        x: the map's input.
        y: its output.
        reference: (C,) that outputs are taken relative to: their mean, so that little is lost at large means.
        geometry: of the map.
        samples: S.
        number: of the batch, () int64.
    """
    (first, *others), inputs, outside = _find(x, y, geometry, samples, number)
    outputs = torch.ops.aten.index(y, [first, None, *others]).to(reference.dtype) - reference
    patches = geometry.patches(x, inputs, outside).to(reference.dtype)
    now = moments(outputs)
    patch = patches.mean(0)
    left = (outputs - now.mean) / len(outputs)
    return Seen(now.mean, now.var if y.dtype == reference.dtype else None, patch, left, patches - patch)


def sampled_of_each(
    x: Tensor, y: Tensor, references: Tensor, geometry: LinearMap, samples: int, numbers: Sequence[int], which: Tensor
) -> SeenOfEach:
    """What :func:`sampled` gives for some batches of one size, of which y (B n, C, *) and x have one after another.

    Args:
        x: the map's input.
        y: its output.
        references: (B, C).
        geometry: of the map.
        samples: S, of each.
        numbers: of the J batches to look at.
        which: (J,) of the B they are, J >= 1; see :func:`nothing_of_each`.
    """
    n, c = len(y) // len(references), y.shape[1]
    sizes = geometry, n, tuple(x.shape[2:]) if geometry.kernel else (), tuple(y.shape[2:]), samples
    outputs, inputs, outside = _places_of_period(*sizes, y.device)
    rows = torch.tensor(numbers, device=y.device) % _PERIOD

    def of(t: Tensor) -> Tensor:
        return t.index_select(0, rows).flatten(0, 1)

    (first, *others), (first_in, *others_in) = [of(t) for t in outputs], [of(t) for t in inputs]
    s = outputs[0].shape[1]
    begins = (which * n).repeat_interleave(s)
    found = torch.ops.aten.index(y, [first + begins, None, *others]).view(-1, s, c)
    found = found.to(references.dtype) - references[which].unsqueeze(1)
    first_in = first_in + begins.view(-1, *[1] * (first_in.dim() - 1))
    patches = geometry.patches(x, [first_in, *others_in], None if outside is None else of(outside))
    patches = patches.to(references.dtype).view(-1, s, *patches.shape[1:])
    now = moments(found.transpose(0, 1).flatten(1))
    offset, spread = now.mean.view(-1, c), now.var.view(-1, c)
    patch = patches.mean(1)
    left = (found - offset.unsqueeze(1)) / s
    return SeenOfEach(which, offset, spread, patch, left, patches - patch.unsqueeze(1))


def everywhere(x: Tensor, y: Tensor, mean: Tensor, var: Tensor, geometry: LinearMap, weight: Tensor) -> Seen:
    """From all positions of y (N, C, *), whose moments are ``mean`` and ``var``: a weight gradient of the map."""
    patch = geometry.mean_patch(x, tuple(y.shape[2:])).to(mean.dtype)
    # The rounded mean is not quite the mean, and at a mean of 1e4 what is left would drown the covariance.
    centred = y.to(mean.dtype) - per_channel(mean, y)
    covariance = geometry.covariance(x, centred, weight).to(mean.dtype)
    covariance -= spread(patch, channel_mean(centred))
    none = nothing(patch, len(mean))
    return none._replace(spread=var if y.dtype == var.dtype else None, patch=patch, covariance=covariance)


def nothing(patch: Tensor, channels: int) -> Seen:
    """Of an empty batch, or where there is no map to speak of: ``patch`` (G, K) gives the shapes."""
    zeros, (groups, k) = patch.new_zeros(channels), patch.shape
    return Seen(zeros, zeros, torch.zeros_like(patch), patch.new_zeros(0, channels), patch.new_zeros(0, groups, k))


def nothing_of_each(patch: Tensor, channels: int) -> SeenOfEach:
    """Of batches of which none is looked at; shapes by ``patch`` (G, K)."""
    none = patch.new_zeros(0, channels)
    which = torch.zeros(0, dtype=torch.int64, device=patch.device)
    return SeenOfEach(
        which, none, none, patch.new_zeros(0, *patch.shape), none[:, None], patch.new_zeros(0, 1, *patch.shape)
    )
