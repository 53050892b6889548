"""The table, the configs, and what they answer to a slip of the pen."""

import inspect
from pathlib import Path

import pytest
import torch
from torch import nn

import anybatch as ab
from anybatch.nn import CrossIterationBatchNorm
from anybatch.typed import tidy_method


def test_public_names_are_a_decision() -> None:
    assert ab.__all__ == [
        "BGN", "BN", "CBN", "GN", "IEBN", "METHODS", "AccumulatedBN", "AnybatchError", "BatchGroupNorm",
        "BatchRenorm", "ExampleWeighedBN", "GhostBN", "Monitor", "NoNorm", "ProxyNorm", "Report", "advise", "attach",
        "convert_", "diagnose", "fold",
        "history_state_dict", "kernels", "load_history_state_dict", "nn", "param_groups", "parse_method",
        "recalibrate_", "revert_", "tune_example_weight", "weigh_examples_",
    ]  # fmt: skip
    assert ab.nn.__all__ == [
        "AccumulatedBatchNorm", "BatchAndGroupNorm", "BatchGroupNormalization", "BatchRenormalization",
        "CrossIterationBatchNorm", "ExampleWeighedBatchNorm", "GhostBatchNorm", "InstanceEnhancementBatchNorm",
        "InstanceEnhancementCrossIterationBatchNorm", "NoNormalization", "ProxyNormalization",
    ]  # fmt: skip
    assert list(ab.METHODS) == [
        "bn", "gn", "cbn", "cbn-naive", "cbn-paper", "accumulated", "renorm", "bgn", "ghost",
        "batch-group", "iebn", "iebn-cbn", "proxynorm", "proxynorm-group", "weighed", "nonorm",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ab.METHODS)
def test_config_and_layer_are_public(name: str) -> None:
    config = ab.METHODS[name].config
    assert getattr(ab, type(config).__name__) is type(config)
    layer = type(ab.METHODS[name].small.build(nn.BatchNorm2d(8)))
    assert layer.__module__.startswith("torch.nn.") or getattr(ab.nn, layer.__name__) is layer


@pytest.mark.parametrize("name", [name for name, row in ab.METHODS.items() if hasattr(row.config, "layer")])
def test_config_and_layer_have_the_same_defaults(name: str) -> None:
    """For every option that they share; a config may have some for the converter besides."""
    config = type(ab.METHODS[name].config)()
    layer = inspect.signature(config.layer).parameters
    for option, value in config.options.items():
        assert option not in layer or layer[option].default == value, option


@pytest.mark.parametrize(
    ("text", "config"),
    [
        ("bn", ab.BN()),
        ("gn(groups=4)", ab.GN(groups=4)),
        (" cbn ", ab.CBN()),
        ("cbn(window=16, pooling='equal')", ab.CBN(window=16, pooling="equal")),
        ("cbn-naive(window=2)", ab.CBN(window=2, compensate=False)),
        ("cbn-paper(burn_in_steps=9)", ab.CBN.paper(burn_in_steps=9)),
    ],
)
def test_methods_as_typed(text: str, config: object) -> None:
    assert ab.parse_method(text) == config


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cnb", "unknown method 'cnb'; did you mean cbn"),
        ("cbn-papr", "cbn-paper"),
        ("zzz", "bn or gn or cbn or cbn-naive or cbn-paper"),
        ("cbn(window=0)", "window=0; give a whole number of at least 1"),
        ("cbn(window=2.5)", "window=2.5"),
        ("cbn(window=True)", "window=True"),
        ("cbn(gradient='past')", "'history', 'current'"),
        ("cbn(widow=3)", "widow"),
        ("cbn(16)", "by name"),
        ("cbn(window=", "cbn\\(window=16\\)"),
        ("gn(groups=0)", "groups=0"),
    ],
)
def test_slips_are_answered_with_the_mend(text: str, said: str) -> None:
    with pytest.raises(ab.AnybatchError, match=said):
        ab.parse_method(text)


def test_layer_checks_its_options_as_the_config_does() -> None:
    with pytest.raises(ab.AnybatchError, match="window=0"):
        CrossIterationBatchNorm(3, window=0)


