"""Exact running statistics: the moments of a whole loader instead of a trailing average over training."""

import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..core.moments import Moments, moments, pool
from ..errors import AnybatchError
from ..layers.base import NormLayer
from .batches import check_loader, examples_in, run_on, unwrapped
from .ranks import on_every_rank, ranks_in

__all__ = ["recalibrate_"]


def recalibrate_(
    model: nn.Module,
    loader: Iterable[Any],
    forward: Callable[[nn.Module, Any], Any] | None = None,
    batches: int | None = None,
    sync: bool = True,
    process_group: Any = None,
) -> int:
    """Set every BatchNorm's running mean and variance to those of the loader's data, in place.

    Layers that use none (Proxy Norm) keep theirs.

    The variance is the total one, of all values seen: within and between batches, population. While the loader runs,
    each norm normalises by its current batch, as torch's BatchNorm does in training (a single value per channel, by
    what came before it), and all else evaluates. Nothing but ``running_mean`` and ``running_var`` changes, no history
    either; if anything raises, nothing.

    Where torch.distributed is initialised, every rank calls this with a loader of its own, and all get the moments of
    all data. The loaders may be of unequal length, or empty (but not with sharded weights, which a forward gathers).

    Args:
        model: any model with norms of BatchNorm's family, converted or not; on the device of the data. What is wrapped
            (DistributedDataParallel) runs without its wrapper, what is compiled as it was before.
        loader: gives batches, the larger the better.
        forward: how to run the model on a batch; by default ``model(batch)``, ``model(batch[0])`` for a tuple or list
            such as (images, labels), ``model(**batch)`` for a dict.
        batches: stop after so many, on each rank.
        sync: whether the ranks' data count together. False: this process is on its own, and need not wait for others.
        process_group: the ranks; None for all.

    Returns:
        The number of examples seen, on all ranks: the length of the first tensor of each batch, added up.

    Raises:
        AnybatchError: no batch, no norm reached that uses running statistics, moments that are not finite, or another
            rank raised.
    """
    model = unwrapped(model)
    norms = {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    group = ranks_in("recalibrate_", sync, process_group)
    seen = on_every_rank("recalibrate_", lambda: _look(model, norms, loader, forward, batches), group)
    examples = sum(part.examples for part in seen)
    if not any(part.moments for part in seen):
        none = "the batches reached no BatchNorm, or none that uses running statistics"
        raise AnybatchError(f"recalibrate_: {none if examples else 'the loader gave no batch'}; check the loader")
    for name, norm in norms.items():
        if parts := [part.moments[name] for part in seen if name in part.moments]:
            total = _together(parts)
            _write(norm, total.mean, total.var)
    return examples


class _Seen(NamedTuple):
    """What one rank's data gave."""

    moments: dict[str, Moments]  # of the norms' inputs, float64, on the CPU
    examples: int


def _look(
    model: nn.Module,
    norms: Mapping[str, _BatchNorm],
    loader: Iterable[Any],
    forward: Callable[[nn.Module, Any], Any] | None,
    batches: int | None,
) -> _Seen:
    """Run the model on the batches and measure what its norms are given; afterwards it is as before."""
    check_loader("recalibrate_", loader)
    if batches is not None and batches < 1:
        raise AnybatchError(f"recalibrate_: batches={batches}; give at least 1, or None for the whole loader")
    seen: dict[_BatchNorm, Moments] = {}
    examples = 0
    with _evaluating(model, norms), ExitStack() as hooks:
        for norm in norms.values():
            if norm.running_mean is not None and getattr(norm, "uses_running", True):
                hooks.callback(norm.register_forward_pre_hook(_observer(seen), with_kwargs=True).remove)
        for batch in itertools.islice(loader, batches):
            run_on("recalibrate_", model, batch, forward)
            examples += examples_in(batch)
    found = {name: seen[norm] for name, norm in norms.items() if norm in seen}
    for name, now in found.items():
        if not torch.isfinite(now.mean + now.var).all():
            raise AnybatchError(f"recalibrate_: '{name}' met moments that are not finite; check the loader's data")
    return _Seen({name: Moments(now.mean.cpu(), now.var.cpu(), now.size) for name, now in found.items()}, examples)


def _observer(seen: dict[_BatchNorm, Moments]) -> Callable[..., None]:
    """A hook that adds the input's moments to ``seen`` and makes the norm, which evaluates, normalise by them."""

    def observe(norm: _BatchNorm, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x: Tensor = args[0] if args else kwargs["input"]
        if not x.numel():
            return
        wide = x.double()  # float32 has a mean of 1e4 only to 5e-4, and so the spread of the batches' means
        now = norm.statistics(wide) if isinstance(norm, NormLayer) else moments(wide)
        before = seen.get(norm)
        if now.size > 1:
            _write(norm, now.mean, now.var)
        elif before is not None:
            _write(norm, before.mean, before.var)
        seen[norm] = now if before is None else _together([before, now])

    return observe


def _together(parts: Sequence[Moments]) -> Moments:
    """The moments of all values that the parts are of."""
    count = sum(part.size for part in parts)
    shares = parts[0].mean.new_tensor([part.size / count for part in parts])
    means, variances = torch.stack([part.mean for part in parts], 1), torch.stack([part.var for part in parts], 1)
    return Moments(*pool(means, variances, shares), count)


def _write(norm: _BatchNorm, mean: Tensor, var: Tensor) -> None:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    with torch.no_grad():
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(var)


@contextmanager
def _evaluating(model: nn.Module, norms: Mapping[str, _BatchNorm]) -> Iterator[None]:
    """The body in evaluation, eager, without gradients; modes and running statistics are put back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    saved = [
        (norm, norm.running_mean.clone(), norm.running_var.clone())
        for norm in norms.values()
        if norm.running_mean is not None and norm.running_var is not None
    ]
    weighed = [(norm, norm.alpha) for norm in norms.values() if isinstance(norm, NormLayer)]
    try:
        with torch.no_grad(), ExitStack() as eager:
            if "torch._dynamo" in sys.modules:  # a graph would not call our hooks, or keep them
                eager.enter_context(torch.compiler.set_stance("force_eager"))
            for module, _ in modes:
                module.training = False  # not eval(): a model's own may do more than can be put back
            for layer, _ in weighed:
                layer.alpha = 0.0  # by the batch's own moments, and nothing else
            yield
    finally:
        for layer, alpha in weighed:
            layer.alpha = alpha
        for module, training in modes:
            module.training = training
        for norm, mean, var in saved:
            _write(norm, mean, var)
