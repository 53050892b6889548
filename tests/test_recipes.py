"""The recipes in the package, what a recipe may say, and the dry run."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch
import torchvision
from rich.console import Console
from typer.testing import CliRunner

from anybatch.cli import app
from anybatch.errors import AnybatchError
from anybatch.lab import dry_run as dry
from anybatch.lab.config import ClassifyConfig, TrainConfig
from anybatch.lab.detection.config import DetectConfig
from anybatch.lab.detection.scenes import SceneConfig, write_scenes
from anybatch.lab.dry_run import dry_run
from anybatch.lab.recipes import load_recipe, read_recipe, shipped
from anybatch.lab.schedule import Schedule
from anybatch.lab.streaming.config import StreamConfig
from anybatch.lab.tasks import config_class_of
from anybatch.layers.config import NormConfig

from .lab_fakes import image_folder
from .test_streaming import write as write_images

PAGE = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text(encoding="utf-8")
NAMES = ("coco-faster-rcnn-r50-fpn", "coco-mask-rcnn-r50-fpn", "imagenet-resnet18", "imagenet-resnet50")
PUBLISHED = {
    "coco-faster-rcnn-r50-fpn": [("frozen BN", 36.8), ("SyncBN", 37.5), ("GN", 37.7), ("CBN", 37.6)],
    "coco-mask-rcnn-r50-fpn": [
        ("frozen BN", 37.6, 34.0),
        ("SyncBN", 38.5, 34.3),
        ("GN", 38.5, 35.0),
        ("CBN", 38.4, 34.7),
    ],
    "imagenet-resnet18": [],
    "imagenet-resnet50": [
        ("BN, 32 images", 76.59),
        ("BN, 2 images", 64.78),
        ("BRN, 2 images", 69.71),
        ("MABN, 2 images", 76.33),
        ("BN, 2 images", 66.512),
        ("BGN, 2 images", 76.096),
    ],
}
GOOD = 'task = "detect"\n[run]\nweights = "none"\nbackbone = "method"\n'


def config_of_recipe(name: str) -> TrainConfig:
    recipe = read_recipe(Path(name))
    return config_class_of(recipe.task)(**recipe.values)


def printed(config: TrainConfig, recipe: Path | None = None) -> tuple[int, str]:
    out = StringIO()
    code = dry_run(config, Console(file=out, width=140, highlight=False), recipe)
    return code, out.getvalue()


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200", "NO_COLOR": "1"})
    return result.exit_code, result.output


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without data, and whatever a dry run writes would be seen."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(folder / "torch"))
    yield
    assert not list(folder.iterdir())


def test_the_recipes_in_the_package() -> None:
    assert tuple(shipped()) == NAMES
    for name in NAMES:
        rows = [(row.norm, *row.measures.values()) for row in read_recipe(Path(name)).published]
        assert rows == PUBLISHED[name]


@pytest.mark.parametrize("name", NAMES)
def test_each_has_four_images_a_process_and_the_published_steps(name: str) -> None:
    recipe, config = read_recipe(Path(name)), config_of_recipe(name)
    assert config.batch == 4
    schedule = Schedule.of(config, recipe.images or 0, recipe.processes)
    coco = name.startswith("coco")
    assert (recipe.processes, schedule.step, schedule.micro_batches) == ((4, 16, 1) if coco else (8, 256, 8))
    assert schedule.peak_lr == pytest.approx(0.02 if coco else 0.1)
    assert schedule.epoch // schedule.step == (7329 if coco else 5004)
    rates = [schedule.lr(epoch * schedule.epoch) / schedule.peak_lr for epoch in range(config.epochs)]
    tenths = [sum(epoch >= m for m in config.milestones) for epoch in range(config.epochs)]
    assert rates == pytest.approx([1 / 3 if coco and e == 0 else 10.0**-t for e, t in enumerate(tenths)])
    assert config.milestones == ((8, 11) if coco else (30, 60, 80) if "18" in name else (30, 60, 90))
    alone = Schedule.of(config, recipe.images or 0, 1)
    assert (alone.step, alone.peak_lr) == (schedule.step, schedule.peak_lr)  # one GPU accumulates to the same


@pytest.mark.parametrize("name", NAMES)
def test_each_published_row_can_be_trained(name: str) -> None:
    recipe, config = read_recipe(Path(name)), config_of_recipe(name)
    for row in recipe.published:
        words = shlex.split(row.options)
        options = dict(zip(words[::2], words[1::2], strict=True))
        if not options:
            assert "not in this library" in row.source
            continue
        assert set(options) <= {"--method", "--batch"}
        changed = replace(config, method=options["--method"], batch=int(options.get("--batch", config.batch)))
        Schedule.of(changed, recipe.images or 0, recipe.processes)
        if changed.method != "frozen":
            assert isinstance(changed.norm(recipe.images or 0), NormConfig)
        assert f"`{row.options}`" in PAGE, row.options


@pytest.mark.parametrize("name", NAMES)
def test_the_page_has_each_with_its_command_and_numbers(name: str) -> None:
    recipe = read_recipe(Path(name))
    text = recipe.path.read_text(encoding="utf-8")
    (command,) = re.findall(r"^#   (torchrun .*)$", text, re.MULTILINE)
    assert command in PAGE
    assert f"--nproc-per-node {recipe.processes} " in command
    assert f"--recipe {name} " in command
    section = PAGE.partition(f"## {name}")[2].partition("\n## ")[0]
    for row in recipe.published:
        numbers = " | ".join(f"{value:g}" for value in row.measures.values())
        empty = " | ".join(" " * len(row.measures))
        line = next(line for line in section.splitlines() if line.startswith(f"| {row.norm} |") and numbers in line)
        assert re.search(re.escape(f"| {numbers} |") + r"( \|)+", line), (line, empty)


@pytest.mark.parametrize("name", NAMES)
def test_each_dry_runs(name: str) -> None:
    """On tiny images, as many as one process has; one of the real size is in docs/recipes.md."""
    config = config_of_recipe(name)
    small = {"batch": 1, "gradient_batch": 4} if config.task == "detect" else {"gradient_batch": 32}
    code, text = printed(replace(config, image_size=32, **small), Path(name))
    assert code == 0, text
    assert "Loss and gradients are finite" in text
    assert f"there is no data folder '{config.data}'" in text
    norms = {NAMES[0]: 12, NAMES[1]: 16, NAMES[2]: 20, NAMES[3]: 53}[name]
    assert f"{norms} norms: {norms} converted, 0 left alone" in text
    if config.task != "detect":
        model = getattr(torchvision.models, config.network)()
        assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in text
    assert ("random, not 'imagenet'" in text) == (config.task == "detect")
    steps, epochs = (29316, 12) if config.task == "detect" else (40036, config.epochs)
    assert f"{steps:,} steps an epoch: " in text
    assert f"; {epochs} epochs: " in text
    assert "Peak memory: " in text
    for row in PUBLISHED[name]:
        assert all((value if isinstance(value, str) else f"{value:g}") in text for value in row)


def test_the_estimate_is_the_step_times_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = read_recipe(Path("imagenet-resnet18"))
    config = replace(config_of_recipe("imagenet-resnet18"), image_size=32, gradient_batch=32)
    clock = iter([0.0, 100.0, 200.0, 200.5])  # the first step makes buffers, and does not count
    monkeypatch.setattr(dry.time, "perf_counter", lambda: next(clock))
    _, text = printed(config, recipe.path)
    said = "A step of 32 images on 8 processes: 0.50 s; 40,036 steps an epoch: 5 h 33 min; 90 epochs: 20 d 20 h."
    assert said in text


def test_memory_counts_what_came_since(tmp_path: Path) -> None:
    """In a process of its own: the most that this one ever held may be far above what it holds now."""
    code = "import torch; from anybatch.lab.dry_run import _Memory; memory = _Memory('cpu')\n"
    code += "torch.ones(2**28); print(memory.report())"  # 1 GiB, freed again
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    peak, before = map(float, re.findall(r"([\d.]+) GiB", done.stdout))
    assert before > 0
    assert 0.8 < peak - before < 1.3


def test_an_open_task_is_dry_run_as_it_is(tmp_path: Path) -> None:
    root = write_images(tmp_path / "images")
    config = StreamConfig(data=str(root), network="resnet18", image_size=16, gradient_batch=8, batch=4, method="gn")
    code, text = printed(config)
    assert code == 0
    assert "A step of 8 images on 1 process: " in text
    assert "3 steps an epoch" in text
    assert "there is no data folder" not in text
    memory = ClassifyConfig(data=str(image_folder(tmp_path / "classes", {"a": 30, "b": 30})), image_size=8, batch=16)
    code, text = printed(memory)
    assert code == 0
    assert "9 norms: 9 converted" in text


def test_a_detector_is_dry_run_on_its_data(tmp_path: Path) -> None:
    scenes = SceneConfig(train=8, val=2, size=65, objects=(1, 3), scale=(0.6, 1.1))
    root = write_scenes(tmp_path / "scenes", scenes)
    code, text = printed(DetectConfig(data=str(root), image_size=65, gradient_batch=4))
    assert code == 0
    assert "random, not 'garments'" in text
    assert "there is no data folder" not in text
    assert "A step of 4 images on 1 process: " in text
    assert "2 steps an epoch" in text


def test_weights_from_a_file_are_tried(tmp_path: Path) -> None:
    config = replace(
        config_of_recipe(NAMES[0]), image_size=32, batch=1, gradient_batch=4, weights=str(tmp_path / "w.pt")
    )
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "w.pt")
    with pytest.raises(AnybatchError, match="do not fit resnet50"):
        printed(config, Path(NAMES[0]))


def test_without_data_somebody_must_say_how_many() -> None:
    with pytest.raises(AnybatchError, match="there is no data folder imagenet"):
        printed(StreamConfig(image_size=16))
    with pytest.raises(AnybatchError, match="there is no folder coco"):
        printed(DetectConfig(data="coco"))


def test_what_is_not_finite_fails() -> None:
    config = replace(config_of_recipe("imagenet-resnet18"), image_size=32, gradient_batch=32, lr=1e30)
    code, text = printed(config, Path("imagenet-resnet18"))
    assert code == 1
    assert "Not finite: the loss of step 2" in text
    assert "steps an epoch" not in text


def test_gradients_that_are_not_finite_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoiled(task: object, model: torch.nn.Module, *others: object) -> list[torch.Tensor]:
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        model.get_parameter("layer1.0.conv1.weight").grad[0] = float("inf")
        return [torch.zeros(())]

    monkeypatch.setattr(dry, "take_step", spoiled)
    config = replace(config_of_recipe("imagenet-resnet18"), image_size=32, gradient_batch=32)
    code, text = printed(config, Path("imagenet-resnet18"))
    assert code == 1
    assert "Not finite: the gradients of step 1 in layer1.0.conv1.weight" in text


def test_a_dry_run_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(AnybatchError, match="a dry run is one process's: start it without torchrun"):
        printed(config_of_recipe("imagenet-resnet18"), Path("imagenet-resnet18"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task = ", r"is no TOML \(Invalid value"),
        ("", "task: is missing: add it"),
        ("task = 3", "task: is 3: give text in quotes"),
        ('task = "paint"', "task: there is no task 'paint': there are classify, classify-folder, detect, segment"),
        ('task = "detect"', "run: is missing"),
        ('task = "detect"\nrun = 1', "run: is 1: give a table"),
        (GOOD + "bach = 2", r"run.bach: a run of 'detect' has no such option: did you mean 'batch'\?"),
        (GOOD + "zzz = 2", "run.zzz: a run of 'detect' has no such option: there are backbone, batch,"),
        (GOOD + "seed = 2", "run.seed: it belongs to a run, not to a recipe: give --seed with the command"),
        (GOOD + 'device = "cuda"', "run.device: it belongs to a run"),
        (GOOD + 'batch = "4"', "run.batch: is '4': give a whole number"),
        (GOOD + "batch = 1.5", "run.batch: is 1.5: give a whole number"),
        (GOOD + "batch = true", "run.batch: is True: give a whole number"),
        (GOOD + "flip = 1", "run.flip: is 1: give true or false"),
        (GOOD + "lr = true", "run.lr: is True: give a number"),
        (GOOD + "milestones = 8", "run.milestones: is 8: give a list, each of it a whole number"),
        (GOOD + "milestones = [8.5]", r"run.milestones: is \[8.5\]: give a list"),
        (GOOD + 'norm_weight_decay = "none"', "run.norm_weight_decay: is 'none': give a number"),
        (GOOD + 'mode = "both"', "run.mode: is 'both': give 'accumulate' or 'step'"),
        (GOOD + "batch = 3", "batch 3 does not divide the gradient batch 8"),
        ("speed = 1\n" + GOOD, "speed: there is no such key: correct or remove it"),
        ("processes = 0\n" + GOOD, "processes: is 0: give at least 1"),
        (GOOD + "[data]\nimages = -1", "data.images: is -1: give at least 1"),
        (GOOD + "[data]\nshape = 1", "data.shape: there is no such key"),
        (GOOD + "[published]\nnorm = 1", "published: is .*: give tables in"),
        (GOOD + '[[published]]\nsource = "x"', r"published\[1\].norm: is missing"),
        (GOOD + '[[published]]\nnorm = "x"\nsource = "x"\nAP = "1"', r"published\[1\].AP: is '1': give a number"),
        ("published = [1]\n" + GOOD, r"published\[1\] is 1: make it a table"),
    ],
)
def test_recipes_that_do_not_serve(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "own.toml"
    path.write_text(text)
    with pytest.raises(AnybatchError, match=rf"recipe .*own\.toml:? ?{message}"):
        load_recipe(path, DetectConfig)


def test_recipes_that_are_not_there_or_another_tasks(tmp_path: Path) -> None:
    for name in ("coco", str(tmp_path), str(tmp_path / "none.toml")):
        with pytest.raises(AnybatchError, match=f"there is no recipe .*: give a .toml file, or one of {NAMES[0]}, "):
            load_recipe(Path(name), DetectConfig)
    (tmp_path / "bytes.toml").write_bytes(b"\xff")
    with pytest.raises(AnybatchError, match="is no TOML"):
        load_recipe(tmp_path / "bytes.toml", DetectConfig)
    with pytest.raises(AnybatchError, match="is for the task 'classify-folder', not 'detect': take another recipe"):
        load_recipe(Path("imagenet-resnet18"), DetectConfig)


def test_values_are_those_of_the_configuration(tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_text(GOOD + "lr = 1\nepochs = 3\nmilestones = [1, 2]\nnorm_weight_decay = 0\n")
    values = load_recipe(path, DetectConfig)
    assert values["lr"] == 1.0
    assert isinstance(values["lr"], float)
    assert isinstance(values["norm_weight_decay"], float)
    assert DetectConfig(**values).milestones == (1, 2)
    recipe = read_recipe(path)
    assert (recipe.processes, recipe.images, recipe.classes, recipe.published) == (1, None, None, ())
    path.write_text('task = "segment"\n[run]\nintensity = "data"\npatch = 32\n')
    assert read_recipe(path).values == {"intensity": "data", "patch": 32}
    path.write_text('task = "segment"\n[run]\nintensity = "all"\n')
    with pytest.raises(AnybatchError, match=r"run\.intensity: is 'all': give 'example' or 'data'"):
        read_recipe(path)


def test_train_takes_a_recipe_and_what_is_typed_goes_first(tmp_path: Path) -> None:
    root = write_images(tmp_path / "images")
    small = ["--data", str(root), "--image-size", "16", "--network", "shufflenet_v2_x0_5", "--epochs", "1"]
    recipe = tmp_path / "small.toml"
    recipe.write_text(
        'task = "classify-folder"\n[run]\nmethod = "bn"\nbatch = 4\ngradient_batch = 8\nepochs = 5\nlr = 0.1\n'
    )
    out = tmp_path / "out"
    code, text = run("train", "--recipe", str(recipe), *small, "--out", str(out))
    assert code == 0, text
    assert "epoch 1: " in text
    assert "% top-1 accuracy" in text
    assert "epoch 2" not in text
    code, text = run("train", "--recipe", str(recipe), *small, "--method", "gn", "--dry-run", "--batch", "2")
    assert code == 0, text
    assert "GroupNorm at batch 2, seed 0" in text


def test_train_refuses_what_does_not_go_together() -> None:
    code, text = run("train", "--recipe", "imagenet-resnet18", "--train-images", "5")
    assert code == 2
    assert "--train-images is for images in memory, and recipe" in text
    code, text = run("train", "--recipe", "coco-mask-rcnn-r50-fpn")
    assert code == 2
    assert "is for the task 'detect': give it to anybatch detect" in text


def test_detect_takes_a_recipe_by_name() -> None:
    code, text = run("detect", "--recipe", "coco-faster-rcnn-r50-fpn", "--batch", "3", "--dry-run")
    assert code == 2
    assert "batch 3 does not divide the gradient batch 16" in text
    code, text = run("detect", "--recipe", "coco-faster-rcnn-r50-fpn")
    assert code == 2
    assert "there is no folder coco" in text
