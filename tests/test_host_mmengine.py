"""MMEngine: norms of ``norm_cfg``, and the hook: beside a loop by hand, across a stop, and beside other hooks."""

import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import anybatch as ab

from .lives import assert_same, training_state

with warnings.catch_warnings():
    # MMEngine imports a part of torch that uses torch's own, deprecated, torch.jit.
    warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
    from mmcv.cnn import ConvModule, build_norm_layer, is_norm
    from mmengine.model import BaseModel
    from mmengine.optim import OptimWrapper, OptimWrapperDict, build_optim_wrapper
    from mmengine.runner import Runner

    from anybatch.integrations._by_name import NAMES
    from anybatch.integrations.mmengine import AnybatchHook

pytestmark = [
    # MMEngine builds its singletons again, with arguments that it warns of.
    pytest.mark.filterwarnings("ignore:.*instance named of .* has been created"),
    # Its checkpoints hold objects, which torch refuses but for a variable that it then warns of.
    pytest.mark.filterwarnings("ignore:Environment variable TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD detected"),
]

CBN = {"type": "CBN", "window": 4}


@pytest.fixture(autouse=True)
def trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")


class Net(BaseModel):
    def __init__(self, norm_cfg: Any) -> None:
        torch.manual_seed(7)
        super().__init__()
        self.stem = ConvModule(3, 4, 3, norm_cfg=norm_cfg)
        self.neck = ConvModule(4, 5, 3, norm_cfg=norm_cfg, act_cfg=None)

    def init_weights(self) -> None:
        """As built: the runner would draw anew."""

    def forward(self, images: list[Tensor], labels: list[Tensor], mode: str = "tensor") -> Any:
        scores = self.neck(self.stem(torch.stack(images))).mean((2, 3))
        if mode == "tensor":
            return scores
        return {"loss": nn.functional.cross_entropy(scores, torch.stack(labels))}


class Examples(torch.utils.data.Dataset):
    """Twelve of them; to look at one moves the random state, as an augmentation does."""

    def __init__(self) -> None:
        g = torch.Generator().manual_seed(3)
        self.images = torch.randn(12, 3, 9, 7, generator=g)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        torch.rand(())
        return self.images[i], torch.tensor(i % 5)


def runner(
    folder: Path, iterations: int, model: Any = None, accumulate: int = 1, hooks: Any = None, **options: Any
) -> Any:
    loader = {
        **{"dataset": Examples(), "batch_size": 2, "sampler": {"type": "InfiniteSampler", "shuffle": False}},
        "collate_fn": {"type": "pseudo_collate"},
    }
    runner.made += 1
    return Runner(
        model=Net(CBN) if model is None else model,
        work_dir=str(folder),
        train_dataloader=loader,
        train_cfg={"by_epoch": False, "max_iters": iterations},
        optim_wrapper={
            "optimizer": {"type": "SGD", "lr": 0.05, "momentum": 0.9},
            "accumulative_counts": accumulate,
        },
        default_hooks={"checkpoint": {"type": "CheckpointHook", "by_epoch": False, "interval": 6}},
        custom_hooks=[{"type": h} if isinstance(h, str) else h for h in (["AnybatchHook"] if hooks is None else hooks)],
        log_level="ERROR",
        experiment_name=f"{folder.name}-{runner.made}",
        randomness={"seed": 0},
        **options,
    )


runner.made = 0


def all_of(run: Any) -> Any:
    return training_state(run.model), run.optim_wrapper.optimizer.state_dict()["state"]


