import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from anybatch.errors import AnybatchError
from anybatch.lab import training
from anybatch.lab.classify import Classify
from anybatch.lab.config import ClassifyConfig
from anybatch.lab.networks import NETWORKS, build, small_resnet
from anybatch.lab.summary import label
from anybatch.lab.training import run_key, train_run

from . import lab_fakes

DATA = lab_fakes.dataset()
CONFIG = ClassifyConfig(method="bn", batch=4, epochs=3, lr=0.05)


def outcome(result: training.RunResult) -> tuple[object, ...]:
    return result.accuracy, result.loss, result.train_accuracy, result.curve, [list(pair) for pair in result.train_loss]


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_have_torchvision_names(name: str) -> None:
    model = build(name, 5, 3)
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 5)
    names = set(model.state_dict())
    assert {"conv1.weight", "bn1.running_mean", "layer2.0.downsample.1.weight", "fc.bias"} <= names
    with pytest.raises(AnybatchError, match="there is no network 'vgg': choose one of small-resnet"):
        build("vgg", 5, 3)


def test_small_resnet_is_that_of_the_protocol() -> None:
    model = small_resnet(10)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert [m.out_channels for m in convolutions] == [12, 12, 12, 24, 24, 24, 48, 48, 48]
    assert all(m.bias is None for m in convolutions)
    std = float(model.layer3[0].conv2.weight.detach().std())
    assert std == pytest.approx((2 / (48 * 9)) ** 0.5, rel=0.05)


def test_same_seed_same_run_and_a_full_record() -> None:
    first, second = train_run(Classify(CONFIG, DATA)), train_run(Classify(CONFIG, DATA))
    assert outcome(first) == outcome(second)
    record = json.loads(json.dumps(first.record(), allow_nan=False))
    assert record["norm"] == "BN()"
    assert record["key"] == run_key(Classify(CONFIG, DATA))
    assert {"machine", "versions", "commit", "date", "seconds"} <= set(record)
    assert first.accuracy > 90
    assert len(first.curve) == 3


def test_runs_of_a_seed_are_paired_across_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, orders = [], []
    real = torch.randperm

    def recorded(*args: object, **kwargs: object) -> torch.Tensor:
        orders.append(real(*args, **kwargs))
        return orders[-1]

    monkeypatch.setattr(torch, "randperm", recorded)
    for method, batch in (("bn", 32), ("gn", 2), ("cbn", 2)):
        config = replace(CONFIG, method=method, batch=batch, epochs=1)
        weights.append(torch.cat([p.detach().flatten() for p in Classify(config, DATA).build().parameters()]))
        train_run(Classify(config, DATA))
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[2])
    assert torch.equal(orders[0], orders[1])
    assert torch.equal(orders[0], orders[2])
    other = Classify(replace(CONFIG, seed=1), DATA).build()
    assert not torch.equal(weights[0], torch.cat([p.detach().flatten() for p in other.parameters()]))


def test_accumulated_groupnorm_is_the_whole_batch() -> None:
    # GroupNorm sees one image at a time, so micro-batches change nothing but the order of sums.
    whole, parts = (train_run(Classify(replace(CONFIG, method="gn", batch=batch), DATA)) for batch in (32, 8))
    assert parts.loss == pytest.approx(whole.loss, rel=1e-3)
    stepped = train_run(Classify(replace(CONFIG, method="gn", batch=8, mode="step"), DATA))
    assert stepped.loss != pytest.approx(whole.loss, rel=1e-3)


