"""Where a backbone's weights come from, and norms that stay as these weights have them."""

import hashlib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anybatch.convert.walker import swap
from anybatch.errors import AnybatchError, first_line
from anybatch.integrations._hosts import require
from anybatch.lab.data import load
from anybatch.lab.detection.compose import SceneConfig, compose
from anybatch.lab.detection.networks import SmallBody
from anybatch.lab.idx import user_cache
from anybatch.lab.images import IMAGENET_MEAN, IMAGENET_STD
from anybatch.reporting.files import write_atomically

__all__ = ["body_weights", "freeze_norms_"]

State = Mapping[str, Tensor]
RECIPE = 1  # raised whenever training on garments gives other weights

# As ImageNet is to COCO: one garment a picture, in the look of the scenes. A few seconds an epoch on one core.
_PICTURES, _BATCH, _EPOCHS, _LR = 6000, 32, 5, 0.1
_LOOK = SceneConfig(size=48, objects=(1, 1), scale=(0.7, 1.5), seed=1)


def body_weights(weights: str, network: str) -> tuple[State, str]:
    """The state of a backbone, without what follows its stages, and hexadecimal digits that change with any of it.

    Args:
        weights: "none" (an empty state), "garments", "imagenet", or a file: safetensors, or a state_dict that
            `torch.load` reads weights-only. Entries of a whole classifier or detector are told apart by their prefix.
        network: a key of `NETWORKS`.

    Raises:
        AnybatchError: they are not there, do not fit the network or cannot be read.
    """
    if weights == "none":
        return {}, ""
    if weights == "garments":
        if network != "small-resnet":
            raise AnybatchError(
                f"weights 'garments' are for small-resnet, not {network}: give imagenet, none or a file"
            )
        state = _garments()
    elif weights == "imagenet":
        if network == "small-resnet":
            raise AnybatchError("there are no weights 'imagenet' for small-resnet: give garments, none or a file")
        models = require("torchvision.models", "detect")
        try:
            state = models.get_model_weights(network)["IMAGENET1K_V1"].get_state_dict(progress=True, check_hash=True)
        except (OSError, RuntimeError) as error:  # not online, no room, or not what was to be downloaded
            raise AnybatchError(
                f"weights 'imagenet' of {network} cannot be downloaded ({error}): go online once, or give a file"
            ) from error
    else:
        state = _file(Path(weights))
    state = {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].contiguous().cpu().numpy().tobytes())
    return state, digest.hexdigest()[:12]


def freeze_norms_(body: nn.Module) -> None:
    """Puts torchvision's FrozenBatchNorm2d in place of every BatchNorm2d, with what it holds: nothing of it trains."""
    frozen_norm = require("torchvision.ops", "detect").FrozenBatchNorm2d
    instead: dict[nn.Module, nn.Module] = {}
    for norm in body.modules():
        if isinstance(norm, nn.BatchNorm2d):
            frozen = frozen_norm(norm.num_features, norm.eps)
            state = {name: value for name, value in norm.state_dict().items() if name != "num_batches_tracked"}
            frozen.load_state_dict(state)
            instead[norm] = frozen
    swap(body, instead)


def _file(path: Path) -> State:
    try:
        if path.suffix == ".safetensors":
            state: dict[str, Tensor] = safetensors.torch.load_file(path)
        else:
            state = torch.load(path, weights_only=True, map_location="cpu")
    except FileNotFoundError as error:
        raise AnybatchError(f"there is no file {path}: give weights as garments, imagenet, none or a file") from error
    except Exception as error:  # whatever safetensors, pickle and zip raise
        raise AnybatchError(
            f"weights {path} cannot be read ({first_line(error)}): give a state_dict of tensors"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise AnybatchError(f"weights {path} hold no state_dict of tensors: save model.state_dict()")
    for prefix in ("backbone.body.", "body.", "backbone.", "module."):
        if inner := {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}:
            return inner
    return state


def _garments() -> State:
    """A small body trained to classify garments; from the user's cache after the first time."""
    path = user_cache() / f"garments-{RECIPE}.safetensors"
    try:
        return safetensors.torch.load_file(path)
    except Exception:  # missing, or damaged: made anew
        state = _train_on_garments()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, safetensors.torch.save(state))
    except OSError as error:
        raise AnybatchError(f"{path} cannot be written ({error.strerror}): free or allow the space there") from error
    return state


def _train_on_garments() -> dict[str, Tensor]:
    data = load("embedded")
    pixels, labels = data.train_images.squeeze(1).numpy(), data.train_labels
    with torch.random.fork_rng(devices=[]), _one_thread():
        torch.manual_seed(0)
        pictures, classes = [], []
        for place in range(_PICTURES):
            picture, placed = compose(pixels, _LOOK, np.random.default_rng([_LOOK.seed, 2, place]))
            pictures.append(torch.from_numpy(picture).permute(2, 0, 1))
            classes.append(int(labels[placed[0].garment]))
        x, y = torch.stack(pictures), torch.tensor(classes)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
        model = nn.Sequential(_Last(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, len(data.classes)))
        optimizer = torch.optim.SGD(model.parameters(), lr=_LR, momentum=0.9, weight_decay=5e-4)
        steps = _EPOCHS * (_PICTURES // _BATCH)
        for step in range(steps):
            if step % (_PICTURES // _BATCH) == 0:
                order = torch.randperm(_PICTURES)
            chosen = order[step % (_PICTURES // _BATCH) * _BATCH :][:_BATCH]
            optimizer.param_groups[0]["lr"] = _LR * (1 + math.cos(math.pi * step / steps)) / 2
            loss = F.cross_entropy(model((x[chosen].float() / 255 - mean) / std), y[chosen])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
        return {name: tensor.clone() for name, tensor in model[0].state_dict().items()}


@contextmanager
def _one_thread() -> Iterator[None]:
    """The same sums in the same order, whatever the number of cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Last(SmallBody):
    """The output of the last stage alone."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return list(super().forward(x).values())[-1]
