import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from anybatch.convert import convert_
from anybatch.errors import AnybatchError
from anybatch.inference import recalibrate_
from anybatch.methods import CBN, ProxyNorm

from .small_models import ResNet, SharedHead, shake


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_the_first_norm_gets_the_moments_of_all_data(offset: float) -> None:
    conv = nn.Conv2d(3, 5, 3)
    model, data = nn.Sequential(conv, nn.BatchNorm2d(5)), torch.randn(7, 3, 6, 5) + offset
    assert recalibrate_(model, data.split(3)) == 7  # batches of 3, 3 and 1
    y = conv(data).double()
    torch.testing.assert_close(model[1].running_mean.double(), y.mean((0, 2, 3)), rtol=1e-6, atol=1e-6)
    var = y.var((0, 2, 3), correction=0)
    torch.testing.assert_close(model[1].running_var.double(), var, rtol=1e-3, atol=1e-6)


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


def broken_loader():
    yield torch.randn(2, 3, 15, 13)
    raise Failing


def test_everything_is_put_back_when_it_raises() -> None:
    model = shake(ResNet())
    before, modes = state(model), [module.training for module in model.modules()]
    with pytest.raises(Failing):
        recalibrate_(model, broken_loader())
    with pytest.raises(AnybatchError, match=r"'stem\.1' met moments that are not finite"):
        recalibrate_(model, [torch.full((2, 3, 15, 13), torch.inf)])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_pre_hooks for module in model.modules())


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
