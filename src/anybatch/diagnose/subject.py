"""What is measured: a model, some batches, a loss. Copies of the model run; the model itself is never touched."""

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves, tree_map_only

from ..convert import convert_
from ..convert.eligible import batch_norms
from ..convert.snapshot import random_states_kept
from ..errors import AnybatchError
from ..inference.batches import check_loader, examples_in, run_on
from ..layers.config import NormConfig
from ..layers.nonorm import NoNorm
from ..training import attach
from .copies import CALL, builder, copier, seed_all
from .meter import Meter, Passes
from .watch import first_not_finite

__all__ = ["Forward", "Loss", "Meter", "Passes", "Subject", "target_of"]

Forward = Callable[[nn.Module, Any], Any]
Loss = Callable[[Any, Any], Tensor]


class Subject:
    """A model with batches and a loss, to measure; every random draw of a measurement is from the same seed.

    Args:
        model: a module, or a function without arguments that builds one. A module is copied, with its history, and
            never run; wrappers (DistributedDataParallel, torch.compile) are left out of the copies.
        loader: gives batches; the first ``batches`` are kept, on the model's device.
        loss: of (output, target), a single number; the target is the second item of a batch that is a tuple or list,
            and else the batch itself.
        batches: how many to keep.
        forward: how to run the model on a batch; by default ``model(batch)``, of its first item for a tuple or list,
            ``model(**batch)`` for a dict.

    Raises:
        AnybatchError: the model cannot be copied, or the loader gives no batch or raises.
    """

    def __init__(
        self,
        model: nn.Module | Callable[[], nn.Module],
        loader: Iterable[Any],
        loss: Loss,
        batches: int = 8,
        forward: Forward | None = None,
    ) -> None:
        check_loader(CALL, loader)
        if batches < 1:
            raise AnybatchError(f"{CALL}: batches={batches}; give at least 1")
        if not callable(loss):
            raise AnybatchError(f"{CALL}: the loss is a {type(loss).__name__}; give a function of (output, target)")
        if forward is not None and not callable(forward):
            raise AnybatchError(f"{CALL}: forward is a {type(forward).__name__}; give a function of (model, batch)")
        self._build = copier(model) if isinstance(model, nn.Module) else builder(model)
        self.loss, self.forward = loss, forward
        self.meter = Meter()
        sample = self.copy()
        if any(is_lazy(t) for t in [*sample.parameters(), *sample.buffers()]):
            raise AnybatchError(f"{CALL}: the model has uninitialised lazy modules: run one forward of it first")
        self._device = next((t.device for t in [*sample.parameters(), *sample.buffers()]), torch.device("cpu"))
        try:
            with random_states_kept():
                taken = list(itertools.islice(loader, batches))
        except Exception as error:
            raise AnybatchError(f"{CALL}: the loader raised {type(error).__name__}: {error}; check it") from error
        if not taken:
            raise AnybatchError(f"{CALL}: the loader gave no batch; check it, or give a list of batches")
        self.batches = self.placed(taken)

    def placed(self, batches: Iterable[Any]) -> tuple[Any, ...]:
        """Batches on the model's device."""
        return tuple(tree_map_only(Tensor, lambda t: t.to(self._device), batch) for batch in batches)

    @property
    def spent(self) -> Passes:
        """Passes so far, of this subject and those derived from it."""
        return self.meter.passes

    def copy(self) -> nn.Module:
        """A copy of the model to do anything with, in training mode, always the same."""
        return self._build().train()

    def derived(self, build: Callable[[], nn.Module] | None = None, batches: Sequence[Any] | None = None) -> "Subject":
        """The same with another model or other batches; passes count together."""
        other = copy.copy(self)
        if build is not None:
            other._build = build
        if batches is not None:
            other.batches = tuple(batches)
        return other

    def converted(self, config: NormConfig) -> "Subject":
        """The same with the BatchNorms converted; see :func:`anybatch.convert_`."""
        inputs = self.example_inputs() if config.needs_example else None

        def build() -> nn.Module:
            model = self._build()
            convert_(model, config, example_inputs=inputs)
            return model

        build()  # what cannot be converted is said now
        return self.derived(build)

    def without_norms(self) -> "Subject | None":
        """The same with :class:`anybatch.NoNorm` for every BatchNorm; None where there is none."""
        return self.converted(NoNorm()) if batch_norms(self.copy()) else None

    def regrouped(self, size: int) -> "Subject":
        """The same examples in batches of ``size``; the last, smaller one is dropped.

        Raises:
            AnybatchError: the batches are no tensors, or not of one shape, or there are fewer examples.
        """
        try:
            parts = [torch.cat(leaves) for leaves in zip(*(_leaves(batch) for batch in self.batches), strict=True)]
        except (TypeError, ValueError, RuntimeError) as error:
            raise AnybatchError(
                f"{CALL}: batches of {size} cannot be made of the loader's ({error}); give a loader of such batches"
            ) from error
        count = len(parts[0])
        if size < 1 or any(len(part) != count for part in parts):
            raise AnybatchError(
                f"{CALL}: batches of {size} cannot be made of tensors of {[len(part) for part in parts]} entries"
            )
        if count < size:
            raise AnybatchError(f"{CALL}: {count} examples make no batch of {size}; keep more batches")
        chunks = zip(*(torch.split(part, size) for part in parts), strict=True)
        whole = [chunk for chunk in chunks if len(chunk[0]) == size]
        return self.derived(batches=[chunk[0] if isinstance(self.batches[0], Tensor) else chunk for chunk in whole])

    def joined(self, size: int) -> "Subject":
        """The same examples in batches of ``size``, or one if they are fewer, where they can be joined."""
        if examples_in(self.batches[0]) >= size:
            return self
        try:
            return self.regrouped(min(size, sum(examples_in(batch) for batch in self.batches)))
        except AnybatchError:
            return self

    def batch(self, number: int) -> Any:
        """One of the batches.

        Raises:
            AnybatchError: there are not so many.
        """
        if not 0 <= number < len(self.batches):
            raise AnybatchError(f"{CALL}: there is no batch {number}; there are {len(self.batches)}, from 0 on")
        return self.batches[number]

    def example_inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What one forward of the model is called with."""
        model, calls = self.copy(), []
        model.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
        with torch.no_grad():
            self.output(model, self.batches[0])
        if not calls:
            raise AnybatchError(f"{CALL}: the forward did not call the model itself, only parts of it; call model(...)")
        args, kwargs = calls[0]
        return args, kwargs

    def output(self, model: nn.Module, batch: Any, seed: int = 0) -> Any:
        """One forward pass: what the model makes of a batch."""
        with self._same_draws(seed):
            # A clone: a model may change its input in place.
            own = tree_map_only(Tensor, Tensor.clone, batch)
            try:
                output = run_on(CALL, model, own, self.forward)
            except AnybatchError:
                raise
            except Exception as error:
                raise AnybatchError(f"{CALL}: the forward raised {type(error).__name__}: {error}") from error
        self.meter.count(Passes(forward=1))
        return output

    def loss_of(self, model: nn.Module, batch: Any, seed: int = 0) -> Tensor:
        """The loss of one forward pass, a () tensor."""
        return self.judge(self.output(model, batch, seed), target_of(batch))

    def judge(self, output: Any, target: Any) -> Tensor:
        """The loss of an output.

        Raises:
            AnybatchError: the loss function raises, or gives no single number.
        """
        try:
            loss = self.loss(output, target)
        except Exception as error:
            raise AnybatchError(
                f"{CALL}: the loss raised {type(error).__name__}: {error}. It is called with what the model returned "
                "and the second item of the batch (the batch itself, if it is no tuple or list)"
            ) from error
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            what = f"tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise AnybatchError(f"{CALL}: the loss is a {what}; give one that returns a single number, such as a mean")
        return loss.reshape(())

    def trained(self, model: nn.Module) -> list[nn.Parameter]:
        """The parameters that are trained."""
        parameters = [p for p in model.parameters() if p.requires_grad]
        if not parameters:
            raise AnybatchError(
                f"{CALL}: the loss does not depend on any parameter that is trained, there is none; set requires_grad"
            )
        return parameters

    def backward(self, loss: Tensor, of: Sequence[Tensor], again: bool = False) -> list[Tensor]:
        """One backward pass: the gradient of ``loss`` at each of ``of``, zeros where there is none."""
        if not loss.requires_grad:
            raise AnybatchError(
                f"{CALL}: the loss does not depend on any parameter that is trained (requires_grad); check both"
            )
        grads = torch.autograd.grad(loss, of, retain_graph=again, allow_unused=True)
        self.meter.count(Passes(backward=1))
        return [torch.zeros_like(p) if g is None else g for g, p in zip(grads, of, strict=True)]

    def sgd(self, model: nn.Module, rate: float, momentum: float) -> Callable[[Tensor], None]:
        """What makes a step of SGD along the gradient of a loss: one backward pass."""
        parameters = self.trained(model)
        optimizer = torch.optim.SGD(parameters, lr=rate, momentum=momentum)
        attach(model, optimizer)

        def step(loss: Tensor) -> None:
            for p, g in zip(parameters, self.backward(loss, parameters), strict=True):
                p.grad = g
            optimizer.step()

        return step

    def check(self) -> Any:
        """Refuse what cannot be measured.

        Returns:
            What the model puts out for the first batch.

        Raises:
            AnybatchError: the model or loss raises on the first batch, or the loss is not a finite number there; it
                names what was not finite first.
        """
        batch, model = self.batches[0], self.copy()
        if any(t.is_floating_point() and not t.isfinite().all() for t in tree_leaves(batch) if isinstance(t, Tensor)):
            raise AnybatchError(f"{CALL}: the first batch holds values that are not finite; check the data")
        with torch.no_grad(), first_not_finite(model) as culprit:
            output = self.output(model, batch)
            loss = self.judge(output, target_of(batch))
        if not loss.isfinite():
            where = culprit[0] if culprit else "no module's output, so the loss function itself"
            raise AnybatchError(f"{CALL}: the loss of the first batch is {float(loss)}; first not finite: {where}")
        return output

    @contextmanager
    def _same_draws(self, seed: int) -> Iterator[None]:
        """Dropout and the like draw the same at every pass."""
        with random_states_kept():
            seed_all(seed)
            yield


def target_of(batch: Any) -> Any:
    """What the loss compares the output with."""
    return batch[1] if isinstance(batch, (tuple, list)) and len(batch) > 1 else batch


def _leaves(batch: Any) -> list[Tensor]:
    items = list(batch) if isinstance(batch, (tuple, list)) else [batch]
    if not all(isinstance(item, Tensor) and item.dim() for item in items):
        raise TypeError("not tensors with one entry an example")
    return items
