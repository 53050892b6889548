"""What becomes of one architecture: converted, trained for two steps, folded, reverted, and compared each time."""

import json
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import anybatch as ab
from anybatch.convert.pairing import as_call
from anybatch.convert.tracing import tensors_in

from .rows import Row

__all__ = ["FOLDS_TO", "Reason", "Result", "examine", "read"]

FOLDS_TO = 1e-4  # of the output's scale


@dataclass(frozen=True)
class Reason:
    """Why norms of an architecture follow no map, were left alone, or stayed when the others were folded.

    Args:
        text: as the library says it, names of modules left out; or what it refused the whole model with.
        norms: that it holds for.
        first: the first of them; empty where the whole model was refused.
        left: they were left alone.
        unpaired: they were converted and follow no map.
        unfolded: they cannot be folded.
    """

    text: str
    norms: int
    first: str
    left: int
    unpaired: int
    unfolded: int


@dataclass(frozen=True)
class Result:
    """What came of one row.

    Args:
        library: as in the row.
        name: as in the row.
        input: the shape of the first tensor that one forward takes.
        norms: of BatchNorm's family, in the model.
        converted: of these.
        paired: converted, and following the map that feeds them.
        left: alone.
        folded: into their maps.
        before: largest difference of evaluation before training to the original's, of the output's scale; 0: no bit.
        finite: losses, gradients and parameters of two steps of training were.
        fold: largest difference of the folded model to the converted one after training, of the output's scale.
        reverted: state_dict and evaluation came back to the bit, and so did the classes of the norms.
        reasons: why norms are not paired or not folded; or why the model was refused.
        error: what was raised where nothing should have been; empty.
    """

    library: str
    name: str
    input: tuple[int, ...] = ()
    norms: int = 0
    converted: int = 0
    paired: int = 0
    left: int = 0
    folded: int = 0
    before: float | None = None
    finite: bool | None = None
    fold: float | None = None
    reverted: bool | None = None
    reasons: tuple[Reason, ...] = ()
    error: str = ""

    @property
    def key(self) -> str:
        """Of the row."""
        return f"{self.library}/{self.name}"

    @property
    def unpaired(self) -> int:
        """Converted norms that follow no map."""
        return self.converted - self.paired

    @property
    def counts(self) -> tuple[int, ...]:
        """What must come out the same whenever the row is examined."""
        return self.norms, self.converted, self.paired, self.left, self.folded

    @property
    def holds(self) -> bool:
        """No error, and every check that was made holds; where there is no norm, none is made."""
        checked = self.before == 0 and self.finite and self.reverted and (self.fold or 0) <= FOLDS_TO
        return not self.error and (self.norms == 0 or bool(checked))

    @property
    def perfect(self) -> bool:
        """Every norm is converted, paired and folded."""
        return 0 < self.norms == self.paired == self.folded


def examine(row: Row) -> Result:
    """Build the architecture of a row and hold it to every check, with `ab.CBN()` at its defaults."""
    torch.manual_seed(0)
    model = row.build()
    kinds = {name: type(norm) for name, norm in norms_of(model).items()}
    if not kinds:
        return Result(row.library, row.name, reasons=(refusal(model, row),))
    training, inputs = row.training or row.inputs, row.inputs()
    settle(model, inputs)
    names, original = list(model.state_dict()), evaluate(row, model, inputs)

    report = ab.convert_(model.train(), ab.CBN(), example_inputs=training())
    before = difference(evaluate(row, model, inputs), original)
    finite = all([step(model, training()) for _ in range(2)])

    trained, state = evaluate(row, model, inputs), {name: t.clone() for name, t in model.state_dict().items()}
    folded = ab.fold(model.eval(), example_inputs=inputs, strict=False)
    unfolded = norms_of(folded)
    fold = difference(evaluate(row, folded, inputs), trained)

    ab.revert_(model)
    after = model.state_dict()
    reverted = (
        list(after) == names
        and all(torch.equal(after[name], state[name]) for name in names)
        and {name: type(norm) for name, norm in norms_of(model).items()} == kinds
        and difference(evaluate(row, model, inputs), trained) == 0
    )
    return Result(
        row.library,
        row.name,
        input=tuple(next(tensors_in(as_call(inputs))).shape),
        norms=len(kinds),
        converted=len(report.converted),
        paired=len(report.converted) - len(report.unpaired),
        left=len(report.left),
        folded=len(kinds) - len(unfolded),
        before=before,
        finite=finite,
        fold=fold,
        reverted=reverted,
        reasons=tuple(reasons_in(report, unfolded)),
    )


