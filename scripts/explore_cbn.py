"""Experiments on CBN itself: what would it gain if it knew more, or pooled otherwise?

    python -m scripts.explore_cbn --list
    python -m scripts.explore_cbn --seeds 6 --out docs/results/explore/runs.jsonl bn cbn window-32 known-reductions

Protocol F6k, one image at a time; causal_cbn.py computes a step's micro-batches at once. Runs in --out are kept.
"""

import argparse
from collections.abc import Iterator
from typing import Any

import torch
from scripts.causal_cbn import CausalCBN, Way, make_causal_
from scripts.kept_runs import add_options, make_runs
from torch import nn

from anybatch.lab.classify import Classify, open_classify
from anybatch.lab.config import ClassifyConfig
from anybatch.lab.data import Dataset
from anybatch.lab.report import difference_text
from anybatch.lab.statistics import estimate
from anybatch.lab.training import train_run

EXPERIMENTS: dict[str, tuple[str, Way | None]] = {
    "bn": ("BatchNorm at 32 images", None),
    "cbn": ("CBN: 64 examples, reductions over 64", Way()),
    "window-16": ("16 examples, reductions over 32", Way(16, 32)),
    "window-32": ("32 examples, reductions over 32", Way(32, 32)),
    "window-16-64": ("16 examples, reductions over 64", Way(16, 64)),
    "window-32-64": ("32 examples, reductions over 64", Way(32, 64)),
    "window-64": ("64 examples, reductions over 32", Way(64, 32)),
    "window-128": ("128 examples, reductions over 32", Way(128, 32)),
    "before": ("8 examples, reductions over 128: the defaults before", Way(8, 128)),
    "known-reductions": ("32 examples, reductions of the whole step, known beforehand", Way(32, 32, known=True)),
    "known-reductions-64": ("64 examples, reductions of the whole step, known beforehand", Way(known=True)),
    "known-statistics": ("moments of the whole step, known beforehand, reductions over 32", Way(0, 32)),
    "left-out": ("the image itself left out of its moments", Way(own=False)),
    "trust-64": ("64 examples, the past trusted as far as it was right", Way(trust=True)),
    "trust-512": ("512 examples, the past trusted as far as it was right", Way(512, 64, trust=True)),
    "window-512-64": ("512 examples, reductions over 64", Way(512, 64)),
    "reductions-8": ("64 examples, reductions over 8", Way(64, 8)),
}


class Causal(Classify):
    """The lab's task, with a network whose norms pool ``batch`` images at a time in one way; None: BatchNorm."""

    def __init__(self, config: ClassifyConfig, dataset: Dataset, way: Way | None, batch: int) -> None:
        super().__init__(config, dataset)
        self.way, self.batch_size = way, batch

    def build(self) -> nn.Module:
        """The network."""
        model = super().build()
        if self.way is not None:
            make_causal_(model, self.batch_size, self.way)
        return model


def run(name: str, seed: int, epochs: int = 3, batch: int = 1) -> dict[str, Any]:
    """Train once, as `anybatch compare` does; the record of the run."""
    torch.set_num_threads(1)
    config = ClassifyConfig(
        method="bn", batch=32, seed=seed, data="fashion-mnist", train_images=6000, test_images=4000, epochs=epochs
    )
    task = Causal(config, open_classify(config).dataset, EXPERIMENTS[name][1], batch)
    biases: list[list[float]] = []

    def note(model: nn.Module) -> None:
        layers = (layer for layer in model.modules() if isinstance(layer, CausalCBN))
        biases.extend(layer.state.bias for layer in layers if layer.state.bias)

    result = train_run(task, finish=note)
    bias = torch.tensor(biases)
    early, late = (bias[:, :20].mean().item(), bias[:, 90:].mean().item()) if biases else (None, None)
    return {
        "name": name,
        "seed": seed,
        "batch": batch,
        "epochs": epochs,
        "accuracy": result.accuracy,
        "train_accuracy": result.train_accuracy,
        "log_variance_bias": {"steps 1-20": early, "from step 90": late},
        **result.facts,
    }


def table(runs: list[dict[str, Any]]) -> Iterator[str]:
    """Test accuracies and, paired by seed, their differences to BatchNorm at 32 images and to CBN."""
    by_name: dict[str, dict[int, float | None]] = {}
    for each in runs:
        by_name.setdefault(each["name"], {})[each["seed"]] = each["accuracy"]
    yield "| experiment | what | seeds | test accuracy, % | less BatchNorm's at 32 | less CBN's |"
    yield "|---|---|---|---|---|---|"
    for name in [name for name in EXPERIMENTS if name in by_name]:
        mine = by_name[name]
        accuracies = [accuracy for accuracy in mine.values() if accuracy is not None]
        gone = f", {len(mine) - len(accuracies)} of them diverged" if len(accuracies) < len(mine) else ""
        cells = [difference(mine, by_name.get(other, {})) if name != other else "" for other in ("bn", "cbn")]
        mean = estimate(accuracies).mean
        yield f"| `{name}` | {EXPERIMENTS[name][0]} | {len(mine)}{gone} | {mean:.1f} | {cells[0]} | {cells[1]} |"


def difference(mine: dict[int, float | None], other: dict[int, float | None]) -> str:
    """Mean and half the 95 % interval over the seeds that both have finished."""
    pairs = [(mine[seed], other[seed]) for seed in mine if seed in other]
    apart = [a - b for a, b in pairs if a is not None and b is not None]
    return difference_text(estimate(apart), 2) if apart else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="experiments; all by default")
    add_options(parser, 6, "results/explore.jsonl")
    parser.add_argument("--list", action="store_true")
    asked = parser.parse_args()
    if asked.list:
        print("\n".join(f"{name:18} {what}" for name, (what, _) in EXPERIMENTS.items()))
        return
    if strange := [name for name in asked.names if name not in EXPERIMENTS]:
        parser.error(f"there is no experiment {strange[0]!r}: choose from {', '.join(EXPERIMENTS)}")
    print("\n".join(table(make_runs(run, asked.names or list(EXPERIMENTS), asked))))


if __name__ == "__main__":
    main()
