"""Files for deployment: every method in every format, and what is refused."""

import json
import re
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d
from typer.testing import CliRunner

import anybatch as ab
import anybatch.cli.export
from anybatch.lab import export as exporting
from anybatch.lab.deploy import how_to_run
from anybatch.lab.export import Exported, export
from anybatch.lab.export_formats import FORMATS, norms_of_graph
from anybatch.lab.trained import open_trained

from .selection import usually
from .small_models import ResNet, assert_untouched, shake, tensors

every_method = pytest.mark.parametrize("name", ab.METHODS)
every_format = pytest.mark.parametrize("format", FORMATS)


class Small(nn.Module):
    """A norm after a convolution, with a sum behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.bn(self.conv(x))).mean((2, 3)))


class Joined(nn.Module):
    """One norm folds; the other normalises a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn1 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.side, self.bn2 = nn.Conv2d(4, 2, 1), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.stem(x))
        return self.bn2(torch.cat([x, self.side(x)], 1)).relu()


def volumes() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv3d(1, 3, 3, padding=1), nn.BatchNorm3d(3), nn.ReLU()),
        *(nn.ConvTranspose3d(3, 2, 2, 2), nn.BatchNorm3d(2)),
    )


def images(count: int) -> Tensor:
    return torch.randn(count, 3, 8, 9)


@cache
def trained(name: str) -> nn.Module:
    """A small network after one training forward; not to be changed."""
    torch.manual_seed(0)
    model = shake(Small())
    ab.convert_(model, ab.METHODS[name].small, example_inputs=images(2))
    with torch.no_grad():
        model(images(4))
    return model.eval()


def run_onnx(path: Path, *args: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    return torch.from_numpy(session.run(None, {n: a.numpy() for n, a in zip(names, args, strict=True)})[0])


def norm_nodes(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node if node.op_type.endswith("Normalization")]


# Every method in every format


@every_method
@pytest.mark.parametrize("format", usually(["onnx", "safetensors"], FORMATS))
def test_files_give_the_models_outputs(name: str, format: str, tmp_path: Path) -> None:
    """Read without any of our code, at a batch that the export has not seen; what folds leaves no norm behind."""
    model, path, x = trained(name), tmp_path / "there" / "file", images(5)
    done = export(model, images(1), path, format)
    match format:
        case "onnx":
            found = run_onnx(path, x)
        case "torch-export":
            found = torch.export.load(path).module()(x)
        case _:
            bare = Small()
            if done.left:
                ab.convert_(bare, ab.METHODS[name].small, example_inputs=x)
            bare = bare.eval() if done.left else ab.fold(bare.eval(), example_inputs=x)
            bare.load_state_dict(safetensors.torch.load_file(path))
            found = bare(x)
    wanted = model(x)
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert done == Exported(
        *(path, format, 18 if format == "onnx" else None, True, done.nodes),
        **{"folded": int(not done.left), "thawed": 0, "left": done.left, "difference": done.difference},
        checked=("noise", "a real example", "noise at batch 3", "real examples at batch 3"),
        size=path.stat().st_size,
        inputs=((1, 3, 8, 9),),
    )
    assert done.difference < 1e-5
    assert list(done.left) == ([] if ab.METHODS[name].foldable else ["bn"])
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]
    if format == "onnx" and ab.METHODS[name].foldable:
        assert not norm_nodes(path)
        assert done.nodes == 4  # convolution, relu, mean, matrix product


def test_the_reasons_of_norms_that_stay(tmp_path: Path) -> None:
    said = {
        name: export(trained(name), images(1), tmp_path / "f", "safetensors").left["bn"]
        for name in ("gn", "iebn", "proxynorm", "weighed")
    }
    assert said["gn"] == "GroupNorm normalises each example by its own moments"
    assert said["iebn"].endswith("in evaluation is more than a scale and a shift per channel")
    assert said["proxynorm"].startswith("ProxyNormalization in evaluation")
    assert "alpha=0.1 of an example's own moments" in said["weighed"]


# Networks


