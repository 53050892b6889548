import copy
import random

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, TensorDataset

from anybatch.convert import convert_
from anybatch.errors import AnybatchError
from anybatch.inference import recalibrate_
from anybatch.inference.weigh import weigh_examples_
from anybatch.methods import CBN, ProxyNorm

from .small_models import ResNet, SharedHead, shake
from .tolerances import SAME


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_the_first_norm_gets_the_moments_of_all_data(offset: float) -> None:
    conv = nn.Conv2d(3, 5, 3)
    model, data = nn.Sequential(conv, nn.BatchNorm2d(5)), torch.randn(7, 3, 6, 5) + offset
    assert recalibrate_(model, data.split(3)) == 7  # batches of 3, 3 and 1
    y = torch.cat([conv(batch) for batch in data.split(3)]).double()
    torch.testing.assert_close(model[1].running_mean.double(), y.mean((0, 2, 3)), **SAME)
    torch.testing.assert_close(model[1].running_var.double(), y.var((0, 2, 3), correction=0), **SAME)


def test_each_norm_normalises_by_its_batch_as_in_training() -> None:
    model = shake(
        nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3), nn.BatchNorm1d(3))
    )
    data = torch.randn(11, 4) * 3
    recalibrate_(model, data.split(4))
    with torch.no_grad():
        trained = nn.Sequential(model[0], nn.BatchNorm1d(5), model[3])
        trained[1].load_state_dict(model[1].state_dict())
        y = torch.cat([trained(batch) for batch in data.split(4)]).double()
    torch.testing.assert_close(model[4].running_mean.double(), y.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model[4].running_var.double(), y.var(0, correction=0), rtol=1e-5, atol=1e-6)


def test_one_batch_of_everything_makes_evaluation_training() -> None:
    model, x = ResNet(), torch.randn(4, 3, 15, 13)
    recalibrate_(model, [x])
    torch.testing.assert_close(model.eval()(x), model.train()(x)[0], rtol=1e-4, atol=1e-5)


