"""From the files that a user names to the arrays that a model takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thresher.compiler.errors import UsageError
from thresher.models.preprocess import (
    ImageSteps,
    LanguageSteps,
    TextSteps,
    kind_of,
    read_image,
)

Feeds = dict[str, NDArray[Any]]
ARRAYS = (".npz", ".npy")


def feeds_of(
    preprocessing: dict[str, Any] | None,
    names: Sequence[str],
    files: Sequence[Path],
    texts: Sequence[str],
) -> Feeds:
    """One batch: images, lines of text, or arrays under the names of the inputs.

    Raises:
        UsageError: nothing was given, a file does not exist or decode, or kinds are mixed.
    """
    for file in files:
        if not file.is_file():
            raise UsageError(f"the input {file} does not exist: give a file")
    if not files and not texts:
        raise UsageError("there is nothing to run on: add --input FILE or --text SENTENCE")
    if files and files[0].suffix in ARRAYS:
        return _arrays(files, names)
    need = "a text" if texts else f"the file {files[0]}"
    kind = kind_of(preprocessing, need)
    if kind == "language":
        raise UsageError("the model continues a text: give --prompt TEXT, or arrays as --input")
    if kind == "image":
        if texts:
            raise UsageError("the model takes images: give --input FILE instead of --text")
        return _images(preprocessing or {}, files)
    lines = [line for file in files for line in _lines(file)]
    return TextSteps(preprocessing or {})([*texts, *lines])


def language_of(preprocessing: dict[str, Any] | None, name: str) -> LanguageSteps:
    """How the causal language model ``name`` reads and writes text.

    Raises:
        UsageError: it is none, or its folder had no tokenizer.
    """
    if preprocessing is None:
        raise UsageError(
            f"{name} has no tokenizer: put tokenizer.json into the folder of a causal language model"
            " and export it again"
        )
    if kind_of(preprocessing, "a text") != "language":
        raise UsageError(
            f"{name} continues no text, it takes {preprocessing['kind']}s: give --input"
        )
    return LanguageSteps(preprocessing)


def image_sample(
    preprocessing: dict[str, Any] | None, image: Path
) -> tuple[Feeds, NDArray[np.float64]]:
    """An image as a batch of one, and its pixels ``[H, W, 3]`` from 0 to 1 as the model sees them.

    Raises:
        UsageError: the model takes no images, or the file does not exist or decode.
    """
    feeds = feeds_of(preprocessing, (), [image], ())
    if preprocessing is None or preprocessing["kind"] != "image":
        raise UsageError(f"the model takes no images, so {image} cannot be followed through it")
    steps = ImageSteps.of(preprocessing)
    (array,) = feeds.values()
    pixels = array[0].transpose(1, 2, 0) * np.array(steps.std) + np.array(steps.mean)
    shown: NDArray[np.float64] = np.clip(pixels, 0, 1).astype(np.float64)
    return feeds, shown.repeat(3, axis=2) if steps.channels == 1 else shown


def _images(preprocessing: Mapping[str, Any], files: Sequence[Path]) -> Feeds:
    steps = ImageSteps.of(preprocessing)
    return {str(preprocessing["input"]): np.stack([steps(read_image(file)) for file in files])}


def _lines(file: Path) -> list[str]:
    try:
        found = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise UsageError(f"{file} is not UTF-8 text: give one sentence a line") from error
    if not found:
        raise UsageError(f"{file} holds no text: give one sentence a line")
    return found


def _arrays(files: Sequence[Path], names: Sequence[str]) -> Feeds:
    if len(files) > 1:
        raise UsageError(f"{files[0]} holds a whole batch already: give one file of arrays")
    try:
        read = np.load(files[0], allow_pickle=False)
        if isinstance(read, np.ndarray):
            if len(names) != 1:
                raise UsageError(
                    f"the model has the inputs {', '.join(names)}: give an .npz with those names"
                )
            return {names[0]: read}
        return {name: read[name] for name in read.files}
    except (OSError, ValueError, EOFError) as error:
        raise UsageError(f"{files[0]} holds no plain arrays ({error}): write it again") from error
