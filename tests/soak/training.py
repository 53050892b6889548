"""A configuration's training as users run it, and its reference: eager, float64, in one process.

The reference also runs with rounding errors: what goes into a map, its weight and bias, what comes out of it and out of
an activation, and their gradients, are multiplied by 1 + e, |e| <= u at random, the unit roundoff of the precision that
is held against it (Monte Carlo arithmetic). How far that moves a result is how far rounding may, amplified or not.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

import anybatch as ab
from anybatch.core.linear_map import MAPS
from anybatch.methods import parse_method

from .configurations import Configuration
from .nets import NETS, SHAPES, Net, memory_format

__all__ = ["Results", "reference", "trained"]

Results = dict[str, Tensor]
D = torch.float64


def trained(rank: int, world: int, configuration: Configuration) -> Results:
    """What ``rank`` of ``world`` gets from the configuration's training, by name."""
    dtype = torch.float64 if configuration.precision == "float64" else torch.float32
    half = {"float16": torch.float16, "bfloat16": torch.bfloat16}.get(configuration.precision)
    with quiet(configuration):
        net = build(configuration, dtype)
        net.checkpointing = configuration.checkpointing
        layout = memory_format(configuration.net) if configuration.channels_last else torch.contiguous_format
        net.to(memory_format=layout)
        optimizer = optimizer_of(net, configuration)
        # A scale at which nothing overflows: a skipped step is no step of the reference.
        scaler = GradScaler("cpu", init_scale=2.0**4, enabled=half is torch.float16)
        ab.attach(net, optimizer, scaler=scaler)
        run: nn.Module = net
        if configuration.compiler != "none":
            torch._dynamo.reset()
            run = torch.compile(net, backend=configuration.compiler, fullgraph=True)
        if world > 1:
            run = DistributedDataParallel(run, forward_sync_buffers=configuration.broadcast)
        seen: Results = {}
        for step, micro_batches in enumerate(batches(configuration)):
            optimizer.zero_grad()
            for i, parts in enumerate(micro_batches):
                x, cotangent = (t.to(dtype) for t in parts[rank])
                x = x.to(memory_format=layout).requires_grad_()
                more = world > 1 and i < len(micro_batches) - 1
                with run.no_sync() if more else contextlib.nullcontext():
                    with torch.autocast("cpu", half, enabled=half is not None):
                        out = run(x)
                    scaler.scale((out.to(dtype) * cotangent).sum()).backward()
                seen |= {f"output {step}.{i}": out.detach(), f"gradient of x {step}.{i}": x.grad / scaler.get_scale()}
            scaler.unscale_(optimizer)
            seen |= gradients(net, step)
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() in (1.0, 2.0**4), "a gradient overflowed, and the step was skipped"
        with torch.autocast("cpu", half, enabled=half is not None):
            return seen | final(net, configuration, dtype)


def reference(configuration: Configuration, roundoff: float = 0.0, seed: int = 0) -> list[Results]:
    """What every rank should get, with errors of ``roundoff`` and the random ``seed`` of them."""
    world, synced = configuration.world, configuration.synced
    nets = [build(configuration, D) for _ in range(1 if synced else world)]
    optimizers = [optimizer_of(net, configuration) for net in nets]
    torch.manual_seed(seed)
    for net, optimizer in zip(nets, optimizers, strict=True):
        ab.attach(net, optimizer)
        if roundoff:
            add_rounding(net, roundoff)
    seen: list[Results] = [{} for _ in range(world)]
    broadcast = configuration.broadcast
    for step, micro_batches in enumerate(batches(configuration)):
        for optimizer in optimizers:
            optimizer.zero_grad()
        for i, parts in enumerate(micro_batches):
            if broadcast:
                for net in nets[1:]:
                    copy_buffers(nets[0], net)
            broadcast = configuration.broadcast and i == len(micro_batches) - 1  # none after a no_sync() block
            if synced:
                parts = [tuple(map(torch.cat, zip(*parts, strict=True)))]
            got: list[tuple[Tensor, Tensor]] = []
            for net, (x, cotangent) in zip(nets, parts, strict=True):
                out = rounded(net(x.requires_grad_()), roundoff)
                out.backward(cotangent)
                got.append((out.detach(), x.grad))
            if synced:
                examples = configuration.batches[step][i]
                got = list(zip(*(t.split(examples) for t in got[0]), strict=True))
            for results, (out, grad) in zip(seen, got, strict=True):
                results |= {f"output {step}.{i}": out, f"gradient of x {step}.{i}": grad}
        average_gradients(nets, world)
        for rank, results in enumerate(seen):
            results |= gradients(nets[rank % len(nets)], step)
        for optimizer in optimizers:
            optimizer.step()
    return [results | final(nets[r % len(nets)], configuration, D) for r, results in enumerate(seen)]


def build(configuration: Configuration, dtype: torch.dtype) -> Net:
    """Converted, weights and statistics away from where they begin, parts of it frozen."""
    torch.manual_seed(configuration.seed)
    net = NETS[configuration.net]()
    example = torch.randn(2, *SHAPES[configuration.net][0])
    ab.convert_(net, parse_method(configuration.method), example_inputs=example)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
        for norm in norms(net):
            if getattr(norm, "running_mean", None) is not None:
                norm.running_mean.normal_(0, 0.3)
                norm.running_var.uniform_(0.5, 2)
    freeze(net, configuration.frozen)
    return net.to(dtype)


