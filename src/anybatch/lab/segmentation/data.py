"""The data that a name or a folder stands for."""

from pathlib import Path

from anybatch.errors import AnybatchError
from anybatch.lab.segmentation import images, nifti
from anybatch.lab.segmentation.examples import Examples, Intensity
from anybatch.lab.segmentation.generated import GENERATED, generated

__all__ = ["load"]


def load(
    source: str, image_size: int | None = None, spacing: float | None = None, intensity: Intensity | None = None
) -> Examples:
    """The examples.

    Args:
        source: "volumes", "scenes", or a folder.
        image_size: pixels a side that images are resized to.
        spacing: millimetres that volumes are resampled to.
        intensity: whose moments an example is normalised by, its own ("example") or those of all training examples
            ("data"); None is what fits the data.

    Raises:
        AnybatchError: there is no such data, an option is not for it, or something of it is unusable.
    """
    root = Path(source).expanduser()
    volumes = nifti.is_layout(root)
    if source in GENERATED or volumes:
        _refuse("image_size", image_size, "image folders")
    if source in GENERATED or not volumes:
        _refuse("spacing", spacing, "NIfTI volumes")
    if source in GENERATED:
        return generated(source, intensity or "data")
    if volumes:
        return nifti.load_volumes(root, spacing, intensity)
    return images.load_images(root, image_size, intensity)


def _refuse(option: str, value: float | None, what: str) -> None:
    if value is not None:
        raise AnybatchError(f"{option} {value} is for {what} alone: leave it out")
