"""Makes diagnose/assets/experience.json: what each method came to at each noise of the batch's statistics.

Reads the runs of the study small-batch in docs/results/studies and measures the noise of their
network at its initialization, on the first 256 of their training images.
"""

import json
from collections import defaultdict
from pathlib import Path
from statistics import fmean

import torch
import torch.nn.functional as F

from anybatch.diagnose import Subject, batch_noise
from anybatch.lab import networks
from anybatch.lab.data import load
from anybatch.reporting.files import write_atomically

ROOT = Path(__file__).parents[1]
BATCHES = (1, 2, 4, 32)
RUNS = ROOT / "docs" / "results" / "studies" / "small-batch.jsonl"
# As `anybatch.diagnose.advice` calls it: the method as it ran.
METHODS = {
    "bn": "bn",
    "gn": "gn(groups=4)",
    "cbn": "cbn",
    "accumulated": "accumulated",
    "renorm": "renorm",
    "proxynorm-group": "proxynorm-group(groups=4)",
}


def main() -> None:
    torch.set_num_threads(1)
    points = {name: differences(RUNS, typed) for name, typed in METHODS.items()}
    dataset = load("fashion-mnist", 256, 1)
    torch.manual_seed(0)
    network = networks.build("small-resnet", 10, 1)
    images = dataset.normalise(dataset.train_images)
    batches = list(zip(images.split(64), dataset.train_labels.split(64), strict=True))
    found = batch_noise.measure(Subject(network, batches, F.cross_entropy), BATCHES)
    noise = {str(b): round(found.noise_at(b), 4) for b in BATCHES}
    asset = ROOT / "src" / "anybatch" / "diagnose" / "assets" / "experience.json"
    facts = {
        "source": "scripts/make_experience.py",
        "noise": noise,
        "points": points,
    }
    write_atomically(asset, (json.dumps(facts, indent=1) + "\n").encode())
    print(json.dumps(facts, indent=1))


def differences(file: Path, method: str) -> dict[str, float]:
    """Mean difference to BatchNorm at 32 by batch size, paired by seed, within one file."""
    accuracies: dict[tuple[str, int], dict[int, float]] = defaultdict(dict)
    for line in file.read_text().splitlines():
        run = json.loads(line)
        if run["config"]["mode"] == "accumulate" and run["accuracy"] is not None:
            accuracies[run["config"]["method"], run["config"]["batch"]][run["config"]["seed"]] = run["accuracy"]
    reference = accuracies["bn", 32]
    return {
        str(b): round(fmean(a - reference[s] for s, a in accuracies[method, b].items() if s in reference), 2)
        for b in BATCHES
    }


if __name__ == "__main__":
    main()
