import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import anybatch as ab
from anybatch.convert import convert_, revert_
from anybatch.errors import AnybatchError
from anybatch.layers.base import NormLayer
from anybatch.methods import BN, CBN, GN
from anybatch.nn import CrossIterationBatchNorm

from .small_models import (
    ConvNorm,
    ResNet,
    SharedHead,
    SharedNorm,
    Steps,
    Unpairable,
    assert_untouched,
    assorted,
    flat,
    parametrized,
    shake,
    tensors,
    train_step,
)

X = (2, 3, 15, 13)


@pytest.mark.parametrize("make", [ResNet, lambda: SharedHead(True), lambda: SharedHead(False), SharedNorm, Unpairable])
def test_evaluation_and_the_state_dict_stay(make) -> None:
    model, x = shake(make()).eval(), torch.randn(X)
    before, expected = tensors(model), flat(model(x))
    report = convert_(model.train(), CBN(window=3), x[:1])
    after = tensors(model.eval())
    assert list(after) == list(before)
    assert all(after[name] is tensor for name, tensor in before.items())
    assert all(map(torch.equal, flat(model(x)), expected))
    assert not report.left
    assert all(isinstance(model.get_submodule(row.name), CrossIterationBatchNorm) for row in report.converted)

    train_step(model.train(), x)  # the pairs hold in a real training forward
    fresh = make()
    fresh.load_state_dict(model.state_dict(), strict=True)
    model.load_state_dict(make().state_dict(), strict=True)


def test_the_layers_follow_their_maps_and_use_them() -> None:
    model = ResNet()
    report = convert_(model, CBN(window=3), torch.randn(1, 3, 15, 13))
    assert {row.name: row.fed_by for row in report.rows}["blocks.1.downsample.1"] == ("blocks.1.downsample.0",)
    assert model.bn.maps == (model.fc,)
    assert model.bn.exclusive
    train_step(model, torch.randn(X))
    history = model.stem[1].histories[0]
    assert history.covariance.shape[-1] == 27  # compensated: the entries are as wide as the map's weight
    assert sum(isinstance(module, NormLayer) for module in model.modules()) == len(report.converted) == 8


@pytest.mark.parametrize("case", range(len(assorted())))
def test_every_kind_of_map_trains(case: int) -> None:
    model, x = assorted()[case]
    convert_(model, CBN(window=2), x)
    for _ in range(3):
        train_step(model, torch.randn_like(x))
    assert model[0].weight.grad.isfinite().all()


def test_norms_inside_of_their_convolutions() -> None:
    model = nn.Sequential(ConvNorm(3, 5, 3, bias=False, norm=nn.BatchNorm2d(5)), ConvNorm(5, 4, 1))
    x = torch.randn(X)
    report = convert_(model, CBN(window=2), x)
    assert report.rows[0].fed_by == ("0",)
    assert not report.unpaired
    for _ in range(3):
        train_step(model, x)
    assert list(model.state_dict())[:2] == ["0.weight", "0.norm.weight"]


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "noise", "own"])
def test_parametrized_maps_train(kind: str) -> None:
    model = nn.Sequential(parametrized(kind), nn.BatchNorm2d(5))
    report = convert_(model, CBN(window=2), torch.randn(X))
    assert not report.unpaired
    for _ in range(3):
        train_step(model, torch.randn(X))


def test_control_flow_trains() -> None:
    model = Steps()
    inputs = {"image": torch.randn(2, 3, 5, 7), "steps": 2}
    convert_(model, CBN(window=2), inputs)
    model(**inputs).square().mean().backward()
    assert model.bn.weight.grad is not None


