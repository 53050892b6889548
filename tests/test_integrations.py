"""The adapters for hosts: norms built by a callable, frozen norms thawed, a host that is missing."""

import importlib
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import timm
import torch
import torchvision
from timm.layers import freeze_batch_norm_2d
from torch import nn
from torchvision.ops import FrozenBatchNorm2d
from transformers.models.detr.modeling_detr import DetrFrozenBatchNorm2d
from transformers.models.rt_detr.modeling_rt_detr import RTDetrFrozenBatchNorm2d

import anybatch as ab
from anybatch.errors import AnybatchError
from anybatch.integrations._hosts import require
from anybatch.integrations.frozen import thaw_
from anybatch.integrations.norm_layer import norm_layer, pair_
from anybatch.integrations.timm import norm_act_layer
from anybatch.layers.base import NormLayer

from . import detectron2_standin
from .small_models import shake

X = (2, 3, 45, 38)


def seeded(make):
    torch.manual_seed(5)
    return make()


def train_step(model: nn.Module, x: torch.Tensor) -> None:
    """Under a random cotangent."""
    out = model(x)
    out.backward(torch.randn_like(out))


def without(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    """As where the host was never installed."""
    for name in [name for name in sys.modules if name.partition(".")[0] == host]:
        monkeypatch.delitem(sys.modules, name)
    find = importlib.import_module

    def import_module(name: str, package: str | None = None) -> ModuleType:
        if name.partition(".")[0] == host:
            raise ModuleNotFoundError(f"No module named '{host}'", name=host)
        return find(name, package)

    monkeypatch.setattr(importlib, "import_module", import_module)


def test_a_missing_host_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    assert require("timm.layers", "timm") is sys.modules["timm.layers"]
    without(monkeypatch, "timm")
    with pytest.raises(AnybatchError, match=re.escape("timm.layers is not installed") + r".*'anybatch\[timm\]'"):
        norm_act_layer(ab.CBN())


def test_hosts_are_imported_when_they_are_used() -> None:
    code = """
import sys
import anybatch, anybatch.integrations.frozen, anybatch.integrations.norm_layer, anybatch.integrations.timm
hosts = ("torchvision", "timm", "transformers", "segmentation_models_pytorch", "monai", "mmengine", "lightning")
assert not set(hosts) & set(sys.modules), sys.modules.keys() & set(hosts)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_a_host_itself_misses_is_its_own_error(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    (tmp_path / "some_host.py").write_text("import something_that_is_nowhere")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="something_that_is_nowhere"):
        require("some_host", "some")


@pytest.mark.parametrize("config", [ab.CBN(window=4), ab.CBN(compensate=False), ab.AccumulatedBN(), ab.BGN(groups=4)])
def test_a_model_built_by_the_callable_is_the_one_converted(config) -> None:
    made = seeded(lambda: torchvision.models.resnet18(num_classes=5, norm_layer=norm_layer(config)))
    plain = seeded(lambda: torchvision.models.resnet18(num_classes=5))
    x = torch.randn(X)
    if config.needs_map:
        with pytest.raises(AnybatchError, match=r"CBN: built before its model.*pair_\(model, example_inputs\)"):
            made(x)
        assert not pair_(made, x).unpaired
    ab.convert_(plain, config, x)
    for model in (made, plain):
        torch.manual_seed(1)
        train_step(model, x)
    assert list(made.state_dict()) == list(plain.state_dict())
    for a, b in zip(made.state_dict().values(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    for a, b in zip(made.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=0)


def test_options_of_the_built_norms() -> None:
    build = norm_layer(ab.CBN(), eps=1e-3, momentum=0.01)
    norm = build(6, device="meta", dtype=torch.float64)
    assert (norm.num_features, norm.eps, norm.momentum) == (6, 1e-3, 0.01)
    assert norm.weight.is_meta
    assert norm.weight.dtype == torch.float64
    assert isinstance(norm_layer(ab.GN(groups=2))(6), nn.GroupNorm)


@pytest.mark.parametrize("build", [norm_layer, norm_act_layer])
def test_what_the_callables_refuse(build) -> None:
    with pytest.raises(AnybatchError, match=r"norm_(act_)?layer: the config is 'cbn'; give an instance such as ab.CBN"):
        build("cbn")
    with pytest.raises(AnybatchError, match=r"ProxyNorm\(.*has to know what follows the norm.*convert_"):
        build(ab.ProxyNorm())(8)


def test_norms_that_call_their_activation_want_the_other_callable() -> None:
    with pytest.raises(AnybatchError, match=r"a norm with apply_act, act_kwargs, .*norm_act_layer\(config, act_layer"):
        timm.create_model("regnety_002", norm_layer=norm_layer(ab.CBN()))


@pytest.mark.parametrize(("name", "act"), [("efficientnet_lite0", "relu6"), ("regnety_002", nn.ReLU)])
def test_timm_builds_norms_with_their_activation(name: str, act) -> None:
    config = ab.CBN(window=4)
    made = seeded(lambda: timm.create_model(name, num_classes=5, norm_layer=norm_act_layer(config, act)))
    plain = seeded(lambda: timm.create_model(name, num_classes=5))
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(made.eval()(x), plain.eval()(x))
    assert not pair_(made, x).unpaired
    ab.convert_(plain, config, x)
    for model in (made.train(), plain.train()):
        torch.manual_seed(1)
        train_step(model, x)
    for a, b in zip(made.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=0)
    report = ab.revert_(made.eval())
    assert {row.action for row in report.rows} == {"reverted"}
    assert torch.equal(made(x), plain.eval()(x))


def test_detectron2_takes_the_callable() -> None:
    norm = detectron2_standin.get_norm(norm_layer(ab.CBN(window=4)), 6)
    model = nn.Sequential(detectron2_standin.Conv2d(3, 6, 3, bias=False, norm=norm, activation=nn.ReLU()))
    x = torch.randn(X)
    assert pair_(model, x).rows[0].fed_by == ("0",)
    train_step(model, x)
    model.eval()
    torch.testing.assert_close(ab.fold(model)(x), model(x))
    assert [detectron2_standin.get_norm(name, 32) for name in ("", None)] == [None, None]


class Slim(nn.Module):
    """Of a host that writes another eps into its forward."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(channels))

    def forward(self, x):
        scale = self.weight * (self.running_var + 1e-3).rsqrt()
        return x * scale.view(-1, 1, 1) + (self.bias - self.running_mean * scale).view(-1, 1, 1)


class SlimFrozenBatchNorm2d(Slim):
    pass


FROZEN = {
    "torchvision": lambda: FrozenBatchNorm2d(6, eps=1e-3),
    "timm": lambda: timm.layers.FrozenBatchNormAct2d(6, eps=1e-3, act_layer="silu"),
    "detr": lambda: DetrFrozenBatchNorm2d(6),
    "rt-detr": lambda: RTDetrFrozenBatchNorm2d(6),
    "detectron2": lambda: detectron2_standin.FrozenBatchNorm2d(6, eps=1e-3),
}


def random_moments(norm: nn.Module) -> nn.Module:
    g = torch.Generator().manual_seed(2)
    for name in ("weight", "bias", "running_mean"):
        norm.get_buffer(name).copy_(3 * torch.randn(6, generator=g))
    norm.running_var.copy_(10.0 ** torch.arange(-4, 2))  # small beside eps, and large
    return norm


@pytest.mark.parametrize("host", FROZEN)
def test_thawed_norms_evaluate_as_they_did_and_convert(host: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), random_moments(FROZEN[host]()), nn.Conv2d(6, 4, 1))
    x, calls = torch.randn(X), []
    model[1].register_forward_hook(lambda *_: calls.append(1))
    frozen = model.eval()(x).detach()
    names, held = [n for n in model.state_dict() if "tracked" not in n], model[1].running_mean
    assert thaw_(model) == ("1",)
    torch.testing.assert_close(model(x), frozen, rtol=1e-5, atol=1e-5)
    assert len(calls) == 2  # hooks stay, and the check of the thawing ran none
    assert not model[1].training
    assert model[1].running_mean is held
    assert [n for n in model.state_dict() if "tracked" not in n] == names
    assert {n for n, p in model.named_parameters() if p.requires_grad} >= {"1.weight", "1.bias"}

    report = ab.convert_(model, ab.CBN(window=2), x)
    assert report.rows[0].fed_by == ("0",)
    torch.testing.assert_close(model(x), frozen, rtol=1e-5, atol=1e-5)
    train_step(model.train(), x)
    assert model[1].weight.grad.abs().sum() > 0
    model.eval()
    torch.testing.assert_close(ab.fold(model)(x), model(x), rtol=1e-4, atol=1e-4)


