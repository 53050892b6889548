"""Proxy Norm against its equations, in every form an activation is called in, and among what programs do around it."""

import copy
import io
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import anybatch as ab
from anybatch.core.quadrature import standard_normal
from anybatch.nn import ProxyNormalization

from .selection import usually
from .tolerances import HALF, ORACLE, REORDERED, SAME

D = torch.float64
SHAPES = [(5, 4), (1, 4), (3, 4, 7), (2, 4, 5, 3), (1, 4, 1, 1), (3, 4, 2, 3, 2)]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)

THEN_RELU = "then relu; adds proxy_weight and proxy_bias"


def by_channel(v: Tensor, x: Tensor) -> Tensor:
    return v.view(1, -1, *[1] * (x.dim() - 2))


def written_out(x: Tensor, norm: ProxyNormalization, act: Callable[[Tensor], Tensor] | None) -> Tensor:
    """The equations, for a layer with quantiles; ``act`` takes (*, C) in its last dimension's order of channels."""
    groups = norm.groups if norm.base == "group" else 1
    rows = x.reshape(len(x), groups, -1)
    centred = rows - rows.mean(-1, keepdim=True)
    y = (centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt()).reshape(x.shape)
    if act is None:
        return by_channel(norm.weight, x) * y
    i = torch.arange(norm.points, dtype=D)
    q = torch.distributions.Normal(torch.zeros((), dtype=D), 1.0).icdf((i + 0.5) / norm.points)
    p = norm.proxy_bias + (1 + norm.proxy_weight) * q[:, None]
    a = act(norm.weight * p + norm.bias)
    mean, var = a.mean(0), a.var(0, correction=0)
    out = act((by_channel(norm.weight, x) * y + by_channel(norm.bias, x)).movedim(1, -1)).movedim(-1, 1)
    return (out - by_channel(mean, x)) / (by_channel(var, x) + norm.proxy_eps).sqrt()


def layer(activation: str = "relu", channels: int = 4, **options) -> ProxyNormalization:
    norm = ProxyNormalization(channels, activation, dtype=D, **options)
    with torch.no_grad():
        for p in norm.parameters():
            p.normal_()
    return norm


def assert_same(x: Tensor, mine: Tensor, theirs: Tensor, parameters: list[Tensor]) -> None:
    torch.testing.assert_close(mine, theirs, **ORACLE)
    assert type(mine) is Tensor
    wanted, cotangent = [x, *parameters], torch.randn_like(mine)
    for a, b in zip(
        torch.autograd.grad(mine, wanted, cotangent), torch.autograd.grad(theirs, wanted, cotangent), strict=True
    ):
        torch.testing.assert_close(a, b, **ORACLE)


def prelu(channels: int = 4) -> nn.PReLU:
    module = nn.PReLU(channels, dtype=D)
    with torch.no_grad():
        module.weight.uniform_(-1, 1)
    return module


FORMS = {
    "relu": [torch.relu, F.relu, Tensor.relu, nn.ReLU(), lambda u: F.relu(input=u)],
    "relu in place": [Tensor.relu_, nn.ReLU(inplace=True), lambda u: F.relu(u, inplace=True)],
    "gelu": [F.gelu, nn.GELU()],
    "gelu tanh": [nn.GELU("tanh"), lambda u: F.gelu(u, approximate="tanh")],
    "silu": [F.silu, nn.SiLU(), nn.SiLU(inplace=True)],
    "leaky_relu": [lambda u: F.leaky_relu(u, 0.3), nn.LeakyReLU(0.3), nn.LeakyReLU(0.3, inplace=True)],
    "hardtanh": [nn.ReLU6(), lambda u: F.hardtanh(u, 0.0, 6.0), lambda u: F.hardtanh_(u, min_val=0, max_val=6)],
    "clamp": [lambda u: u.clamp(-0.5, 1), lambda u: u.clamp_(max=1, min=-0.5), lambda u: torch.clamp(u, -0.5, 1)],
    "tanh": [torch.tanh, nn.Tanh(), F.tanh, Tensor.tanh_],
}


@every_shape
@pytest.mark.parametrize("kind", FORMS)
def test_outputs_and_every_gradient_in_every_form(kind: str, shape: tuple[int, ...]) -> None:
    norm = layer(kind.split()[0])
    x = torch.randn(shape, dtype=D, requires_grad=True)
    for form in FORMS[kind]:
        expected = written_out(x, norm, lambda t, form=form: form(t.clone()))
        assert_same(x, form(norm(x)), expected, list(norm.parameters()))