@pytest.mark.parametrize(("channels", "groups"), [(12, 4), (48, 16), (64, 32), (7, 1)])
def test_groupnorm_groups_divide_the_channels(channels: int, groups: int) -> None:
    bn = nn.BatchNorm2d(channels)
    layer = ab.GN().build(bn)
    assert layer.num_groups == groups
    assert layer.weight is bn.weight
    assert layer.bias is bn.bias


def test_following_what_does_not_fit_is_refused() -> None:
    norm = CrossIterationBatchNorm(3)
    with pytest.raises(ab.AnybatchError, match=r"ReLU.*Conv2d"):
        norm.follows(nn.ReLU())
    with pytest.raises(ab.AnybatchError, match=r"4 channels.*num_features=3"):
        norm.follows(nn.Conv2d(2, 4, 3))


def test_an_input_that_is_not_the_maps_output_is_refused() -> None:
    conv = nn.Conv2d(2, 3, 3)
    norm = CrossIterationBatchNorm(3).follows(conv)
    x = torch.randn(2, 2, 5, 5)
    with pytest.raises(ab.AnybatchError, match="untouched output of Conv2d"):
        norm(conv(x).relu())
    with pytest.raises(ab.AnybatchError, match="untouched output of Conv2d"):
        norm(conv(x).add_(1))
    norm.unfollow()
    assert norm(conv(x).relu()).shape == (2, 3, 3, 3)


def test_a_norm_outside_evaluation_knows_its_dimensions() -> None:
    norm = ab.CBN().build(nn.BatchNorm2d(3))
    with pytest.raises(ab.AnybatchError, match=r"\(2, 3\).*\(N, C, H, W\)"):
        norm(torch.randn(2, 3))


def test_frozen_statistics_stay_while_the_batch_is_used() -> None:
    """track_running_stats switched off on a layer, as fine-tuning helpers do, keeps the buffers."""
    norm = CrossIterationBatchNorm(3, compensate=False)
    norm.track_running_stats = False
    norm(torch.randn(4, 3) + 5)
    assert (norm.running_mean == 0).all()
    assert norm.num_batches_tracked == 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cbn(kind=ring)", "kind=ring is no value: write kind='ring'"),
        ("cbn(compensate=false)", "compensate=false is no value: write compensate=False"),
        ("cbn(burn_in_steps=1/3)", "a share of a run is written burn_in_steps='1/3'"),
        ("cbn(window=1+x)", "window=1 \\+ x is no value: give a number, True, False, None or text in quotes"),
        ("cbn(window=2, window=3)", "window is given twice; write it like"),
        ("cbn(", "never closed; write it like"),
        ("cbn(**{'window': 2})", "options are given by name"),
        ("groupnorm", "did you mean gn"),
        ("batchnorm", "did you mean bn"),
        ("cbn(windw=3)", "the options of cbn are: window, gradient"),
        ("bn(groups=3)", "the options of bn are: none"),
    ],
)
def test_slips_are_answered_with_what_there_is(text: str, said: str) -> None:
    with pytest.raises(ab.AnybatchError, match=said):
        ab.parse_method(text)
    assert ab.parse_method("CBN") == ab.CBN()


def test_a_method_is_written_in_one_way() -> None:
    written = "cbn(window=4, kind='ring', eps=0.001, burn_in_steps='1/3', sync=True)"
    assert tidy_method(" CBN ( window = 4,kind=\"ring\", eps=1e-3, burn_in_steps='1/3', sync=True,) ") == written
    assert tidy_method(written) == written
    assert tidy_method("bn()") == tidy_method("bn") == "bn"


ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", ab.METHODS)
def test_every_method_has_its_page(name: str) -> None:
    """Found from the README, with what it did in our runs."""
    row = ab.METHODS[name]
    page = (ROOT / "docs" / "methods" / f"{row.page}.md").read_text()
    assert f"docs/methods/{row.page}.md" in (ROOT / "README.md").read_text()
    assert f"ab.{type(row.config).__name__}" in page
    assert "\n## In our runs\n" in page
    assert "RESULTS" not in page