def test_learning_rate_falls_along_the_cosine(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = []
    real = torch.optim.SGD.step

    def recorded(self: torch.optim.SGD) -> None:
        rates.append(self.param_groups[0]["lr"])
        real(self)

    monkeypatch.setattr(torch.optim.SGD, "step", recorded)
    train_run(Classify(replace(CONFIG, epochs=2, lr=0.1), DATA))
    assert rates == pytest.approx([0.1, 0.085355, 0.05, 0.0146447], rel=1e-4)
    rates.clear()
    train_run(Classify(replace(CONFIG, epochs=1, lr=0.1, batch=16, mode="step"), DATA))
    assert rates == pytest.approx([0.05, 0.0426777, 0.025, 0.00732233], rel=1e-4)


@pytest.mark.parametrize("method", ["bn", "cbn"])
def test_resume_is_bit_identical(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    config = replace(CONFIG, method=method)
    whole = train_run(Classify(config, DATA), checkpoint=tmp_path / "whole")

    def stop_in_the_second_epoch(progress: training.Progress) -> None:
        if progress.images > progress.total // 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_run(Classify(config, DATA), stop_in_the_second_epoch, checkpoint=tmp_path / "parts")
    torch.manual_seed(999)
    parts = train_run(Classify(config, DATA), checkpoint=tmp_path / "parts", resume=True)
    assert outcome(parts) == outcome(whole)
    files = [(tmp_path / run / "model.safetensors").read_bytes() for run in ("whole", "parts")]
    assert files[0] == files[1]
    assert set(safetensors.torch.load(files[0])) == set(small_resnet(3).state_dict())


def test_resume_of_what_is_not_there_or_another(tmp_path: Path) -> None:
    with pytest.raises(AnybatchError, match="has no checkpoint to resume"):
        train_run(Classify(CONFIG, DATA), checkpoint=tmp_path, resume=True)
    train_run(Classify(replace(CONFIG, epochs=1), DATA), checkpoint=tmp_path)
    with pytest.raises(AnybatchError, match="was trained with epochs=1, not 3"):
        train_run(Classify(CONFIG, DATA), checkpoint=tmp_path, resume=True)
    with pytest.raises(AnybatchError, match="have changed"):
        train_run(Classify(replace(CONFIG, epochs=1), lab_fakes.dataset(96)), checkpoint=tmp_path, resume=True)
    (tmp_path / "training.pt").write_bytes(b"cut short")
    with pytest.raises(AnybatchError, match="is damaged"):
        train_run(Classify(replace(CONFIG, epochs=1), DATA), checkpoint=tmp_path, resume=True)


def test_divergence_is_a_result() -> None:
    result = train_run(Classify(replace(CONFIG, lr=1e30), DATA))
    assert (result.status, result.accuracy, result.loss) == ("diverged", None, None)
    json.dumps(result.record(), allow_nan=False)


def test_burn_in_as_a_share_of_the_forwards() -> None:
    config = ClassifyConfig(method="cbn-paper(burn_in_steps='1/3')", batch=1, epochs=3)
    assert config.resolved(config.method, 6000) == "cbn-paper(burn_in_steps=5984)"  # 3 * 187 * 32 / 3
    assert replace(config, batch=4).resolved(config.method, 6000) == "cbn-paper(burn_in_steps=1496)"
    assert "burn_in_steps=5984" in repr(config.norm(6000))
    ragged = ClassifyConfig(method="CBN( examples_per_group = 3,burn_in_steps='1/2')", batch=4, epochs=1)
    assert "burn_in_steps=16" in repr(ragged.norm(64))  # two groups of each of 16 batches


@pytest.mark.parametrize("share", ["1/0", "4/3", "a third", "0.5", "-1/3", "1 / 3"])
def test_what_is_no_share_of_a_run(share: str) -> None:
    with pytest.raises(AnybatchError, match=f"burn_in_steps='{share}' is no share of a run: write it as a fraction"):
        ClassifyConfig(method=f"cbn(burn_in_steps='{share}')").norm(6000)
    with pytest.raises(AnybatchError, match="window='1/3'; give a whole number"):
        ClassifyConfig(method="cbn(window='1/3')").norm(6000)


def test_the_forwards_of_a_step_by_name() -> None:
    config = ClassifyConfig(method="cbn(average_reductions='step')", batch=2)
    assert config.resolved(config.method, 6000) == "cbn(average_reductions=16)"
    assert replace(config, mode="step").resolved(config.method, 6000) == "cbn(average_reductions=1)"
    assert label(config.method) == "CBN (reductions over a step)"


@pytest.mark.parametrize(
    ("batch", "mode", "reductions"), [(32, "accumulate", 8), (16, "accumulate", 8), (16, "step", 4)]
)
def test_a_group_is_a_forward(batch: int, mode: Any, reductions: int) -> None:
    config = ClassifyConfig(batch=batch, mode=mode, epochs=3)
    method = "cbn(examples_per_group=4, average_reductions='step', burn_in_steps='1/3')"
    written = f"cbn(examples_per_group=4, average_reductions={reductions}, burn_in_steps=1496)"
    assert config.resolved(method, 6000) == written
    smaller = method.replace("group=4", "group=64")
    assert "reductions=1" in replace(config, gradient_batch=batch).resolved(smaller, 6000)


def test_key_names_configuration_method_and_data() -> None:
    keys = {
        run_key(Classify(config, data))
        for config, data in [
            (CONFIG, DATA),
            (replace(CONFIG, seed=1), DATA),
            (replace(CONFIG, method="gn"), DATA),
            (CONFIG, lab_fakes.dataset(96)),
        ]
    }
    assert len(keys) == 4
    assert run_key(Classify(CONFIG, DATA)) == run_key(Classify(replace(CONFIG), lab_fakes.dataset()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 3}, "batch 3 does not divide the gradient batch 32: choose one of 1, 2, 4, 8, 16, 32"),
        ({"batch": 0}, "batch 0 does not divide"),
        ({"epochs": 0}, "epochs is 0"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"mode": "other"}, "there is no mode 'other'"),
    ],
)
def test_configurations_that_do_not_fit(change: dict[str, object], message: str) -> None:
    with pytest.raises(AnybatchError, match=message):
        replace(CONFIG, **change)


