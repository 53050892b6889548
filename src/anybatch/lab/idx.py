"""The IDX files that Fashion-MNIST is published in: found on this machine, or downloaded once and checked."""

import gzip
import hashlib
import os
import urllib.request
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from anybatch.errors import AnybatchError
from anybatch.reporting.files import write_atomically

__all__ = ["FASHION_MNIST_URL", "fashion_mnist_arrays", "read_idx", "user_cache"]

FASHION_MNIST_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
SYSTEM_FOLDER = Path("/usr/share/datasets/fashion-mnist")

# The MD5 sums that the authors publish. They hold for a download; Linux distributions compress the same content anew.
MD5 = {
    "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
}
SHAPES = {
    "train-images-idx3-ubyte.gz": (60000, 28, 28),
    "train-labels-idx1-ubyte.gz": (60000,),
    "t10k-images-idx3-ubyte.gz": (10000, 28, 28),
    "t10k-labels-idx1-ubyte.gz": (10000,),
}

Bytes = npt.NDArray[np.uint8]


def read_idx(path: Path) -> Bytes:
    """The array in one gzip-compressed IDX file of unsigned bytes.

    Raises:
        AnybatchError: the file cannot be read, or is not what its header says.
    """
    try:
        raw = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise AnybatchError(f"{path} cannot be read ({error}): delete it and get it again") from error
    # An IDX header: two zero bytes, the type (8: unsigned byte), the number of dimensions, each as a big-endian int32.
    dims = raw[3] if raw[:3] == b"\0\0\x08" and len(raw) > 3 else 0
    shape = tuple(np.frombuffer(raw, ">u4", dims, 4).tolist()) if dims and len(raw) >= 4 + 4 * dims else ()
    if not shape or len(raw) - 4 - 4 * dims != np.prod(shape, dtype=np.int64):
        raise AnybatchError(f"{path} is not an IDX file of bytes, or is cut short: delete it and get it again")
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * dims).reshape(shape)


def fashion_mnist_arrays() -> tuple[Bytes, Bytes, Bytes, Bytes]:
    """Train images, train labels, test images, test labels of the full set, from the first place that has them.

    Raises:
        AnybatchError: no place has them and they cannot be downloaded.
    """
    folder = next((f for f in _folders() if all((f / name).is_file() for name in MD5)), None) or _download()
    arrays = []
    for name, shape in SHAPES.items():
        array = read_idx(folder / name)
        if array.shape != shape:
            raise AnybatchError(f"{folder / name} holds {array.shape}, Fashion-MNIST is {shape}: get the file again")
        arrays.append(array)
    train_images, train_labels, test_images, test_labels = arrays
    return train_images, train_labels, test_images, test_labels


def user_cache() -> Path:
    """Where data that can be had again is kept; it need not be there yet."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "anybatch"


def _folders() -> list[Path]:
    own = os.environ.get("ANYBATCH_DATA")
    return ([Path(own) / "fashion-mnist"] if own else []) + [SYSTEM_FOLDER, user_cache() / "fashion-mnist"]


def _download() -> Path:
    folder = user_cache() / "fashion-mnist"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, md5 in MD5.items():
            if (folder / name).is_file():
                continue
            with urllib.request.urlopen(FASHION_MNIST_URL + name, timeout=60) as response:
                content: bytes = response.read()
            if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
                raise OSError(f"{name} arrived damaged: its MD5 sum is not {md5}")
            write_atomically(folder / name, content)
    except OSError as error:
        raise AnybatchError(
            f"the full Fashion-MNIST is not on this machine and cannot be downloaded ({error}): put its four .gz files "
            f"into $ANYBATCH_DATA/fashion-mnist, or install your system's package (Debian: dataset-fashion-mnist), "
            f"or use the 8,000 images that come with anybatch: --data embedded"
        ) from error
    return folder