@pytest.mark.parametrize("accumulate", [1, 2, 3])
@pytest.mark.parametrize("method", ["CBN", "AccumulatedBN"])
def test_it_is_the_loop_by_hand(method: str, accumulate: int, tmp_path: Path) -> None:
    run = runner(tmp_path, 12, Net({"type": method}), accumulate)
    run.train()

    by_hand = Net({"type": "BN"})
    ab.convert_(by_hand, getattr(ab, method)(), example_inputs=([Examples()[0][0]], []))
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.05, momentum=0.9)
    ab.attach(by_hand, optimizer)
    data = Examples()
    for i in range(12):
        images, labels = zip(*(data[2 * (i % 6) + j] for j in range(2)), strict=True)
        (by_hand(images, labels, mode="loss")["loss"] / accumulate).backward()
        if (i + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
    assert_same(all_of(run), (training_state(by_hand), optimizer.state_dict()["state"]))


@pytest.mark.parametrize("accumulate", [1, 2, 3])
@pytest.mark.parametrize("method", ["CBN", "AccumulatedBN", "IEBN"])
def test_stopped_and_resumed(method: str, accumulate: int, tmp_path: Path) -> None:
    options = {"shortcuts": "converted", "window": 4} if method == "IEBN" else {}

    def net() -> nn.Module:
        return Net({"type": method, **options})

    through = runner(tmp_path / "through", 12, net(), accumulate)
    through.train()
    runner(tmp_path / "stopped", 6, net(), accumulate).train()
    saved = tmp_path / "stopped" / "iter_6.pth"
    resumed = runner(tmp_path / "resumed", 12, net(), accumulate, resume=True, load_from=str(saved))
    resumed.train()
    assert_same(all_of(resumed), all_of(through))
    if method != "AccumulatedBN":
        assert all(training_state(resumed.model)["history"].values())


def test_a_model_converted_before(tmp_path: Path) -> None:
    net = Net({"type": "BN"})
    ab.convert_(net, ab.CBN(window=4), example_inputs=([Examples()[0][0]], []))
    converted, named = runner(tmp_path / "a", 6, net), runner(tmp_path / "b", 6)
    converted.train()
    named.train()
    assert_same(all_of(converted), all_of(named))


def test_an_average_beside_it(tmp_path: Path) -> None:
    """Which copies the model before it is paired."""
    with_average, alone = runner(tmp_path / "a", 6, hooks=["EMAHook", "AnybatchHook"]), runner(tmp_path / "b", 6)
    with_average.train()
    alone.train()
    assert_same(all_of(with_average), all_of(alone))
    saved = torch.load(tmp_path / "a" / "iter_6.pth")
    average = Net({"type": "BN"})
    average.load_state_dict(saved["state_dict"])
    assert not torch.equal(average.stem.conv.weight, alone.model.stem.conv.weight)
    assert saved["anybatch_history"].keys() == {"version", "layers"}


def test_weights_alone_start_without_history(tmp_path: Path) -> None:
    runner(tmp_path / "a", 6).train()
    run = runner(tmp_path / "b", 3, load_from=str(tmp_path / "a" / "iter_6.pth"))
    run.train()
    forwards = [h.forwards for m in run.model.modules() for h in getattr(m, "histories", {}).values()]
    assert forwards == [3, 3]


def test_what_it_logs_and_lets_go_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = runner(tmp_path, 3)
    run.logger.setLevel(logging.INFO)
    said: list[str] = []
    run.logger.info, run.logger.warning = said.append, lambda *_: None  # type: ignore[method-assign]
    run.train()
    assert any("stem.conv" in line and "2 converted, 0 left alone" in line for line in said)
    assert not run.optim_wrapper.optimizer._optimizer_step_post_hooks


def test_example_inputs_of_ones_own(tmp_path: Path) -> None:
    hook = AnybatchHook(example_inputs=([torch.randn(3, 9, 7)], []))
    runner(tmp_path, 1, hooks=[hook]).train()
    assert [row.fed_by for row in hook.report.rows] == [("stem.conv",), ("neck.conv",)]


class Scaled(OptimWrapper):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.loss_scaler = torch.amp.GradScaler("cpu")


@pytest.mark.parametrize("several", [False, True])
def test_every_optimizer_and_its_scaler(several: bool, tmp_path: Path) -> None:
    """MMEngine's own wrapper with a scaler is for GPUs only; the hook goes by the attribute."""
    run, hook = runner(tmp_path, 1, hooks=[]), AnybatchHook()
    run._train_loop = run.build_train_loop(run._train_loop)
    parts = [
        Scaled(torch.optim.SGD(part.parameters(), lr=0.1), accumulative_counts=2)
        for part in ([run.model.stem, run.model.neck] if several else [run.model])
    ]
    run.optim_wrapper = OptimWrapperDict(stem=parts[0], neck=parts[1]) if several else parts[0]
    state = torch.get_rng_state()
    hook.before_train(run)
    assert_same(torch.get_rng_state(), state)  # though the first example was looked at
    assert run.model.stem.bn.loss_scale is parts[-1].loss_scaler._scale
    assert [len(part.optimizer._optimizer_step_post_hooks) for part in parts] == [1] * len(parts)
    hook.after_train(run)
    assert [len(part.optimizer._optimizer_step_post_hooks) for part in parts] == [0] * len(parts)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("IEBN", "ProxyNorm")])
def test_every_method_is_a_norm(name: str) -> None:
    options = {"channel_groups": 4} if name == "BatchGroupNorm" else {}
    called, layer = build_norm_layer({"type": name, "requires_grad": False, **options}, 8, postfix=1)
    assert called == "bn1"
    assert is_norm(layer)
    assert (layer.num_features, layer.eps) == (8, 1e-5)
    assert not any(p.requires_grad for p in layer.parameters())
    if not options and name != "BGN":
        assert list(Net({"type": name}).state_dict()) == list(Net({"type": "BN"}).state_dict())


def test_norms_are_norms_to_the_optimizer() -> None:
    wrapper = build_optim_wrapper(
        Net(CBN),
        {
            "optimizer": {"type": "SGD", "lr": 0.1, "weight_decay": 0.1},
            "paramwise_cfg": {"norm_decay_mult": 0.0},
        },
    )
    decays = {tuple(group["params"][0].shape): group["weight_decay"] for group in wrapper.optimizer.param_groups}
    assert decays == {(4, 3, 3, 3): 0.1, (4,): 0.0, (5, 4, 3, 3): 0.1, (5,): 0.0}
