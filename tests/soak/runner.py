"""Draws configurations, checks them one after another, and says what came of it."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from statistics import median

import hypothesis
import torch
from hypothesis import HealthCheck, Phase

from .comparison import Outcome, check
from .configurations import COMPILERS, Configuration, configurations, factors

__all__ = ["Soak"]

_MOST_FAILURES = 20
_SHRINK = 30  # seconds for each


class Soak:
    """A run over random configurations.

    Args:
        examples: how many.
        minutes: after which no further one is begun.
        seed: of the drawing.
        compilers: to draw from.
        say: takes every line of what there is to say.
    """

    def __init__(
        self,
        examples: int,
        minutes: float,
        seed: int,
        compilers: Sequence[str] = COMPILERS,
        say: Callable[[str], None] = print,
    ) -> None:
        self.examples, self.seed, self.compilers, self.say = examples, seed, compilers, say
        self.start = time.monotonic()
        self.end = self.start + 60 * minutes
        self.done: dict[Configuration, Outcome | Exception] = {}
        self.shrunk = 0  # configurations that were no draw, but smaller ones than a draw that failed
        self._patience = self.end  # until when the last failure is shrunk
        self._failed: Configuration | None = None  # the last, of the draws since a failure was reported
        self.failures: list[tuple[Configuration, Exception]] = []

    @property
    def late(self) -> bool:
        """Whether there is no time for another configuration."""
        return time.monotonic() > self.end

    @property
    def drawn(self) -> int:
        """How many there were."""
        return len(self.done) - self.shrunk

    def run(self) -> None:
        """Check configurations; each failure is shrunk, and the others go on.

        Each is a drawing of its own, for within one hypothesis varies what it has drawn before. It first tries the
        smallest configuration, which is checked once.
        """
        torch.set_num_threads(1)
        settings = hypothesis.settings(
            max_examples=2,
            deadline=None,
            database=None,
            derandomize=False,
            report_multiple_bugs=False,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
            print_blob=False,
        )
        drawing = 0
        while self.drawn < self.examples and not self.late and len(self.failures) < _MOST_FAILURES:
            test = settings(hypothesis.given(configurations(self.compilers))(self._check))
            drawing += 1
            try:
                hypothesis.seed(self.seed + 1000 * drawing)(test)()
            except Exception as error:
                if self._failed is None:
                    raise
                self.failures.append((self._failed, error))
                self._failed, self._patience = None, self.end

    def _check(self, configuration: Configuration) -> None:
        if configuration not in self.done:
            if self.late or time.monotonic() > self._patience:
                return
            self.shrunk += self._failed is not None
            self.done[configuration] = self._timed(configuration)
        outcome = self.done[configuration]
        if isinstance(outcome, Exception):
            if self._failed is None:
                self._patience = time.monotonic() + _SHRINK
            self._failed = configuration
            raise outcome

    def _timed(self, configuration: Configuration) -> Outcome | Exception:
        start = time.monotonic()
        outcome: Outcome | Exception
        try:
            outcome = check(configuration)
            said = f"refused: {outcome.refused}" if outcome.refused else f"{max(outcome.reached.values()):.2f}"
        except Exception as error:
            outcome, said = error, f"FAILED ({(str(error).strip() or repr(error)).splitlines()[-1]})"
        self.say(f"{len(self.done) + 1:4d} {time.monotonic() - start:5.1f} s {said:>4} {configuration}")
        return outcome

    def report(self) -> str:
        """How often every value of every factor was met, how near results came to their tolerance, and what failed."""
        lines = [
            f"{self.drawn} configurations of {self.examples}, and {self.shrunk} to make failures smaller, in "
            f"{time.monotonic() - self.start:.0f} s"
        ]
        counts: dict[str, Counter[str]] = {}
        for configuration in self.done:
            for factor, value in factors(configuration).items():
                counts.setdefault(factor, Counter())[value] += 1
        for factor, values in counts.items():
            lines.append(f"{factor}: " + ", ".join(f"{value} {n}" for value, n in sorted(values.items())))
        outcomes = {c: o for c, o in self.done.items() if isinstance(o, Outcome)}
        refused = Counter(o.refused for o in outcomes.values() if o.refused)
        lines += [f"refused as documented: {n} with {text!r}" for text, n in refused.items()]
        for precision in ("float64", "float32", "float16", "bfloat16"):
            of = [o for c, o in outcomes.items() if c.precision == precision and not o.refused]
            lines.append(f"{precision}: {len(of)} compared")
            for kind in sorted({kind for o in of for kind in o.reached}):
                tolerances = [o.tolerance[kind] for o in of if kind in o.tolerance]
                reached = max(o.reached.get(kind, 0.0) for o in of)
                lines.append(
                    f"  {kind}: errors reached {reached:.2f} of their tolerance, which was "
                    f"{median(tolerances):.1e} of the largest value (median; {max(tolerances):.1e} at most)"
                )
        for configuration, error in self.failures:
            lines.append(f"FAILED {configuration}\n    {error}")
        return "\n".join(lines)
