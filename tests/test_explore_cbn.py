"""The experiments on CBN: without options they compute what the layer does; the published runs make their page."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from scripts import after_training, causal_cbn, explore_cbn

import anybatch as ab
from anybatch.lab import networks

D = torch.float64
PAGES = Path(__file__).parents[1] / "docs" / "results"


@pytest.mark.parametrize("batch", [1, 3])
def test_a_step_at_once_is_the_micro_batches_one_after_another(batch: int) -> None:
    """Losses and gradients of four steps, the weights moving; the reductions are averages of a few past ones."""
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(networks.small_resnet(5, 1, (4, 6)).to(D).train())
    layered, causal = models
    images, labels = torch.randn(4, 12, 1, 10, 10, dtype=D), torch.randint(5, (4, 12))
    ab.convert_(layered, ab.CBN(window_examples=16, positions=None, refresh=1), example_inputs=images[0, :2])
    causal_cbn.make_causal_(causal, batch, causal_cbn.Way(16, 16))
    for step, (x, y) in enumerate(zip(images, labels, strict=True)):
        for model in models:
            model.zero_grad()
        parts = 12 // batch
        for part, target in zip(x.split(batch), y.split(batch), strict=True):
            (F.cross_entropy(layered(part), target) / parts).backward()
        F.cross_entropy(causal(x), y).backward()
        for (name, p), q in zip(layered.named_parameters(), causal.parameters(), strict=True):
            # The layer expands all batches together, which differs by the second order of how far weights moved.
            assert (q.grad - p.grad).abs().max() <= (1e-5 if step else 1e-12) * p.grad.abs().max(), f"{step} {name}"
            with torch.no_grad():
                p -= 0.002 * p.grad
                q.copy_(p)


def test_what_no_layer_can_know_is_batchnorms_own() -> None:
    """Moments and reductions of the whole step, known beforehand: BatchNorm on the step, to every gradient."""
    torch.manual_seed(0)
    plain, causal = (networks.small_resnet(5, 1, (4, 6)).to(D).train() for _ in range(2))
    causal.load_state_dict(plain.state_dict())
    causal_cbn.make_causal_(causal, 1, causal_cbn.Way(0, 32, known=True))
    x, y = torch.randn(8, 1, 10, 10, dtype=D), torch.randint(5, (8,))
    for model in (plain, causal):
        F.cross_entropy(model(x), y).backward()
    for p, q in zip(plain.parameters(), causal.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-9, atol=1e-12)


def test_an_image_left_out_counts_for_those_after_it() -> None:
    way = causal_cbn.Way(4, 4, own=False)
    causal = causal_cbn.CausalCBN(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2), 1, way)
    a, counts = causal.pooling(3)
    torch.testing.assert_close(a[1:, 2:].diagonal(), torch.zeros(2, dtype=D))
    torch.testing.assert_close(a.sum(1), torch.ones(3, dtype=D))
    torch.testing.assert_close(counts, torch.tensor([0, 0.75**2, 0.75, 1], dtype=D))


def test_a_past_is_trusted_as_far_as_it_was_right() -> None:
    """One that is off by as much as a micro-batch's own mean counts as one of them; one that is right, in full."""
    causal = causal_cbn.CausalCBN(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2), 1, causal_cbn.Way(trust=True))
    none, one = torch.zeros(2, 1), torch.ones(2)
    means = torch.randn(1000, 2)
    for off, count in ((0.0, 50.0), (1.0, 1.0), (0.25**0.5, 4.0)):
        causal.state = causal_cbn.State(causal_cbn.Past(none, none, one, one, one, 50.0))
        causal.trust_(means.mean(0) + off, means.var(0), means)
        assert causal.state.past is not None
        assert causal.state.past.count == pytest.approx(count, rel=0.05)


@pytest.mark.parametrize(
    ("file", "table"), [("runs", explore_cbn.table), ("long", explore_cbn.table), ("after", after_training.table)]
)
def test_the_page_has_what_the_published_runs_make(file: str, table: Callable[[list], Iterator[str]]) -> None:
    runs = [json.loads(line) for line in (PAGES / "explore" / f"{file}.jsonl").read_text().splitlines()]
    page = (PAGES / "explore.md").read_text()
    for row in table(runs):
        assert row in page
