"""Exact running statistics: the moments of a whole loader instead of a trailing average over training."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..core.moments import Moments, moments, pool
from ..errors import AnybatchError
from ..layers.base import NormLayer
from .batches import check_loader, examples_in, run_on

__all__ = ["recalibrate_"]


def recalibrate_(
    model: nn.Module,
    loader: Iterable[Any],
    forward: Callable[[nn.Module, Any], Any] | None = None,
    batches: int | None = None,
) -> int:
    """Set every BatchNorm's running mean and variance to those of the loader's data, in place.

    Layers that use none (Proxy Norm) keep theirs.

    The variance is the total one, of all values seen: within and between batches, population. While the loader runs,
    each norm normalises by its current batch, as torch's BatchNorm does in training (a single value per channel, by
    what came before it), and all else evaluates. Nothing but ``running_mean`` and ``running_var`` changes, no history
    either; if anything raises, nothing.

    Args:
        model: any model with norms of BatchNorm's family, converted or not; on the device of the data.
        loader: gives batches, the larger the better.
        forward: how to run the model on a batch; by default ``model(batch)``, ``model(batch[0])`` for a tuple or list
            such as (images, labels), ``model(**batch)`` for a dict.
        batches: stop after so many.

    Returns:
        The number of examples seen: the length of the first tensor of each batch, added up.

    Raises:
        AnybatchError: no batch, no norm reached that uses running statistics, or moments that are not finite.
    """
    check_loader("recalibrate_", loader)
    if batches is not None and batches < 1:
        raise AnybatchError(f"recalibrate_: batches={batches}; give at least 1, or None for the whole loader")
    norms = {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    seen: dict[_BatchNorm, Moments] = {}
    examples = 0
    with _evaluating(model, norms), ExitStack() as hooks:
        for norm in norms.values():
            if norm.running_mean is not None and getattr(norm, "uses_running", True):
                hooks.callback(norm.register_forward_pre_hook(_observer(seen), with_kwargs=True).remove)
        for batch in itertools.islice(loader, batches):
            run_on("recalibrate_", model, batch, forward)
            examples += examples_in(batch)
        if not seen:
            none = "the batches reached no BatchNorm, or none that uses running statistics"
            what = none if examples else "the loader gave no batch"
            raise AnybatchError(f"recalibrate_: {what}; check the loader, and pass the model uncompiled")
        for name, norm in norms.items():
            if norm in seen and not torch.isfinite(seen[norm].mean + seen[norm].var).all():
                raise AnybatchError(f"recalibrate_: '{name}' met moments that are not finite; check the loader's data")
    for norm, total in seen.items():
        _write(norm, total.mean, total.var)
    return examples


def _observer(seen: dict[_BatchNorm, Moments]) -> Callable[..., None]:
    """A hook that adds the input's moments to ``seen`` and makes the norm, which evaluates, normalise by them."""

    def observe(norm: _BatchNorm, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x: Tensor = args[0] if args else kwargs["input"]
        if not x.numel():
            return
        now = norm.statistics(x) if isinstance(norm, NormLayer) else moments(x)
        before = seen.get(norm)
        if now.size > 1:
            _write(norm, now.mean, now.var)
        elif before is not None:
            _write(norm, before.mean, before.var)
        now = Moments(now.mean.double(), now.var.double(), now.size)
        if before is not None:
            count = before.size + now.size
            shares = now.mean.new_tensor([before.size / count, now.size / count])
            means, variances = torch.stack([before.mean, now.mean], 1), torch.stack([before.var, now.var], 1)
            now = Moments(*pool(means, variances, shares), count)
        seen[norm] = now

    return observe


def _write(norm: _BatchNorm, mean: Tensor, var: Tensor) -> None:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    with torch.no_grad():
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(var)


@contextmanager
def _evaluating(model: nn.Module, norms: Mapping[str, _BatchNorm]) -> Iterator[None]:
    """The body in eval mode without gradients; modes and running statistics are put back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    saved = [
        (norm, norm.running_mean.clone(), norm.running_var.clone())
        for norm in norms.values()
        if norm.running_mean is not None and norm.running_var is not None
    ]
    weighed = [(norm, norm.alpha) for norm in norms.values() if isinstance(norm, NormLayer)]
    try:
        with torch.no_grad():
            model.eval()
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
