"""MONAI: norms by their names in its factory, and what has to be called once the network stands."""

import copy
import importlib
import sys
from typing import Any

import pytest
import torch
from monai.networks.layers import get_norm_layer
from monai.networks.nets import BasicUNet, SegResNet, UNet
from torch import Tensor, nn

import anybatch as ab
from anybatch.integrations._by_name import NAMES
from anybatch.integrations.monai import pair_

from .lives import assert_same, training_state

VOLUME = torch.randn(1, 1, 8, 12, 8)


def unet(norm: Any, dims: int = 3, **options: Any) -> nn.Module:
    torch.manual_seed(5)
    shape = {"channels": (4, 8, 8), "strides": (2, 2), "num_res_units": 1, **options}
    return UNet(spatial_dims=dims, in_channels=1, out_channels=2, norm=norm, **shape)


def train(net: nn.Module, volume: Tensor, steps: int = 3) -> Any:
    """One volume a step; its outputs and all that is left of it."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    ab.attach(net, optimizer)
    outs = []
    for i in range(steps):
        out = net(volume * (1 + i))
        optimizer.zero_grad()
        out.square().mean().backward()
        optimizer.step()
        outs.append(out.detach())
    return outs, training_state(net)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("num_res_units", [0, 2])
def test_by_name_is_as_converted(dims: int, num_res_units: int) -> None:
    volume = torch.randn(1, 1, *(8, 12, 8)[:dims])
    named, built = (unet(norm, dims, num_res_units=num_res_units) for norm in (("CBN", {"window": 4}), "batch"))
    report = pair_(named, volume)
    assert not report.unpaired
    wanted = ab.convert_(built, ab.CBN(window=4), example_inputs=volume)
    assert [row.fed_by for row in report.rows] == [row.fed_by for row in wanted.rows]
    assert_same(train(named, volume), train(built, volume))
    ab.revert_(named)
    plain = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1]
    assert {type(named.get_submodule(row.name)) for row in report.rows} == {plain}


@pytest.mark.parametrize("net", [BasicUNet, SegResNet])
def test_other_networks(net: Any) -> None:
    """SegResNet's norms stand before their convolutions: they follow a sum, and say so."""
    options = {"features": (4, 4, 8, 8, 8, 4)} if net is BasicUNet else {"init_filters": 4, "blocks_down": (1, 1)}
    if net is SegResNet:
        options["blocks_up"] = (1,)
    model = net(spatial_dims=3, in_channels=1, out_channels=2, norm=("cbn", {"window": 4}), **options)
    volume = torch.randn(1, 1, 16, 16, 16)
    report = pair_(model, volume)
    assert bool(report.unpaired) == (net is SegResNet)
    assert all(torch.isfinite(out).all() for out in train(model, volume)[0])


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("IEBN", "ProxyNorm")])
def test_every_method_is_a_norm(name: str) -> None:
    options = {"channel_groups": 4} if name == "BatchGroupNorm" else {}
    layer = get_norm_layer((name, {**options, "eps": 1e-3, "momentum": None}), spatial_dims=3, channels=8)
    assert (layer.num_features, layer.eps, layer.momentum) == (8, 1e-3, None)
    assert isinstance(layer.to_batchnorm(), nn.BatchNorm3d)
    net = nn.Sequential(nn.Conv3d(2, 8, 1), layer)
    if name == "CBN":
        pair_(net, torch.randn(1, 2, 2, 3, 2))
    net(torch.randn(2, 2, 2, 3, 2))
    with pytest.raises(ab.AnybatchError, match=r"give it \(N, C, D, H, W\)"):
        net[1](torch.randn(2, 8, 2, 3))


def test_a_gate_on_every_norm() -> None:
    net = unet(("IEBN", {"shortcuts": "converted"}))
    train(net, VOLUME)
    assert len([name for name in net.state_dict() if name.endswith("gate_weight")]) == 6
    with pytest.raises(
        ab.AnybatchError, match="pair_: no norm of the model waits to be paired; those built by name do"
    ):
        pair_(net, VOLUME)


def test_a_gate_over_cbn_waits() -> None:
    net = unet(("IEBN", {"shortcuts": "converted", "window": 4}))
    parameters = list(net.parameters())
    report = pair_(net, VOLUME)
    assert len(report.rows) == 6
    assert [id(p) for p in net.parameters()] == [id(p) for p in parameters]


def test_several_configs_in_one_network() -> None:
    net = nn.Sequential(
        *(nn.Conv3d(1, 4, 1), get_norm_layer(("CBN", {"window": 4}), 3, 4), nn.Conv3d(4, 4, 1)),
        *(get_norm_layer("batch", 3, 4), nn.Conv3d(4, 4, 1), get_norm_layer(("CBN", {"window": 2}), 3, 4)),
    )
    report = pair_(net, VOLUME)
    assert [(row.name, row.fed_by) for row in report.rows] == [("1", ("0",)), ("5", ("4",))]
    assert (net[1].window, net[5].window) == (4, 2)
    assert type(net[3]) is nn.BatchNorm3d


def test_it_does_not_train_before_it_is_paired() -> None:
    net = unet("CBN")
    for each in (net, copy.deepcopy(net)):
        with pytest.raises(
            ab.AnybatchError, match="CBN: built before its model, it does not know yet what feeds it; once"
        ):
            each(VOLUME)
    assert_same(net.eval()(VOLUME), unet("batch").eval()(VOLUME))
    net.train()
    with pytest.raises(ab.AnybatchError, match="the example run of the model"):
        pair_(net, VOLUME[:, :, 0])
    with pytest.raises(ab.AnybatchError, match="it does not know yet"):  # still
        net(VOLUME)
    copied = copy.deepcopy(net)
    pair_(copied, VOLUME)
    copied(VOLUME)


@pytest.mark.parametrize(
    ("norm", "said"),
    [
        (("CBN", {"windw": 3}), r"CBN: no option 'windw'; there are window, .*, and BatchNorm's eps, momentum, affine"),
        (("CBN", {"window": 0}), "CBN: window=0"),
        (
            "IEBN",
            r"IEBN\(.*\) has to know what follows the norm, in evaluation too, and is not built by itself; build the",
        ),
        ("ProxyNorm", r"ProxyNorm\(.*\) has to know what follows the norm"),
    ],
)
def test_refused(norm: Any, said: str) -> None:
    with pytest.raises(ab.AnybatchError, match=said):
        unet(norm)


def test_without_monai(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("monai", "monai.networks.layers.factories"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "anybatch.integrations.monai")
    with pytest.raises(ab.AnybatchError, match=r"pip install 'anybatch\[monai\]'"):
        importlib.import_module("anybatch.integrations.monai")