def norms(net: nn.Module) -> list[nn.Module]:
    return [m for m in net.modules() if isinstance(m, (_BatchNorm, nn.GroupNorm))]


def freeze(net: nn.Module, what: str) -> None:
    layers = norms(net)
    if what in ("norms", "first norm"):
        for norm in layers if what == "norms" else layers[:1]:
            norm.eval()
    for module in {"affine": layers, "first map": [m for m in net.modules() if isinstance(m, MAPS)][:1]}.get(what, ()):
        module.requires_grad_(False)


def optimizer_of(net: nn.Module, configuration: Configuration) -> Optimizer:
    """Tame: training itself is not to amplify a rounding error."""
    parameters = [p for p in net.parameters() if p.requires_grad]
    if configuration.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)
    # Its usual eps makes whole steps of gradients that are nothing but rounding, such as a bias has before a norm.
    return torch.optim.AdamW(parameters, lr=0.003, eps=0.1, weight_decay=0.01)


def batches(configuration: Configuration) -> Iterator[list[list[tuple[Tensor, Tensor]]]]:
    """For every step, of every micro-batch and rank, images and the cotangents of their outputs."""
    generator = torch.Generator().manual_seed(configuration.seed)
    like = NETS[configuration.net]().to(D).eval()
    for micro_batches, shape in zip(configuration.batches, configuration.shapes, strict=True):
        size = SHAPES[configuration.net][shape]
        with torch.no_grad():
            out = like(torch.zeros(1, *size, dtype=D)).shape[1:]
        yield [
            [
                (
                    torch.randn(n, *size, generator=generator, dtype=D).float().to(D),
                    torch.randn(n, *out, generator=generator, dtype=D).float().to(D) / out.numel() ** 0.5,
                )
                for n in ranks
            ]
            for ranks in micro_batches
        ]


def gradients(net: nn.Module, step: int) -> Results:
    """Copies."""
    return {f"gradient of {name} {step}": p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def average_gradients(nets: list[Net], world: int) -> None:
    """As DistributedDataParallel does it; of synced ranks the whole batch's gradient is the sum."""
    for parameters in zip(*(net.parameters() for net in nets), strict=True):
        grads = [p.grad for p in parameters if p.grad is not None]
        for p in parameters if grads else ():
            p.grad = torch.stack(grads).sum(0) / world


def copy_buffers(source: nn.Module, target: nn.Module) -> None:
    for a, b in zip(source.buffers(), target.buffers(), strict=True):
        b.copy_(a)


def final(net: Net, configuration: Configuration, dtype: torch.dtype) -> Results:
    """Parameters, running statistics, and what the net makes of new images in evaluation."""
    net.eval().checkpointing = "none"
    generator = torch.Generator().manual_seed(configuration.seed + 1)
    x = torch.randn(2, *SHAPES[configuration.net][0], generator=generator, dtype=D).to(dtype)
    with torch.no_grad():
        evaluated = net(x)
    parameters = {f"parameter {name}": p.detach().clone() for name, p in net.named_parameters()}
    statistics = {f"statistic {name}": b.clone() for name, b in net.named_buffers()}
    return {"evaluated": evaluated, **parameters, **statistics}


def add_rounding(net: nn.Module, roundoff: float) -> None:
    """Errors in every map, which its norm takes for what the map put out, and behind every activation.

    Those of weights stay: a weight that hardly moves is rounded in the same way at every step.
    """
    for module in net.modules():
        if isinstance(module, MAPS):
            factors = {name: _with_errors(torch.ones_like(p), roundoff) for name, p in module.named_parameters()}
            module.forward = partial(rounded_map, module, module.forward, factors, roundoff)
        elif isinstance(module, nn.SiLU):
            module.forward = partial(rounded_activation, module.forward, roundoff)


def rounded_map(
    module: nn.Module, forward: Callable[[Tensor], Tensor], factors: Results, roundoff: float, x: Tensor
) -> Tensor:
    module.__dict__.update({name: module._parameters[name] * factor for name, factor in factors.items()})
    try:  # torch finds them there first
        return rounded(forward(rounded(x, roundoff)), roundoff)
    finally:
        for name in factors:
            del module.__dict__[name]


def rounded_activation(forward: Callable[[Tensor], Tensor], roundoff: float, x: Tensor) -> Tensor:
    return rounded(forward(x), roundoff)


def rounded(x: Tensor, roundoff: float) -> Tensor:
    """``x`` with errors, and its gradient with others."""
    return _Rounded.apply(x, roundoff) if roundoff else x


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, roundoff: float) -> Tensor:
        ctx.roundoff = roundoff
        return _with_errors(x, roundoff)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return _with_errors(g, ctx.roundoff), None


def _with_errors(x: Tensor, roundoff: float) -> Tensor:
    return x * (1 + roundoff * (2 * torch.rand_like(x) - 1))


@contextlib.contextmanager
def quiet(configuration: Configuration) -> Iterator[None]:
    """Warnings are errors, but for what torch says of itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if configuration.compiler != "none":
            warnings.simplefilter("ignore")
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        yield
