"""An image file as a tensor, whatever its mode."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from anybatch.errors import AnybatchError
from anybatch.lab.detection.annotations import ImageEntry
from anybatch.lab.detection.faults import Fault
from anybatch.lab.images import UNREADABLE

__all__ = ["check_file", "load_image"]

EXIF_ORIENTATION = 0x0112


def load_image(entry: ImageEntry) -> Tensor:
    """Its pixels as stored. Shape: float32, (3, height, width), in [0, 1].

    EXIF orientation is not applied: boxes and recorded sizes are for the pixels as stored. Grey becomes three equal
    channels, transparency is left out, 16 bits a channel keep their precision where Pillow reads them (grey).

    Raises:
        AnybatchError: the file is missing, damaged or cut short, has another size than recorded, or pixels of no known
            range.
    """
    try:
        with Image.open(entry.file) as image:
            pixels = _rgb(image)
    except UNREADABLE as error:
        raise AnybatchError(f"image {entry.file} cannot be read ({error}): mend or remove it") from error
    if pixels.shape[1:] != (entry.height, entry.width):
        height, width = pixels.shape[1:]
        was = f"{entry.width} x {entry.height} when its annotations were read"
        raise AnybatchError(f"image {entry.file} is {width} x {height} pixels, and was {was}: put the old one back")
    return pixels


def _rgb(image: Image.Image) -> Tensor:
    if image.mode.startswith(("I", "F")):  # more than 8 bits of grey
        grey = np.asarray(image, dtype=np.float64)
        if image.mode == "F" or grey.min() < 0 or grey.max() > 65535:
            raise ValueError(f"its {image.mode} pixels are neither of 8 nor of 16 bits")
        return torch.from_numpy((grey / 65535).astype(np.float32)).expand(3, -1, -1).contiguous()
    if "transparency" in image.info:
        image = image.convert("RGBA")  # which a palette with transparent colours asks for
    pixels = np.array(image.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous().float() / 255


def check_file(entry: ImageEntry) -> None:
    """Raises Fault unless the file's header says that it is an image of the recorded size."""
    recorded = (entry.width, entry.height)
    try:
        with Image.open(entry.file) as image:
            stored = image.size
            # Asked for only now: for some formats it decodes the whole picture.
            turned = stored == recorded[::-1] != recorded and image.getexif().get(EXIF_ORIENTATION, 1) >= 5
    except FileNotFoundError as error:
        raise Fault("missing image file", f"there is no file {entry.file}") from error
    except UNREADABLE as error:
        raise Fault("unreadable image", f"{entry.file} cannot be read ({error})") from error
    if stored != recorded:
        hint = "; its EXIF entry turns it for display, boxes are for the pixels as stored" if turned else ""
        raise Fault(
            "image of another size",
            f"{entry.file} is {stored[0]} x {stored[1]} pixels, recorded is {entry.width} x {entry.height}{hint}",
        )
