"""Norms with their activation inside, as timm has them, under every method."""

import copy
import pickle
import re

import pytest
import torch
from torch import Tensor, nn

import anybatch as ab
from anybatch.convert.flow import Flow

from .small_models import BatchNormAct2d
from .test_contract import every_method
from .tolerances import REORDERED

C = 8


class Net(nn.Module):
    """With norms that call their activation, or with it beside them."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        act = nn.PReLU(C)
        self.conv1, self.conv2, self.conv3 = nn.Conv2d(3, C, 3), nn.Conv2d(C, C, 3), nn.Conv2d(C, C, 1)
        if fused:
            self.bn1, self.bn2 = BatchNormAct2d(C), BatchNormAct2d(C, act)
            self.bn3 = BatchNormAct2d(C, nn.Identity())
            self.act1 = self.act2 = nn.Identity()
        else:
            self.bn1, self.bn2, self.bn3 = nn.BatchNorm2d(C), nn.BatchNorm2d(C), nn.BatchNorm2d(C)
            self.act1, self.act2 = nn.ReLU(), act

    def forward(self, x: Tensor) -> Tensor:
        y = self.act2(self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x))))))
        return y + self.bn3(self.conv3(y))


def trained(model: nn.Module) -> list[Tensor]:
    """Outputs and gradients of some seeded steps, then an evaluation."""
    generator, seen = torch.Generator().manual_seed(1), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    ab.attach(model, optimizer)
    for _ in range(3):
        out = model(torch.randn(2, 3, 9, 7, generator=generator))
        optimizer.zero_grad()
        out.backward(torch.randn(out.shape, generator=generator))
        seen += [out.detach(), model.conv1.weight.grad.clone(), model.bn2.weight.grad.clone()]
        optimizer.step()
    model.eval()
    return [*seen, model(torch.randn(2, 3, 9, 7, generator=generator)).detach()]


@every_method
def test_inside_or_beside_is_the_same(name: str) -> None:
    x, config, results = torch.randn(1, 3, 9, 7), ab.METHODS[name].small, []
    for fused in (True, False):
        model = Net(fused)
        names = list(model.state_dict())
        report = ab.convert_(model, config, example_inputs=x)
        assert len(report.converted) == (0 if name == "bn" else 3), str(report)
        assert set(names) - set(model.state_dict()) <= {
            n for n in names if name == "gn" and ("running" in n or "batches" in n)
        }
        results.append([*trained(model), *trained(copy.deepcopy(model).train())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, **REORDERED)


@every_method
def test_the_way_back_and_on(name: str) -> None:
    """revert_ gives the class back; converted to another method and pickled the activation is still there once."""
    model, x = Net(fused=True), torch.randn(2, 3, 9, 7)
    act, names = model.bn2.act, list(model.state_dict())
    ab.convert_(model, ab.METHODS[name].small, example_inputs=x)
    if name != "gn":
        twin = copy.deepcopy(model)
        ab.convert_(twin, ab.CBN(window=2), example_inputs=x)
        ab.convert_(twin, ab.BN())
        assert type(twin.bn1) is BatchNormAct2d
        if name != "bn":
            wanted = model.eval()(x)
            ab.revert_(model)
            assert not ab.METHODS[name].foldable or torch.equal(model(x), wanted)
        assert type(model.bn1) is type(model.bn2) is type(model.bn3) is BatchNormAct2d
        assert list(model.state_dict()) == names
        assert model.bn2.act is act
    again = pickle.loads(pickle.dumps(model.eval()))
    assert torch.equal(again(x), model(x))


@pytest.mark.parametrize("name", ["bn", "cbn"])
def test_folding_keeps_the_activation(name: str) -> None:
    model, x = Net(fused=True), torch.randn(2, 3, 9, 7)
    ab.convert_(model, ab.METHODS[name].small, example_inputs=x)
    trained(model)
    folded = ab.fold(model, example_inputs=x)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-4)
    assert folded.get_submodule("bn2.act") is not model.bn2.act
    partly = ab.fold(model, example_inputs=x, strict=False)
    torch.testing.assert_close(partly(x), model(x), rtol=1e-4, atol=1e-4)


def test_weighing_keeps_the_activation() -> None:
    model, x = Net(fused=True).eval(), torch.randn(2, 3, 9, 7)
    wanted = model(x)
    loader = [(x, torch.zeros(2, 7, 5, dtype=torch.long))]
    ab.tune_example_weight(model, loader, score=lambda model, batch: model(batch[0]).mean())
    assert type(model.bn1) is BatchNormAct2d
    assert torch.equal(model(x), wanted)
    ab.weigh_examples_(model, 0.0)
    torch.testing.assert_close(model(x), wanted, **REORDERED)
    ab.weigh_examples_(model, 1.0)
    assert not torch.allclose(model(x), wanted)


def test_what_is_seen_behind_the_norm_is_its_own_activation() -> None:
    """Before and after a conversion; a dropout at work between the two hides it."""
    model, x = Net(fused=True), torch.randn(1, 3, 9, 7)
    for _ in range(2):
        norms = [model.bn1, model.bn2, model.bn3]
        flow = Flow(model, norms, x)
        assert [flow.activation_of(norm) for norm in norms] == ["relu", "prelu", ""]
        assert not any(flow.is_shortcut(norm) for norm in norms)
        report = ab.convert_(model, ab.ProxyNorm(), example_inputs=x)
        assert [re.split("[:;]", row.reason)[0] for row in report.rows] == [
            "then relu", "then prelu", "no activation after it",
        ]  # fmt: skip
    dropping = nn.Sequential(nn.Conv2d(3, 4, 1), BatchNormAct2d(4, drop=nn.Dropout(0.5)))
    assert Flow(dropping, [dropping[1]], x).activation_of(dropping[1]) == ""
    assert Flow(dropping.eval(), [dropping[1]], x).activation_of(dropping[1]) == "relu"


def test_hooks_on_the_norm_see_what_its_activation_gives() -> None:
    model, x, seen = Net(fused=True), torch.randn(2, 3, 9, 7), []
    handle = model.bn1.register_forward_hook(lambda module, args, output: seen.append(output.detach().min()))
    ab.convert_(model, ab.CBN(window=2), example_inputs=x)
    seen.clear()
    model(x)
    assert seen == [0]
    handle.remove()
    model(x)
    assert len(seen) == 1


class Odd(nn.BatchNorm2d):
    """Named otherwise, so that what its children are for is not known."""

    def __init__(self) -> None:
        super().__init__(4)
        self.drop, self.act = nn.Identity(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x))) * 2


def test_other_norms_with_a_forward_of_their_own_are_left_alone() -> None:
    with pytest.raises(ab.AnybatchError, match="Odd has a forward of its own"):
        ab.convert_(nn.Sequential(Odd()), ab.ProxyNorm(), example_inputs=torch.randn(1, 4, 3, 3))


def test_built_by_hand() -> None:
    """config.build and to_batchnorm keep the activation, too."""
    norm, x = BatchNormAct2d(4, nn.SiLU()), torch.randn(2, 4, 3, 3)
    norm.eval()
    layer = ab.CBN(window=2, compensate=False).build(norm)
    assert torch.equal(layer(x), norm(x))
    assert type(layer.to_batchnorm()) is BatchNormAct2d
    assert torch.equal(layer.to_batchnorm()(x), norm(x))
