"""Images to train on: embedded in the package, the full Fashion-MNIST, or a folder of your own."""

import hashlib
import io
import lzma
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import resources

import numpy as np
import torch
from torch import Tensor

from anybatch.errors import AnybatchError
from anybatch.lab.idx import fashion_mnist_arrays
from anybatch.lab.images import load_folder

__all__ = ["BUILT_IN", "EMBEDDED_ASSET", "EMBEDDED_TRAIN", "Dataset", "load"]

BUILT_IN = ("embedded", "fashion-mnist")
EMBEDDED_ASSET = "fashion-mnist-8000.npy.xz"
EMBEDDED_TRAIN = 6000  # of the 8,000 embedded images, in the published order; the rest are test images

_CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
_MEAN, _STD = (0.286,), (0.353,)


@dataclass(frozen=True)
class Dataset:
    """Labelled images in memory, split in two.

    Attributes:
        name: what the user asked for.
        train_images: uint8, (N, C, H, W); likewise `test_images`.
        train_labels: int64, (N,), indices into `classes`; likewise `test_labels`.
        mean: per channel, of pixels in [0, 1]; likewise `std`.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 pixels -> float32 of about zero mean and unit variance per channel. Shape: (N, C, H, W), kept."""
        mean, std = (torch.tensor(v, device=images.device).view(1, -1, 1, 1) for v in (self.mean, self.std))
        return (images.float() / 255 - mean) / std

    @cached_property
    def fingerprint(self) -> str:
        """Twelve hexadecimal digits that change with any pixel, label or normalisation."""
        digest = hashlib.sha256(repr((self.classes, self.mean, self.std)).encode())
        for tensor in (self.train_images, self.train_labels, self.test_images, self.test_labels):
            digest.update(repr(tuple(tensor.shape)).encode())
            digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()[:12]

    def first(self, train_images: int | None, test_images: int | None) -> "Dataset":
        """The same data with only the first `train_images` and `test_images`; None is all.

        Raises:
            AnybatchError: more are asked for than there are, or fewer than one.
        """
        for split, asked, there in (
            ("train", train_images, len(self.train_images)),
            ("test", test_images, len(self.test_images)),
        ):
            if asked is not None and not 1 <= asked <= there:
                more = " (or --data fashion-mnist, which has 60,000 and 10,000)" if self.name == "embedded" else ""
                raise AnybatchError(
                    f"{asked} {split} images are asked for, '{self.name}' has {there}: give 1 to {there}{more}"
                )
        return replace(
            self,
            train_images=self.train_images[:train_images],
            train_labels=self.train_labels[:train_images],
            test_images=self.test_images[:test_images],
            test_labels=self.test_labels[:test_images],
        )


def load(
    source: str = "embedded",
    train_images: int | None = None,
    test_images: int | None = None,
    image_size: int = 64,
) -> Dataset:
    """The data set that `source` names.

    Args:
        source: "embedded", "fashion-mnist", or a folder of class folders with images.
        train_images: only the first so many, in an order that never changes; None is all.
        test_images: likewise.
        image_size: pixels a side that the images of a folder are resized to.

    Raises:
        AnybatchError: there is no such data, or it does not make a data set.
    """
    if source == "embedded":
        dataset = _embedded()
    elif source == "fashion-mnist":
        dataset = _fashion_mnist(source, *fashion_mnist_arrays())
    else:
        dataset = _folder(source, image_size)
    return dataset.first(train_images, test_images)


def _embedded() -> Dataset:
    asset = resources.files("anybatch.lab") / "assets" / EMBEDDED_ASSET
    rows = np.load(io.BytesIO(lzma.decompress(asset.read_bytes())))  # a row: the label, then the 28 x 28 pixels
    labels, images = rows[:, 0], rows[:, 1:].reshape(-1, 28, 28)
    n = EMBEDDED_TRAIN
    return _fashion_mnist("embedded", images[:n], labels[:n], images[n:], labels[n:])


def _fashion_mnist(name: str, *arrays: np.ndarray) -> Dataset:
    train_images, train_labels, test_images, test_labels = (torch.from_numpy(array.copy()) for array in arrays)
    return Dataset(
        name,
        train_images.unsqueeze(1),
        train_labels.long(),
        test_images.unsqueeze(1),
        test_labels.long(),
        _CLASSES,
        _MEAN,
        _STD,
    )


def _folder(source: str, image_size: int) -> Dataset:
    classes, train_images, train_labels, test_images, test_labels = load_folder(source, image_size)
    # Channel by channel: a float64 copy of the whole set would be eight times the images.
    pixels = [channel.double() / 255 for channel in train_images.transpose(0, 1)]
    mean = tuple(round(float(p.mean()), 4) for p in pixels)
    std = tuple(max(round(float(p.std(correction=0)), 4), 1e-3) for p in pixels)
    return Dataset(source, train_images, train_labels, test_images, test_labels, classes, mean, std)
