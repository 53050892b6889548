import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from anybatch.convert.pairing import Pairing, as_call, pair
from anybatch.errors import AnybatchError

from .small_models import (
    ConvNorm,
    Residue,
    ResNet,
    SharedHead,
    SharedNorm,
    Sometimes,
    StandardisedConv,
    Steps,
    Unpairable,
    assorted,
    parametrized,
)


class PaddedConv(nn.Conv2d):
    """Pads by itself, as TensorFlow's convolutions ported to torch do."""

    def forward(self, x):
        return super().forward(nn.functional.pad(x, (0, 1, 0, 1)))


def paired(model: nn.Module, example_inputs: object) -> dict[str, Pairing]:
    norms = {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    return pair(model, norms, example_inputs)


def feeds(pairings: dict[str, Pairing]) -> dict[str, list[str]]:
    return {name: [feed.name for feed in pairing.feeds] for name, pairing in pairings.items()}


RESNET = {
    "stem.1": ["stem.0"],
    "blocks.0.bn1": ["blocks.0.conv1"],
    "blocks.0.bn2": ["blocks.0.conv2"],
    "blocks.1.bn1": ["blocks.1.conv1"],
    "blocks.1.bn2": ["blocks.1.conv2"],
    "blocks.1.downsample.1": ["blocks.1.downsample.0"],
    "aux.1": ["aux.0"],
    "bn": ["fc"],
}


def test_each_norm_of_a_residual_network_finds_its_map() -> None:
    found = paired(ResNet(), torch.randn(1, 3, 15, 13))
    assert feeds(found) == RESNET
    assert all(pairing.exclusive and not pairing.reason and not pairing.note for pairing in found.values())


def test_a_training_branch_is_not_reached_in_evaluation() -> None:
    found = paired(ResNet().eval(), torch.randn(2, 3, 15, 13))
    assert found["aux.1"].reason == "the example run never called it"
    assert feeds(found) == {**RESNET, "aux.1": []}


@pytest.mark.parametrize("case", range(len(assorted())))
def test_every_kind_of_map(case: int) -> None:
    model, x = assorted()[case]
    assert feeds(paired(model, x)) == {"1": ["0"]}
    assert feeds(paired(model.double(), x.double())) == {"1": ["0"]}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision(dtype: torch.dtype) -> None:
    model = ResNet().to(dtype)
    assert feeds(paired(model, torch.randn(1, 3, 15, 13, dtype=dtype))) == RESNET


def test_autocast() -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5))
    with torch.autocast("cpu", torch.bfloat16):
        assert feeds(paired(model, torch.randn(2, 3, 9, 7))) == {"1": ["0"]}


def test_one_norm_on_several_levels_of_one_map() -> None:
    found = paired(SharedHead(per_level=False), torch.randn(1, 3, 9, 7))
    assert feeds(found) == {"norms.0": ["conv"]}
    assert found["norms.0"].exclusive


def test_a_norm_for_each_level_of_one_map() -> None:
    found = paired(SharedHead(per_level=True), torch.randn(1, 3, 9, 7))
    assert feeds(found) == {f"norms.{level}": ["conv"] for level in range(3)}
    assert not any(pairing.exclusive for pairing in found.values())
    assert "'conv' also feeds 'norms.1'" in found["norms.0"].shared


def test_one_norm_after_two_maps() -> None:
    found = paired(SharedNorm(), torch.randn(1, 3, 9, 7))
    assert feeds(found) == {"bn": ["a", "b"]}
    assert found["bn"].exclusive


@pytest.mark.parametrize("bias", [True, False])
def test_a_norm_inside_of_its_convolution(bias: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), ConvNorm(4, 5, 3, bias=bias, norm=nn.BatchNorm2d(5)), nn.Conv2d(5, 2, 1))
    found = paired(model, torch.randn(1, 3, 9, 7))["1.norm"]
    assert [(feed.name, feed.inside) for feed in found.feeds] == [("1", True)]
    assert found.exclusive


