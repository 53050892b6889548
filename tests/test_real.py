"""On real images: what users of the released code report as failing.

A stock residual network, converted by one call with default settings and no burn-in, trains from scratch; and a
BatchNorm checkpoint converted in the middle of training keeps its accuracy. Both at 2 images a step.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import anybatch as ab
from anybatch.lab import data
from anybatch.lab.networks import ResNet

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def images() -> data.Dataset:
    return data.load("embedded", train_images=2000, test_images=1000)


def stock_resnet() -> nn.Module:
    """ResNet-18 as everyone builds it, at an eighth of its width."""
    torch.manual_seed(0)
    return ResNet(10, 1, (8, 16, 32, 64), (2, 2, 2, 2))


def train(model: nn.Module, images: data.Dataset, batch: int, lr: float, seed: int) -> None:
    """One epoch, a step a batch, rate falling linearly to zero."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
    order = torch.randperm(len(images.train_images), generator=torch.Generator().manual_seed(seed)).split(batch)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, len(order))
    model.train()
    for indices in order:
        loss = F.cross_entropy(model(images.normalise(images.train_images[indices])), images.train_labels[indices])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def accuracy(model: nn.Module, images: data.Dataset) -> float:
    model.eval()
    predicted = model(images.normalise(images.test_images)).argmax(1)
    return 100 * (predicted == images.test_labels).float().mean().item()


def test_a_stock_resnet_trains_from_scratch(images: data.Dataset) -> None:
    model = stock_resnet()
    report = ab.convert_(model, ab.CBN(), example_inputs=images.normalise(images.train_images[:1]))
    assert len(report.converted) == 20
    train(model, images, batch=2, lr=0.01, seed=0)
    reached = accuracy(model, images)
    assert reached > 60, reached  # the form of the released code stands at 50 here


def test_a_checkpoint_converted_in_mid_training_keeps_its_accuracy(images: data.Dataset) -> None:
    model = stock_resnet()
    train(model, images, batch=16, lr=0.05, seed=0)
    before = accuracy(model, images)
    assert before > 65, before
    ab.convert_(model, ab.CBN(), example_inputs=images.normalise(images.train_images[:1]))
    assert accuracy(model, images) == before  # evaluation is BatchNorm's
    train(model, images, batch=2, lr=0.002, seed=1)
    after = accuracy(model, images)
    assert after > before - 1, (before, after)
    folded = ab.fold(model)
    assert abs(accuracy(folded, images) - after) <= 0.2