def test_a_norm_called_several_times_pools_its_calls() -> None:
    model, x = SharedHead(per_level=False), torch.randn(2, 3, 9, 7)
    recalibrate_(model, [x])
    levels = [nn.functional.avg_pool2d(x, k) for k in (1, 2, 3)]
    y = torch.cat([model.conv(level).transpose(0, 1).flatten(1) for level in levels], 1)
    torch.testing.assert_close(model.norms[0].running_mean, y.mean(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.norms[0].running_var, y.var(1, correction=0), rtol=1e-5, atol=1e-6)


def test_nothing_else_changes() -> None:
    model, x = ResNet(), torch.randn(2, 3, 15, 13)
    convert_(model, CBN(window=3), x)
    outputs = model(x)
    torch.autograd.backward(outputs, [torch.randn_like(t) for t in outputs])
    model.bn.eval()
    before, modes = state(model), [module.training for module in model.modules()]
    history = model.stem[1].history_state()
    recalibrate_(model, [x, x + 1])
    assert [module.training for module in model.modules()] == modes
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    # The auxiliary head is not reached in evaluation and keeps what it had.
    assert {name.rsplit(".", 1)[1] for name in changed} == {"running_mean", "running_var"}
    assert not any(name.startswith("aux") for name in changed)
    after = model.stem[1].history_state()
    assert str(after) == str(history)


class Failing(Exception):
    pass


class Merging(nn.Linear):
    """A layer whose own eval() changes its weight, as LoRA's may."""

    def train(self, mode: bool = True) -> nn.Module:
        with torch.no_grad():
            self.weight.mul_(2.0)
        return super().train(mode)


def everything(model: nn.Module) -> dict[str, object]:
    """What of a model an interruption might leave changed."""
    return {
        "state": {name: tensor.tolist() for name, tensor in model.state_dict().items()},
        "modes": [module.training for module in model.modules()],
        "hooks": [[*m._forward_pre_hooks, *m._forward_hooks, *m._forward_hooks_with_kwargs] for m in model.modules()],
        "norms": [(m.momentum, getattr(m, "alpha", 0.0)) for m in model.modules() if isinstance(m, _BatchNorm)],
        "torch": (torch.get_rng_state().tolist(), torch.is_grad_enabled(), random.getstate()),
    }


@pytest.mark.parametrize("error", [Failing, KeyboardInterrupt, SystemExit, GeneratorExit])
@pytest.mark.parametrize("place", ["the loader", "forward", "a hook of the user's"])
def test_everything_is_put_back_however_it_ends(error: type[BaseException], place: str) -> None:
    model = shake(nn.Sequential(ResNet(), Merging(6, 6), nn.Dropout(0.5)))
    weigh_examples_(model, 0.3)
    model.train()
    model[0].stem[1].eval()  # frozen
    steps = {"the loader": 0, "forward": 0, "a hook of the user's": 0}

    def step(at: str) -> None:
        steps[at] += 1
        if at == place and steps[at] == 2:
            raise error

    def loader():
        for _ in range(3):
            step("the loader")
            yield torch.randn(2, 3, 15, 13, generator=torch.Generator().manual_seed(1))

    def forward(model: nn.Module, x: Tensor) -> Tensor:
        step("forward")
        return model(x)

    model[0].bn.register_forward_pre_hook(lambda *_: step("a hook of the user's"))
    before = everything(model)
    with pytest.raises(error):
        recalibrate_(model, loader(), forward=forward)
    assert everything(model) == before


def test_nothing_is_written_where_moments_are_not_finite() -> None:
    model = shake(ResNet())
    before = everything(model)
    with pytest.raises(AnybatchError, match=r"'stem\.1' met moments that are not finite"):
        recalibrate_(model, [torch.full((2, 3, 15, 13), torch.inf)])
    assert everything(model) == before


def test_weighing_at_inference_makes_no_difference() -> None:
    """The examples' own moments have no part in it, though evaluation mixes them in before and after."""
    model, x = shake(ResNet()), torch.randn(4, 3, 15, 13)
    weighed = copy.deepcopy(model)
    weigh_examples_(weighed, 0.5)
    for each in (model, weighed):
        recalibrate_(each, x.split(2))
    torch.testing.assert_close(weighed.state_dict(), model.state_dict(), **SAME)
    assert weighed.bn.alpha == 0.5


class ByName(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(4)

    def forward(self, *, image: Tensor, scale: float = 1.0) -> Tensor:
        return self.bn(input=image * scale)


def test_kinds_of_batches() -> None:
    data = torch.randn(9, 4)
    loader = DataLoader(TensorDataset(data, torch.arange(9)), batch_size=4)
    by_position, by_name, by_function = nn.Sequential(nn.BatchNorm1d(4)), ByName(), ByName()
    assert recalibrate_(by_position, loader) == 9
    assert recalibrate_(by_name, [{"image": data}]) == 9
    assert recalibrate_(by_function, loader, forward=lambda model, batch: model(image=batch[0], scale=2.0)) == 9
    torch.testing.assert_close(by_position[0].running_mean, data.mean(0))
    torch.testing.assert_close(by_name.bn.running_var, data.var(0, correction=0))
    torch.testing.assert_close(by_function.bn.running_mean, 2 * data.mean(0))


def test_a_single_value_is_normalised_by_what_was_seen() -> None:
    model, data = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4)), torch.randn(5, 4)
    recalibrate_(model, data.split(4))  # 4 examples, then 1
    first = (data[:4] - data[:4].mean(0)) / (data[:4].var(0, correction=0) + 1e-5).sqrt()
    second = (data[4:] - data[:4].mean(0)) / (data[:4].var(0, correction=0) + 1e-5).sqrt()
    y = torch.cat([first, second])
    torch.testing.assert_close(model[0].running_mean, data.mean(0))
    torch.testing.assert_close(model[1].running_mean, y.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model[1].running_var, y.var(0, correction=0), rtol=1e-5, atol=1e-6)


def test_batches_limits_the_loader() -> None:
    model, data = nn.Sequential(nn.BatchNorm1d(4)), torch.randn(9, 4)
    assert recalibrate_(model, iter(data.split(3)), batches=2) == 6
    torch.testing.assert_close(model[0].running_mean, data[:6].mean(0))