def test_a_3d_network(tmp_path: Path) -> None:
    model, x = shake(volumes()), torch.randn(2, 1, 4, 5, 3)
    ab.convert_(model, ab.CBN(), example_inputs=x)
    done = export(model, x, tmp_path / "v.onnx", opset=21)
    assert (done.folded, done.left, done.opset) == (2, {}, 21)
    assert [entry.version for entry in onnx.load(done.path).opset_import] == [21]
    assert not norm_nodes(done.path)
    torch.testing.assert_close(run_onnx(done.path, x), model.eval()(x), rtol=1e-4, atol=1e-5)


@every_format
def test_a_norm_that_no_map_feeds_stays(format: str, tmp_path: Path) -> None:
    model = shake(Joined()).eval()
    done = export(model, images(1), tmp_path / "f", format)
    assert done.folded == 1
    assert list(done.left) == ["bn2"]
    assert "cat" in done.left["bn2"]
    if format == "onnx":
        assert norm_nodes(done.path) == ["BatchNormalization"]
        x = images(2)
        torch.testing.assert_close(run_onnx(done.path, x), model(x), rtol=1e-4, atol=1e-5)


def test_frozen_norms_are_folded_too(tmp_path: Path) -> None:
    frozen = FrozenBatchNorm2d(4)
    for name in ("weight", "bias", "running_mean"):
        getattr(frozen, name).normal_()
    model = nn.Sequential(nn.Conv2d(3, 4, 3), frozen, nn.ReLU())
    done = export(model, images(1), tmp_path / "f.onnx")
    assert (done.folded, done.thawed, done.left, done.nodes) == (1, 1, {}, 2)
    assert isinstance(model[1], FrozenBatchNorm2d)
    x = images(3)
    torch.testing.assert_close(run_onnx(done.path, x), model(x), rtol=1e-4, atol=1e-5)


def test_the_model_is_left_as_it_is(tmp_path: Path) -> None:
    model = shake(ResNet())
    modules, before = list(model.modules()), tensors(model)
    values = {name: tensor.clone() for name, tensor in before.items()}
    done = export(model, torch.randn(1, 3, 15, 13), tmp_path / "f", "torch-export")
    assert (done.folded, list(done.left)) == (7, [])  # the head that only training runs is not in the graph
    assert_untouched(model, modules, before)
    assert all(torch.equal(tensor, values[name]) for name, tensor in before.items())
    assert model.training


