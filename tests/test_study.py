"""The files of anybatch study: what they may say, what they plan, and the figures of their view."""

import re
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
from typer.main import get_command

from anybatch.cli import app
from anybatch.errors import AnybatchError
from anybatch.lab import compare
from anybatch.lab.config import ClassifyConfig
from anybatch.lab.networks import NETWORKS, all_methods
from anybatch.lab.studies.figure import study_figure
from anybatch.lab.studies.options import has_option, option_of, without_option
from anybatch.lab.studies.page import page
from anybatch.lab.studies.planning import points, runs, seconds
from anybatch.lab.studies.reading import read_study, shipped
from anybatch.lab.summary import is_reference
from anybatch.methods import parse_method

from .study_files import BASE, HEAD, PLAN, ROOT, TINY, VARY, is_a_picture, made_up, run, written

OPTIONS = [
    *["name", "--out", "--jobs", "--seeds", "--device", "--publish", "--check", "--rows", "--seed", "--tolerance"],
    "--longest",
]


def test_options_are_frozen() -> None:
    """A new option is a promise: it is added here on purpose."""
    parameters = get_command(app).commands["study"].params
    assert [parameter.opts[0] for parameter in parameters if parameter.name != "help"] == OPTIONS


@pytest.mark.parametrize("name", shipped())
def test_studies_of_the_package(name: str) -> None:
    study = read_study(Path(name))
    assert study.shipped
    assert study.name == name
    assert study.question.endswith("?")
    assert study.seeds >= 3
    planned = runs(study)
    assert len(planned) == len(set(planned))
    for point in points(study):
        own = [config for config in planned if point.has(config)]
        assert {config.seed for config in own if is_reference(config)} == set(range(study.seeds))
    assert study.get or study.base.data == "fashion-mnist"
    study_figure(study, made_up(study, 2))
    assert f"anybatch study {name} --seeds 2\n" in page(study, made_up(study, 2))


def test_the_list_says_question_runs_and_time() -> None:
    code, output = run()
    assert code == 0
    for name in shipped():
        study = read_study(Path(name))
        (line,) = [line for line in output.splitlines() if line.startswith(f"{name} ")]
        assert study.question in line
        assert f" {len(runs(study))} " in line
        assert re.search(r"about \d+ (min|h)", line)
    assert {"window", "learning-rate", "second-data", "longer", "wider", "deeper"} < set(shipped())


def test_time_is_known_where_the_images_are(tmp_path: Path) -> None:
    short, folder = read_study(written(tmp_path)), TINY.replace("train_images = 64", 'data = "a-folder"')
    assert seconds(read_study(written(tmp_path, folder))) is None
    deep = replace(short, base=replace(short.base, network="deep-resnet"))
    assert 0 < 3 * seconds(short) < seconds(deep)
    assert seconds(short, 4) == pytest.approx(2 * seconds(short))


