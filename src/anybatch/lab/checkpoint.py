"""The checkpoint folder of `anybatch train`: the model to use, the state to go on from, and the configuration."""

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from anybatch.errors import AnybatchError, first_line
from anybatch.lab import machine
from anybatch.lab.config import TrainConfig
from anybatch.lab.processes import Processes
from anybatch.lab.tasks import config_of
from anybatch.reporting.files import write_atomically
from anybatch.training import history_state_dict, load_history_state_dict

__all__ = ["CONFIG", "MODEL", "PREVIOUS", "TRAINING", "Checkpoints", "Counters", "State", "load_model"]

MODEL, TRAINING, PREVIOUS, CONFIG = "model.safetensors", "training.pt", "training.previous.pt", "config.json"
_KEYS = {"config", "fingerprint", "model", "optimizer", "counters", "processes"}


@dataclass
class Counters:
    """How far a run has come, in examples trained on, and what it has measured on the way."""

    images: int = 0
    seconds: float = 0.0
    curve: list[dict[str, float | None]] = field(default_factory=list)
    train_loss: list[list[float]] = field(default_factory=list)
    more: dict[str, float] = field(default_factory=dict)

    @property
    def accuracy(self) -> float | None:
        """On the test examples after the last whole epoch; None before it."""
        return self.curve[-1]["accuracy"] if self.curve else None


