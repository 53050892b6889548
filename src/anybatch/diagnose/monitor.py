"""A few scalars while a model trains: whether its evaluation would do what its training does (evaluation_gap.py).

Every so many training forwards the batch also runs in evaluation mode, without gradients, before its training forward;
of both, each norm's output at some positions is compared:

    gap_l^2 = E[(train_l - eval_l)^2] / E_c[Var[eval_lc]]       E, Var over up to 64 positions of the batch

    gap, gap_max     mean and maximum over the norms
    mean_gap         root mean square over norms and channels of (batch mean - running mean) / running deviation
    sd_gap           the same of ln(batch deviation / running deviation)

A large gap in the first steps is of running statistics that lag behind moving weights, and passes. So before it warns,
a copy of the model is recalibrated on the batches of the last observations: only what that does not mend, twice, is
trouble. mean_gap and sd_gap are taken when the batch is in the running statistics already.
"""

import math
import sys
import warnings
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from statistics import fmean
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..convert.eligible import batch_norms
from ..convert.snapshot import untouched
from ..errors import AnybatchError
from ..inference import recalibrate_
from ..inference.batches import unwrapped
from . import evaluation_gap
from .copies import copier
from .evaluation_gap import TROUBLE, moment_gaps
from .subject import Subject
from .watch import norms_of, watching

__all__ = ["Monitor"]

_SAMPLES = 64  # positions of a norm's output that are compared
_GOLDEN = 0.6180339887498949  # multiples of it, less their whole part, are spread evenly over 0 to 1
_KEPT = 10  # observations that a suspicion is based on
_SUSPICIONS = 2  # before it warns: a method may still be on its way, as Batch Renorm in its ramp


