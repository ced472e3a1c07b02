"""Labelled data as batches of a model's inputs: image folders, arrays, text; without torch."""

from __future__ import annotations

import csv
import io
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from thresher.compiler.errors import UsageError, nearest
from thresher.models.labels import check_labels, class_numbers, read_labels
from thresher.models.preprocess import ImageSteps, TextSteps, kind_of, read_image

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
Batch: TypeAlias = tuple[dict[str, Array], Array | None]

BUILT_IN = {"fashion-mnist": Path(__file__).parent / "fashion_mnist" / "test.npz"}
IMAGES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
FORMS = "an image folder, .npz, .tsv, .csv or .txt file"
_LABEL_KEYS = ("labels", "label", "y", "targets")
_IMAGE_KEYS = ("images", "image", "x", "inputs")
_TEXT_HEADS = ("text", "sentence", "review", "content", "snippet", "title")
_LABEL_HEADS = ("label", "labels", "rating", "score", "class", "target", "category")


@dataclass(frozen=True)
class Dataset:
    """Items in a fixed order, made into a model's inputs when they are asked for.

    Attributes:
        labels: ``int64 [n]`` class numbers, ``float64 [n]`` ratings, or None.
        read: the inputs of the items with the given numbers, each ``[len, ...]``.
    """

    name: str
    count: int
    labels: Array | None
    read: Callable[[Sequence[int]], dict[str, Array]]

    def __len__(self) -> int:
        return self.count

    def take(self, chosen: Sequence[int]) -> Batch:
        """Inputs and labels of the items with these numbers."""
        return self.read(chosen), None if self.labels is None else self.labels[list(chosen)]

    def batches(self, size: int, limit: int | None = None) -> Iterator[Batch]:
        """Inputs and labels of ``size`` items at a time, fewer in the last batch.

        With a ``limit``, as many items spread evenly over the set: one sorted by class would
        otherwise show its first classes alone.
        """
        total = min(self.count, limit) if limit else self.count
        chosen = [index * self.count // total for index in range(total)]
        for start in range(0, total, size):
            yield self.take(chosen[start : start + size])


def open_dataset(
    spec: str,
    preprocessing: Mapping[str, Any] | None,
    *,
    labels: Sequence[str] | None = None,
    classes: int | None = None,
) -> Dataset:
    """Open the data that ``spec`` names for a model with this preprocessing.

    Args:
        spec: a folder of images, with one subfolder for each class or flat and unlabelled; an
            ``.npz`` with images or with arrays under the names of the inputs, and ``labels``; a
            ``.tsv`` or ``.csv`` of text and label, a ``.txt`` of unlabelled lines; or
            ``fashion-mnist``.
        preprocessing: of the model, see ``thresher.models.preprocess``.
        labels: the model's class names, for data whose classes have names.
        classes: number of classes of the model; by default that of ``labels``.

    Raises:
        UsageError: no such data, damaged data, data of another kind than the model takes, or
            labels that do not fit.
    """
    classes = classes or (len(labels) if labels else None)
    path = BUILT_IN.get(spec, Path(spec))
    if path.is_dir():
        dataset = _image_folder(path, preprocessing, labels)
    elif not path.is_file():
        hint = nearest(spec, BUILT_IN) if "did you mean" in nearest(spec, BUILT_IN) else ""
        names = ", ".join(BUILT_IN)
        raise UsageError(f"there is no data {spec!r}{hint or f': give {FORMS}, or {names}'}")
    elif path.suffix == ".npz":
        dataset = _arrays(path, preprocessing)
    elif path.suffix in (".tsv", ".csv", ".txt"):
        dataset = _texts(path, preprocessing, labels)
    else:
        raise UsageError(f"{spec} is not known as data: give {FORMS}")
    if dataset.count == 0:
        raise UsageError(f"{spec} is empty: give {FORMS} with something in it")
    if dataset.labels is None:
        return dataset
    checked = check_labels(dataset.labels, dataset.count, classes, spec)
    return Dataset(spec, dataset.count, checked, dataset.read)


def _image_folder(
    folder: Path, preprocessing: Mapping[str, Any] | None, known: Sequence[str] | None
) -> Dataset:
    steps, name = _image_steps(preprocessing, str(folder))
    classes = sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name[0] != ".")
    if not classes:
        files = _images_in(folder.iterdir())
        return Dataset(str(folder), len(files), None, _image_reader(files, steps, name))
    files, labels = [], []
    for label, number in class_numbers(classes, known, str(folder)).items():
        inside = _images_in((folder / label).rglob("*"))
        files += inside
        labels += [number] * len(inside)
    reader = _image_reader(files, steps, name)
    return Dataset(str(folder), len(files), np.array(labels, dtype=np.int64), reader)


def _images_in(paths: Iterator[Path]) -> list[Path]:
    return sorted(p for p in paths if p.suffix.lower() in IMAGES and p.name[0] != ".")


def _image_reader(
    files: list[Path], steps: ImageSteps, name: str
) -> Callable[[Sequence[int]], dict[str, Array]]:
    return lambda chosen: {name: np.stack([steps(read_image(files[i])) for i in chosen])}


