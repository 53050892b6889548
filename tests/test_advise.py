"""ab.advise end to end: that it is what the measurements recommend, of which models, and what it refuses."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import anybatch as ab
from anybatch.diagnose import Subject, batch_noise, history_error
from anybatch.diagnose.advice import recommend

from .diagnose_nets import batches, chain
from .test_advice import experience
from .test_diagnose_subject import everything

ce = F.cross_entropy


class PreActivation(nn.Module):
    """Its norms are fed by sums."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(2))
        self.maps = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))
        self.stem, self.fc = nn.Conv2d(3, 4, 1), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x) + 1
        for norm, conv in zip(self.norms, self.maps, strict=True):
            x = x + conv(F.relu(norm(x)))
        return self.fc(x.mean((2, 3)))


def test_norms_that_no_map_feeds() -> None:
    advice = ab.advise(PreActivation(), batches(8, 4, torch.float32), ce, 1)
    assert not any(c.method.startswith("cbn") for c in advice.candidates)
    assert "CBN is left out: no norm follows a linear map" in advice.evidence[-1]
    assert len(str(advice).splitlines()) <= 10


def test_advise_is_what_the_measurements_recommend() -> None:
    """Statistics of 64 examples together where there are as many; at any batch size."""
    model, taken = chain(), batches(10, 8, torch.float32)
    whole = Subject(model, taken, ce, 8).joined(64)
    assert len(whole.batches) == 1
    measured = batch_noise.measure(whole, (1, 2, 3, 4, 8, 16, 32))
    past = history_error.measure(whole, rate=0.02)
    advice = ab.advise(model, taken, ce, 3, micro_batches=2, rate=0.02)
    assert advice == recommend(measured, past, 3, 2, channels=[4, 6])
    assert advice.noise["batch"] == measured.noise_at(3)
    assert "at rate 0.02" in str(advice)
    assert ab.advise(lambda: chain(), taken, ce, batch_size=32).batch == 32


def test_a_diagnosis_gives_the_advice_for_its_batches() -> None:
    taken = batches(2, 33, torch.float32)
    names = ["batch-noise", "history-error"]
    found = ab.diagnose(chain(), taken, ce, batches=2, experiments=names, micro_batches=3, compare=False)
    assert (found.advice.batch, found.advice.micro_batches) == (33, 3)
    assert any(c.method.startswith("accumulated") for c in found.advice.candidates)
    alone = ab.diagnose(chain(), taken, ce, batches=2, experiments=names[:1])
    assert alone.advice is None  # it takes both


def test_a_diagnosis_at_other_sizes() -> None:
    """Of which an advice cannot be made, if the loader's is not among them."""
    taken = batches(2, 8, torch.float32)
    found = ab.diagnose(
        chain(), taken, ce, batches=2, experiments=["batch-noise"], options={"batch-noise": {"sizes": (1, 2)}}
    )
    assert found.results["batch-noise"]["as given"].sizes == (1, 2)
    assert found.advice is None


def test_how_far_it_is_to_be_trusted() -> None:
    """The runs were of convolutions that classify."""
    taken = batches(8, 4, torch.float32)
    assert "small networks on one data set" in ab.advise(chain(), taken, ce, 2).caution
    dense = ab.advise(chain()[:6], taken, lambda z, t: z.square().mean(), 2)
    assert "of classifiers, and this is none" in dense.caution
    flat = nn.Sequential(nn.Flatten(), nn.Linear(105, 6), nn.BatchNorm1d(6), nn.Linear(6, 5))
    advice = ab.advise(flat, taken, ce, 2)
    assert "these norms see one value an example" in advice.caution
    assert "positions" not in str(advice)


@pytest.mark.parametrize("chosen", ["bn", "renorm"])
def test_a_model_that_is_converted_already(monkeypatch: pytest.MonkeyPatch, chosen: str) -> None:
    """Cannot be converted once more; what can be done with it is said."""
    experience(monkeypatch, **{chosen: 9})
    model, taken = chain(), batches(2, 8, torch.float32)
    ab.convert_(model, ab.CBN(), example_inputs=taken[0][0])
    advice = ab.advise(model, taken, ce, 2)
    assert advice.method == chosen
    if chosen == "bn":
        assert "to do it: ab.revert_(model)" in str(advice)
        ab.revert_(model)
        assert type(model[1]) is nn.BatchNorm2d
    else:
        assert "ab.convert_ the model as it was built, to ab.BatchRenorm()" in str(advice)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"batch_size": 0}, "advise: batch_size=0; give at least 1"),
        ({"micro_batches": 0}, "advise: micro_batches=0; give at least 1"),
        ({"loader": batches(1, 7, torch.float32)}, "7 examples say too little .*give batches of 8 in all"),
        ({"model": chain(norm=lambda c: nn.GroupNorm(2, c))}, "has no BatchNorm.*it has GroupNorm"),
        ({"loss": lambda z, t: z.sum() * torch.nan}, "the loss of the first batch is nan"),
    ],
)
def test_refused(given: dict[str, Any], words: str) -> None:
    usual = {"model": chain(), "loader": batches(2, 8, torch.float32), "loss": ce, "batch_size": 2}
    with pytest.raises(ab.AnybatchError, match=words):
        ab.advise(**{**usual, **given})


@pytest.mark.parametrize("config", [None, ab.CBN()], ids=["bn", "cbn"])
def test_the_model_and_the_random_states_are_left_as_they_are(config: object) -> None:
    model, taken = chain(nn.Dropout()), batches(2, 8, torch.float32)
    if config:
        ab.convert_(model, config, example_inputs=taken[0][0])
    ce(model(taken[0][0]), taken[0][1]).backward()
    before = everything(model, taken)
    ab.advise(model, taken, ce, 2)
    assert everything(model, taken) == before
