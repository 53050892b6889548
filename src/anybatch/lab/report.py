"""report.html and the figures beside it: one page that stands on its own, in light and dark, on paper and phone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from anybatch.errors import AnybatchError
from anybatch.lab import pictures, plots
from anybatch.lab.data import BUILT_IN
from anybatch.lab.display import run_name
from anybatch.lab.statistics import Estimate
from anybatch.lab.summary import Summary, headed, is_reference
from anybatch.lab.training import RunResult
from anybatch.reporting import style
from anybatch.reporting.files import write_atomically
from anybatch.reporting.page import figure_element, render

__all__ = ["PICTURES", "REPORT", "difference_text", "estimate_text", "facts_of", "shared_configuration", "write_report"]

REPORT = "report.html"
PICTURES = "pictures"


def estimate_text(estimate: Estimate | None, digits: int = 1) -> str:
    """As "79.3 ± 0.8"; without the interval where there is none, a dash where there is nothing."""
    if estimate is None:
        return "–"
    half_width = "" if estimate.half_width is None else f" ± {estimate.half_width:.{digits}f}"
    return f"{estimate.mean:.{digits}f}{half_width}"


def difference_text(estimate: Estimate | None, digits: int = 1) -> str:
    """As `estimate_text`, with a sign: "−2.0 ± 0.6"."""
    if estimate is None:
        return "–"
    sign = "" if round(estimate.mean, digits) == 0 else "\N{MINUS SIGN}" if estimate.mean < 0 else "+"
    return sign + estimate_text(estimate._replace(mean=abs(estimate.mean)), digits)


def write_report(
    folder: Path, summary: Summary, results: Sequence[RunResult], command: str, missing: Sequence[str] = ()
) -> Path:
    """Writes accuracy.png, accuracy.svg and report.html into `folder`.

    Args:
        folder: must exist.
        summary: of `results`.
        results: at least one.
        command: what was typed.
        missing: runs that are planned and not finished, and why.

    Raises:
        AnybatchError: the files cannot be written.
    """
    accuracy = plots.accuracy_figure(summary)
    curves = plots.curves_figure(summary, results)
    first = results[0]
    page = render(
        "anybatch.lab",
        "report.html.j2",
        estimate=estimate_text,
        difference=difference_text,
        summary=summary,
        seeds=len({result.config.seed for result in results}),
        runs=len(results),
        total_time=sum(result.seconds for result in results),
        accuracy_svg=figure_element(accuracy, "a-"),
        curves_svg=figure_element(curves, "c-"),
        norms={result.config.method: result.norm for result in results},
        configuration=shared_configuration(results),
        facts=facts_of(results),
        data=first.config.data,
        command=command,
        missing=missing,
        headed=headed(summary.measure),
        pictures=_pictures(folder, summary, results),
    )
    try:
        write_atomically(folder / "accuracy.png", style.png(accuracy))
        write_atomically(folder / "accuracy.svg", style.svg(accuracy).encode())
        write_atomically(folder / REPORT, page.encode())
    except OSError as error:
        raise AnybatchError(
            f"the report cannot be written to {folder} ({error.strerror or error}); the runs in runs.jsonl are safe: "
            f"make room, then give the same command again"
        ) from error
    return folder / REPORT


def _pictures(folder: Path, summary: Summary, results: Sequence[RunResult]) -> list[Markup]:
    """Of the runs at the smallest batch, and of the reference, where there are any."""
    chosen = [r for r in results if r.config.batch == summary.smallest_batch or is_reference(r.config)]
    return [
        pictures.element(path, f"{run_name(result.config)}: {caption}")
        for result in chosen
        for caption, path in pictures.load(folder / PICTURES / result.key).items()
    ]


def shared_configuration(results: Sequence[RunResult]) -> dict[str, Any]:
    """What all runs have in common; the table shows the rest."""
    configs = [result.config.facts() for result in results]
    hidden = {"method", "batch", "seed", "task"} | ({"image_size"} if configs[0]["data"] in BUILT_IN else set())
    return {
        name.replace("_", " "): "all" if value is None else value  # images, where only some could be asked for
        for name, value in configs[0].items()
        if name not in hidden
        and all(config.get(name) == value for config in configs)
        and (value is not None or name.endswith("_images"))
    }


def facts_of(results: Sequence[RunResult]) -> list[tuple[str, str]]:
    """Machine, versions, commit and data of the runs; several where they differ."""
    facts: dict[str, dict[str, None]] = {}
    for result in results:
        machine, versions = result.facts.get("machine", {}), result.facts.get("versions", {})
        pairs = [*machine.items(), *versions.items(), ("commit", result.facts.get("commit"))]
        at_once = "at once where that computes the same" if result.config.record().get("at_once") else None
        for name, value in [*pairs, ("data fingerprint", result.fingerprint), ("micro-batches", at_once)]:
            if value is not None:
                facts.setdefault(str(name), {})[str(value)] = None
    return [(name, ", ".join(values)) for name, values in facts.items()]
