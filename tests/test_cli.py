import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from anybatch.cli import app
from anybatch.lab.compare import FULL, QUICK

from .lab_fakes import image_folder

COMPARE = [
    *["--method", "--batch", "--seeds", "--data", "--train-images", "--test-images", "--image-size", "--epochs"],
    *["--network", "--augment", "--lr", "--mode", "--device", "--norm-weight-decay", "--at-once"],
    *["--jobs", "--out", "--quick"],
]
TRAIN = [
    *["--out", "--method", "--batch", "--seed", "--data", "--train-images", "--test-images", "--image-size"],
    *[
        "--epochs",
        "--network",
        "--augment",
        "--lr",
        "--mode",
        "--device",
        "--norm-weight-decay",
        "--save-every",
        "--resume",
    ],
    *["--recipe", "--dry-run"],
]
BENCH = [
    *["--method", "--what", "--network", "--channels", "--image-size", "--batch", "--sweep", "--rounds", "--threads"],
    *["--device", "--dtype", "--format", "--compile", "--cuda-graphs", "--out", "--quick"],
]
RUNS = [
    *["--epochs", "--lr", "--weight-decay", "--gradient-batch", "--mode", "--device", "--resume", "--save-every"],
    *["--recipe", "--dry-run", "--jobs"],
]
DETECT = [
    *["--out", "--method", "--batch", "--compare", "--seed", "--seeds", "--data", "--scenes", "--detector"],
    *["--network", "--weights", "--backbone", "--neck", "--heads", "--image-size", "--drop-invalid", "--flip", *RUNS],
]
SEGMENT = [
    *[
        "--out",
        "--method",
        "--batch",
        "--compare",
        "--seed",
        "--seeds",
        "--data",
        "--train-examples",
        "--test-examples",
    ],
    *["--network", "--width", "--patch", "--image-size", "--spacing", "--intensity", *RUNS],
]
EXPORT = ["checkpoint", "--format", "--out", "--opset", "--fixed-batch", "--part"]


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200", "NO_COLOR": "1"})
    return result.exit_code, result.output


@pytest.mark.parametrize(
    ("command", "options"),
    [
        *[("compare", COMPARE), ("train", TRAIN), ("detect", DETECT), ("segment", SEGMENT), ("export", EXPORT)],
        *[("bench", BENCH), ("weigh", ["checkpoint"]), ("methods", [])],
    ],
)
def test_options_are_frozen(command: str, options: list[str]) -> None:
    """A new option is a promise: it is added here on purpose."""
    parameters = get_command(app).commands[command].params
    assert [parameter.opts[0] for parameter in parameters if parameter.name != "help"] == options


def test_help_and_version_do_not_load_the_lab() -> None:
    for argument in ("--help", "--version"):
        code = f"import sys; sys.argv = ['anybatch', {argument!r}]\nfrom anybatch.cli import app\n"
        code += "try: app()\nexcept SystemExit: assert 'matplotlib' not in sys.modules"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "anybatch" in done.stdout


def test_library_does_not_load_the_lab() -> None:
    code = "import sys, anybatch; assert not {'typer', 'rich', 'matplotlib', 'jinja2', 'PIL'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_missing_extras_are_named() -> None:
    code = "import sys, importlib.util as u; real = u.find_spec\n"
    code += "u.find_spec = lambda name, *a: None if name == 'jinja2' else real(name, *a)\nimport anybatch.cli"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "Error: the command line needs jinja2: pip install 'anybatch[lab]'\n"