def test_the_report_names_every_norm_and_why() -> None:
    model = nn.Sequential(Unpairable(), nn.Identity(), nn.SyncBatchNorm(4).eval())
    report = convert_(model, CBN(window=2), torch.randn(X), where=lambda name, module: name != "0.sum")
    text = " ".join(str(report).split())
    assert {row.name for row in report.left} == {"0.sum", "2"}
    assert {row.name: row.reason for row in report.left} == {
        "0.sum": "excluded by where",
        "2": "SyncBatchNorm: revert it to BatchNorm first",
    }
    assert {row.name for row in report.unpaired} == {
        f"0.{n}" for n in ("after_borrowed", "after_permute", "first", "idle")
    }
    assert "0.after_permute BatchNorm2d 4 - unpaired the output" in text
    assert "the output of '0.linear' passes through permute before it" in text
    assert text.endswith("6 norms: 4 converted (4 without compensation), 2 left alone")


class WithReLU(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


class Renamed(nn.BatchNorm2d):
    pass


def test_norms_that_are_left_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 1), WithReLU(5), nn.Conv2d(5, 4, 1), Renamed(4), nn.LazyBatchNorm2d())
    model[4].forward = lambda x: x
    report = convert_(model, BN_LIKE := CBN(window=2, compensate=False))
    assert {row.name: row.reason for row in report.left} == {
        "1": "WithReLU has a forward of its own, which would be lost",
        "4": "lazy and not initialised: run one forward of the model first",
    }
    assert [row.name for row in report.converted] == ["3"]
    assert isinstance(model[1], WithReLU)
    with pytest.raises(AnybatchError, match="none of the norms can be replaced: '1': WithReLU has a forward"):
        convert_(nn.Sequential(nn.Identity(), WithReLU(5)), BN_LIKE)


@pytest.mark.parametrize(
    ("where", "chosen"),
    [
        ("stem.*", {"stem.1"}),
        (["*.bn1", "bn"], {"blocks.0.bn1", "blocks.1.bn1", "bn"}),
        (lambda name, module: module.num_features == 4, {"aux.1"}),
    ],
)
def test_where(where, chosen: set[str]) -> None:
    report = convert_(ResNet(), CBN(window=2), torch.randn(X), where=where)
    assert {row.name for row in report.converted} == chosen
    assert {row.reason for row in report.left} == {"excluded by where"}


def test_a_shared_norm_stays_one_module() -> None:
    model = SharedHead(per_level=False)
    convert_(model, CBN(window=2), torch.randn(X), where="norms.2")
    assert model.norms[0] is model.norms[1] is model.norms[2]
    assert isinstance(model.norms[0], NormLayer)


def test_frozen_norms_and_modes_are_carried() -> None:
    model = ResNet()
    model.bn.eval().weight.requires_grad_(False)
    convert_(model, CBN(window=2), torch.randn(X))
    assert not model.bn.training
    assert model.training
    assert not model.bn.weight.requires_grad
    assert model.bn.bias.requires_grad


