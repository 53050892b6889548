import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from anybatch.convert import convert_
from anybatch.errors import AnybatchError
from anybatch.methods import CBN
from anybatch.nn import CrossIterationBatchNorm

from .small_models import ResNet, assert_untouched, tensors

X = (2, 3, 15, 13)


class DroppingConfig(CBN):
    def build(self, bn: _BatchNorm) -> nn.Module:
        return CrossIterationBatchNorm(bn.num_features, affine=False)


class FailingConfig(CBN):
    def build(self, bn: _BatchNorm) -> nn.Module:
        if bn.num_features == 7:
            raise AnybatchError("7 channels are too many")
        return super().build(bn)


class FrozenNorm2d(nn.Module):
    pass


class GroupNormAct(nn.GroupNorm):
    def __init__(self) -> None:
        super().__init__(1, 3)
        self.drop, self.act = nn.Identity(), nn.ReLU()


class NormFreeBlock(nn.Sequential):
    pass


def test_a_model_without_batchnorm_is_told_what_norms_it_has() -> None:
    model = nn.Sequential(NormFreeBlock(nn.Conv2d(3, 3, 1)), FrozenNorm2d(), GroupNormAct(), FrozenNorm2d())
    with pytest.raises(AnybatchError, match=r"has no BatchNorm; it has 2 FrozenNorm2d, 1 GroupNormAct$"):
        convert_(model, CBN(), torch.randn(X))
    with pytest.raises(AnybatchError, match=r"has no BatchNorm; it has no norm of any kind$"):
        convert_(model[0], CBN(), torch.randn(X))


def test_a_conversion_that_fails_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = ResNet(), torch.randn(X)
    modules, before = list(model.modules()), tensors(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(AnybatchError, match=r"convert_: 'blocks\.1\.bn1': 7 channels are too many"):
        convert_(model, FailingConfig(window=2), x)
    assert_untouched(model, modules, before)
    with pytest.raises(
        AnybatchError, match=r"the optimizer holds a parameter of 'stem\.1' that CrossIteration.* has not"
    ):
        convert_(model, DroppingConfig(window=2), x, optimizer=optimizer)
    assert_untouched(model, modules, before)
    with pytest.raises(AnybatchError, match="in training mode, raised RuntimeError"):
        convert_(model, CBN(window=2), torch.randn(1, 4, 9, 9))
    assert_untouched(model, modules, before)

    follows, calls = CrossIterationBatchNorm.follows, []

    def sometimes(self, *args, **kwargs):
        calls.append(self)
        if len(calls) == 4:
            raise RuntimeError("interrupted")
        return follows(self, *args, **kwargs)

    monkeypatch.setattr(CrossIterationBatchNorm, "follows", sometimes)
    with pytest.raises(RuntimeError, match="interrupted"):
        convert_(model, CBN(window=2), x)
    assert_untouched(model, modules, before)


class DistributedDataParallel(nn.Module):
    """Stands in for torch's, which wants a process group."""

    __module__ = "torch.nn.parallel.distributed"

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def compiled_in_place() -> nn.Module:
    model = ResNet()
    model.compile(backend="eager")
    return model


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: nn.BatchNorm2d(3), r"the model itself is a BatchNorm2d.*config\.build\(norm\)"),
        (lambda: nn.Sequential(nn.GroupNorm(2, 4), nn.LayerNorm(4)), "it has 1 GroupNorm, 1 LayerNorm"),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 1)), "it has no norm of any kind"),
        (
            lambda: DistributedDataParallel(ResNet()),
            r"is a DistributedDataParallel; call .* before wrapping.*ddp\.module",
        ),
        (
            lambda: nn.Sequential(nn.DataParallel(ResNet())),
            "'0' is a DataParallel; call convert_ before wrapping it.*DistributedDataParallel",
        ),
        (
            lambda: torch.compile(ResNet(), backend="eager"),
            r"is a OptimizedModule; call convert_ before torch\.compile",
        ),
        (compiled_in_place, r"the model is a OptimizedModule"),
    ],
)
def test_models_that_cannot_be_converted(make, said: str) -> None:
    with pytest.raises(AnybatchError, match=f"(?s)convert_: .*{said}"):
        convert_(make(), CBN(window=2), torch.randn(X))


def test_what_is_missing_is_said() -> None:
    with pytest.raises(AnybatchError, match=r"CBN has to know what stands around each norm; pass example_inputs"):
        convert_(ResNet(), CBN(window=2))
    with pytest.raises(
        AnybatchError, match=r"where='blocks.0.bn9' matches none of the model's 8 norms; there are blocks\.0\.bn"
    ):
        convert_(ResNet(), CBN(window=2), torch.randn(X), where="blocks.0.bn9")
    with pytest.raises(AnybatchError, match=r"matches none .*; there are stem\.1, "):
        convert_(ResNet(), CBN(window=2), torch.randn(X), where=lambda name, module: False)


@pytest.mark.parametrize("config", ["cbn", CBN, None], ids=["a name", "a class", "nothing"])
def test_a_config_that_is_none_is_answered_with_the_mend(config: object) -> None:
    with pytest.raises(AnybatchError, match=r"ab\.CBN\(\).*parse_method"):
        convert_(ResNet(), config, example_inputs=torch.randn(1, 3, 16, 16))
