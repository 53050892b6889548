import gzip
from pathlib import Path

import numpy as np
import pytest
import torch

from anybatch.errors import AnybatchError
from anybatch.lab import idx
from anybatch.lab.data import load

from .lab_fakes import image_folder


def test_embedded_images_are_those_of_fashion_mnist() -> None:
    data = load()
    assert data.train_images.shape == (6000, 1, 28, 28)
    assert data.test_images.shape == (2000, 1, 28, 28)
    assert data.train_images.dtype == torch.uint8
    assert data.train_labels[:5].tolist() == [9, 0, 0, 3, 0]  # as published
    assert data.test_labels[:5].tolist() == [9, 2, 1, 1, 6]
    assert data.train_labels.bincount().min() > 500
    x = data.normalise(data.train_images)
    assert abs(float(x.mean())) < 0.01
    assert float(x.std()) == pytest.approx(1, abs=0.01)


def test_embedded_file_is_small_and_licensed() -> None:
    assets = Path(idx.__file__).parent / "assets"
    assert sum(file.stat().st_size for file in assets.glob("fashion*.xz")) < 4_000_000
    assert "Zalando SE" in (assets / "fashion-mnist-LICENSE.txt").read_text()


def test_first_images_and_fingerprint() -> None:
    data, few = load(), load("embedded", 100, 50)
    assert torch.equal(few.train_images, data.train_images[:100])
    assert len(few.test_labels) == 50
    assert few.fingerprint == load("embedded", 100, 50).fingerprint != data.fingerprint


@pytest.mark.parametrize("images", [0, -3, 6001])
def test_more_images_than_there_are(images: int) -> None:
    with pytest.raises(
        AnybatchError, match=f"{images} train images are asked for, 'embedded' has 6000: give 1 to 6000"
    ):
        load("embedded", train_images=images)


def test_folder_is_split_in_a_fixed_stratified_way(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "d", {"cat": 10, "dog": 20, "eel": 2})
    data = load(str(root), image_size=8)
    assert data.classes == ("cat", "dog", "eel")
    assert data.train_images.shape == (8 + 16 + 1, 3, 8, 8)
    assert data.test_labels.bincount().tolist() == [2, 4, 1]
    assert data.fingerprint == load(str(root), image_size=8).fingerprint
    assert set(data.train_labels[:5].tolist()) == {0, 1, 2} or data.train_labels[:12].bincount().tolist()[:2] == [4, 8]
    assert data.normalise(data.train_images).mean((0, 2, 3)) == pytest.approx([0, 0, 0], abs=0.01)


@pytest.mark.parametrize("test", ["test", "val"])
def test_folder_with_its_own_split(tmp_path: Path, test: str) -> None:
    image_folder(tmp_path / "train", {"a": 3, "b": 3})
    image_folder(tmp_path / test, {"a": 1, "b": 2})
    data = load(str(tmp_path))
    assert len(data.train_labels) == 6
    assert data.test_labels.bincount().tolist() == [1, 2]
    assert data.train_images.shape[-1] == 64


def make_empty(root: Path) -> None:
    root.mkdir()


def make_one_class(root: Path) -> None:
    image_folder(root, {"cat": 4})


def make_lone_image(root: Path) -> None:
    image_folder(root, {"cat": 4, "dog": 1})


def make_empty_class(root: Path) -> None:
    image_folder(root, {"cat": 4, "dog": 0})


def make_corrupt(root: Path) -> None:
    image_folder(root, {"cat": 4, "dog": 4})
    (root / "dog" / "broken.jpg").write_bytes(b"\xff\xd8 no image")


def make_truncated(root: Path) -> None:
    image_folder(root, {"cat": 4, "dog": 4}, size=64)
    whole = (root / "dog" / "000.png").read_bytes()
    (root / "dog" / "broken.png").write_bytes(whole[: len(whole) // 2])


def make_uneven_split(root: Path) -> None:
    image_folder(root / "train", {"cat": 4, "dog": 4})
    image_folder(root / "test", {"cat": 4, "cow": 4})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: None, "there is no data folder .*d: give an existing folder"),
        (make_empty, "has no class folders with images"),
        (make_one_class, "has one class only, 'cat'"),
        (make_lone_image, "class 'dog' .* has one image, which cannot be in both splits"),
        (make_empty_class, "class folder .*dog has no images"),
        (make_corrupt, "image .*broken.jpg cannot be read"),
        (make_truncated, "image .*broken.png cannot be read"),
        (make_uneven_split, "class 'cow' is in .*test and not in .*train"),
    ],
)
def test_folder_that_does_not_serve(tmp_path: Path, make: object, message: str) -> None:
    make(tmp_path / "d")
    with pytest.raises(AnybatchError, match=message):
        load(str(tmp_path / "d"))


def test_file_instead_of_folder(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("")
    with pytest.raises(AnybatchError, match="there is no data folder"):
        load(str(tmp_path / "f"))


def write_idx(path: Path, array: np.ndarray) -> None:
    header = b"\0\0\x08" + bytes([array.ndim]) + np.array(array.shape, ">u4").tobytes()
    path.write_bytes(gzip.compress(header + array.tobytes()))


def test_idx_round_trip_and_damage(tmp_path: Path) -> None:
    path = tmp_path / "x.gz"
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    write_idx(path, array)
    assert np.array_equal(idx.read_idx(path), array)
    for damaged in (path.read_bytes()[:-9], b"no gzip", gzip.compress(b"\0\0\x08"), gzip.compress(b"\0\0\x0d\x01")):
        path.write_bytes(damaged)
        with pytest.raises(AnybatchError, match=r"x\.gz (cannot be read|is not an IDX file)"):
            idx.read_idx(path)


def test_full_set_from_a_folder_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idx, "SHAPES", {name: (5, 28, 28)[: len(shape)] for name, shape in idx.SHAPES.items()})
    monkeypatch.setenv("ANYBATCH_DATA", str(tmp_path))
    (tmp_path / "fashion-mnist").mkdir()
    for name, shape in idx.SHAPES.items():
        write_idx(tmp_path / "fashion-mnist" / name, np.zeros(shape, np.uint8))
    assert load("fashion-mnist", 3).train_images.shape == (3, 1, 28, 28)


def offline(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setattr(idx, "SYSTEM_FOLDER", cache / "nowhere")
    monkeypatch.delenv("ANYBATCH_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))


def test_no_download_names_the_mends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offline(monkeypatch, tmp_path)

    def no_network(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    with pytest.raises(AnybatchError, match=r"no route to host.*ANYBATCH_DATA.*dataset-fashion-mnist.*--data embedded"):
        load("fashion-mnist")


def test_damaged_download_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offline(monkeypatch, tmp_path)
    page = tmp_path / "page.html"
    page.write_text("please log in to this network")
    real_open = page.open
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: real_open("rb"))
    with pytest.raises(AnybatchError, match="arrived damaged"):
        load("fashion-mnist")
    assert not list(tmp_path.rglob("*.gz"))