def test_what_recalibrate_cannot_do() -> None:
    with pytest.raises(AnybatchError, match="batches=0; give at least 1"):
        recalibrate_(ResNet(), [], batches=0)
    with pytest.raises(AnybatchError, match="the loader gave no batch"):
        recalibrate_(ResNet(), [])
    with pytest.raises(AnybatchError, match="the batches reached no BatchNorm"):
        recalibrate_(nn.Linear(3, 2), [torch.randn(2, 3)])


def test_running_statistics_that_are_not_used_stay() -> None:
    x = torch.randn(3, 2, 5, 5)
    model = shake(nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4)))
    convert_(model, ProxyNorm(), x, where="1")
    before = state(model)
    assert recalibrate_(model, [x]) == 3
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"3.running_mean", "3.running_var"}
    with pytest.raises(AnybatchError, match="none that uses running statistics"):
        recalibrate_(model[:3], [x])


@pytest.mark.parametrize("loader", [None, torch.randn(2, 3, 8, 8)], ids=["nothing", "a tensor"])
def test_what_is_no_loader_is_refused(loader: object) -> None:
    with pytest.raises(AnybatchError, match="yields batches"):
        recalibrate_(nn.Sequential(nn.BatchNorm2d(3)), loader)


def test_a_batch_that_the_model_does_not_take_names_the_mend() -> None:
    with pytest.raises(AnybatchError, match=r"raised .*forward=lambda model, batch"):
        recalibrate_(nn.Sequential(nn.BatchNorm2d(3)), [{"pixels": torch.randn(2, 3, 8, 8)}])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast(dtype: torch.dtype) -> None:
    """Moments, in float64, of what the norm is given in half precision; the second one's input likewise."""
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 4, 3), nn.BatchNorm2d(4))
    data, given = torch.randn(6, 3, 8, 7) * 3 + 100, {1: [], 4: []}
    for i, inputs in given.items():
        model[i].register_forward_pre_hook(lambda _, args, inputs=inputs: inputs.append(args[0]))
    with torch.autocast("cpu", dtype):
        recalibrate_(model, data.split(4))
    for i, inputs in given.items():
        assert {y.dtype for y in inputs} == {dtype}
        y = torch.cat(inputs).double()
        torch.testing.assert_close(model[i].running_mean.double(), y.mean((0, 2, 3)), **SAME)
        torch.testing.assert_close(model[i].running_var.double(), y.var((0, 2, 3), correction=0), **SAME)


@pytest.mark.filterwarnings("default")  # the compiler's own
@pytest.mark.parametrize("how", ["torch.compile", "model.compile", "a part"])
def test_a_compiled_model(how: str) -> None:
    """Recalibrated before its first run and after it: as eager, none of our hooks in its graphs, no new graph."""
    torch._dynamo.reset()
    data, graphs, counts = torch.randn(6, 3, 8, 7), [], []

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append(graph)
        return graph

    head = nn.Sequential(nn.Conv2d(5, 4, 3), nn.BatchNorm2d(4))
    plain = shake(nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), head))
    convert_(plain, CBN(window=1), data)
    compiled = copy.deepcopy(plain)
    runs = torch.compile(compiled, backend=backend) if how == "torch.compile" else compiled
    if how != "torch.compile":
        (compiled if how == "model.compile" else compiled[2]).compile(backend=backend)
    for batches in (data.split(2), data.split(3)):
        count = len(graphs)
        assert recalibrate_(runs, batches) == recalibrate_(plain, batches) == 6
        assert len(graphs) == count
        torch.testing.assert_close(compiled.state_dict(), plain.state_dict(), rtol=0, atol=0)
        out = runs.eval()(data)
        torch.testing.assert_close(out, plain.eval()(data), **SAME)
        torch.testing.assert_close(compiled.state_dict(), plain.state_dict(), rtol=0, atol=0)
        counts.append(len(graphs))
    assert counts[0] == counts[1] > 0