def read(file: Path) -> list[Result]:
    """The results in a file of JSON lines."""
    facts = [json.loads(line) for line in file.read_text().splitlines()]
    return [
        Result(**{**each, "input": tuple(each["input"]), "reasons": tuple(Reason(**r) for r in each["reasons"])})
        for each in facts
    ]


def norms_of(model: nn.Module) -> dict[str, _BatchNorm]:
    return {name: norm for name, norm in model.named_modules() if isinstance(norm, _BatchNorm)}


def refusal(model: nn.Module, row: Row) -> Reason:
    """What the library says to a model without BatchNorm."""
    try:
        ab.convert_(model, ab.CBN(), example_inputs=row.inputs())
    except ab.AnybatchError as error:
        return Reason(str(error), 0, "", 0, 0, 0)
    raise AssertionError(f"{row.name} has no BatchNorm and was converted")


@torch.no_grad()
def settle(model: nn.Module, inputs: Any) -> None:
    """Random gamma and beta; running statistics halfway between random ones and those of the inputs.

    Fresh ones would hide differences. Of random ones alone, activations explode in some deep networks; and by
    the moments of two random images alone fresh networks are chaotic: float32 itself is off by more than is asked of
    fold.
    """
    for norm in norms_of(model).values():
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.normal_(0, 0.1)
        norm.running_mean.normal_(0, 0.1)
        norm.running_var.uniform_(0.5, 1.5)
    drawn = {norm: (norm.running_mean.clone(), norm.running_var.clone()) for norm in norms_of(model).values()}
    args, kwargs = as_call(inputs)
    ab.recalibrate_(model, [inputs], forward=lambda model, _: model(*args, **kwargs))
    for norm, (mean, var) in drawn.items():
        norm.running_mean.lerp_(mean, 0.5)
        norm.running_var.lerp_(var, 0.5)


@torch.no_grad()
def evaluate(row: Row, model: nn.Module, inputs: Any) -> list[Tensor]:
    """The tensors that the model puts out in evaluation."""
    args, kwargs = as_call(inputs)
    torch.manual_seed(1)
    return [t.clone() for t in tensors_in(row.outputs(model.eval(), *args, **kwargs))]


def difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest difference of two outputs, each tensor's relative to its largest value; inf for other shapes."""
    if [t.shape for t in ours] != [t.shape for t in theirs]:
        return float("inf")
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        if not torch.equal(a, b):
            scale = b.double().abs().max().clamp_min(1e-30)
            found = ((a.double() - b.double()).abs().max() / scale).item()
            worst = max(worst, found if found == found else float("inf"))
    return worst


def step(model: nn.Module, inputs: Any) -> bool:
    """A step of SGD; whether the loss, all gradients and all parameters after it are finite."""
    args, kwargs = as_call(inputs)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    outputs = model.train()(*args, **kwargs)
    loss = loss_of(outputs)
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    optimizer.step()
    optimizer.zero_grad()
    return all(bool(torch.isfinite(t).all()) for t in (loss, *gradients, *model.state_dict().values()))


def loss_of(outputs: Any) -> Tensor:
    """A detector's own losses; else every output's product with a random cotangent."""
    of_detector = isinstance(outputs, dict) and all(isinstance(t, Tensor) and t.dim() == 0 for t in outputs.values())
    if of_detector:
        return torch.stack(list(outputs.values())).sum()
    return torch.stack([(t * torch.randn_like(t)).mean() for t in tensors_in(outputs) if t.requires_grad]).sum()


def reasons_in(report: ab.Report, unfolded: Iterable[str]) -> list[Reason]:
    """The reasons of norms that are not paired, were left or stayed, by what they have in common."""
    stayed, by_text = set(unfolded), defaultdict(list)
    for row in report.rows:
        if not row.paired or row.action == "left" or row.name in stayed:
            by_text[without_names(row.reason)].append(row)
    return [
        Reason(
            text,
            len(alike),
            alike[0].name,
            left=sum(row.action == "left" for row in alike),
            unpaired=sum(not row.paired for row in alike),
            unfolded=sum(row.name in stayed for row in alike),
        )
        for text, alike in by_text.items()
    ]


def without_names(text: str) -> str:
    """'conv1' becomes '...', and what is then said twice is said once; how many rows an example has is no reason."""
    said = re.sub(r"'[^']*'", "'...'", text).split("; ")
    return "; ".join(dict.fromkeys(part for part in said if "count as one example" not in part))
