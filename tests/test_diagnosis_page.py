"""The page of a diagnosis and its numbers beside it: whole, on its own, of any model, without a warning."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.nn.functional as F
from markupsafe import escape
from torch import Tensor, nn

import anybatch as ab
from anybatch.diagnose import EXPERIMENTS, Diagnosis
from anybatch.reporting import style

from .diagnose_nets import chain
from .test_diagnosis import GIVEN, WITHOUT, ByName, float_batches, short

ce = F.cross_entropy


class Odd(nn.Sequential):
    pass


Odd.__name__ = "Net<b>"


def saved(found: Diagnosis, folder: Path, command: str = "") -> str:
    """The page, after what holds for every one."""
    path = found.save(folder, command)
    page = path.read_text(encoding="utf-8")
    assert path == folder / "report.html"
    assert {file.name for file in folder.iterdir()} == {"report.html", "diagnosis.json"}  # nothing half written

    def no_constant(name: str) -> None:
        raise AssertionError(name)

    text = (folder / "diagnosis.json").read_text(encoding="utf-8")
    assert json.loads(text, parse_constant=no_constant) == found.numbers()
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert {target for target in re.findall(r'href="#([^"]+)"', page)} <= set(ids)
    assert not re.search(r'(src|href)="(?!#|data:image/png)', page)  # nothing from outside: marks and heat maps within
    assert "@import" not in page
    assert not any(colour in page[page.index("<body>") :] for colour in style.LIGHT)
    assert re.findall(r'<section id="([^"]+)"', page)[-len(found.results) :] == list(found.results)
    return page


def test_the_page_is_whole_and_stands_alone(tmp_path: Path) -> None:
    found = short(Odd(*chain()), float_batches())
    folder = tmp_path / "a" / "new" / "folder"
    page = saved(found, folder, "anybatch diagnose --model 'a<b>'")
    body = page[page.index("<body>") :]
    for row in EXPERIMENTS.values():
        assert f"<h2>{row.title}</h2>" in page
        assert escape(row.question) in page
    assert "Net&lt;b&gt;" in page
    assert "a&lt;b&gt;" in page
    assert "<b>" not in page
    assert page.count('<li class="') == len(found.findings)
    assert str(found.advice).splitlines()[0] in page
    assert body.count("<svg") == sum(len(row.module.panels(found.results[n])) for n, row in EXPERIMENTS.items())
    (folder / "report.html").write_text("old")
    assert saved(found, folder).count("<svg") == body.count("<svg")


def test_figures_of_every_experiment() -> None:
    """Of a page's panels, in one figure."""
    found = short(chain(), float_batches(), compare=False)
    for name, row in EXPERIMENTS.items():
        axes = [a for a in found.figure(name).axes if a.get_visible()]
        assert len(axes) >= len(row.module.panels(found.results[name]))


def exploding() -> nn.Module:
    """Without its norms nothing is finite."""
    layers = [part for _ in range(24) for part in (nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU())]
    model = nn.Sequential(nn.Flatten(), nn.Linear(105, 4), *layers, nn.Linear(4, 5))
    for module in layers[::3]:
        nn.init.normal_(module.weight, 0, 100)
    return model


def vanishing() -> nn.Module:
    model = exploding()
    for module in model[2::3]:
        nn.init.normal_(module.weight, 0, 1e-9)
    return model


class Zero(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 0 * x


def constant(z: Tensor, t: Tensor) -> Tensor:
    return 0 * z.sum() + 1


GRADIENTS = ("depth", "weight-gradients", "logit-gradients", "cancellation", "gradient-noise", "evaluation-gap")
ODD: dict[str, tuple[Callable[[], nn.Module], Any, tuple[int, int]]] = {
    "vanishing": (vanishing, ce, (2, 8)),
    "dead": (lambda: nn.Sequential(*chain()[:2], Zero(), *chain()[2:]), ce, (2, 8)),
    "no gradient": (chain, constant, (2, 8)),
    "one example": (chain, ce, (8, 1)),
    "one output": (lambda: nn.Sequential(*chain()[:8], nn.Linear(6, 1)), lambda z, t: z.square().mean(), (2, 8)),
}


@pytest.mark.parametrize("case", ODD)
def test_pages_of_odd_models(case: str, tmp_path: Path) -> None:
    make, loss, size = ODD[case]
    saved(short(make(), float_batches(*size), loss, experiments=GRADIENTS), tmp_path)


def test_a_model_that_explodes_without_its_norms(tmp_path: Path) -> None:
    """Is compared where it can be; where not, the page says why."""
    found = short(exploding(), float_batches())
    for name, row in EXPERIMENTS.items():
        assert GIVEN in found.results[name]
        if row.compares:
            assert (WITHOUT in found.results[name]) != (f"{name}, {WITHOUT}" in found.left_out)
    assert "the loss is nan" in found.left_out[f"step-size, {WITHOUT}"]
    assert "not finite" in found.left_out[f"weight-gradients, {WITHOUT}"]
    assert found.results["learning-rate"][WITHOUT].largest_stable == 0
    assert f"{WITHOUT}: not measured: the loss is nan" in saved(found, tmp_path)


def test_what_is_left_out_is_on_the_page(tmp_path: Path) -> None:
    """With its reason, where that is the same of both subjects, and where each has its own."""
    by_name = [{"image": x, "label": t} for x, t in float_batches()]
    found = ab.diagnose(
        ByName(),
        by_name,
        lambda z, batch: ce(z["logits"], batch["label"]) - 100,
        forward=lambda model, batch: model(batch["image"]),
        experiments=["depth", "step-size", "logit-gradients"],
    )
    assert set(found.left_out) == {"logit-gradients", f"step-size, {GIVEN}", f"step-size, {WITHOUT}"}
    page = saved(found, tmp_path)
    for why in found.left_out.values():
        assert why.partition(";")[0] in page


@pytest.mark.parametrize("place", ["a file", "/proc/anybatch"])
def test_a_folder_that_cannot_be_written(place: str, tmp_path: Path) -> None:
    found = ab.diagnose(chain(), float_batches(), ce, experiments=["depth"])
    (tmp_path / "a file").write_text("")
    with pytest.raises(ab.AnybatchError, match=r"the diagnosis cannot be written to .*: mend it or name another"):
        found.save(tmp_path / place)


def test_a_page_that_cannot_be_made_leaves_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = ab.diagnose(chain(), float_batches(), ce, experiments=["depth"])
    found.save(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ab.AnybatchError, match="No space left on device"):
        found.save(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
