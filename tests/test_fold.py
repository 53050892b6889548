import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from anybatch.convert import convert_
from anybatch.errors import AnybatchError
from anybatch.inference import fold, fold_weights
from anybatch.layers.base import NormLayer
from anybatch.methods import CBN
from anybatch.nn import CrossIterationBatchNorm

from .small_models import (
    ConvNorm,
    Residue,
    ResNet,
    SharedHead,
    SharedNorm,
    StandardisedConv,
    Steps,
    Unpairable,
    assorted,
    flat,
    shake,
)

X = (2, 3, 15, 13)


def norms_in(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


def assert_same(folded: nn.Module, model: nn.Module, x: Tensor) -> None:
    """Equal to the unfolded model in float64, to 1e-5 of its largest output."""
    exact = flat(copy.deepcopy(model).double()(x.double()))
    for ours, reference in zip(flat(folded(x)), exact, strict=True):
        assert (ours.double() - reference).abs().max() <= 1e-5 * reference.abs().max()


def assert_clean(folded: nn.Module) -> None:
    for module in folded.modules():
        assert not isinstance(module, NormLayer)
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module.training


@pytest.mark.parametrize("case", range(len(assorted())))
@pytest.mark.parametrize("converted", [True, False])
def test_every_kind_of_map(case: int, converted: bool) -> None:
    model, x = assorted()[case]
    shake(model)
    if converted:
        convert_(model, CBN(window=2), x)
    folded = fold(model.eval(), None if converted else x)
    assert_same(folded, model, x)
    assert_clean(folded)
    assert isinstance(folded[1], nn.Identity)


@pytest.mark.parametrize("make", [ResNet, lambda: SharedHead(per_level=False), SharedNorm])
@pytest.mark.parametrize("converted", [True, False])
def test_models(make, converted: bool) -> None:
    model, x = shake(make()), torch.randn(X)
    if hasattr(model, "aux") and not converted:
        del model.aux  # which evaluation does not reach
    if converted:
        convert_(model, CBN(window=2), x)
    before = {name: tensor.clone() for name, tensor in model.eval().state_dict().items()}
    expected = flat(model(x))
    folded = fold(model, None if converted else x)
    assert_same(folded, model, x)
    assert_clean(folded)
    assert not norms_in(folded)
    assert [name for name, _ in folded.named_modules()] == [name for name, _ in model.named_modules()]

    # The model itself is as it was, hooks included.
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(map(torch.equal, flat(model(x)), expected))
    assert not converted or all(norm.maps for norm in norms_in(model))


def test_a_norm_inside_of_its_convolution() -> None:
    model, x = shake(nn.Sequential(ConvNorm(3, 5, 3, bias=False, norm=nn.BatchNorm2d(5)))).eval(), torch.randn(X)
    for inputs in (x, None):
        folded = fold(model, inputs)
        assert_same(folded, model, x)
        assert isinstance(folded[0].norm, nn.Identity)
        assert_clean(folded)
        convert_(model, CBN(window=2), x)


def test_control_flow() -> None:
    model, inputs = shake(Steps()).eval(), {"image": torch.randn(2, 3, 5, 7), "steps": 3}
    torch.testing.assert_close(fold(model, inputs)(**inputs), model(**inputs), rtol=1e-4, atol=1e-5)


def test_after_training() -> None:
    model, x = ResNet(), torch.randn(X)
    convert_(model, CBN(window=3), x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(4):
        outputs = model(torch.randn(X))
        torch.autograd.backward(outputs, [torch.randn_like(t) for t in outputs])
        optimizer.step()
    assert_same(fold(model.eval()), model, x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtype_and_layout_are_kept(dtype: torch.dtype) -> None:
    model = shake(nn.Sequential(nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5))).eval()
    model = model.to(dtype, memory_format=torch.channels_last)
    model[0].weight.requires_grad_(False)
    folded = fold(model, torch.randn(X, dtype=dtype))
    assert folded[0].weight.dtype == folded[0].bias.dtype == dtype
    assert folded[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not folded[0].weight.requires_grad


@pytest.mark.parametrize("use", ["add", "method", "inplace", "output", "again", "weight"])
@pytest.mark.parametrize("converted", [True, False])
def test_a_map_whose_output_has_other_users_is_refused(use: str, converted: bool) -> None:
    model, x = shake(Residue(use)).eval(), torch.randn(X)
    if converted:
        convert_(model, CBN(window=2), x)
    said = "the output of its map has other users" if converted else "also|changed"
    with pytest.raises(AnybatchError, match=rf"fold: 1 of 1 norms cannot be folded[\s\S]*'bn': .*({said})"):
        fold(model, None if converted else x)
    left = fold(model, x, strict=False)
    assert type(left.bn) is nn.BatchNorm2d
    assert_clean(left)
    assert all(map(torch.equal, flat(left(x)), flat(model(x))))


@pytest.mark.parametrize("use", ["branch", "nothing"])
def test_a_map_whose_output_has_none_is_not(use: str) -> None:
    model, x = shake(Residue(use)).eval(), torch.randn(X)
    assert_same(fold(model, x), model, x)


def test_a_map_with_a_norm_for_each_level_is_refused() -> None:
    model, x = shake(SharedHead(per_level=True)).eval(), torch.randn(X)
    with pytest.raises(AnybatchError, match=r"'norms\.0': 'conv' also feeds 'norms\.1'"):
        fold(model, x)
    # By hand one may promise what does not hold: the same map for two norms.
    for index in (0, 1):
        model.norms[index] = CrossIterationBatchNorm.replacing(model.norms[index]).follows(model.conv)
    del model.norms[2]
    with pytest.raises(AnybatchError, match=r"'norms.0', 'norms.1': 'conv' feeds several norms"):
        fold(model)


def test_all_that_cannot_be_folded_is_said_at_once() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1),
        nn.BatchNorm2d(4, track_running_stats=False),
        parametrized_then_norm(),
        Unpairable(),
    )
    model[2][0] = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 3, 1))
    x = torch.randn(2, 3, 9, 7)
    with pytest.raises(AnybatchError) as raised:
        fold(shake(model).eval(), x)
    text = str(raised.value)
    assert text.startswith("fold: 7 of 7 norms cannot be folded (strict=False leaves such norms in place):")
    assert "'1': it keeps no running statistics" in text
    assert "'2.1': '2.0' computes its weight (weight_norm, pruning or the like)" in text
    assert "'3.sum': fed by no linear map: it normalises the result of add" in text
    assert "'3.idle': the example run never called it" in text


