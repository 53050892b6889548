"""The operators that stand in for torchvision's compiled ones compute what its documentation says."""

import itertools
import math

import pytest
import torch
import torchvision
from torchvision.ops import box_iou, nms, roi_align


def sample(image, y, x):
    """One bilinear sample of a (H, W) image; 0 further than a pixel outside."""
    height, width = image.shape
    if not (-1 <= y <= height and -1 <= x <= width):
        return image.new_zeros(())
    y, x = min(max(y, 0.0), height - 1.0), min(max(x, 0.0), width - 1.0)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    b, r = y - top, x - left
    return (
        (1 - b) * (1 - r) * image[top, left]
        + (1 - b) * r * image[top, right]
        + b * (1 - r) * image[bottom, left]
        + b * r * image[bottom, right]
    )


def one_by_one(images, rois, scale, bins, ratio, aligned):
    rows = []
    for index, *box in rois.tolist():
        x1, y1, x2, y2 = (edge * scale - (0.5 if aligned else 0.0) for edge in box)
        height, width = y2 - y1, x2 - x1
        if not aligned:
            height, width = max(height, 1.0), max(width, 1.0)
        down, across = (
            ratio if ratio > 0 else math.ceil(side / b) for side, b in zip((height, width), bins, strict=True)
        )
        cells = []
        for channel, i, j in itertools.product(range(images.shape[1]), range(bins[0]), range(bins[1])):
            values = [
                sample(
                    images[int(index), channel],
                    y1 + (i + (a + 0.5) / down) * height / bins[0],
                    x1 + (j + (b + 0.5) / across) * width / bins[1],
                )
                for a in range(down)
                for b in range(across)
            ]
            cells.append(sum(values) / max(down * across, 1))
        rows.append(torch.stack(cells).view(images.shape[1], *bins))
    return torch.stack(rows)


@pytest.mark.parametrize(("ratio", "aligned"), list(itertools.product((2, 3, -1), (True, False))))
def test_roi_align_is_the_mean_of_bilinear_samples(ratio, aligned):
    images = torch.randn(2, 2, 7, 9, dtype=torch.float64, requires_grad=True)
    rois = torch.rand(6, 5, dtype=torch.float64) * 14 - 3  # some partly or wholly outside
    rois[:, 0] = torch.tensor([0, 1, 1, 0, 1, 0])
    rois[:, 3:] = rois[:, 1:3] + torch.rand(6, 2, dtype=torch.float64) * 8 + 0.1
    found = roi_align(images, rois, (3, 2), 0.7, ratio, aligned)
    expected = one_by_one(images, rois, 0.7, (3, 2), ratio, aligned)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    cotangent = torch.randn_like(found)
    gradients = [torch.autograd.grad(y, images, cotangent)[0] for y in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


def test_roi_align_of_no_box():
    assert roi_align(torch.randn(1, 3, 8, 8), torch.zeros(0, 5), (2, 2)).shape == (0, 3, 2, 2)


def test_nms_keeps_a_box_that_no_better_one_overlaps():
    low = torch.rand(60, 2) * 10
    boxes, scores = torch.cat([low, low + torch.rand(60, 2) * 6], 1), torch.rand(60)
    kept = nms(boxes, scores, 0.3).tolist()
    overlap = box_iou(boxes, boxes)
    expected: list[int] = []
    for i in scores.argsort(descending=True).tolist():
        if all(overlap[i, j] <= 0.3 for j in expected):
            expected.append(i)
    assert kept == expected
    assert 5 < len(kept) < 60


def test_a_detector_trains_and_detects():
    model = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, num_classes=3, min_size=64, max_size=64
    )
    target = {"boxes": torch.tensor([[4.0, 4.0, 40.0, 50.0]]), "labels": torch.tensor([1])}
    losses = model([torch.rand(3, 64, 64)], [target])
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert set(model.eval()([torch.rand(3, 64, 64)])[0]) == {"boxes", "labels", "scores"}