def test_run_that_does_not_fit_the_data_or_machine() -> None:
    with pytest.raises(AnybatchError, match="20 training examples do not fill one gradient batch of 32"):
        train_run(Classify(CONFIG, lab_fakes.dataset(20)))
    with pytest.raises(AnybatchError, match="device 'nonsense' cannot be used"):
        train_run(Classify(replace(CONFIG, device="nonsense"), DATA))


def test_a_checkpoint_is_not_overwritten(tmp_path: Path) -> None:
    train_run(Classify(replace(CONFIG, epochs=1), DATA), checkpoint=tmp_path)
    kept = (tmp_path / "training.pt").read_bytes()
    with pytest.raises(AnybatchError, match=r"holds a checkpoint.*--resume"):
        train_run(Classify(replace(CONFIG, epochs=1), DATA), checkpoint=tmp_path)
    assert (tmp_path / "training.pt").read_bytes() == kept


def test_norm_weight_decay_reaches_the_optimizer_and_the_key() -> None:
    """Decay strong enough to be seen in the outcome; keys of runs without it stay as they were."""
    strong = replace(CONFIG, weight_decay=0.3, epochs=1)
    results = [train_run(Classify(c, DATA)) for c in (strong, replace(strong, norm_weight_decay=0.3))]
    assert outcome(results[0]) != outcome(results[1])
    assert results[0].key != results[1].key
    assert "norm_weight_decay" not in strong.facts()
    with pytest.raises(AnybatchError, match="norm_weight_decay is -1: give a number of at least 0"):
        replace(CONFIG, norm_weight_decay=-1)


def test_keys_of_earlier_runs_still_name_them() -> None:
    """A run that was trained is never trained again because an option came later, nor taken for what it is not."""
    records = Path(__file__).parents[1] / "docs" / "results" / "f6k" / "runs.jsonl"
    for run in map(json.loads, records.read_text().splitlines()):
        dataset = SimpleNamespace(train_images=range(run["config"]["train_images"]), fingerprint=run["fingerprint"])
        # CBN's default is no ring any more; the form as released still is.
        same = not run["norm"].startswith("CBN(") or "gradient='current'" in run["norm"]
        assert (run_key(Classify(ClassifyConfig(**run["config"]), dataset)) == run["key"]) is same


def test_clipped_gradients_have_the_norm_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []

    class Watched(torch.optim.SGD):
        def step(self, closure: None = None) -> None:
            gradients = [p.grad for group in self.param_groups for p in group["params"]]
            seen.append(float(torch.cat([g.flatten() for g in gradients]).norm()))
            super().step(closure)

    monkeypatch.setattr(torch.optim, "SGD", Watched)
    free = train_run(Classify(replace(CONFIG, epochs=1), DATA))
    most = max(seen)
    seen.clear()
    clipped = train_run(Classify(replace(CONFIG, epochs=1, clip=most / 4), DATA))
    assert max(seen) == pytest.approx(most / 4, rel=1e-4)
    assert clipped.loss != free.loss