def _image_steps(preprocessing: Mapping[str, Any] | None, origin: str) -> tuple[ImageSteps, str]:
    if kind_of(preprocessing, "an image") != "image" or preprocessing is None:
        raise UsageError(f"{origin} holds images, and the model takes text")
    return ImageSteps.of(preprocessing), str(preprocessing["input"])


def _arrays(path: Path, preprocessing: Mapping[str, Any] | None) -> Dataset:
    """``uint8`` images are preprocessed; all other arrays are inputs as they are."""
    arrays = _load_npz(path)
    labels = next((arrays.pop(key) for key in _LABEL_KEYS if key in arrays), None)
    counts = {key: len(value) if value.ndim else 0 for key, value in arrays.items()}
    if len(set(counts.values())) != 1:
        told = ", ".join(f"{key} has {count}" for key, count in counts.items())
        what = f"arrays of different length ({told})" if arrays else "no arrays but labels"
        raise UsageError(f"{path} holds {what}: give as many items of each")
    count = next(iter(counts.values()))
    image = preprocessing is not None and preprocessing.get("kind") == "image"
    if image and preprocessing is not None:
        name = str(preprocessing["input"])
        key = next((key for key in (name, *_IMAGE_KEYS) if key in arrays), None)
        if key is None:
            raise UsageError(
                f"{path} has no array {name!r} or 'images': it has {', '.join(arrays)}"
            )
        pixels = arrays[key]
        if pixels.dtype == np.uint8:
            return Dataset(str(path), count, labels, _pixel_reader(path, pixels, preprocessing))
        arrays = {name: pixels, **{k: v for k, v in arrays.items() if k != key}}
    return Dataset(
        str(path), count, labels, lambda chosen: {k: v[chosen] for k, v in arrays.items()}
    )


def _pixel_reader(
    path: Path, pixels: Array, preprocessing: Mapping[str, Any]
) -> Callable[[Sequence[int]], dict[str, Array]]:
    """Images ``uint8 [n, H, W]`` or ``[n, H, W, C]`` with 1, 3 or 4 channels."""
    if pixels.ndim == 4 and pixels.shape[3] == 1:
        pixels = pixels[..., 0]
    if not (pixels.ndim == 3 or (pixels.ndim == 4 and pixels.shape[3] in (3, 4))):
        raise UsageError(
            f"the images in {path} have the shape {list(pixels.shape)}:"
            " give [n, H, W] or [n, H, W, 3]"
        )
    steps, name = _image_steps(preprocessing, str(path))
    return lambda chosen: {name: np.stack([steps(pixels[i]) for i in chosen])}


def _load_npz(path: Path) -> dict[str, Array]:
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {key: stored[key] for key in stored.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        text = f"{path} cannot be read as arrays ({reason}): save plain arrays with numpy.savez"
        raise UsageError(text) from error


def _texts(
    path: Path, preprocessing: Mapping[str, Any] | None, known: Sequence[str] | None
) -> Dataset:
    kind = kind_of(preprocessing, "text")
    if kind != "text" or preprocessing is None:
        takes = (
            "takes images" if kind == "image" else "continues text: 'verify' takes it as such data"
        )
        raise UsageError(f"{path} holds text, and the model {takes}")
    steps = TextSteps(preprocessing)
    texts, words = _read_texts(path)
    labels = None if words is None else read_labels(words, known, str(path))
    return Dataset(str(path), len(texts), labels, lambda chosen: steps([texts[i] for i in chosen]))


def _read_texts(path: Path) -> tuple[list[str], list[str] | None]:
    """Texts and their labels as written; a header line names the columns."""
    try:
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text ({error.reason}): convert it") from error
    lines = [line.rstrip("\r") for line in content.split("\n") if line.strip()]
    if path.suffix == ".txt":
        return lines, None
    if path.suffix == ".tsv":
        rows = [line.split("\t") for line in lines]
    else:
        rows = [row for row in csv.reader(io.StringIO(content, newline="")) if row]
    text, label = _columns(rows[0]) if rows else (0, 1)
    heads = bool(rows) and _is_header(rows, label)
    texts, labels = [], []
    for number, row in enumerate(rows[heads:], 1 + heads):
        if len(row) <= max(text, label):
            raise UsageError(f"row {number} of {path} has {len(row)} column: give text and label")
        texts.append(row[text])
        labels.append(row[label].strip())
    return texts, labels


def _columns(head: Sequence[str]) -> tuple[int, int]:
    """Where text and label are: as the header says, otherwise first and second."""
    names = [cell.strip().lower() for cell in head]
    text = next((i for i, name in enumerate(names) if name in _TEXT_HEADS), None)
    label = next((i for i, name in enumerate(names) if name in _LABEL_HEADS), None)
    return (text, label) if text is not None and label is not None else (0, 1)


def _is_header(rows: Sequence[Sequence[str]], label: int) -> bool:
    """A first row with known names, or with a word above a column of numbers."""
    names = [cell.strip().lower() for cell in rows[0]]
    if any(name in _TEXT_HEADS for name in names) and any(name in _LABEL_HEADS for name in names):
        return True
    column = [row[label] for row in rows if len(row) > label]
    return len(column) > 1 and not _number(column[0]) and all(map(_number, column[1:]))


def _number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True