def test_norms_that_have_no_map_say_what_they_normalise() -> None:
    reasons = {name: pairing.reason for name, pairing in paired(Unpairable(), torch.randn(2, 3, 9, 7)).items()}
    assert reasons["first"] == "fed by no linear map: it normalises an input of the model"
    assert reasons["sum"] == "fed by no linear map: it normalises the result of add"
    assert "the result of conv2d (a function called on its own" in reasons["after_borrowed"]
    assert reasons["after_permute"] == "the output of 'linear' passes through permute before it"
    assert reasons["idle"] == "the example run never called it"


def test_what_changed_its_input_in_place_is_said() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.BatchNorm2d(4))
    reason = paired(model, torch.randn(2, 3, 9, 7))["3"].reason
    assert reason == "fed by no linear map: it normalises the result of batch_norm, then relu"


def test_a_weight_that_is_not_the_maps_own_is_found_out() -> None:
    model = nn.Sequential(StandardisedConv(3, 5, 3), nn.BatchNorm2d(5))
    found = paired(model, torch.randn(1, 3, 9, 7))["1"]
    assert not found.feeds
    assert "after '0': its input is not what the map's own weight gives" in found.reason


def test_padding_of_the_maps_own_code_is_found_out() -> None:
    model = nn.Sequential(PaddedConv(3, 5, 3), nn.BatchNorm2d(5))
    found = paired(model, torch.randn(1, 3, 9, 7))["1"]
    assert not found.feeds
    assert "own padding" in found.reason


@pytest.mark.parametrize("scale", [1e-18, 1.0, 1e12])
def test_dead_and_tiny_channels_are_paired(scale: float) -> None:
    """As in networks of many layers before training: a channel in three is 0, another a billionth of its neighbour."""
    model = nn.Sequential(nn.Conv2d(3, 6, 3, groups=3, bias=False), nn.BatchNorm2d(6))
    x = scale * torch.randn(2, 3, 24, 20) * torch.tensor([1.0, 0.0, 1e-9]).view(3, 1, 1)
    assert feeds(paired(model, x)) == {"1": ["0"]}
    assert not paired(nn.Sequential(PaddedConv(3, 6, 3, groups=3), nn.BatchNorm2d(6)), x)["1"].feeds


def test_a_norm_that_a_map_feeds_only_sometimes() -> None:
    found = paired(Sometimes(), torch.randn(1, 3, 9, 7))["bn"]
    assert not found.feeds
    assert found.reason.startswith("in some of its calls, fed by no linear map")


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "noise", "own"])
@pytest.mark.parametrize("training", [True, False])
def test_parametrized_weights_pair_by_the_weight_that_was_used(kind: str, training: bool) -> None:
    model = nn.Sequential(parametrized(kind), nn.BatchNorm2d(5)).train(training)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert feeds(paired(model, torch.randn(1, 3, 9, 7))) == {"1": ["0"]}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_weight_that_moves_at_every_reading_cannot_serve_a_norm_inside() -> None:
    conv = nn.utils.parametrizations.spectral_norm(ConvNorm(3, 5, 3, norm=nn.BatchNorm2d(5)))
    found = paired(nn.Sequential(conv).eval(), torch.randn(1, 3, 9, 7))["0.norm"]
    assert "every reading of the weight" in found.reason


@pytest.mark.parametrize(
    ("use", "said"),
    [
        ("add", "the output of 'conv' is also used by add"),
        ("method", "the output of 'conv' is also used by sigmoid"),
        ("inplace", "the output of 'conv' is also used by mean; the output of 'conv' is changed by relu_"),
        ("output", "the output of 'conv' is also used by the model's output"),
        ("again", "'conv' also runs where this norm does not follow"),
        ("weight", "the weight of 'conv' is also used by conv2d"),
        ("branch", ""),
        ("nothing", ""),
    ],
)
def test_other_users_of_the_maps_output(use: str, said: str) -> None:
    found = paired(Residue(use), torch.randn(2, 3, 9, 7))["bn"]
    assert [feed.name for feed in found.feeds] == ["conv"]
    assert found.shared == said
    assert found.exclusive == (not said)


def test_a_hook_that_looks_at_the_maps_output_is_no_other_user() -> None:
    model, seen = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), []
    model[0].register_forward_hook(lambda module, args, output: seen.append(output.square().mean().item()))
    assert paired(model, torch.randn(2, 3, 9, 7))["1"].exclusive