def test_a_frozen_checkpoint_loads_into_the_thawed_model() -> None:
    frozen = nn.Sequential(nn.Conv2d(3, 6, 3), random_moments(FrozenBatchNorm2d(6)))
    thawed = nn.Sequential(nn.Conv2d(3, 6, 3), FrozenBatchNorm2d(6))
    thaw_(thawed)
    thawed.load_state_dict(frozen.state_dict(), strict=True)
    x = torch.randn(X)
    torch.testing.assert_close(thawed.eval()(x), frozen(x), rtol=1e-5, atol=1e-5)
    frozen.load_state_dict(thawed.state_dict(), strict=True)


@pytest.mark.parametrize("name", ["resnet10t", "mobilenetv3_small_050"])
def test_what_timm_froze_is_thawed(name: str) -> None:
    model = shake(timm.create_model(name, num_classes=3)).eval()
    x = torch.randn(2, 3, 64, 64)
    expected, kinds = model(x), [type(m) for m in model.modules()]
    model = freeze_batch_norm_2d(model)
    assert len(thaw_(model)) == sum(issubclass(kind, nn.BatchNorm2d) for kind in kinds)
    assert [type(m) for m in model.modules()] == kinds
    assert torch.equal(model.eval()(x), expected)
    assert not ab.convert_(model, ab.CBN(), x).unpaired


