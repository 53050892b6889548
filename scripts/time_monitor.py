"""What ab.Monitor adds to a training step: ResNet-18, one thread, steps with and without it in turns.

python scripts/time_monitor.py [image size] [batch] [rounds]
"""

import sys
import time
from statistics import median

import torch
import torch.nn.functional as F

import anybatch as ab
from anybatch.lab import networks

EVERY = 100


def main(size: int = 64, batch: int = 4, rounds: int = 15) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = networks.resnet18(10).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    images, labels = torch.randn(batch, 3, size, size), torch.randint(10, (batch,))

    def step() -> float:
        begun = time.perf_counter()
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        return time.perf_counter() - begun

    plain, idle, observed = [], [], []
    for _ in range(3):
        step()
    for _ in range(rounds):
        plain.append(step())
        with ab.Monitor(model, every=10**9):
            idle.append(step())
        with ab.Monitor(model, every=1):
            observed.append(step())
    usual = median(plain)
    waiting = median(b / a for a, b in zip(plain, idle, strict=True)) - 1
    looking = median(b / a for a, b in zip(plain, observed, strict=True)) - 1
    share = ((EVERY - 1) * waiting + looking) / EVERY
    print(f"a step without: {1e3 * usual:.1f} ms; beside it, with the monitor: {waiting:+.2%} where it only counts,")
    print(
        f"{looking:+.1%} where it looks, so {share:+.2%} with every={EVERY}; {looking / EVERY:+.2%} of that for looking"
    )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
