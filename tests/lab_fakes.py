"""Small made-up data and results for the tests of the lab."""

import signal
import subprocess
from pathlib import Path

import torch
from PIL import Image

from anybatch.lab.config import ClassifyConfig
from anybatch.lab.data import Dataset
from anybatch.lab.training import Progress, RunResult


def dataset(images: int = 64, size: int = 8, classes: int = 3) -> Dataset:
    generator = torch.Generator().manual_seed(0)

    def split(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.arange(n) % classes
        pixels = torch.randint(0, 100, (n, 1, size, size), generator=generator) + 60 * labels.view(-1, 1, 1, 1)
        return pixels.clamp(max=255).to(torch.uint8), labels

    names = tuple(f"class {i}" for i in range(classes))
    return Dataset("made up", *split(images), *split(images // 2), names, (0.5,), (0.3,))


def image_folder(root: Path, counts: dict[str, int], size: int = 12) -> Path:
    """Class folders under `root`; images of one class share a colour, each with one pixel of its own."""
    for place, (name, count) in enumerate(counts.items()):
        folder = root / name
        folder.mkdir(parents=True)
        for index in range(count):
            image = Image.new("RGB", (size, size), (80 * place, 255 - 80 * place, 40))
            image.putpixel((index % size, index // size % size), (255, 255, 255))
            image.save(folder / f"{index:03}.png")
    return root


def result(
    method: str = "bn", batch: int = 32, seed: int = 0, accuracy: float | None = 80.0, seconds: float = 12.0
) -> RunResult:
    curve = [] if accuracy is None else [{"epoch": 1, "accuracy": accuracy, "loss": 0.5}]
    return RunResult(
        key=f"{method}-{batch}-{seed}",
        config=ClassifyConfig(method=method, batch=batch, seed=seed, epochs=1),
        norm=f"<{method}>",
        status="diverged" if accuracy is None else "finished",
        accuracy=accuracy,
        loss=None if accuracy is None else 0.5,
        train_accuracy=None if accuracy is None else accuracy + 1,
        seconds=seconds,
        curve=curve,
        train_loss=[[0.5, 2.0], [1.0, 1.0]],
        fingerprint="0123456789ab",
        facts={"machine": {"cpu": "a <cpu>", "cores": 2}, "versions": {"torch": "2"}, "commit": None, "date": "today"},
    )


def progress(images: int) -> Progress:
    return Progress(images, 100, None)


def interrupted(command: list[str], at: str, limit: float) -> tuple[int, str]:
    """The exit code of a command that gets Ctrl-C once a line of its has ``at``, and what it printed from then on."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in process.stdout:
        if at in line:
            process.send_signal(signal.SIGINT)
            break
    rest, _ = process.communicate(timeout=limit)
    return process.returncode, rest
