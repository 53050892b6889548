"""Shifted and mirrored images: what they are, and that the seed, the epoch and the image alone decide."""

from dataclasses import replace

import torch
import torch.nn.functional as F

from anybatch.lab.augment import SHIFT, augmented
from anybatch.lab.classify import Classify
from anybatch.lab.config import ClassifyConfig
from anybatch.lab.training import run_key, train_run

from . import lab_fakes

DATA = lab_fakes.dataset()
CONFIG = ClassifyConfig(method="bn", batch=4, epochs=2, lr=0.05, augment=True)


def test_images_are_shifted_and_mirrored() -> None:
    """Each is one of the 2 x 81 that there are, every shift and both directions occur."""
    torch.manual_seed(0)
    image = torch.randint(1, 256, (1, 3, 7, 5), dtype=torch.uint8)
    padded = F.pad(image, [SHIFT] * 4)[0]
    known = {}
    for mirror in (False, True):
        for down in range(2 * SHIFT + 1):
            for right in range(2 * SHIFT + 1):
                window = padded[:, down : down + 7, right : right + 5]
                known[(window.flip(-1) if mirror else window).numpy().tobytes()] = down, right, mirror
    every = torch.arange(3000)
    out = augmented(image.expand(3000, -1, -1, -1), every, seed=1, epoch=0, count=3000)
    assert out.dtype == torch.uint8
    found = [known[each.numpy().tobytes()] for each in out]
    assert set(found) == set(known.values())
    assert 0.45 < sum(mirror for _, _, mirror in found) / 3000 < 0.55


def test_seed_epoch_and_image_alone_decide() -> None:
    torch.manual_seed(0)
    images = torch.randint(256, (12, 1, 9, 9), dtype=torch.uint8)
    whole = augmented(images, torch.arange(12), seed=3, epoch=2, count=12)
    order = torch.randperm(12)
    for part in order.split(5):
        assert torch.equal(augmented(images[part], part, seed=3, epoch=2, count=12), whole[part])
    for seed, epoch in ((3, 1), (2, 2)):
        assert not torch.equal(augmented(images, torch.arange(12), seed, epoch, 12), whole)


def test_the_epoch_is_the_running_one() -> None:
    task = Classify(CONFIG, DATA)
    indices, epoch = torch.arange(4), task.train_count // 32 * 32
    first, still, next_one = (task.batch(indices, seen)[0] for seen in (0, epoch - 32, epoch))
    assert torch.equal(first, still)
    assert not torch.equal(first, next_one)
    plain = Classify(replace(CONFIG, augment=False), DATA)
    assert torch.equal(plain.batch(indices, 0)[0], DATA.normalise(DATA.train_images[:4]))


def test_a_run_says_that_it_augments() -> None:
    task, plain = Classify(CONFIG, DATA), Classify(replace(CONFIG, augment=False), DATA)
    assert run_key(task) != run_key(plain)
    result = train_run(task)
    assert result.record()["config"]["augment"] is True
    assert result.train_loss != train_run(plain).train_loss
    assert result.train_loss == train_run(task).train_loss