def test_methods_table() -> None:
    from anybatch.methods import METHODS

    code, output = run("methods")
    assert code == 0
    for name, method in METHODS.items():
        assert name in output
        assert method.source in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "--method", "cnb"], "unknown method 'cnb'; did you mean cbn"),
        (["compare", "--batch", "3"], "batch 3 does not divide the gradient batch 32"),
        (["compare", "--data", "no/such/folder"], "there is no data folder no/such/folder"),
        (["compare", "--train-images", "7000"], "7000 train images are asked for, 'embedded' has 6000"),
        (["compare", "--network", "vgg"], "there is no network 'vgg'"),
        (["train", "--lr", "0"], "lr is 0.0"),
        (["train", "--resume"], "has no checkpoint to resume"),
        (["bench", "--method", "cnb"], "unknown method 'cnb'; did you mean cbn"),
        (["bench", "--rounds", "1"], "rounds is 1: give at least 2"),
        (["bench", "--sweep", "widow=2,4"], "cannot sweep over 'widow': choose window, batch, image-size, channels"),
        (["bench", "--cuda-graphs"], "CUDA graphs on device 'cpu': give --device cuda"),
        (["bench", "--format", "nhwc"], "there is no format 'nhwc': choose contiguous or channels_last"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(tmp_path: Path, arguments: list[str], message: str) -> None:
    code, output = run(*arguments, "--out", str(tmp_path / "out"))
    assert code == 2
    assert output.startswith("Error: ")
    assert output.count("\n") == 1
    assert message in output


def test_compare_from_end_to_end(tmp_path: Path) -> None:
    images, out = image_folder(tmp_path / "images", {"red": 30, "green": 30}), tmp_path / "out"
    options = ["--data", str(images), "--image-size", "8", "--epochs", "1", "--seeds", "2", "--jobs", "1"]
    code, output = run("compare", *options, "--method", "gn", "--batch", "16", "--out", str(out))
    assert code == 0, output
    assert "4 runs to do" in output
    assert "GroupNorm" in output
    assert str(out / "report.html") in output
    assert {path.name for path in out.iterdir()} == {
        ".lock",
        "runs.jsonl",
        "accuracy.png",
        "accuracy.svg",
        "report.html",
    }
    assert len((out / "runs.jsonl").read_text().splitlines()) == 4
    code, output = run("compare", *options, "--method", "gn", "--batch", "16", "--out", str(out))
    assert (code, "0 runs to do, 4 already done" in output) == (0, True)


def test_train_saves_and_resumes(tmp_path: Path) -> None:
    images, out = image_folder(tmp_path / "images", {"red": 30, "green": 30}), tmp_path / "out"
    options = ["--data", str(images), "--image-size", "8", "--epochs", "1", "--batch", "8", "--out", str(out)]
    code, output = run("train", *options)
    assert code == 0, output
    assert "CBN at batch 8, seed 0" in output
    assert {path.name for path in out.iterdir()} == {"model.safetensors", "training.pt", "config.json"}
    assert json.loads((out / "config.json").read_text())["config"]["method"] == "cbn"
    code, output = run("train", *options, "--resume")
    assert code == 0, output
    code, output = run("train", *options, "--resume", "--seed", "1")
    assert (code, "was trained with seed=0, not 1" in output) == (2, True)


def test_quick_is_small() -> None:
    assert QUICK.seeds * (1 + len(QUICK.methods) * len(QUICK.batches)) == 7
    assert set(QUICK.methods) <= set(FULL.methods)


def test_weigh_tunes_a_checkpoint(tmp_path: Path) -> None:
    """Accuracies on either half by alpha, in the table and in weigh.json; alpha 0 is the model as trained."""
    folder = tmp_path / "run"
    images = ["--train-images", "320", "--test-images", "101"]
    code, output = run("train", "--method", "bn", "--batch", "2", "--epochs", "1", *images, "--out", str(folder))
    assert code == 0, output
    trained = float(re.search(r"epoch 1: ([\d.]+) %", output)[1])
    code, output = run("weigh", str(folder))
    assert code == 0, output
    found = json.loads((folder / "weigh.json").read_text())
    both = (50 * found["validation"]["0.0"] + 51 * found["test"]["0.0"]) / 101
    assert both == pytest.approx(trained, abs=0.01)
    assert found["validation"][str(found["alpha"])] == max(found["validation"].values())
    assert f"alpha {found['alpha']} is best" in output


def test_weigh_without_a_checkpoint(tmp_path: Path) -> None:
    code, output = run("weigh", str(tmp_path))
    assert code == 2
    assert "has no checkpoint" in output
    (tmp_path / "config.json").write_text("{}")
    code, output = run("weigh", str(tmp_path))
    assert code == 2
    assert "damaged" in output


def test_bench_from_end_to_end(tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ["--network", "small-resnet", "--quick", "--rounds", "2", "--batch", "2", "--method", "cbn"]
    for times in (1, 2):  # earlier timings stay
        code, output = run("bench", *options, "--image-size", "8", "--format", "channels_last", "--out", str(out))
        assert code == 0, output
        assert "CBN" in output
        assert output.splitlines()[-1].startswith("To repeat: anybatch")
        lines = [json.loads(line) for line in (out / "bench.jsonl").read_text().splitlines()]
        assert len(lines) == 3 * times
    assert lines[-3]["config"]["format"] == "channels_last"
    assert [(line["method"], len(line["ratios"])) for line in lines[-2:]] == [("bn", 2), ("cbn", 2)]


def test_a_sweep_from_end_to_end(tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ["--what", "layer", "--image-size", "6", "--channels", "4", "--rounds", "2", "--method", "released"]
    code, output = run("bench", *options, "--method", "syncbn", "--sweep", "window=2,3", "--out", str(out))
    assert code == 0, output
    assert "CBN, the authors' way" in output
    assert output.count("Not timed: SyncBatchNorm: torch's SyncBatchNorm takes CUDA tensors only") == 1
    assert {path.name for path in out.iterdir()} == {"bench.jsonl", "window.png", "window.svg"}
    lines = [json.loads(line) for line in (out / "bench.jsonl").read_text().splitlines()]
    assert [line.get("norm", line.get("config", {}).get("window")) for line in lines] == [
        *(2, "BN()", "Released(window=2, burn_in_steps=0)", "SyncBN()"),
        *(3, "BN()", "Released(window=3, burn_in_steps=0)", "SyncBN()"),
    ]
