"""What changes in evaluation bring to a network that CBN has trained: examples weighed, running statistics taken anew.

    python -m scripts.after_training --seeds 5 --out docs/results/explore/after.jsonl

Protocol F6k, one image at a time (as groups of a batch); each variant evaluates the same trained network. Runs in --out
are kept.
"""

import argparse
from collections.abc import Iterator
from typing import Any

import torch
from scripts.kept_runs import add_options, make_runs
from torch import nn

import anybatch as ab
from anybatch.lab.classify import Classify, open_classify
from anybatch.lab.config import ClassifyConfig
from anybatch.lab.report import difference_text
from anybatch.lab.statistics import estimate
from anybatch.lab.training import train_run

METHODS = {"bn": "BatchNorm at 32 images", "cbn(examples_per_group=1)": "CBN, one image at a time"}
ALPHAS = (1 / 256, 1 / 64, 1 / 16, 1 / 4)
AS_IS = "as it is"
RECALIBRATED = "running statistics of all training images"
VARIANTS = (AS_IS, *(f"examples weighed, alpha = 1/{1 / alpha:.0f}" for alpha in ALPHAS), RECALIBRATED)


def run(name: str, seed: int, epochs: int) -> dict[str, Any]:
    """Train once and evaluate in every way; the record of it."""
    torch.set_num_threads(1)
    config = ClassifyConfig(
        method=name, batch=32, seed=seed, data="fashion-mnist", train_images=6000, test_images=4000, epochs=epochs
    )
    task = open_classify(config)
    accuracies: dict[str, float | None] = {}

    def evaluate(model: nn.Module) -> None:
        accuracies[AS_IS] = task.evaluate(model, "test").score
        for name, alpha in zip(VARIANTS[1:], ALPHAS, strict=False):
            ab.weigh_examples_(model, alpha)
            accuracies[name] = task.evaluate(model, "test").score
        ab.weigh_examples_(model, 0.0)
        ab.recalibrate_(model, batches(task))
        accuracies[RECALIBRATED] = task.evaluate(model, "test").score

    result = train_run(task, finish=evaluate)
    record = {"name": name, "seed": seed, "epochs": epochs, "accuracy": result.accuracy}
    return record | {"accuracies": accuracies, **result.facts}


def batches(task: Classify, size: int = 500) -> Iterator[torch.Tensor]:
    """The training images."""
    for images in task.dataset.train_images.split(size):
        yield task.dataset.normalise(images)


def table(runs: list[dict[str, Any]]) -> Iterator[str]:
    """Mean accuracies, and what each variant brings to the same networks."""
    yield "| trained with | evaluated | seeds | test accuracy, % | less as it is |"
    yield "|---|---|---|---|---|"
    for method in METHODS:
        mine = [each["accuracies"] for each in runs if each["name"] == method]
        for name in VARIANTS if mine else ():
            change = estimate([each[name] - each[AS_IS] for each in mine])
            cell = "" if name == AS_IS else difference_text(change, 2)
            mean = estimate([each[name] for each in mine]).mean
            yield f"| {METHODS[method]} | {name} | {len(mine)} | {mean:.2f} | {cell} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, 5, "results/after.jsonl")
    print("\n".join(table(make_runs(run, list(METHODS), parser.parse_args()))))


if __name__ == "__main__":
    main()
