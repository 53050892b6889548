"""The gate: nothing is timed whose steps are not right."""

import torch

from anybatch.errors import AnybatchError
from anybatch.lab.bench.config import FOLDED, BenchConfig, Row
from anybatch.lab.bench.subjects import Batches, Steps, Subject, model_of, subject
from anybatch.lab.released import Released

__all__ = ["STEPS", "disagreement", "wrong"]

# Steps compared, so that what a method remembers of one is used in the next; and how far loss (or output) and gradient
# may be off float64's. In float32 rounding alone is some 1e-6 of a gradient; with a ReLU that it turns on or off, up to
# 2e-2 (one image of 32 pixels). Under autocast every activation is rounded to 2^-11 or 2^-8 and many ReLUs turn: twice
# what BatchNorm's own ResNet-18 is off there.
STEPS = 2
WITHIN: dict[torch.dtype | None, tuple[float, float]] = {
    None: (1e-3, 5e-2),
    torch.float16: (1e-2, 0.3),
    torch.bfloat16: (5e-2, 0.6),
}
SAME = 1e-7, 1e-7  # float64 by another formula
FOLDED_WITHIN = 1e-5


def wrong(config: BenchConfig, row: Row, steps: Subject, batches: Batches) -> str:
    """Why a row must not be timed; empty if nothing speaks against it."""
    norm = config.norm(row.method)
    if isinstance(norm, Released):
        same = Steps(model_of(config, norm.same(), batches), batches).copy(torch.float64)
        if found := _apart(steps.copy(torch.float64), same, SAME, "cbn-paper's"):
            return found
    if found := disagreement(steps):
        return found
    if FOLDED in row.how:
        unfolded = subject(config, Row(row.method), batches).copy()
        off = float((steps.copy()() - unfolded()).abs().max() / unfolded().abs().max())
        if not off <= FOLDED_WITHIN:
            return f"folded, the output is off the unfolded model's by {off:.1e} of it, more than {FOLDED_WITHIN:g}"
    return ""


def disagreement(steps: Subject) -> str:
    """How steps from here on differ from the same in float64; empty if they agree."""
    with torch.backends.cudnn.flags(allow_tf32=False):
        found = ""
        if steps.how or steps.autocast is not None:  # first the formula, then the way it shall run
            found = _apart(steps.copy(), steps.copy(torch.float64), WITHIN[None], "float64's")
        mine, within = steps.copy(plain=False), WITHIN[steps.autocast]
        return found or _apart(mine, steps.copy(torch.float64), within, "float64's")


def _apart(mine: Subject, wanted: Subject, within: tuple[float, float], whose: str) -> str:
    """How steps of ``mine`` differ from those of ``wanted``, relative to the latter's; empty if they agree."""
    wanted.warm(mine.warmed)
    for step in range(1, STEPS + 1):
        results = mine().double(), wanted().double()
        try:
            gradients = mine.gradient(), wanted.gradient()
        except AnybatchError as error:
            return f"step {step}: {error}"
        kind = "loss" if results[0].dim() == 0 else "output"
        for what, (a, b), most in ((kind, results, within[0]), ("gradient", gradients, within[1])):
            if a is None or b is None:
                continue
            off = float((a - b).norm() / b.norm())
            if not off <= most:
                return f"step {step}: the {what} is off {whose} by {off:.1e} of it, more than {most:g}"
    return ""