@pytest.mark.parametrize("between", [nn.Dropout(0.5), nn.ReLU(inplace=True)])
@pytest.mark.parametrize("training", [True, False])
def test_what_stands_between_map_and_norm_is_seen_in_either_mode(between: nn.Module, training: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), between, nn.BatchNorm2d(4)).train(training)
    found = paired(model, torch.randn(2, 3, 9, 7) + 5)["2"]
    assert not found.feeds
    assert between.__class__.__name__.lower() in found.reason


def test_identity_may_stand_between() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Identity(), nn.BatchNorm2d(4))
    assert paired(model, torch.randn(2, 3, 9, 7))["2"].exclusive


@pytest.mark.parametrize(
    "inputs", [{"image": torch.randn(1, 3, 5, 7), "steps": 2}, ((), {"image": torch.randn(1, 3, 5, 7), "steps": 3})]
)
def test_control_flow_and_keyword_arguments(inputs: object) -> None:
    assert feeds(paired(Steps(), inputs)) == {"bn": ["conv"]}


def test_a_large_mean_does_not_break_the_check() -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5))
    assert feeds(paired(model, torch.randn(2, 3, 9, 7) + 1e4)) == {"1": ["0"]}


def test_a_single_value_per_channel() -> None:
    assert feeds(paired(nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7)), torch.randn(1, 5))) == {"1": ["0"]}


def test_inputs_that_are_not_finite_or_empty() -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5))
    assert "not finite" in paired(model, torch.full((1, 3, 5, 5), torch.nan))["1"].reason
    assert paired(model, torch.randn(0, 3, 5, 5))["1"].reason == "the example run gave it no values"


def test_torch_fx_may_see_it_otherwise() -> None:
    class Patched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
            # A hook: fx does not see what it does.
            self.conv.register_forward_hook(lambda module, args, output: output * 2)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.bn(self.conv(x)))

    found = paired(Patched(), torch.randn(2, 3, 9, 7))["bn"]
    assert not found.feeds
    assert found.note == "torch.fx sees 'conv' feed it"


class Restless(nn.Module):
    """Moves everything a forward can move, then perhaps raises."""

    def __init__(self, fail: bool) -> None:
        super().__init__()
        self.conv, self.bn, self.fail = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), fail
        self.register_buffer("count", torch.zeros(3))
        self.register_buffer("average", torch.zeros(3))
        self.register_buffer("positions", torch.arange(3).expand(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.average = self.average * 0.9 + torch.rand(3)
        random.random()
        x = F.dropout(x, 0.5, self.training)
        if self.fail:
            raise RuntimeError("out of cheese")
        return self.bn(self.conv(x))


@pytest.mark.parametrize("fail", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_the_model_and_the_random_states_are_untouched(fail: bool, training: bool) -> None:
    model = Restless(fail).train(training)
    before = {name: (tensor, tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    modes = [module.training for module in model.modules()]
    states = torch.get_rng_state(), random.getstate()
    if fail:
        with pytest.raises(AnybatchError, match=r"raised RuntimeError: out of cheese.*a tensor, a tuple of arguments"):
            paired(model, torch.randn(2, 3, 9, 7, generator=torch.Generator().manual_seed(0)))
    else:
        paired(model, torch.randn(2, 3, 9, 7, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert modes == [module.training for module in model.modules()]
    after = model.state_dict(keep_vars=True)
    assert all(after[name] is tensor and torch.equal(tensor, copy) for name, (tensor, copy) in before.items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_what_example_inputs_may_be() -> None:
    x = torch.randn(2)
    assert as_call(x) == ((x,), {})
    assert as_call((x, 3)) == ((x, 3), {})
    assert as_call({"x": x}) == ((), {"x": x})
    assert as_call(((x,), {"scale": 2})) == ((x,), {"scale": 2})
    with pytest.raises(AnybatchError, match=r"example_inputs is a list.*as \(the_list,\)"):
        as_call([x])


def test_lazy_modules_must_have_run() -> None:
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.BatchNorm2d(4))
    with pytest.raises(AnybatchError, match="run one forward of it first"):
        paired(model, torch.randn(2, 3, 9, 7))