def test_what_is_varied_has_a_reference_at_every_point(tmp_path: Path) -> None:
    study = read_study(written(tmp_path, TINY + VARY))
    planned = runs(study, seeds=3)
    assert planned == [
        config
        for lr in (0.05, 0.1)
        for config in compare.plan(replace(study.base, lr=lr), study.methods, study.batches, 3)
    ]
    assert {c.lr for c in planned if is_reference(c)} == {0.05, 0.1}
    assert {c.device for c in runs(study, device="cuda")} == {"cuda"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("title = ", r"is no TOML \(.*\): mend it there"),
        (TINY.replace('title = "Tiny"\n', ""), "title: is missing: add it"),
        (TINY.replace("title =", "titel ="), "title: is missing: 'titel' is no such key, correct it"),
        (HEAD + PLAN.replace("seeds =", "seed ="), "seeds: is missing: 'seed' is no such key, correct it"),
        (HEAD + PLAN.replace("seeds = 2\n", "") + BASE, "seeds: is missing: add it"),
        (TINY.replace('"Tiny"', "3"), "title: is 3: give text in quotes"),
        (TINY.replace("seeds = 2", "seeds = 0"), "seeds: is 0: give at least 1"),
        (TINY.replace("[16, 32]", '["16"]'), r"batches: is \['16'\]: give a list, each of it a whole number"),
        (TINY.replace("[16, 32]", "[]"), "batches: is empty: give at least one"),
        (TINY.replace("[16, 32]", "[16, 16]"), "batches: 16 is given twice: remove one"),
        (TINY.replace("[16, 32]", "[3]"), "batches: batch 3 does not divide the gradient batch 32: choose one of 1, 2"),
        (TINY.replace('["bn", "cbn"]', "[]"), "methods: is empty"),
        (TINY.replace('"cbn"', '"cnb"'), "methods: unknown method 'cnb'; did you mean cbn"),
        (TINY.replace('"cbn"', '"cbn(windw=2)"'), "methods: method 'cbn.windw=2.': .*windw.*the options of cbn are"),
        (TINY.replace('"cbn"', '"BN ( )"'), "methods: 'bn' is given twice: remove one"),
        (TINY.replace('"cbn"', '"cbn("'), "methods: method 'cbn.': '.' was never closed; write it like"),
        (TINY.replace('"cbn"', "\"cbn(burn_in_steps='1/0')\""), "burn_in_steps='1/0' is no share of a run"),
        ("color = 1\n" + TINY, "color: there is no such key: correct or remove it"),
        (TINY + "epoch = 2\n", "base.epoch: a run of 'classify' has no such option: did you mean 'epochs'"),
        (TINY + 'lr = "high"\n', "base.lr: is 'high': give a number"),
        (TINY + "lr = 0\n", "lr is 0.0: give a number above 0"),
        (TINY + "seed = 1\n", "base.seed: it differs between the runs: give seeds = 5"),
        (TINY + 'method = "bn"\n', "base.method: it differs between the runs: give methods = "),
        (TINY + "batch = 1\n", "base.batch: it differs between the runs: give batches = "),
        (TINY + 'device = "cuda"\n', "base.device: it belongs to a machine, not to a study: give --device"),
        (TINY + 'network = "resnet5"\n', "base.network: there is no network 'resnet5': choose one of small-resnet"),
        (TINY + "[vary]\nlr = 0.1\n", "vary.lr: is 0.1: give a list, each of it a number"),
        (TINY + "[vary]\nlr = []\n", "vary.lr: is empty: give at least one"),
        (TINY + "[vary]\nlr = [0.1, -1]\n", "vary.lr: lr is -1.0: give a number above 0"),
        (TINY + '[vary]\nnetwork = ["no"]\n', "vary.network: there is no network 'no'"),
        (TINY + "[vary]\nlrs = [1]\n", "vary.lrs: a run of 'classify' has no such option: did you mean 'lr'"),
        (TINY + "[vary]\nbatch = [1]\n", "vary.batch: it differs between the runs"),
        (TINY + '[vary]\ndata = ["a", "b"]\n', "vary.data: a study is of one data set: give it in .base."),
        (TINY + "[vary]\nlr = [0.1, 0.2]\n", "vary.lr: the figure does not show it: make it figure.x or figure.panels"),
        (TINY + "[vary]\ngradient_batch = [48]\n", "batches: batch 32 does not divide the gradient batch 48"),
        (TINY + 'vary = 3\n[figure]\nx = "lr"\n', "base.vary: a run of 'classify' has no such option"),
        ("vary = 3\n" + TINY, "vary: is 3: give a table"),
        (TINY + '[figure]\nx = "windw"\n', "figure.x: is 'windw', which no method has as an option: give 'batch', or"),
        (TINY + '[figure]\npanels = "seed"\n', "figure.panels: is 'seed': give 'method' or 'batch'"),
        (
            TINY + '[figure]\npanels = "batch"\n',
            "figure.panels: is 'batch', as figure.x: give another, or leave it out",
        ),
        (TINY + '[figure]\ny = "loss"\n', "figure.y: is 'loss': give 'score' or 'difference'"),
        (TINY + '[figure]\nfloor = "low"\n', "figure.floor: is 'low': give a number"),
        (TINY + "[figure]\nfloor = 150.0\n", "figure.floor: is 150: give percent, from 0 to less than 100"),
        (TINY + "[figure]\nz = 1\n", "figure.z: there is no such key"),
    ],
)
def test_a_wrong_file_is_one_clear_error(tmp_path: Path, text: str, message: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(AnybatchError, match=message) as caught:
        read_study(path)
    assert str(caught.value).startswith(f"study {path}")


def test_no_such_study() -> None:
    with pytest.raises(AnybatchError, match=r"there is no study windw: did you mean 'window'"):
        read_study(Path("windw"))


def test_options_in_methods_as_typed() -> None:
    base = ClassifyConfig(epochs=1)
    assert option_of(base, "cbn", "average_reductions") == parse_method("cbn").average_reductions
    assert option_of(base, "cbn(kind='ring', window=4)", "window") == 4
    assert option_of(base, "cbn(positions=None)", "positions") is None
    assert option_of(base, "cbn-paper(burn_in_steps='1/3')", "burn_in_steps") == Fraction(1, 3)
    assert has_option(base, "iebn", "window")
    assert not has_option(base, "bn", "window")
    for typed in ("cbn(window=4)", "cbn( window = 4 )", "cbn()", "cbn"):
        assert without_option(typed, "window") == "cbn"
    assert without_option("cbn(kind='ring', window=4)", "window") == "cbn(kind='ring')"
    assert without_option("cbn(window=4, kind='ring')", "window") == "cbn(kind='ring')"
    assert without_option("cbn-paper(burn_in_steps='1/3')", "burn_in_steps") == "cbn-paper"


def test_the_wide_network_is_small_resnet_of_twice_the_channels() -> None:
    small, wide = (NETWORKS[name](10, 1).state_dict() for name in ("small-resnet", "wide-resnet"))
    assert small.keys() == wide.keys()
    assert all(len(wide[name]) == 2 * len(small[name]) for name in small if "bn" in name and small[name].ndim)
    assert all_methods("wide-resnet") == all_methods("small-resnet")


@pytest.mark.parametrize(
    ("plan", "figure", "panels", "ticks"),
    [
        (PLAN, "", 1, ["16", "32"]),
        (PLAN, 'y = "difference"\n', 1, ["16", "32"]),
        (PLAN, "floor = 75.0\n", 1, ["16", "32"]),
        (PLAN, 'panels = "method"\n', 2, ["16", "32"]),
        (
            PLAN.replace('"cbn"', '"cbn(window=2)", "cbn(window=64)"'),
            'x = "window"\npanels = "batch"\n',
            2,
            ["2", "64"],
        ),
        (PLAN.replace('"cbn"', '"cbn(kind=\'ring\')", "cbn"'), 'x = "kind"\n', 1, ["ring", "exponential"]),
        (PLAN.replace('"cbn"', '"cbn(positions=None)", "cbn"'), 'x = "positions"\n', 1, ["None", "16"]),
        (PLAN.replace('"cbn"', '"cbn(burn_in_steps=\'1/3\')", "cbn"'), 'x = "burn_in_steps"\n', 1, ["0", "1/3"]),
    ],
)
def test_figures(tmp_path: Path, plan: str, figure: str, panels: int, ticks: list[str]) -> None:
    study = read_study(written(tmp_path, HEAD + plan + BASE + f"[figure]\n{figure}"))
    drawn = study_figure(study, made_up(study))
    assert len(drawn.axes) == panels
    assert [text.get_text() for text in drawn.axes[0].get_xticklabels()] == ticks
    low, high = drawn.axes[0].get_ylim()
    assert low < high
    assert (low == 75.0) == ("floor" in figure)
    path = tmp_path / "figure.png"
    drawn.savefig(path)
    assert is_a_picture(path)
    written_below = [text.get_text() for text in drawn.axes[0].texts if "\N{DOWNWARDS ARROW}" in text.get_text()]
    assert written_below == (["74 ↓", "74 ↓"] if "floor" in figure else [])  # both methods at batch 16


@pytest.mark.parametrize("panels", ["", "method", "batch"])
def test_a_study_of_which_only_the_reference_is_there(tmp_path: Path, panels: str) -> None:
    plan = PLAN.replace('"bn"', '"gn(groups=4)"').replace("[16, 32]", "[8, 16]")
    figure = f'[figure]\nx = "window"\npanels = "{panels}"\n' if panels else ""
    study = read_study(written(tmp_path, HEAD + plan + BASE + figure))
    results = made_up(study)[:1]
    assert is_reference(results[0].config)
    assert study_figure(study, results).axes
    assert "**1 of 10 runs are finished.**" in page(study, results, 2)
    assert "BatchNorm at batch 32, 78.0 % (1 seed)." in page(study, results, 2)


def test_a_figure_of_runs_that_all_diverged(tmp_path: Path) -> None:
    study = read_study(written(tmp_path))
    results = [replace(each, accuracy=None, status="diverged") for each in made_up(study)]
    assert study_figure(study, results).axes
    assert "2 of 2 diverged" in page(study, results)


def test_the_page_has_every_study_of_the_package() -> None:
    """That its commands and its file are understood, test_docs.py sees to."""
    text = (ROOT / "docs" / "study.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `([\w-]+)` \| (.*) \|$", text, re.MULTILINE))
    assert rows == {name: read_study(Path(name)).question for name in shipped()}
