"""The checkpoint folder of `anybatch train`: the model to use, the state to go on from, and the configuration."""

import io
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from anybatch.errors import AnybatchError
from anybatch.lab import machine
from anybatch.lab.config import RunConfig
from anybatch.lab.data import Dataset
from anybatch.lab.files import write_atomically
from anybatch.training import history_state_dict, load_history_state_dict

__all__ = ["CONFIG", "MODEL", "TRAINING", "Counters", "load", "load_model", "refuse_to_overwrite", "save"]

MODEL, TRAINING, CONFIG = "model.safetensors", "training.pt", "config.json"


@dataclass
class Counters:
    """How far a run has come, and what it has measured on the way."""

    epoch: int = 0
    step: int = 0
    seconds: float = 0.0
    curve: list[dict[str, float | None]] = field(default_factory=list)
    train_loss: list[list[float]] = field(default_factory=list)

    @property
    def accuracy(self) -> float | None:
        """On the test images after the last whole epoch; None before it."""
        return self.curve[-1]["accuracy"] if self.curve else None


def save(
    folder: Path,
    config: RunConfig,
    dataset: Dataset,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    order: torch.Generator,
    done: Counters,
) -> None:
    """Writes the three files, each one atomically.

    Raises:
        AnybatchError: the folder cannot be written.
    """
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    training = {
        # The weights again: what a run goes on from is then one file, and cannot be torn between two epochs.
        "model": state,
        "optimizer": optimizer.state_dict(),
        "history": history_state_dict(model),
        "order_rng": order.get_state(),
        "torch_rng": torch.get_rng_state(),
        "counters": asdict(done),
    }
    buffer = io.BytesIO()
    torch.save(training, buffer)
    facts = {"config": asdict(config), "fingerprint": dataset.fingerprint, "versions": machine.versions()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / CONFIG, (json.dumps(facts, indent=2) + "\n").encode())
        write_atomically(folder / TRAINING, buffer.getvalue())
        write_atomically(folder / MODEL, safetensors.torch.save(state, {"epoch": str(done.epoch)}))
    except OSError as error:
        raise AnybatchError(
            f"the checkpoint cannot be saved to {folder} ({error.strerror or error}): make room or name another "
            f"folder; what was there before is whole"
        ) from error


def refuse_to_overwrite(folder: Path) -> None:
    """Raise if ``folder`` holds a checkpoint already.

    Raises:
        AnybatchError: it does.
    """
    if (folder / TRAINING).exists():
        raise AnybatchError(f"{folder} holds a checkpoint: go on from it with --resume, or name another --out")


def load_model(folder: Path) -> tuple[RunConfig, dict[str, Tensor], str]:
    """The configuration, the model's state and the fingerprint of its data.

    Raises:
        AnybatchError: there is no checkpoint, or it is damaged.
    """
    try:
        facts = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        return RunConfig(**facts["config"]), safetensors.torch.load_file(folder / MODEL), facts["fingerprint"]
    except FileNotFoundError as error:
        raise AnybatchError(
            f"{folder} has no checkpoint ({error.filename}): give an --out of anybatch train"
        ) from error
    except Exception as error:  # json, safetensors and RunConfig each have their own
        raise AnybatchError(f"the checkpoint in {folder} is damaged ({error}): train anew") from error


def load(
    folder: Path,
    config: RunConfig,
    dataset: Dataset,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    order: torch.Generator,
) -> Counters:
    """Puts everything back as `save` found it.

    Raises:
        AnybatchError: there is no checkpoint, it is damaged, or it belongs to another configuration or other data.
    """
    try:
        facts = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        training: dict[str, Any] = torch.load(folder / TRAINING, weights_only=True, map_location=config.device)
    except FileNotFoundError as error:
        raise AnybatchError(f"{folder} has no checkpoint to resume ({error.filename}): leave out --resume") from error
    except Exception as error:  # torch.load raises whatever unpickling meets
        raise AnybatchError(f"the checkpoint in {folder} is damaged ({error}): start anew in another --out") from error
    for name, value in asdict(config).items():
        if facts["config"].get(name) != value:
            raise AnybatchError(
                f"the checkpoint in {folder} was trained with {name}={facts['config'].get(name)!r}, not {value!r}: "
                f"resume with the same options, or start anew in another --out"
            )
    if facts["fingerprint"] != dataset.fingerprint:
        raise AnybatchError(f"the images of '{config.data}' have changed since {folder} was saved: start anew")
    model.load_state_dict(training["model"])
    optimizer.load_state_dict(training["optimizer"])
    load_history_state_dict(model, training["history"])
    order.set_state(training["order_rng"].cpu())
    torch.set_rng_state(training["torch_rng"].cpu())
    return Counters(**training["counters"])
