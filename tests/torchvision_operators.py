"""torchvision's compiled operators, where its own cannot be loaded beside a CPU build of torch.

Its wheel on the package index is a CUDA build. Beside a CPU torch the library of operators does not load, and without
their schemas `import torchvision`, and with it timm, lightning and others, fails. So the schemas are declared here, and
the two operators that detectors use, nms and roi_align, are written in torch; calling another one raises.

`python -m tests.with_torchvision detect ...` runs the command line with them.
"""

import importlib
import importlib.util
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

__all__ = ["declare"]

_ROI = "Tensor input, Tensor rois, float spatial_scale, int pooled_height, int pooled_width"
_BACK = "float spatial_scale, int pooled_height, int pooled_width"
_SIZE = "int batch_size, int channels, int height, int width"
_CONV = (
    "Tensor input, Tensor weight, Tensor offset, Tensor mask, Tensor bias, int stride_h, int stride_w, int pad_h, "
    "int pad_w, int dilation_h, int dilation_w, int groups, int offset_groups, bool use_mask"
)
_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    f"roi_align({_ROI}, int sampling_ratio, bool aligned) -> Tensor",
    f"qroi_align({_ROI}, int sampling_ratio, bool aligned) -> Tensor",
    f"_roi_align_backward(Tensor grad, Tensor rois, {_BACK}, {_SIZE}, int sampling_ratio, bool aligned) -> Tensor",
    f"roi_pool({_ROI}) -> (Tensor, Tensor)",
    f"_roi_pool_backward(Tensor grad, Tensor rois, Tensor argmax, {_BACK}, {_SIZE}) -> Tensor",
    f"ps_roi_align({_ROI}, int sampling_ratio) -> (Tensor, Tensor)",
    f"_ps_roi_align_backward(Tensor grad, Tensor rois, Tensor mapping, {_BACK}, int sampling_ratio, {_SIZE}) -> Tensor",
    f"ps_roi_pool({_ROI}) -> (Tensor, Tensor)",
    f"_ps_roi_pool_backward(Tensor grad, Tensor rois, Tensor mapping, {_BACK}, {_SIZE}) -> Tensor",
    f"deform_conv2d({_CONV}) -> Tensor",
    f"_deform_conv2d_backward(Tensor grad, {_CONV}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
_LIBRARIES: list[torch.library.Library] = []  # a registration lasts as long as its Library


def declare() -> bool:
    """Declares the operators unless torchvision's own load; whether it did. To be called before torchvision's import.

    Raises:
        ImportError: torchvision is not installed.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        raise ImportError("torchvision is not installed; `make .venv/ready` installs what the tests need")
    if _LIBRARIES or hasattr(torch.ops.torchvision, "nms"):
        return bool(_LIBRARIES)
    try:
        for library in Path(spec.origin).parent.glob("_C*.so"):
            torch.ops.load_library(str(library))
            return False
    except OSError:
        pass
    library = torch.library.Library("torchvision", "DEF")
    for schema in _SCHEMAS:
        library.define(schema)
    library.impl("nms", _nms, "CPU")
    library.impl("roi_align", _roi_align, "CompositeImplicitAutograd")
    _LIBRARIES.append(library)

    importlib.import_module("torchvision.extension")._has_ops = lambda: True  # type: ignore[attr-defined]
    # Its own roi_align in torch compiles itself, and samples outside of the image count in it.
    importlib.import_module("torchvision.ops.roi_align")._has_ops = lambda: True  # type: ignore[attr-defined]
    return True


def _nms(dets: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Indices of the boxes that no better box overlaps by more than the threshold, best first."""
    boxes, order = dets.detach().double().numpy(), torch.sort(scores.detach(), descending=True, stable=True)[1].numpy()
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    kept = []
    while order.size:
        best, order = order[0], order[1:]
        kept.append(int(best))
        low = np.maximum(boxes[best, :2], boxes[order, :2])
        high = np.minimum(boxes[best, 2:], boxes[order, 2:])
        common = np.prod(np.clip(high - low, 0, None), axis=1)
        union = area[best] + area[order] - common
        order = order[common <= iou_threshold * union]
    return torch.tensor(kept, dtype=torch.int64)


def _roi_align(
    input: Tensor,
    rois: Tensor,
    spatial_scale: float,
    pooled_height: int,
    pooled_width: int,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """The mean over a grid of bilinear samples is separable: one matrix for the rows, one for the columns."""
    shift = 0.5 if aligned else 0.0
    x1, y1, x2, y2 = (rois[:, 1:] * spatial_scale - shift).unbind(1)
    rows = _weights(y1, y2, pooled_height, input.shape[2], sampling_ratio, aligned)
    columns = _weights(x1, x2, pooled_width, input.shape[3], sampling_ratio, aligned)
    image = rois[:, 0].long()
    output = input.new_zeros(len(rois), input.shape[1], pooled_height, pooled_width)
    for each in image.unique().tolist():
        chosen = (image == each).nonzero().squeeze(1)
        tall = torch.einsum("chw,kqw->kqch", input[each], columns[chosen])
        output = output.index_put((chosen,), torch.einsum("kqch,kph->kcpq", tall, rows[chosen]))
    return output


def _weights(low: Tensor, high: Tensor, bins: int, size: int, sampling_ratio: int, aligned: bool) -> Tensor:
    """(K, bins, size): what each pixel along one axis adds to each bin."""
    length = high - low if aligned else (high - low).clamp(min=1.0)
    samples = torch.full_like(length, sampling_ratio) if sampling_ratio > 0 else (length / bins).ceil().clamp(min=0)
    most = int(samples.max()) if len(samples) else 1
    step = torch.arange(max(most, 1), dtype=low.dtype)
    bin_size = (length / bins)[:, None, None]
    offset = (step + 0.5) / samples.clamp(min=1)[:, None, None]
    at = low[:, None, None] + (torch.arange(bins, dtype=low.dtype)[:, None] + offset) * bin_size  # (K, bins, samples)
    counts = (step < samples[:, None, None]) & (at >= -1) & (at <= size)
    at = at.clamp(0, size - 1)
    distance = (at[..., None] - torch.arange(size, dtype=low.dtype)).abs()
    triangle = (1 - distance).clamp(min=0) * counts[..., None]
    return triangle.sum(2) / samples.clamp(min=1)[:, None, None]
