"""Example weighing of a trained checkpoint: alpha picked on one half of the test images, judged on the other."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from anybatch.errors import AnybatchError
from anybatch.inference import tune_example_weight
from anybatch.lab.classify import EVALUATION_BATCH
from anybatch.lab.config import ClassifyConfig
from anybatch.lab.trained import open_classifier
from anybatch.reporting.files import write_atomically

__all__ = ["Weighing", "weigh"]

WEIGHING = "weigh.json"


@dataclass(frozen=True)
class Weighing:
    """What came of it, accuracies in percent.

    Attributes:
        config: of the checkpoint.
        alpha: the best on the validation half.
        validation: accuracy on the first half of the test images, by alpha.
        test: accuracy on the second half, by alpha.
    """

    config: ClassifyConfig
    alpha: float
    validation: dict[float, float]
    test: dict[float, float]


def weigh(folder: Path) -> Weighing:
    """Tunes alpha for the model in a checkpoint folder of `anybatch train`; the outcome is saved there too.

    Raises:
        AnybatchError: there is no checkpoint, its images have changed, or its model cannot be weighed.
    """
    task, model = open_classifier(folder)
    config, dataset = task.config, task.dataset
    if config.device == "cpu":
        torch.set_num_threads(1)
    half = len(dataset.test_labels) // 2

    def batches(start: int, end: int) -> list[tuple[Tensor, Tensor]]:
        images, labels = dataset.test_images[start:end], dataset.test_labels[start:end]
        pairs = zip(images.split(EVALUATION_BATCH), labels.split(EVALUATION_BATCH), strict=True)  # type: ignore[no-untyped-call]
        return [(dataset.normalise(x.to(config.device)), y.to(config.device)) for x, y in pairs]

    validation = tune_example_weight(model, batches(0, half))
    test = tune_example_weight(model, batches(half, len(dataset.test_labels)))
    validation_scores, test_scores = (
        {alpha: round(100 * score, 4) for alpha, score in found.scores.items()} for found in (validation, test)
    )
    outcome = Weighing(config, validation.alpha, validation_scores, test_scores)
    try:
        write_atomically(folder / WEIGHING, (json.dumps(asdict(outcome), indent=2) + "\n").encode())
    except OSError as error:
        raise AnybatchError(f"cannot write to {folder} ({error.strerror or error}): make room") from error
    return outcome