def test_norms_of_a_forward_are_named(tmp_path: Path) -> None:
    class Own(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.group_norm(x, 1)

    done = export(nn.Sequential(nn.Conv2d(3, 4, 3), Own()), images(1), tmp_path / "f", "torch-export")
    assert done.left == {"1": "aten.group_norm.default in the forward of its own"}


def test_a_list_of_images_fixes_the_batch(tmp_path: Path) -> None:
    """As detectors take it."""

    class Listed(Small):
        def forward(self, x: list[Tensor]) -> dict[str, Tensor]:
            scores = super().forward(torch.stack(x))
            return {"scores": scores, "best": scores.argmax(1)}

    model, given = shake(Listed()), list(images(2))
    done = export(model, (given,), tmp_path / "f.onnx")
    assert (done.any_batch, done.checked, done.inputs) == (False, ("a real example",), ((3, 8, 9), (3, 8, 9)))
    torch.testing.assert_close(run_onnx(done.path, *given), model.eval()(given)["scores"], rtol=1e-4, atol=1e-5)


def test_a_batch_that_the_model_fixes(tmp_path: Path) -> None:
    class Fixed(Small):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if len(x) == 1 else super().forward(x)[:3]

    model = shake(Fixed())
    with pytest.raises(ab.AnybatchError, match=r"torch.export cannot follow Fixed .*--fixed-batch"):
        export(model, images(1), tmp_path / "f.onnx")
    done = export(model, images(1), tmp_path / "f.onnx", dynamic_batch=False)
    assert (done.any_batch, done.checked) == (False, ("noise", "a real example"))
    assert run_onnx(done.path, images(1)).shape == (1, 5)


def test_a_part(tmp_path: Path) -> None:
    model, x = shake(ResNet()).eval(), torch.randn(2, 3, 15, 13)
    done = export(model, x, tmp_path / "f.onnx", part="blocks.1")
    assert (done.folded, done.left, done.inputs) == (3, {}, ((2, 5, 7, 6),))
    features = torch.randn(3, 5, 7, 6)
    torch.testing.assert_close(run_onnx(done.path, features), model.blocks[1](features), rtol=1e-4, atol=1e-5)


# What is refused, and leaves no file


def refused(said: str, path: Path, model: nn.Module | None = None, example: object = None, **options: object) -> None:
    with pytest.raises(ab.AnybatchError, match=said):
        export(trained("cbn") if model is None else model, images(1) if example is None else example, path, **options)
    assert not path.exists()
    assert not list(path.parent.iterdir())


@pytest.mark.parametrize("gap", [1e-3, float("nan")])
def test_a_corrupted_export(gap: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = onnxruntime.InferenceSession.run

    def off(session: onnxruntime.InferenceSession, *args: object) -> list[np.ndarray]:
        (found,) = real(session, *args)
        return [found + np.float32(gap) * np.abs(found).max()]

    monkeypatch.setattr(onnxruntime.InferenceSession, "run", off)
    refused("onnx file gives other outputs than the model: they differ by (1.0e-03|inf) .*1e-04", tmp_path / "f.onnx")
    (tmp_path / "old.onnx").write_bytes(b"old")
    with pytest.raises(ab.AnybatchError, match="nothing was written"):
        export(trained("cbn"), images(1), tmp_path / "old.onnx")
    assert [(entry.name, entry.read_bytes()) for entry in tmp_path.iterdir()] == [("old.onnx", b"old")]


def test_outputs_of_another_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = onnxruntime.InferenceSession.run
    monkeypatch.setattr(onnxruntime.InferenceSession, "run", lambda *args: [real(*args)[0][:1]])
    refused("differ by inf", tmp_path / "f.onnx")


@every_format
def test_a_fold_that_computes_something_else(format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = exporting.fold

    def wrong(*args: object, **options: object) -> nn.Module:
        folded = real(*args, **options)
        folded.conv.bias.data += 0.01
        return folded

    monkeypatch.setattr(exporting, "fold", wrong)
    refused("gives other outputs than the model", tmp_path / "f", format=format)


@pytest.mark.parametrize("format", ["onnx", "torch-export"])
def test_a_norm_that_was_not_folded_after_all(format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what says that no norm is left: on a model that is not folded it fails, though the optimizer of ONNX folds."""
    assert norms_of_graph(torch.export.export(trained("bn"), (images(1),))) == {"bn": "aten.batch_norm.default"}
    monkeypatch.setattr(exporting, "fold", lambda model, *args, **options: model)
    refused(
        r"'bn' was folded, and aten\.batch_norm\.default is in the graph", tmp_path / "f", trained("bn"), format=format
    )


def test_norms_of_no_module(tmp_path: Path) -> None:
    stripped = exporting.strip(trained("cbn"), (images(1),))
    for format, kind in (("onnx", "BatchNormalization"), ("torch-export", "aten.batch_norm.default")):
        written = FORMATS[format].write(stripped.model, (images(2),), True, 18, {})
        assert exporting._norms_left(written, stripped) == {}
        with pytest.raises(ab.AnybatchError, match=f"{kind}.* in the file, of no norm of the model"):
            exporting._norms_left(replace(written, kinds={kind: 1}), stripped)


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    model = Small()
    nn.init.constant_(model.fc.bias, float("nan"))
    refused("output on noise is not finite", tmp_path / "f.onnx", model, format="safetensors")


def test_a_graph_that_depends_on_values(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    class Boxes(Small):
        def forward(self, x: Tensor) -> Tensor:
            kept = super().forward(x)[:, 0].nonzero()
            return kept if kept.numel() else kept + 1

    refused("cannot follow Boxes .*--part backbone.*safetensors", tmp_path / "f.onnx", Boxes())
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"format": "tflite"}, "no format 'tflite': choose onnx, torch-export, safetensors"),
        ({"opset": 17}, "opset 17 is not one .* give 18 to 23"),
        ({"opset": 24}, "opset 24"),
        ({"format": "torch-export", "opset": 18}, "opset 18 is for onnx, torch-export has none"),
        ({"part": "head"}, "Small has no part 'head': it has conv, bn, fc"),
        ({"part": "conv"}, "a part that holds every norm with the map before it"),
    ],
)
def test_options_out_of_range(options: dict[str, object], said: str, tmp_path: Path) -> None:
    refused(said, tmp_path / "f", **options)


def test_parts_that_cannot_be_had(tmp_path: Path) -> None:
    class Named(Small):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.bn(self.conv(input=x)).mean((2, 3)))

    refused("'conv' is called with arguments by name", tmp_path / "f", shake(Named()), part="conv")
    idle = shake(ResNet())
    refused("does not call 'aux'", tmp_path / "f", idle, torch.randn(1, 3, 15, 13), part="aux")


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnxruntime"])
def test_missing_extras_are_named(missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    refused(rf"{missing} is not installed.*pip install 'anybatch\[export\]'", tmp_path / "f.onnx")


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    with pytest.raises(ab.AnybatchError, match="is a folder: give a file"):
        export(trained("cbn"), images(1), tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ab.AnybatchError, match=r"cannot be written .*name another file"):
        export(trained("cbn"), images(1), tmp_path / "file" / "f", "safetensors")


# The command


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(anybatch.cli.app, arguments, env={"COLUMNS": "200", "NO_COLOR": "1"})
    return result.exit_code, result.output


@pytest.mark.parametrize("method", ["cbn", "iebn"])
def test_the_command(method: str, tmp_path: Path) -> None:
    """Trains, exports in every format, and runs the lines of Python that it prints."""
    options = [*("--train-images", "32"), *("--test-images", "20"), *("--epochs", "1"), *("--method", method)]
    assert run("train", "--out", str(tmp_path), *options)[0] == 0
    task, model = open_trained(tmp_path)
    x = torch.cat([task.example()] * 4)
    wanted = model.eval()(x).detach()
    for format in FORMATS if method == "cbn" else ["safetensors"]:
        code, said = run("export", str(tmp_path), "--format", format)
        assert code == 0, said
        path = tmp_path / f"deploy{FORMATS[format].suffix}"
        assert f"Wrote {path}: " in said
        assert "differs from the trained model by at most " in said
        assert ("Norms: 9 folded" in said and "no norm any more" in said) == (method == "cbn")
        assert method == "cbn" or "Norms: 2 folded into the maps before them, 7 stay:\n  bn1, layer1.0.bn1" in said
        lines = [line.strip() for line in said.partition("To run it:\n")[2].splitlines()]
        names = {"input": x.numpy() if format == "onnx" else x, "model": task.build()}
        exec("\n".join(lines), names)
        found = names["outputs"] if "outputs" in names else names["model"].eval()(x)
        found = torch.from_numpy(found[0]) if isinstance(found, list) else found
        assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()
    with safetensors.safe_open(tmp_path / "deploy.safetensors", "pt") as file:
        facts = file.metadata()
    assert facts["norm"].startswith("IEBN(" if method == "iebn" else "CBN(")
    assert json.loads(facts["config"]) == json.loads(json.dumps(task.config.record()))


def test_a_model_that_was_trained_elsewhere(tmp_path: Path) -> None:
    """On an accelerator that this machine has not: it is deployed from the CPU all the same."""
    options = [*("--train-images", "32"), *("--test-images", "20"), *("--epochs", "1")]
    assert run("train", "--out", str(tmp_path), *options)[0] == 0
    file = tmp_path / "config.json"
    facts = json.loads(file.read_text())
    facts["config"]["device"] = "cuda:77"
    file.write_text(json.dumps(facts))
    code, said = run("export", str(tmp_path), "--format", "safetensors")
    assert code == 0, said
    with pytest.raises(ab.AnybatchError, match="device 'cuda:77' cannot be used"):
        open_trained(tmp_path)


def test_what_the_command_refuses(tmp_path: Path) -> None:
    code, said = run("export", str(tmp_path))
    assert code == 2
    assert re.search(r"Error: .* has no checkpoint .*give an --out", said)
    assert run("export", str(tmp_path), "--format", "tflite")[0] == 2


def test_frozen_norms_are_in_what_is_to_be_run(tmp_path: Path) -> None:
    done = export(trained("gn"), images(1), tmp_path / "f", "safetensors")
    lines = how_to_run(replace(done, folded=2, thawed=1), "GN(groups=4)")
    assert lines[1:4] == [
        "# model is the network with the norms that it was trained with, GN(groups=4)",
        "anybatch.integrations.frozen.thaw_(model)  # its frozen BatchNorms are folded too",
        "model = ab.fold(model.eval(), input, strict=False)  # then the maps have a bias; input is float32, (N, 3, 8, 9)",  # noqa: E501
    ]