@every_shape
@pytest.mark.parametrize("base", ["layer", "group"])
def test_prelu_with_a_weight_a_channel(base: str, shape: tuple[int, ...]) -> None:
    act, norm = prelu(), layer("prelu", base=base, groups=2)
    x = (torch.randn(shape, dtype=D) + 3).requires_grad_()
    expected = written_out(x, norm, lambda t: torch.where(t > 0, t, act.weight * t))
    assert_same(x, act(norm(x)), expected, [*norm.parameters(), act.weight])


@every_shape
def test_no_activation_is_scale_only(shape: tuple[int, ...]) -> None:
    norm = layer("", base="group", groups=2)
    assert [n for n, _ in norm.named_parameters()] == ["weight", "bias"]
    x = torch.randn(shape, dtype=D, requires_grad=True)
    assert_same(x, norm(x), written_out(x, norm, None), [norm.weight])
    norm(x).sum().backward()
    assert (norm.bias.grad == 0).all()


@given(
    n=st.integers(1, 4), groups=st.integers(1, 3), size=st.integers(1, 3),
    spatial=st.lists(st.integers(1, 4), max_size=3), points=st.integers(2, 30),
)  # fmt: skip
def test_any_shape(n: int, groups: int, size: int, spatial: list[int], points: int) -> None:
    norm = layer("silu", groups * size, base="group", groups=groups, points=points)
    x = torch.randn(n, groups * size, *spatial, dtype=D, requires_grad=True)
    assert_same(x, F.silu(norm(x)), written_out(x, norm, F.silu), list(norm.parameters()))


def test_training_is_evaluation_and_asks_no_other_example() -> None:
    norm = layer()
    before = copy.deepcopy(norm.state_dict())
    x = torch.randn(3, 4, 5, 5, dtype=D)
    z = norm(x).relu()
    torch.testing.assert_close(norm(x[1:2]).relu(), z[1:2], **ORACLE)
    assert all(torch.equal(v, before[k]) for k, v in norm.state_dict().items())
    assert torch.equal(norm.eval()(x).relu(), z)


def test_the_new_parameters_do_not_matter_where_they_are_zero_and_gamma_beta_are_plain() -> None:
    """P is then standard normal, and ReLU's mean and variance are 1 / sqrt(2 pi) and 1/2 - 1 / (2 pi)."""
    norm, x = ProxyNormalization(3, "relu", dtype=D, quadrature="gauss-hermite"), torch.randn(2, 3, 4, dtype=D)
    y = F.layer_norm(x, (3, 4), eps=norm.eps)
    mean, var = 1 / math.sqrt(2 * math.pi), 0.5 - 0.5 / math.pi
    # The kink costs the rule about 1 / points.
    torch.testing.assert_close(norm(x).relu(), (y.relu() - mean) / math.sqrt(var + 0.03), rtol=5e-3, atol=5e-3)


# Of n quantiles each stands for a cell of probability 1 / n. What a cell loses is its own spread: for the outermost, as
# wide as the tail, about 1 / n of a deviation; those within add up to less. Gauss-Hermite errs at a kink by about one
# spacing of its nodes squared, pi^2 / 2n, times the density there, 0.4.
@pytest.mark.parametrize("kind", ["quantiles", "gauss-hermite"])
@pytest.mark.parametrize(("mean", "deviation"), [(0.0, 1.0), (0.7, 0.4), (-1.5, 2.0), (3.0, 0.5)])
def test_moments_of_relu_in_closed_form(kind: str, mean: float, deviation: float) -> None:
    n = 200
    nodes, shares = standard_normal(kind, n, D, torch.device("cpu"))
    a = (mean + deviation * nodes).relu()
    t = mean / deviation
    cdf, density = 0.5 * (1 + math.erf(t / math.sqrt(2))), math.exp(-t * t / 2) / math.sqrt(2 * math.pi)
    first = mean * cdf + deviation * density
    second = (mean**2 + deviation**2) * cdf + mean * deviation * density
    assert abs((shares * a).sum() - first) < 2 / n * deviation
    assert abs((shares * a.square()).sum() - second) < 2 / n * deviation * (abs(mean) + 2 * deviation)


