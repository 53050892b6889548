"""Holds `anybatch advise` against runs: in how many settings is the advised method within a point of the best?

Settings are those of docs/results/studies and docs/results/advice: a network, a learning rate, gradients accumulated or
not, a batch size. The advice is asked for as a user would, before training, and its method looked up among the runs;
with the advised window if CBN was run with it, else with its usual one.

    python scripts/judge_advice.py          prints the table of docs/results/advice.md
"""

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
import torch.nn.functional as F

from anybatch.diagnose import Advice, advise
from anybatch.lab import networks
from anybatch.lab.config import ClassifyConfig
from anybatch.lab.data import Dataset, load
from anybatch.lab.summary import label
from anybatch.typed import split_method

RESULTS = Path(__file__).parents[1] / "docs" / "results"
PROTOCOLS = {
    "accumulated, rate 0.1": RESULTS / "studies" / "small-batch.jsonl",
    "a step a batch, rate 0.1": RESULTS / "studies" / "small-steps.jsonl",
    "accumulated, rate 0.03": RESULTS / "studies" / "low-rate.jsonl",
    "accumulated, 33 layers": RESULTS / "advice" / "deep.jsonl",
}


@dataclass(frozen=True)
class Setting:
    """What came of every method in one setting.

    Attributes:
        protocol: in words.
        config: of its runs, the method and the seed apart.
        points: mean difference to BatchNorm at batch 32, by method as typed.
        seeds: that there are of each.
    """

    protocol: str
    config: ClassifyConfig
    points: dict[str, float]
    seeds: int

    @property
    def best(self) -> str:
        """The method that came out best."""
        return max(self.points, key=lambda method: self.points[method])

    def of(self, advised: str) -> float:
        """Points of a method: as it is typed, or with other options if it was run with these alone."""
        name = split_method(advised)[0]
        others = (points for method, points in self.points.items() if split_method(method)[0] == name)
        return self.points[advised] if advised in self.points else next(others)


def settings() -> Iterator[Setting]:
    """Every setting that there are runs of."""
    for protocol, file in PROTOCOLS.items():
        points: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        configs: dict[int, ClassifyConfig] = {}
        runs = [json.loads(line) for line in file.read_text().splitlines()]
        runs = [run for run in runs if run["accuracy"] is not None]
        reference = {
            run["config"]["seed"]: run["accuracy"]
            for run in runs
            if (run["config"]["method"], run["config"]["batch"]) == ("bn", 32)
        }
        for run in runs:
            config = ClassifyConfig(**{name: value for name, value in run["config"].items() if name != "task"})
            if config.seed in reference:
                points[config.batch][config.method].append(run["accuracy"] - reference[config.seed])
                configs[config.batch] = config
        for batch in sorted(points):
            rows = points[batch]
            if len(rows) > 1:
                seeds = min(len(values) for values in rows.values())
                yield Setting(protocol, configs[batch], {m: fmean(v) for m, v in rows.items()}, seeds)


def advice_for(setting: Setting, dataset: Dataset) -> Advice:
    """As a user would ask for it."""
    config = setting.config
    accumulates = config.mode == "accumulate"
    images = dataset.normalise(dataset.train_images)
    loader = list(zip(images.split(32), dataset.train_labels.split(32), strict=True))

    def build() -> torch.nn.Module:
        return networks.build(config.network, 10, 1)

    return advise(
        build,
        loader,
        F.cross_entropy,
        config.batch,
        micro_batches=config.gradient_batch // config.batch if accumulates else 1,
        folds=False,
        rate=config.lr if accumulates else config.lr * config.batch / 32,
    )


def main() -> None:
    torch.set_num_threads(1)
    dataset = load("fashion-mnist", 256, 1)
    print("| runs | batch | seeds | advised | its points | best | its points | behind |")
    print("|---" * 8 + "|")
    right = total = 0
    for setting in settings():
        advice = advice_for(setting, dataset)
        mine, best = setting.of(advice.method), setting.points[setting.best]
        total, right = total + 1, right + (best - mine <= 1)
        cells = [
            setting.protocol,
            str(setting.config.batch),
            str(setting.seeds),
            label(advice.method),
            f"{mine:+.1f}",
            label(setting.best),
            f"{best:+.1f}",
            f"{best - mine:.1f}",
        ]
        print(f"| {' | '.join(cells)} |".replace("-", "\N{MINUS SIGN}"))
    print(f"\n{right} of {total} within a point of the best")


if __name__ == "__main__":
    main()