def parametrized_then_norm() -> nn.Sequential:
    return nn.Sequential(nn.Identity(), nn.BatchNorm2d(3))


def test_what_can_be_folded_is_when_not_strict() -> None:
    model, x = shake(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), Unpairable())).eval(), torch.randn(X)
    convert_(model, CBN(window=2), x)
    folded = fold(model, strict=False)
    assert isinstance(folded[1], nn.Identity)
    assert type(folded[2].sum) is nn.BatchNorm2d
    assert_clean(folded)
    assert_same(folded, model, x)


class PadsItself(nn.Conv2d):
    """As TensorFlow's 'same' at stride 2, ported: no closed form of the module's own padding explains its output."""

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.pad(x, (0, 1, 1, 2))
        return nn.functional.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class PadsItselfTwice(PadsItself):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + super().forward(x.flip(0)).relu()


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"groups": 3}, {"dtype": torch.float64}])
@pytest.mark.parametrize("converted", [True, False])
def test_a_map_that_pads_by_itself(options: dict, converted: bool) -> None:
    model = shake(nn.Sequential(PadsItself(3, 6, 3, 2, **options), nn.BatchNorm2d(6, dtype=options.get("dtype"))))
    x = torch.randn(X, dtype=options.get("dtype")) + 3
    before = dict(model.named_parameters())
    if converted:
        report = convert_(model, CBN(), x)
        assert "own padding" in report.unpaired[0].reason
    folded = fold(model.eval(), x)
    assert isinstance(folded[1], nn.Identity)
    assert_same(folded, model, x)
    assert all(parameter is before[name] for name, parameter in model.named_parameters())