def test_thawing_a_part() -> None:
    model = torchvision.models.resnet18(norm_layer=FrozenBatchNorm2d)
    thawed = thaw_(model, where="layer4.*")
    assert len(thawed) == 5
    assert all(name.startswith("layer4") for name in thawed)
    assert sum(isinstance(m, FrozenBatchNorm2d) for m in model.modules()) == 15
    x = torch.randn(2, 3, 64, 64)
    assert len(ab.convert_(model, ab.CBN(), x).rows) == 5
    torch.testing.assert_close(ab.fold(model.eval())(x), model(x), rtol=1e-4, atol=1e-4)


def test_what_thawing_refuses() -> None:
    with pytest.raises(AnybatchError, match="thaw_: the model has no frozen BatchNorm"):
        thaw_(nn.Sequential(nn.BatchNorm2d(3), Slim(3)))
    with pytest.raises(AnybatchError, match="the model itself is a frozen BatchNorm"):
        thaw_(FrozenBatchNorm2d(3))
    model = nn.Sequential(FrozenBatchNorm2d(3), SlimFrozenBatchNorm2d(3))
    with pytest.raises(
        AnybatchError, match=r"where='body\.\*' matches none of the 2 frozen BatchNorms; there are 0, 1"
    ):
        thaw_(model, where="body.*")
    with pytest.raises(AnybatchError, match=r"'1', a SlimFrozenBatchNorm2d, does not compute .* with eps=1e-05"):
        thaw_(model)
    assert isinstance(model[0], FrozenBatchNorm2d)  # all or none
    with pytest.raises(AnybatchError, match="DataParallel"):
        thaw_(nn.DataParallel(model))


def detector(norm: type[nn.Module] | None = nn.BatchNorm2d) -> nn.Module:
    """RetinaNet on a small pyramid of a frozen body; two norms in each of its heads, which all levels share."""
    from torchvision.models.detection import RetinaNet
    from torchvision.models.detection.backbone_utils import BackboneWithFPN
    from torchvision.models.detection.retinanet import RetinaNetHead
    from torchvision.ops.feature_pyramid_network import LastLevelP6P7

    body = torchvision.models.resnet18(norm_layer=FrozenBatchNorm2d)
    levels = {"layer2": "0", "layer3": "1", "layer4": "2"}
    backbone = BackboneWithFPN(body, levels, [128, 256, 512], 16, LastLevelP6P7(16, 16), norm_layer=norm)
    return RetinaNet(backbone, 3, head=RetinaNetHead(16, 9, 3, norm_layer=norm), min_size=96, max_size=96)


IMAGES = [torch.rand(3, 96, 64)]
TARGETS = [{"boxes": torch.tensor([[8.0, 8.0, 60.0, 70.0]]), "labels": torch.tensor([1])}]


@pytest.mark.parametrize("training", [True, False])
def test_a_head_shared_by_the_levels_of_a_pyramid(training: bool) -> None:
    model = seeded(detector).train(training)
    report = ab.convert_(model, ab.CBN(window=10), (IMAGES, TARGETS) if training else (IMAGES,))
    assert not report.unpaired
    assert {row.name.split(".")[0] for row in report.rows} == {"backbone", "head"}
    assert not any("body" in row.name for row in report.rows)
    assert sum(isinstance(m, FrozenBatchNorm2d) for m in model.modules()) == 20
    losses = model.train()(IMAGES, TARGETS)
    sum(losses.values()).backward()
    head = [m for name, m in model.named_modules() if isinstance(m, NormLayer) and name.startswith("head")]
    assert len(head) == 8
    assert all(int(m.num_batches_tracked) == 5 for m in head)  # an entry a level
    assert all(p.grad.isfinite().all() for m in head for p in m.parameters())
    model.eval()
    folded, plain = ab.fold(model)(IMAGES)[0], model(IMAGES)[0]
    torch.testing.assert_close(folded["scores"], plain["scores"], rtol=1e-4, atol=1e-4)


def test_a_host_built_for_another_torch_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mismatched.py").write_text("raise RuntimeError('operator mismatched::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    said = r"mismatched is installed and does not fit this torch \(operator mismatched::nms does not exist\)"
    with pytest.raises(ab.AnybatchError, match=said):
        require("mismatched", "detect")