@pytest.mark.parametrize("func", [F.gelu, F.silu, torch.tanh, F.softplus], ids=lambda f: f.__name__)
def test_the_quadratures_agree_on_smooth_functions(func: Callable[[Tensor], Tensor]) -> None:
    """Gauss-Hermite converges fast there; a hundred times the quantiles differ from it by a hundredth of theirs."""
    means = []
    for kind, points in (("gauss-hermite", 60), ("gauss-hermite", 90), ("quantiles", 20000)):
        nodes, shares = standard_normal(kind, points, D, torch.device("cpu"))
        values = func(0.3 + 1.2 * nodes)
        means.append(torch.stack([(shares * values).sum(), (shares * values.square()).sum()]))
    torch.testing.assert_close(means[0], means[1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(means[0], means[2], rtol=2e-4, atol=2e-4)


def test_gauss_hermite_is_exact_for_polynomials() -> None:
    nodes, shares = standard_normal("gauss-hermite", 9, D, torch.device("cpu"))
    powers = [(shares * nodes**k).sum().item() for k in range(9)]
    assert powers == pytest.approx([1, 0, 1, 0, 3, 0, 15, 0, 105], rel=1e-12, abs=1e-12)


class BasicBlock(nn.Module):
    """torchvision's, with its one ReLU for two places."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride > 1:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += x if self.downsample is None else self.downsample(x)
        return self.relu(y)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu = nn.Conv2d(3, 4, 3, 2, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.layer1, self.layer2 = BasicBlock(4, 4), BasicBlock(4, 8, 2)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        return self.fc(self.layer2(self.layer1(x)).mean((2, 3)))


def net(dtype: torch.dtype = torch.float32, **options) -> Net:
    torch.manual_seed(3)
    model = Net().to(dtype)
    ab.convert_(model, ab.ProxyNorm(**options), example_inputs=torch.randn(1, 3, 15, 13, dtype=dtype))
    return model


def test_a_stock_resnet() -> None:
    """Norms before the shared ReLU get the proxy, those before a sum the scale; the network is what is written out."""
    model = Net().to(D)
    names, identities = list(model.state_dict()), {n: id(p) for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(2, 3, 15, 13, dtype=D)
    report = ab.convert_(model, ab.ProxyNorm(), example_inputs=x, optimizer=optimizer)
    notes = {row.name: row.reason for row in report.converted}
    without = "no activation after it: scale only, its bias is unused"
    assert notes == {
        "bn1": THEN_RELU, "layer1.bn1": THEN_RELU, "layer1.bn2": without, "layer2.bn1": THEN_RELU,
        "layer2.bn2": without, "layer2.downsample.1": without,
    }  # fmt: skip
    assert [n for n in model.state_dict() if n in names] == names
    assert all(id(p) == identities[n] for n, p in model.named_parameters() if n in identities)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}

    shaken = [m for m in model.modules() if isinstance(m, ProxyNormalization)]
    with torch.no_grad():
        for norm in shaken:
            for p in norm.parameters():
                p.add_(0.3 * torch.randn_like(p))

    def relu(x: Tensor, norm: ProxyNormalization) -> Tensor:
        return written_out(x, norm, torch.relu)

    def block(x: Tensor, m: BasicBlock) -> Tensor:
        y = written_out(m.conv2(relu(m.conv1(x), m.bn1)), m.bn2, None)
        down = x if m.downsample is None else written_out(m.downsample[0](x), m.downsample[1], None)
        return (y + down).relu()

    y = block(block(relu(model.conv1(x), model.bn1), model.layer1), model.layer2)
    wanted = [p for n, p in model.named_parameters() if not ("bn2.bias" in n or "downsample.1.bias" in n)]
    x.requires_grad_()
    y = block(block(relu(model.conv1(x), model.bn1), model.layer1), model.layer2)
    assert_same(x, model(x), model.fc(y.mean((2, 3))), wanted)


def test_the_report_names_a_norm_that_the_example_run_never_called() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    model[0].idle = nn.BatchNorm2d(4)
    report = ab.convert_(model, ab.ProxyNorm(), example_inputs=torch.randn(1, 3, 2, 2))
    notes = {row.name: row.reason for row in report.rows}
    assert notes == {
        "0.idle": "the example run never called it: scale only, its bias is unused",
        "1": THEN_RELU,
    }


def test_taken_back_and_refused() -> None:
    model = net()
    x = torch.randn(2, 3, 15, 13)
    with pytest.raises(ab.AnybatchError, match="more than a scale and a shift"):
        ab.fold(model.eval(), example_inputs=x)
    report = ab.revert_(model)
    assert all("may change" in row.reason for row in report.rows)
    assert "its proxy_weight and proxy_bias went" in report.rows[0].reason
    assert list(model.state_dict()) == list(Net().state_dict())
    with pytest.raises(ab.AnybatchError, match="pass example_inputs"):
        ab.convert_(model, ab.ProxyNorm())
    with pytest.raises(ab.AnybatchError, match=r"'bn1'.*groups=32 does not divide 4 channels; choose one of 1, 2, 4"):
        ab.convert_(model, ab.ProxyNorm(base="group"), example_inputs=x)
    assert type(model.bn1) is nn.BatchNorm2d
    report = ab.convert_(model, ab.ProxyNorm(base="group", groups=2), example_inputs=x)
    assert len(report.converted) == 6
    report = ab.convert_(model, ab.ProxyNorm(points=50), example_inputs=x)  # over itself
    assert model.bn1.points == 50
    assert model(x).isfinite().all()
    ab.convert_(model, ab.CBN(window=2), example_inputs=x)
    assert list(model.state_dict()) == list(Net().state_dict())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"activation": "rellu"}, "activation='rellu'"),
        ({"base": "batch"}, "base='batch'; choose one of 'layer', 'group'"),
        ({"quadrature": "simpson"}, "'quantiles', 'gauss-hermite'"),
        ({"points": 1}, "points=1"),
        ({"groups": 0}, "groups=0"),
        ({"proxy_eps": -1}, "proxy_eps=-1"),
        ({"base": "group", "groups": 3}, "groups=3 does not divide 4 channels; choose one of 1, 2, 4"),
    ],
    ids=str,
)
def test_options_out_of_range(options: dict, said: str) -> None:
    with pytest.raises(ab.AnybatchError, match=said):
        ProxyNormalization(4, **options)


def test_a_model_that_runs_differently_now_is_told_so() -> None:
    class Fickle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn, self.after = nn.BatchNorm2d(3), F.relu

        def forward(self, x: Tensor) -> Tensor:
            return self.after(self.bn(x))

    model, x = Fickle(), torch.randn(2, 3, 4, 4)
    ab.convert_(model, ab.ProxyNorm(), example_inputs=x)
    model(x)
    for other in (
        F.silu, lambda u: u + 1, lambda u: 1 + u, lambda u: u.mean(), lambda u: torch.cat([u, u]), lambda u: u.add_(1),
        lambda u: F.dropout(u, 0.5), lambda u: u[0], lambda u: F.conv2d(u, torch.ones(3, 3, 1, 1)), F.relu6,
    ):  # fmt: skip
        model.after = other
        with pytest.raises(ab.AnybatchError, match=r"was to go to relu and is given to .*[Cc]onvert the model again"):
            model(x)
    model.after = F.silu
    ab.convert_(model, ab.ProxyNorm(), example_inputs=x)
    assert model.bn.activation == "silu"
    model(x)


def test_looking_at_the_output_is_no_use_of_it() -> None:
    norm, x = layer(), torch.randn(2, 4, 3, 5, dtype=D)
    u = norm(x)
    assert u.shape == x.shape == u.size()
    assert (u.dim(), u.ndim, u.dtype, u.device, len(u)) == (4, 4, D, x.device, 2)
    assert u.is_floating_point() and not u.is_cuda and u.requires_grad and u.numel() == 120  # noqa: PT018
    assert type(u.detach()) is type(u.data) is Tensor
    assert "grad_fn" in repr(u)
    seen = []
    u.register_hook(lambda g: seen.append(g.shape))
    z = nn.Identity()(F.dropout(u.contiguous(), 0.5, training=False)).relu()
    torch.testing.assert_close(z, written_out(x, norm, torch.relu), **ORACLE)
    z.backward(torch.randn_like(z))
    assert seen == [x.shape]


def test_an_activation_in_place_as_a_statement() -> None:
    norm, x = layer(), torch.randn(2, 4, 3, 5, dtype=D, requires_grad=True)
    u = norm(x)
    u.relu_()
    assert_same(x, u * 1, written_out(x, norm, torch.relu), list(norm.parameters()))
    assert torch.cat([u, u]).shape == (4, 4, 3, 5)


@pytest.mark.parametrize("hook", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_backward_hooks_on_the_norm(hook: str) -> None:
    norm, x, calls = layer(), torch.randn(2, 4, 3, 5, dtype=D, requires_grad=True), []
    getattr(norm, hook)(lambda *args: calls.append(1) and None)
    norm.register_forward_hook(lambda module, args, output: calls.append(output.detach().mean()) and None)
    for form in (torch.relu, lambda u: F.relu(u)):
        assert_same(x, form(norm(x)), written_out(x, norm, torch.relu), list(norm.parameters()))
    assert len(calls) == 4


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("parts", ["norm and activation", "norm alone"])
def test_checkpointing_changes_nothing(reentrant: bool, inplace: bool, parts: str) -> None:
    norm, act = layer(), nn.ReLU(inplace)
    x = torch.randn(2, 4, 3, 5, dtype=D, requires_grad=True)
    g, results = torch.randn(2, 4, 3, 5, dtype=D), []
    for checkpointing in (False, True):
        if not checkpointing:
            out = act(norm(x))
        elif parts == "norm alone":
            out = act(checkpoint(norm, x, use_reentrant=reentrant))
        else:
            out = checkpoint(nn.Sequential(norm, act), x, use_reentrant=reentrant)
        norm.zero_grad()
        x.grad = None
        out.backward(g)
        results.append([out.detach(), x.grad, *(p.grad for p in norm.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.filterwarnings("default")  # the compiler reads .grad of non-leaf tensors, and says so
@pytest.mark.parametrize("training", usually([True], [True, False]))
def test_a_compiled_resnet(training: bool) -> None:
    model = net().train(training)
    compiled, x = torch.compile(model, backend="aot_eager"), torch.randn(2, 3, 15, 13)
    for n in (2, 1):
        torch.testing.assert_close(compiled(x[:n]), model(x[:n]), **REORDERED)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), **REORDERED)


def test_autocast_and_models_in_half_precision() -> None:
    model, x = net(), torch.randn(2, 3, 15, 13)
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
        out.float().square().mean().backward()
    assert out.dtype == torch.bfloat16
    tolerance = {k: 4 * v for k, v in HALF[torch.bfloat16].items()}  # some ten roundings in a row
    torch.testing.assert_close(out.float(), expected, **tolerance)
    assert all(p.grad.isfinite().all() for p in model.parameters())
    torch.testing.assert_close(copy.deepcopy(model).bfloat16()(x.bfloat16()).float(), expected, **tolerance)
    act, norm = nn.PReLU(4).bfloat16(), ProxyNormalization(4, "prelu").bfloat16()
    assert act(norm(torch.randn(2, 4, 3, 3).bfloat16())).dtype == torch.bfloat16


@pytest.mark.parametrize("training", [True, False])
def test_an_empty_batch_gives_every_parameter_its_gradient(training: bool) -> None:
    for norm in (layer("prelu").train(training), layer("").train(training)):
        act = prelu() if norm.activation else nn.Identity()
        out = act(norm(torch.randn(0, 4, 3, 3, dtype=D)))
        assert out.shape == (0, 4, 3, 3)
        out.sum().backward()
        assert all((p.grad == 0).all() for p in [*norm.parameters(), *act.parameters()])


class Counted(ProxyNormalization):
    """Counts how often the proxy's moments are computed."""

    count = 0

    def proxy_moments(self, *args):
        self.count += 1
        return super().proxy_moments(*args)


@torch.no_grad()
def test_moments_are_computed_anew_when_something_changed() -> None:
    torch.manual_seed(0)
    norm, act, x = Counted(4, "prelu", dtype=D).eval(), prelu(), torch.randn(2, 4, 3, 3, dtype=D)
    state = {k: torch.randn_like(v) if v.is_floating_point() else v for k, v in norm.state_dict().items()}

    def zero_the_weight() -> None:
        norm.proxy_weight.zero_()

    def optimizer_step() -> None:
        optimizer = torch.optim.SGD([norm.bias], lr=0.5)
        norm.bias.grad = torch.ones_like(norm.bias)
        optimizer.step()

    def another_parameter() -> None:
        norm.weight = nn.Parameter(torch.randn(4, dtype=D))

    for change in (
        lambda: None, zero_the_weight, optimizer_step, another_parameter, lambda: norm.load_state_dict(state),
        lambda: norm.load_state_dict({k: v.clone() for k, v in state.items()}, assign=True),
        lambda: act.weight.mul_(0.5), lambda: norm.float().double(), lambda: norm.train().eval(),
        lambda: (norm.proxy_bias.data.add_(1), norm.eval()),
    ):  # fmt: skip
        change()
        before = norm.count
        outs = [act(norm(x)) for _ in range(3)]
        assert norm.count == before + 1
        for out in outs:
            expected = written_out(x, norm, lambda t: torch.where(t > 0, t, act.weight * t))
            torch.testing.assert_close(out, expected, **ORACLE)


@torch.no_grad()
def test_another_slope_is_another_activation() -> None:
    norm, x = Counted(4, "leaky_relu", dtype=D).eval(), torch.randn(2, 4, 3, 3, dtype=D)
    for slope in (0.1, 0.1, 0.4, 0.1):
        expected = written_out(x, norm, lambda t, slope=slope: F.leaky_relu(t, slope))
        torch.testing.assert_close(F.leaky_relu(norm(x), slope), expected, **ORACLE)
        torch.testing.assert_close(F.leaky_relu(norm(x), negative_slope=slope), expected, **ORACLE)
    assert norm.count == 3


def test_inference_mode_before_everything_else() -> None:
    """What is remembered from it serves evaluation without gradients; training computes its own."""
    norm, x = layer().eval(), torch.randn(2, 4, 3, 3, dtype=D, requires_grad=True)
    standard_normal.cache_clear()
    with torch.inference_mode():
        expected = norm(x).relu()
    with torch.no_grad():
        assert torch.equal(norm(x).relu(), expected)
    assert_same(x, norm(x).relu(), written_out(x, norm, torch.relu), list(norm.parameters()))
    with torch.inference_mode():
        made_there = layer().eval()
        for _ in range(2):
            made_there.weight.mul_(2)
            torch.testing.assert_close(made_there(x).relu(), written_out(x, made_there, torch.relu), **ORACLE)


def test_copies_are_on_their_own_and_tensors_can_be_saved() -> None:
    norm, x = layer().eval(), torch.randn(2, 4, 3, 3, dtype=D)
    with torch.no_grad():
        z = norm(x).relu()
        twin = copy.deepcopy(norm)
        twin.weight.mul_(2)
        assert torch.equal(norm(x).relu(), z)
        torch.testing.assert_close(twin(x).relu(), written_out(x, twin, torch.relu), **ORACLE)
        file = io.BytesIO()
        torch.save(norm(x).detach(), file)
    torch.testing.assert_close(norm.float()(x.float()).relu().double(), z, **SAME)


class Activated(nn.Module):
    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.bn, self.activation = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), activation

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.bn(self.conv(x)))


