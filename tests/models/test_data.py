"""Data sets: image folders, arrays, text; labels that do not fit are told in one sentence."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.models.folders import tokenizer
from thresher.compiler.errors import UsageError
from thresher.models.data import Dataset, open_dataset
from thresher.models.labels import class_numbers

IMAGE = {
    "kind": "image",
    "input": "x",
    "size": [8, 8],
    "channels": 3,
    "mean": [0.0] * 3,
    "std": [1.0] * 3,
}
GREY = IMAGE | {"input": "images", "size": [28, 28], "channels": 1, "mean": [0.0], "std": [1.0]}


def paint(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (10, 10), (value, value, value)).save(path)


def gather(dataset: Dataset, size: int = 2, limit: int | None = None) -> tuple[Any, Any]:
    """All inputs and all labels, joined."""
    batches = list(dataset.batches(size, limit))
    inputs = {name: np.concatenate([b[0][name] for b in batches]) for name in batches[0][0]}
    if batches[0][1] is None:
        return inputs, None
    return inputs, np.concatenate([b[1] for b in batches if b[1] is not None])


def test_class_folders(tmp_path: Path) -> None:
    for value, name in enumerate(["cat/1.png", "cat/deep/2.JPG", "ant/3.png"]):
        paint(tmp_path / name, value)
    (tmp_path / "cat" / "notes.txt").write_text("x")
    (tmp_path / ".cache").mkdir()
    dataset = open_dataset(str(tmp_path), IMAGE)
    assert len(dataset) == 3
    inputs, labels = gather(dataset)
    assert inputs["x"].shape == (3, 3, 8, 8)
    assert labels.tolist() == [0, 1, 1]
    named = open_dataset(str(tmp_path), IMAGE, labels=["dog", "cat", "cow", "ant"])
    assert gather(named)[1].tolist() == [3, 1, 1]


def test_flat_folder(tmp_path: Path) -> None:
    paint(tmp_path / "b.png", 1)
    paint(tmp_path / "a.png", 0)
    dataset = open_dataset(str(tmp_path), IMAGE)
    inputs, labels = gather(dataset)
    assert labels is None
    assert inputs["x"][:, 0, 0, 0].tolist() == [0.0, np.float32(1 / 255)]


def test_bad_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    with pytest.raises(UsageError, match=r"a\.png cannot be decoded"):
        gather(open_dataset(str(tmp_path), IMAGE))


def test_class_names() -> None:
    known = ["dog", "n01440764 tench", "Cat"]
    assert class_numbers(["cat", "n01440764"], known, "d") == {"cat": 2, "n01440764": 1}
    assert class_numbers(["10", "9"], None, "d") == {"9": 0, "10": 1}
    assert class_numbers(["0", "2"], known, "d") == {"0": 0, "2": 2}
    assert class_numbers(["a", "b", "c"], known, "d") == {"a": 0, "b": 1, "c": 2}
    with pytest.raises(UsageError, match=r"d has 2 classes and the model 3.*'dogg'; did you mean"):
        class_numbers(["cat", "dogg"], known, "d")


def test_arrays_of_images(tmp_path: Path) -> None:
    pixels = np.arange(5 * 64, dtype=np.uint8).reshape(5, 8, 8)
    path = tmp_path / "d.npz"
    for shape, preprocessing in (
        ((5, 8, 8), IMAGE),
        ((5, 8, 8, 1), IMAGE),
        ((5, 8, 8), GREY | {"size": [8, 8]}),
    ):
        np.savez(path, images=pixels.reshape(shape), labels=np.arange(5, dtype=np.uint8))
        inputs, labels = gather(open_dataset(str(path), preprocessing))
        name = str(preprocessing["input"])
        assert inputs[name].shape == (5, preprocessing["channels"], 8, 8)
        np.testing.assert_allclose(inputs[name][:, 0] * 255, pixels, rtol=1e-5)
        assert labels.dtype == np.int64
        assert labels.tolist() == [0, 1, 2, 3, 4]


def test_arrays_that_are_inputs_already(tmp_path: Path) -> None:
    path = tmp_path / "d.npz"
    ready = np.ones((3, 3, 8, 8), dtype=np.float32)
    np.savez(path, images=ready)
    inputs, labels = gather(open_dataset(str(path), IMAGE))
    assert labels is None
    np.testing.assert_array_equal(inputs["x"], ready)
    ids = np.ones((3, 4), dtype=np.int64)
    np.savez(path, input_ids=ids, attention_mask=ids, y=np.array([0.5, -1.0, 2.0]))
    inputs, labels = gather(open_dataset(str(path), None))
    assert sorted(inputs) == ["attention_mask", "input_ids"]
    assert labels.tolist() == [0.5, -1.0, 2.0]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.ones((3, 2)), "y": np.ones(2)}, r"has 3 items and labels of shape \[2\]"),
        ({"x": np.ones((3, 2)), "z": np.ones(4)}, r"different length \(x has 3, z has 4\)"),
        ({"y": np.ones(2)}, "no arrays but labels"),
        ({"x": np.ones((2, 2)), "y": np.array([0, 9])}, "label 9, and the model has 4 classes"),
        ({"x": np.ones((2, 2)), "y": np.array([0, -1])}, "label -1"),
        ({"x": np.ones((2, 2)), "y": np.array(["a", "b"])}, "are of type <U1"),
        ({"x": np.ones((2, 2)), "y": np.array([0.0, np.nan])}, "no numbers"),
        ({"x": np.array([{}, {}], dtype=object)}, "cannot be read as arrays"),
        ({"x": np.ones((0, 2))}, "is empty"),
    ],
)
def test_arrays_that_do_not_fit(arrays: dict[str, Any], message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", **arrays)
    with pytest.raises(UsageError, match=message):
        open_dataset(str(tmp_path / "d.npz"), None, classes=4)


def test_damaged_arrays(tmp_path: Path) -> None:
    path = tmp_path / "d.npz"
    np.savez(path, x=np.ones((30, 20)))
    for content in (b"", b"junk", path.read_bytes()[:900]):
        path.write_bytes(content)
        with pytest.raises(UsageError, match="cannot be read as arrays"):
            open_dataset(str(path), None)


def test_images_of_another_shape(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", images=np.ones((2, 3, 8, 8), dtype=np.uint8))
    with pytest.raises(UsageError, match=r"have the shape \[2, 3, 8, 8\]"):
        open_dataset(str(tmp_path / "d.npz"), IMAGE)


@pytest.fixture
def text(tmp_path: Path) -> dict[str, Any]:
    return {
        "kind": "text",
        "tokenizer": str(tokenizer(tmp_path)),
        "inputs": ["input_ids", "attention_mask"],
        "max_length": 16,
        "pad_id": 0,
    }


@pytest.mark.parametrize(
    ("name", "content", "labels"),
    [
        ("d.tsv", "good film\t1\nbad\t0\n", [1, 0]),
        ("d.tsv", "sentence\tlabel\r\ngood film\t1\r\nbad\t0\r\n", [1, 0]),
        ("d.tsv", "label\tid\ttext\n1\ta\tgood film\n0\tb\tbad\n", [1, 0]),
        ("d.csv", 'text,rating\n"good film",1.5\nbad,-2\n', [1.5, -2.0]),
        ("d.csv", '"good film",pos\nbad,neg\n', [1, 0]),
        ("d.csv", "what,how much\ngood film,2\nbad,3\n", [2, 3]),
        ("d.txt", "good film\n\nbad\n", None),
    ],
)
def test_texts(
    name: str, content: str, labels: list[float] | None, text: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content, newline="")
    inputs, found = gather(open_dataset(str(tmp_path / name), text))
    assert inputs["input_ids"].tolist() == [[2, 4, 6, 3], [2, 5, 3, 0]]
    assert (None if found is None else found.tolist()) == labels


def test_text_labels_by_the_names_of_the_model(text: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "d.tsv").write_text("good\tPositive\nbad\tnegative\n")
    found = open_dataset(str(tmp_path / "d.tsv"), text, labels=["positive", "negative", "mixed"])
    assert gather(found)[1].tolist() == [0, 1]


def test_texts_that_do_not_fit(text: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "d.tsv"
    path.write_text("good\t1\nbad\n")
    with pytest.raises(UsageError, match=r"row 2 of .* has 1 column: give text and label"):
        open_dataset(str(path), text)
    path.write_bytes(b"gr\xfc\xdfe\t1\n")
    with pytest.raises(UsageError, match="is not UTF-8"):
        open_dataset(str(path), text)
    path.write_text("good\t1\n")
    with pytest.raises(UsageError, match="holds text, and the model takes images"):
        open_dataset(str(path), IMAGE)
    with pytest.raises(UsageError, match="holds images, and the model takes text"):
        open_dataset(str(tmp_path), text)


def test_data_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="did you mean 'fashion-mnist'"):
        open_dataset("fashionmnist", None)
    with pytest.raises(UsageError, match=r"no data 'zzz': give an image folder, \.npz"):
        open_dataset("zzz", None)
    (tmp_path / "d.parquet").write_text("x")
    with pytest.raises(UsageError, match="not known as data"):
        open_dataset(str(tmp_path / "d.parquet"), None)


def test_limit_is_spread_over_the_set(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.arange(10)[:, None], y=np.arange(10))
    dataset = open_dataset(str(tmp_path / "d.npz"), None)
    batches = list(dataset.batches(2, limit=5))
    assert [b[0]["x"][:, 0].tolist() for b in batches] == [[0, 2], [4, 6], [8]]
    assert gather(dataset, 3, 99)[1].tolist() == list(range(10))


def test_the_shipped_set() -> None:
    dataset = open_dataset("fashion-mnist", GREY, classes=10)
    assert len(dataset) == 10_000
    inputs, labels = gather(dataset, 4, limit=8)
    assert inputs["images"].shape == (8, 1, 28, 28)
    assert labels.shape == (8,)


def test_no_torch_is_imported() -> None:
    code = (
        "import sys, thresher.models.data, thresher.models.sources;sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