@dataclass
class State:
    """All that a run goes on from.

    Attributes:
        losses: since the last point of the training loss.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    done: Counters = field(default_factory=Counters)
    losses: list[Tensor] = field(default_factory=list)

    def own(self) -> dict[str, Any]:
        """What differs from process to process."""
        state = {
            "history": history_state_dict(self.model),
            "rng": torch.get_rng_state(),
            "losses": torch.stack(self.losses) if self.losses else torch.empty(0),
        }
        device = self._device  # which need not be the current one
        return state | ({"cuda_rng": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})

    def take(self, saved: dict[str, Any], rank: int | None) -> None:
        """Goes on from a checkpoint, with the own state of process `rank`; without any if that is None."""
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.done = Counters(**saved["counters"])
        if rank is None:
            return
        own = saved["processes"][rank]
        load_history_state_dict(self.model, own["history"])
        self.losses = list(own["losses"].unbind())
        torch.set_rng_state(own["rng"].cpu())
        if "cuda_rng" in own:
            torch.cuda.set_rng_state(own["cuda_rng"].cpu(), self._device)

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device


class Checkpoints:
    """One run's folder; training.pt and the one before it, training.previous.pt, are each one whole state.

    Args:
        folder: to write to; made by the first `save`.
        config: of the run.
        fingerprint: of its data.
        processes: of the run; all of them call `load` and `save`, the main one writes.
    """

    def __init__(self, folder: Path, config: TrainConfig, fingerprint: str, processes: Processes) -> None:
        self.folder, self.config, self.processes = folder, config, processes
        self._facts = {"config": config.record(), "fingerprint": fingerprint}
        self._worth_keeping = True  # training.pt, when the next one comes

    def refuse_to_overwrite(self) -> None:
        """Raise if the folder holds a checkpoint already.

        Raises:
            AnybatchError: it does.
        """
        if any((self.folder / name).exists() for name in (TRAINING, PREVIOUS)):
            raise AnybatchError(f"{self.folder} holds a checkpoint: go on from it with --resume, or name another --out")

    def save(self, state: State) -> None:
        """Writes the three files, each one atomically, and keeps the state before.

        Raises:
            AnybatchError: the folder cannot be written.
        """
        parts = self.processes.gather(state.own())
        if not self.processes.is_main:
            return
        model = {name: tensor.contiguous() for name, tensor in state.model.state_dict().items()}
        # The weights again: what a run goes on from is then one file, and cannot be torn between two steps.
        training = self._facts | {
            "model": model,
            "optimizer": state.optimizer.state_dict(),
            "counters": asdict(state.done),
            "processes": parts,
        }
        buffer = io.BytesIO()
        torch.save(training, buffer)
        facts = self._facts | {"versions": machine.versions()}
        keep = self.folder / PREVIOUS if self._worth_keeping else None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for name in (CONFIG, MODEL, TRAINING):
                for leftover in self.folder.glob(f".{name}.*"):  # of a process killed while it wrote
                    leftover.unlink()
            # The model first: once the run is saved as finished, so is its model.
            write_atomically(self.folder / CONFIG, (json.dumps(facts, indent=2) + "\n").encode())
            write_atomically(self.folder / MODEL, safetensors.torch.save(model, {"images": str(state.done.images)}))
            write_atomically(self.folder / TRAINING, buffer.getvalue(), keep)
        except OSError as error:
            raise AnybatchError(
                f"the checkpoint cannot be saved to {self.folder} ({error.strerror or error}): make room, then go on "
                f"with --resume from the one before, which is whole"
            ) from error
        self._worth_keeping = True

    def load(self, state: State, say: Callable[[str], None]) -> None:
        """Puts everything back as `save` found it.

        Args:
            state: filled.
            say: told, in a line each, what could not be had.

        Raises:
            AnybatchError: there is no checkpoint, both are damaged, or they belong to another configuration or to
                other data.
        """
        saved = self._newest(say)
        before_it_came = type(self.config)().record()  # a value that an earlier version did not know
        for name, value in self.config.record().items():
            was = saved["config"].get(name, before_it_came[name])
            if was != value:
                raise AnybatchError(
                    f"the checkpoint in {self.folder} was trained with {name}={was!r}, not "
                    f"{value!r}: resume with the same options, or start anew in another --out"
                )
        if saved["fingerprint"] != self._facts["fingerprint"]:
            raise AnybatchError(
                f"the data of '{self.config.data}' have changed since {self.folder} was saved: start anew"
            )
        before, now = len(saved["processes"]), self.processes.count
        if before != now:
            say(f"saved by {before} process{'es' * (before > 1)}, resumed by {now}: the layers' history is dropped")
        try:
            state.take(saved, self.processes.rank if before == now else None)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise AnybatchError(
                f"the checkpoint in {self.folder} does not fit the model ({first_line(error)}): start anew in "
                f"another --out"
            ) from error

    def _newest(self, say: Callable[[str], None]) -> dict[str, Any]:
        """The last state that is whole."""
        refused = []
        for name in (TRAINING, PREVIOUS):
            try:
                saved = _read(self.folder / name, self.config.device)
            except FileNotFoundError:
                continue
            except _Damaged as error:
                refused.append(f"{name} is refused, {error}")
                self._worth_keeping = False
                continue
            if refused:
                say(f"{refused[0]}; {PREVIOUS} is taken, the save before it")
            return saved
        if refused:
            raise AnybatchError(
                f"the checkpoint in {self.folder} is damaged ({'; '.join(refused)}): start anew in another --out"
            )
        raise AnybatchError(f"{self.folder} has no checkpoint to resume: leave out --resume")


class _Damaged(Exception):
    """A file that is no checkpoint; why not."""


def _read(path: Path, device: str) -> dict[str, Any]:
    content = path.read_bytes()
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as members:  # torch.load itself checks no sums
            if (member := members.testzip()) is not None:
                raise _Damaged(f"it is damaged in {member}")
        saved = torch.load(io.BytesIO(content), weights_only=True, map_location=device)
    except pickle.UnpicklingError as error:
        # Its own text goes on with how to run the code all the same.
        raise _Damaged("it holds more than tensors and numbers; nothing in it was run") from error
    except _Damaged:
        raise
    except Exception as error:  # zipfile and torch.load raise whatever they meet
        raise _Damaged(f"it is cut short or no checkpoint: {first_line(error)}") from error
    if not isinstance(saved, dict) or set(saved) != _KEYS:
        raise _Damaged("it is no checkpoint of this version of anybatch")
    return saved


def load_model(folder: Path) -> tuple[TrainConfig, dict[str, Tensor], str]:
    """The configuration, the model's state and the fingerprint of its data.

    Raises:
        AnybatchError: there is no checkpoint, or it is damaged.
    """
    try:
        facts = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        return config_of(facts["config"]), safetensors.torch.load_file(folder / MODEL), facts["fingerprint"]
    except FileNotFoundError as error:
        raise AnybatchError(
            f"{folder} has no checkpoint ({error.filename}): give an --out of anybatch train, detect or segment"
        ) from error
    except Exception as error:  # json, safetensors and the configuration each have their own
        raise AnybatchError(f"the checkpoint in {folder} is damaged ({error}): train anew") from error