def test_the_optimizer_goes_on() -> None:
    model = ResNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train_step(model, torch.randn(X))
    optimizer.step()
    convert_(model, CBN(window=3), torch.randn(X), optimizer=optimizer)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer.zero_grad()
    train_step(model, torch.randn(X))
    optimizer.step()
    assert all(not torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


class Extra(CrossIterationBatchNorm):
    """A method that adds a parameter."""


class ExtraConfig(CBN):
    def build(self, bn: _BatchNorm) -> nn.Module:
        layer = Extra.replacing(bn)
        layer.gate = nn.Parameter(torch.zeros(bn.num_features))
        return layer


def test_new_parameters_join_the_group_of_the_norms_weight() -> None:
    model = ResNet()
    frozen = [model.bn.weight, model.bn.bias]
    norms = [p for m in model.modules() if isinstance(m, _BatchNorm) and m is not model.bn for p in m.parameters()]
    first = torch.optim.SGD(model.fc.parameters(), lr=0.1)
    second = torch.optim.SGD([{"params": norms, "weight_decay": 0.5}, {"params": [model.stem[0].weight]}], lr=0.1)
    report = convert_(model, ExtraConfig(window=2), torch.randn(X), optimizer=[first, second])
    gates = {p for n, p in model.named_parameters() if n.endswith("gate")} - {model.bn.gate}
    assert len(gates) == 7
    assert gates <= set(second.param_groups[0]["params"])
    assert len(second.param_groups[1]["params"]) == 1
    assert "its new parameters are in no optimizer group" in {row.name: row.reason for row in report.rows}["bn"]
    assert not {*frozen, model.bn.gate} & set(second.param_groups[0]["params"])


def test_hooks_of_the_user_stay_and_can_be_removed() -> None:
    model, seen = ResNet(), []
    handle = model.bn.register_forward_hook(lambda module, args, output: seen.append(type(module).__name__))
    convert_(model, CBN(window=2), torch.randn(X))
    seen.clear()
    train_step(model, torch.randn(X))
    assert seen == ["CrossIterationBatchNorm"]
    handle.remove()
    train_step(model, torch.randn(X))
    assert len(seen) == 1


def test_converting_again_takes_the_new_config() -> None:
    model, x = ResNet(), torch.randn(X)
    before = tensors(model)
    convert_(model, CBN(window=2), x)
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    train_step(model, x)
    report = convert_(model, CBN(window=5), x)
    assert len(report.converted) == 8
    assert model.bn.window == 5
    assert model.bn.maps == (model.fc,)
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    assert all(tensor is before[name] for name, tensor in tensors(model).items())
    convert_(model, BN())
    assert type(model.bn) is nn.BatchNorm1d
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert {row.reason for row in convert_(model, BN()).rows} == {"it is what was asked for"}


def test_group_norm_needs_no_example() -> None:
    model = ResNet()
    report = convert_(model, GN(groups=5))
    assert len(report.converted) == 8
    assert isinstance(model.stem[1], nn.GroupNorm)


@pytest.mark.parametrize("make", [ResNet, lambda: SharedHead(False), SharedNorm, Unpairable])
def test_revert_is_exact(make) -> None:
    model, x = shake(make()), torch.randn(X)
    types = [type(module) for module in model.modules()]
    convert_(model, CBN(window=3), x)
    for _ in range(2):
        train_step(model, x)
    before, expected = tensors(model.eval()), flat(model(x))
    report = revert_(model)
    assert [type(module) for module in model.modules()] == types
    assert_untouched(model, list(model.modules()), before)
    assert all(map(torch.equal, flat(model(x)), expected))
    assert {row.action for row in report.rows} == {"reverted"}
    assert str(report).endswith(f"{len(report.rows)} norms: {len(report.rows)} reverted, 0 left alone")


def test_reverting_in_part_and_in_vain() -> None:
    model = ResNet()
    with pytest.raises(AnybatchError, match="no layer of anybatch; its 8 BatchNorms are not converted"):
        revert_(model)
    convert_(model, CBN(window=2), torch.randn(X), where="bn")
    report = revert_(model)
    assert len(report.left) == 7
    assert [row.name for row in report.converted] == ["bn"]
    with pytest.raises(AnybatchError, match=r"the model itself is the norm.*to_batchnorm"):
        revert_(CrossIterationBatchNorm(4))


def test_parameters_that_go_are_named() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    ab.convert_(model, ab.IEBN(shortcuts="converted"))
    report = ab.convert_(model, ab.GhostBN())
    assert report.rows[0].reason == "its gate_weight and gate_bias went"


def test_new_parameters_do_not_decay_as_gamma_does() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    optimizer = torch.optim.SGD(ab.param_groups(model, 0.1, 0.1), lr=0.1)
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    undecayed = torch.optim.SGD(ab.param_groups(plain, 0.1), lr=0.1)
    assert len(ab.convert_(plain, ab.IEBN(shortcuts="converted"), optimizer=undecayed).converted) == 1
    with pytest.raises(ab.AnybatchError, match="convert first, then call param_groups"):
        ab.convert_(model, ab.IEBN(shortcuts="converted"), optimizer=optimizer)
    assert type(model[1]) is nn.BatchNorm2d


def test_a_weight_of_examples_that_goes_is_named() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    ab.weigh_examples_(model, 0.25)
    assert ab.convert_(model, ab.GhostBN()).rows[0].reason == "its alpha=0.25 went"
    ab.weigh_examples_(model, 0.25)
    assert "its alpha=0.25 went" in ab.revert_(model).rows[0].reason