@pytest.mark.parametrize(
    "activation",
    [
        *(F.relu, Tensor.relu_, nn.ReLU(inplace=True), nn.PReLU(4), nn.GELU("tanh"), nn.Hardswish(), nn.Hardsigmoid()),
        *(F.tanh, lambda y: F.silu(input=y), lambda y: y.clamp(0, 6), lambda y: (y.relu_(), y)[1]),
    ],
)
@pytest.mark.parametrize("quadrature", ["quantiles", "gauss-hermite"])
def test_an_exported_network(activation: Callable[[Tensor], Tensor], quadrature: str) -> None:
    """By torch.export as it is by default, for any number of examples: in place, as a method, by name."""
    model, x = Activated(activation), torch.randn(5, 3, 6, 7)
    report = ab.convert_(model, ab.ProxyNorm(quadrature=quadrature, points=9), example_inputs=x)
    assert report.rows[0].reason.startswith("then ")
    for parameter in model.eval().bn.parameters():
        nn.init.normal_(parameter)
    sizes = ({0: torch.export.Dim("n")},)
    graph = torch.export.export(model, (x[:3],), dynamic_shapes=sizes).module()
    torch.testing.assert_close(graph(x), model(x), **REORDERED)


def test_an_export_that_goes_astray_is_refused() -> None:
    model, x = Activated(F.relu), torch.randn(2, 3, 6, 7)
    ab.convert_(model, ab.ProxyNorm(), example_inputs=x)
    for astray in (lambda y: y * 2, lambda y: F.relu(y.mul_(2))):
        model.activation = astray
        with pytest.raises(ab.AnybatchError, match="was to go to relu and is given to mul"):
            torch.export.export(model.eval(), (x,))


@pytest.mark.parametrize("activation", [nn.Hardswish(), nn.Hardsigmoid()])
def test_activations_that_the_compiler_does_not_show_are_refused(activation: nn.Module) -> None:
    """torch's compiler does not hand them to a subclass of tensor: unrefused, the graph would leave the proxy out."""
    model, x = Activated(activation), torch.randn(2, 3, 6, 7)
    ab.convert_(model, ab.ProxyNorm(), example_inputs=x)
    for fullgraph in (True, False):
        torch._dynamo.reset()
        with pytest.raises(Exception, match=r"Proxy Norm: torch\.compile .*cannot follow .*hardswish and hardsigmoid"):
            torch.compile(model.eval(), backend="eager", fullgraph=fullgraph)(x)
