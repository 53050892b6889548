"""`anybatch detect` as typed: real processes, alone and together."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from anybatch.lab.detection.config import BEST_CBN
from anybatch.lab.detection.scenes import SceneConfig, write_scenes

from .tolerances import REORDERED

ROOT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200", "NO_COLOR": "1", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    scenes = SceneConfig(train=8, val=3, size=65, objects=(1, 3), scale=(0.6, 1.1))
    return write_scenes(tmp_path_factory.mktemp("detect") / "scenes", scenes)


def command(folder: Path, *more: str) -> list[str]:
    common = ["--data", str(folder), "--image-size", "65", "--weights", "none", "--backbone", "method"]
    return ["-m", "tests.with_torchvision", "detect", *common, "--epochs", "1", "--gradient-batch", "4", *more]


def run(*arguments: str, processes: int = 1) -> subprocess.CompletedProcess[str]:
    start = [sys.executable, *arguments]
    if processes > 1:
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        start += arguments
    return subprocess.run(start, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)


def test_one_run_leaves_model_page_and_events(folder: Path, tmp_path: Path) -> None:
    done = run(*command(folder, "--detector", "fcos", "--batch", "2", "--out", str(tmp_path)))
    assert done.returncode == 0, done.stderr
    assert re.search(r"CBN \(reductions over a step\) at batch 2, seed 0: \d+\.\d\d % AP50 in \d+ s", done.stdout)
    page = (tmp_path / "report.html").read_text()
    assert "data:image/png;base64," in page
    assert "backbone.fpn.inner_blocks.0.1" in page  # every norm is listed
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert {"AP50", "train_loss"} <= set(events.Tags()["scalars"])
    assert events.Scalars("AP50")[-1].step == 8
    config = json.loads((tmp_path / "config.json").read_text())["config"]
    assert (config["task"], config["detector"], config["method"]) == ("detect", "fcos", BEST_CBN)
    again = run(*command(folder, "--detector", "fcos", "--batch", "2", "--out", str(tmp_path), "--resume"))
    assert again.returncode == 0, again.stderr
    assert "nothing is left to train" in again.stdout


def test_several_processes_are_one(folder: Path, tmp_path: Path) -> None:
    """GroupNorm looks at each image alone, and FCOS draws nothing at random: the gradients are the same."""
    options = ("--detector", "fcos", "--method", "gn(groups=4)", "--batch", "1")
    alone = run(*command(folder, *options, "--out", str(tmp_path / "alone")))
    together = run(*command(folder, *options, "--out", str(tmp_path / "together")), processes=2)
    assert (alone.returncode, together.returncode) == (0, 0), together.stderr
    assert together.stdout.count("Report:") == 1
    states = [torch.load(tmp_path / name / "training.pt", weights_only=True)["model"] for name in ("alone", "together")]
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, **REORDERED)


def test_compared_side_by_side(folder: Path, tmp_path: Path) -> None:
    options = ("--compare", "--method", "cbn", "--method", "gn(groups=4)", "--batch", "2", "--detector", "fcos")
    done = run(*command(folder, *options, "--jobs", "2", "--out", str(tmp_path)))
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert {(row["config"]["method"], row["config"]["batch"]) for row in rows} == {
        ("bn", 4),
        ("cbn", 2),
        ("gn(groups=4)", 2),
    }
    assert all("AP" in row["more"] for row in rows)
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "AP50 against batch size" in page
    again = run(*command(folder, *options, "--out", str(tmp_path)))
    assert "AP50, %" in again.stdout
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--method", "bn", "--method", "cbn"), "--method for one run: give one value, or --compare"),
        (("--batch", "1", "--batch", "2"), "--batch for one run"),
        (("--seeds", "2"), "--seeds for one run"),
        (("--compare", "--resume"), "--compare goes on by itself where it stopped and takes no --resume"),
        (("--compare", "--seed", "1"), "--seed 1 for several runs: theirs are 0, 1, ...; give their number, --seeds"),
        (("--method", "cnb"), "unknown method 'cnb'"),
        (("--data", "/nowhere"), "there is no folder /nowhere"),
    ],
)
def test_what_cannot_be(options: tuple[str, ...], said: str, folder: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from anybatch.cli import app

    done = CliRunner().invoke(app, [*command(folder)[2:], *options, "--out", str(tmp_path / "out")])
    assert done.exit_code == 2
    assert said in re.sub(r"\s+", " ", done.output)
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_bad_annotations_stop_it_or_are_dropped_and_counted(folder: Path, tmp_path: Path) -> None:
    copy = write_scenes(tmp_path / "bad", SceneConfig(train=8, val=3, size=65, objects=(1, 3), scale=(0.6, 1.1)))
    file = copy / "annotations" / "instances_train.json"
    document = json.loads(file.read_text())
    document["annotations"][1]["bbox"] = [60, 60, 50, 50]
    document["annotations"][2]["category_id"] = 99
    file.write_text(json.dumps(document))
    options = ("--detector", "fcos", "--batch", "4", "--out", str(tmp_path / "out"))
    refused = run(*command(copy, *options))
    assert refused.returncode == 2
    assert str(document["annotations"][1]["id"]) in refused.stderr
    assert "--drop-invalid" in refused.stderr
    taken = run(*command(copy, *options, "--drop-invalid"))
    assert taken.returncode == 0, taken.stderr
    assert "dropped 2 entries: 1 x " in taken.stdout