@pytest.mark.parametrize("conv", [StandardisedConv(3, 6, 3), PadsItselfTwice(3, 6, 3, 2)])
def test_a_map_that_does_not_scale_as_its_weight_does_is_refused(conv: nn.Module) -> None:
    with pytest.raises(AnybatchError, match="its input is not what the map's own weight gives"):
        fold(shake(nn.Sequential(conv, nn.BatchNorm2d(6))).eval(), torch.randn(X))


def test_a_map_that_pads_by_itself_and_has_other_users_is_refused() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = PadsItself(3, 6, 3, 2), nn.BatchNorm2d(6)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.bn(y) + y.mean()

    with pytest.raises(AnybatchError, match="the output of 'conv' is also used by mean"):
        fold(shake(Net()).eval(), torch.randn(X))


def test_weights_that_others_hold_too_stay_theirs() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.bn = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.bn(self.a(x)))

    model, x = shake(Tied()).eval(), torch.randn(X)
    folded = fold(model, x)
    assert_same(folded, model, x)
    assert torch.equal(folded.b.weight, model.b.weight)


def test_hooks_on_the_norms_stay() -> None:
    model, seen = shake(nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5))).eval(), []
    folded_from = fold(model, torch.randn(X))
    model[1].register_forward_hook(lambda module, args, output: seen.append(type(module).__name__))
    fold(model, torch.randn(X))(torch.randn(X))
    assert seen[-1] == "Identity"
    assert not folded_from[1]._forward_hooks


def test_a_layer_that_does_more_is_refused_and_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = shake(nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5))).eval(), torch.randn(X)
    convert_(model, CBN(window=2), x)
    monkeypatch.setattr(CrossIterationBatchNorm, "foldable", False)
    with pytest.raises(AnybatchError, match="more than a scale and a shift per channel"):
        fold(model)
    assert isinstance(fold(model, x, strict=False)[1], CrossIterationBatchNorm)


def test_what_fold_cannot_start_with() -> None:
    with pytest.raises(AnybatchError, match=r"training mode.*call model\.eval\(\) first"):
        fold(ResNet(), torch.randn(X))
    for strict in (True, False):
        with pytest.raises(
            AnybatchError, match=r"8 of 8 .*\n  'stem\.1', .*: which map feeds it is .* pass example_inputs"
        ):
            fold(ResNet().eval(), strict=strict)
    with pytest.raises(AnybatchError, match="Sequential has no BatchNorm inside"):
        fold(nn.Sequential(nn.Linear(2, 3)).eval())
    with pytest.raises(AnybatchError, match="'0' is a DataParallel; call fold before wrapping"):
        fold(nn.Sequential(nn.DataParallel(ResNet())).eval())


@pytest.mark.parametrize(("transposed", "groups"), [(False, 1), (False, 3), (True, 1), (True, 3)])
def test_fold_weights_is_exact(transposed: bool, groups: int) -> None:
    make = nn.ConvTranspose2d if transposed else nn.Conv2d
    conv = make(6, 9, (3, 2), groups=groups).double()
    scale, shift, x = torch.randn(9).double(), torch.randn(9).double(), torch.randn(2, 6, 5, 7).double()
    weight, bias = fold_weights(conv.weight, conv.bias, scale, shift, transposed, groups)
    folded = make(6, 9, (3, 2), groups=groups).double()
    folded.load_state_dict({"weight": weight, "bias": bias})
    torch.testing.assert_close(folded(x), conv(x) * scale[:, None, None] + shift[:, None, None], rtol=1e-12, atol=1e-12)