@runtime_checkable
class _Writer(Protocol):
    """TensorBoard's SummaryWriter, and what looks like it."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int | None = None) -> Any: ...


class Monitor:
    """Logs the gap between training and evaluation of a model's norms, and warns once if it predicts a collapse.

    Remove it with :meth:`remove`, or use it in a ``with`` statement.

    Args:
        model: in training; what is wrapped (DistributedDataParallel) is watched inside its wrapper. Not compiled: a
            graph would not call the hooks.
        log: given a dict of numbers, or a ``SummaryWriter`` of TensorBoard, which gets them at the number of training
            forwards; None keeps them in :attr:`last` alone.
        every: training forwards between two observations. One costs a forward pass without gradients.
        warn: whether to warn.
        prefix: of the names that are logged.

    Raises:
        AnybatchError: the model has no BatchNorm, or is compiled.
    """

    def __init__(
        self,
        model: nn.Module,
        log: Callable[[dict[str, float]], Any] | _Writer | None = None,
        every: int = 100,
        warn: bool = True,
        prefix: str = "anybatch/",
    ) -> None:
        if every < 1:
            raise AnybatchError(f"Monitor: every={every}; give at least 1")
        if log is not None and not callable(log) and not isinstance(log, _Writer):
            raise AnybatchError(f"Monitor: log is a {type(log).__name__}; give a function, or a SummaryWriter")
        for name, module in model.named_modules():
            compiled = getattr(module, "_orig_mod", None) or getattr(module, "_compiled_call_impl", None)
            if compiled is not None and batch_norms(module):
                what = f"'{name}'" if name else "the model"
                raise AnybatchError(
                    f"Monitor: {what} is compiled, and a graph does not call hooks: watch it uncompiled"
                )
        self._model = unwrapped(model)
        norms_of(self._model, "Monitor")  # refused if there is none
        self._log, self._every, self._warn, self._prefix = log, every, warn, prefix
        self.forwards = 0
        self.last: dict[str, float] = {}
        self._gaps: deque[float] = deque(maxlen=_KEPT)
        self._calls: deque[tuple[Any, Any]] = deque(maxlen=_KEPT)
        self._next_check = _KEPT
        self._observations = self._suspicions = 0
        self._watching: ExitStack | None = None
        self._evaluated: dict[str, list[Tensor]] = {}
        self._seen: list[Tensor] = []
        self._handles = [
            self._model.register_forward_pre_hook(self._starts, with_kwargs=True),
            self._model.register_forward_hook(self._ends, always_call=True),
        ]

    _busy: ClassVar[bool] = False  # whether a monitor evaluates: for all of them that is no training

    def remove(self) -> None:
        """Take every hook off the model."""
        for handle in self._handles:
            handle.remove()
        self._stop()

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.remove()

    def _starts(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if model is not self._model or Monitor._busy:
            return
        self._stop()  # what a forward that was interrupted left
        if not model.training or not torch.is_grad_enabled():
            return
        self.forwards += 1
        if self.forwards % self._every:
            return
        try:
            self._evaluate(*_cloned((args, kwargs)))
        except Exception as error:  # the model's own, in a mode it was not asked for
            _warn(f"anybatch.Monitor stops: in evaluation mode the model raised {type(error).__name__}: {error}")
            self.remove()
            return
        if self._warn:
            self._calls.append(_cloned((args, kwargs)))
        self._watching = ExitStack()
        self._watching.enter_context(watching(dict(batch_norms(self._model)), self._compare))

    def _evaluate(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        def see(name: str, norm: nn.Module, x: Tensor, y: Tensor) -> None:
            self._evaluated.setdefault(name, []).append(_sampled(y))

        self._evaluated, Monitor._busy = {}, True
        try:
            with untouched(self._model), watching(dict(batch_norms(self._model)), see):
                for module in self._model.modules():
                    module.training = False
                self._model(*args, **kwargs)
        finally:
            Monitor._busy = False

    @torch.no_grad()
    def _compare(self, name: str, norm: nn.Module, x: Tensor, y: Tensor) -> None:
        if Monitor._busy:
            return
        evaluated = self._evaluated.get(name)
        now = _sampled(y)
        if evaluated and evaluated[0].shape == now.shape and len(now) > 1:
            of_output = evaluation_gap.gap(now, evaluated.pop(0))
            self._seen.append(torch.stack([of_output, *moment_gaps(norm, x)]))

    def _ends(self, model: nn.Module, args: Any, output: Any) -> None:
        if model is not self._model or Monitor._busy or self._watching is None:
            return
        seen = self._seen
        self._stop()
        if not seen or output is None:  # None: it raised
            return
        together = torch.stack(seen)
        of_output = together[:, 0]
        of_moments = together[:, 1:].square().nanmean(0).sqrt()
        names = ("gap", "gap_max", "mean_gap", "sd_gap")
        numbers = torch.stack(
            [of_output.mean(), of_output.max(), *of_moments]
        ).tolist()  # the device is waited for once
        found = dict(zip(names, numbers, strict=True))
        self.last = {self._prefix + key: value for key, value in found.items()}
        if isinstance(self._log, _Writer):
            for key, value in self.last.items():
                self._log.add_scalar(key, value, self.forwards)
        elif self._log is not None:
            self._log(dict(self.last))
        self._gaps.append(found["gap"])
        self._observations += 1
        if self._warn and self._observations >= self._next_check and self._recent() > TROUBLE:
            self._next_check = 2 * self._observations  # seldom: it costs as much as some twenty observations
            self._judge()

    def _recent(self) -> float:
        """Root mean square of the last gaps, as evaluation_gap takes it over batches."""
        return math.sqrt(fmean(gap * gap for gap in self._gaps))

    def _judge(self) -> None:
        """Warn, unless recalibration mends it."""
        left = self._recalibrated()
        if left is None or left < TROUBLE:  # None: there is no evidence
            return
        self._suspicions += 1
        if self._suspicions < _SUSPICIONS:
            return
        self._warn = False
        _warn(
            f"anybatch.Monitor: after {self.forwards} training forwards the norms put out something else in evaluation "
            f"than in training (by {100 * self._recent():.0f} %, {100 * left:.0f} % after recalibration): "
            "accuracy is likely to collapse in evaluation. Their batches are too small for running statistics; "
            "train with ab.CBN() or what `anybatch advise` says"
        )
        self._calls.clear()

    def _recalibrated(self) -> float | None:
        """The gap of a recalibrated copy on the last observations' batches; None where there can be none."""
        calls = list(self._calls)
        try:
            twin = copier(self._model)()
            recalibrate_(twin, calls, forward=_run, sync=False)
            return evaluation_gap.measure(Subject(twin, calls, _no_loss, len(calls), forward=_run)).overall
        except Exception:  # it is to watch the training, not to end it: there may be no memory for a copy
            return None

    def _stop(self) -> None:
        if self._watching is not None:
            self._watching.close()
            self._watching = None
        self._seen = []

    def __deepcopy__(self, memo: dict[int, Any]) -> "Monitor":
        """A copy of the model keeps the hooks of this one, which watches the original alone."""
        return self

    def __reduce__(self) -> Any:
        """A model that is read from a file is watched by nobody."""
        return _Nobody, ()


class _Nobody:
    def _starts(self, *_: Any) -> None: ...

    def _ends(self, *_: Any) -> None: ...


def _sampled(y: Tensor) -> Tensor:
    """(N, C, *) at up to 64 positions of the batch, spread over examples and places: (S, C)."""
    y = y.detach().flatten(2) if y.dim() > 2 else y.detach().unsqueeze(2)
    examples, positions = y.shape[0], y.shape[2]
    at = torch.arange(min(examples * positions, _SAMPLES), device=y.device)
    if examples * positions <= _SAMPLES:
        return y[at // positions, :, at % positions]
    return y[at * examples // _SAMPLES, :, (at * _GOLDEN % 1 * positions).long()]


def _cloned(call: Any) -> Any:
    """The same arguments, for a model to do anything with."""
    return tree_map_only(Tensor, lambda t: t.detach().clone(), call)


def _warn(message: str) -> None:
    """A warning of the line that called the model, behind this file and torch's."""
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("anybatch", "torch"):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def _run(model: nn.Module, call: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
    args, kwargs = _cloned(call)
    return model(*args, **kwargs)


def _no_loss(output: Any, target: Any) -> Tensor:
    return torch.zeros(())
