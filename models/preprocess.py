"""From images and text to a model's inputs, with NumPy, Pillow and tokenizers; never torch.

A preprocessing is plain data that travels with the Program and the engine::

    {"kind": "image", "input": "x", "size": [224, 224], "channels": 3, "mean": [...], "std": [...],
     "interpolation": "bicubic", "crop_pct": 0.9, "crop_mode": "center"}
    {"kind": "text", "tokenizer": "/path/tokenizer.json", "inputs": ["input_ids", "attention_mask"],
     "max_length": 128, "length": None, "pad_id": 0}
    {"kind": "language", "tokenizer": "/path/tokenizer.json", "positions": 2048, "ends": [2]}

Image steps are those of timm's evaluation transform, so that published accuracies are reproduced:
resize to ``size / crop_pct`` (or to ``resize`` pixels where that is given), crop the centre, scale
to [0, 1], normalise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from thresher.compiler.errors import UsageError, missing_extra, nearest

if TYPE_CHECKING:
    from PIL import Image

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
KINDS = ("image", "text", "language")


def kind_of(preprocessing: Mapping[str, Any] | None, need: str) -> str:
    """``"image"``, ``"text"``, or ``"language"`` of a causal language model.

    Raises:
        UsageError: there is no preprocessing, or one that this thresher does not know.
    """
    if preprocessing is None:
        raise UsageError(
            f"the model says nothing about how {need} becomes its input: give an .npz with arrays"
            " under the names of its inputs"
        )
    kind = str(preprocessing.get("kind"))
    if kind not in KINDS:
        raise UsageError(f"unknown kind of preprocessing {kind!r}{nearest(kind, KINDS)}")
    return kind


@dataclass(frozen=True)
class ImageSteps:
    """How an image becomes ``float32 [C, H, W]``.

    Attributes:
        size: height and width of the result.
        mean, std: per channel, for pixels in [0, 1].
        crop_mode: ``center`` resizes the shorter edge and crops, ``squash`` resizes both edges and
            crops, ``border`` resizes the longer edge and pads.
        resize: edge in pixels before cropping; by default ``size / crop_pct``.
    """

    size: tuple[int, int]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_pct: float = 1.0
    crop_mode: str = "center"
    resize: int | None = None

    @staticmethod
    def of(preprocessing: Mapping[str, Any]) -> ImageSteps:
        """Read the plain form.

        Raises:
            UsageError: a value is missing or of another type.
        """
        try:
            height, width = preprocessing["size"]
            resize = preprocessing.get("resize")
            return ImageSteps(
                size=(int(height), int(width)),
                channels=int(preprocessing["channels"]),
                mean=tuple(float(v) for v in preprocessing["mean"]),
                std=tuple(float(v) for v in preprocessing["std"]),
                interpolation=str(preprocessing.get("interpolation", "bicubic")),
                crop_pct=float(preprocessing.get("crop_pct") or 1.0),
                crop_mode=str(preprocessing.get("crop_mode") or "center"),
                resize=None if resize is None else int(resize),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(
                f"the image preprocessing of the model is damaged: {error!r}"
            ) from error

    def __call__(self, image: Image.Image | Array) -> Array:
        """``float32 [C, H, W]`` of a Pillow image or of ``uint8 [H, W]`` or ``[H, W, C]``."""
        from PIL import Image

        picture = Image.fromarray(image) if isinstance(image, np.ndarray) else image
        picture = self._cropped(self._resized(_in_mode(picture, self.channels)))
        pixels = np.asarray(picture, dtype=np.float32)
        pixels = pixels.reshape(*self.size, self.channels) / np.float32(255)
        mean, std = np.array(self.mean, np.float32), np.array(self.std, np.float32)
        pixels = (pixels - mean) / std
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))

    def _resized(self, image: Image.Image) -> Image.Image:
        from PIL import Image

        if self.resize is None:
            high, wide = (math.floor(side / self.crop_pct) for side in self.size)
        else:
            high = wide = self.resize
        width, height = image.size
        if self.crop_mode == "squash":
            target = (wide, high)
        elif self.crop_mode == "center" and high == wide:  # whole pixels by cutting off, as torch
            tall = width <= height
            target = (
                (wide, int(wide * height / width)) if tall else (int(high * width / height), high)
            )
        else:
            pick = max if self.crop_mode == "border" else min
            ratio = pick(height / high, width / wide)
            target = (round(width / ratio), round(height / ratio))
        if target == image.size:
            return image
        return image.resize(target, Image.Resampling[self.interpolation.upper()])

    def _cropped(self, image: Image.Image) -> Image.Image:
        """Cut out the middle; what lies outside the image is black, or the mean for ``border``."""
        height, width = self.size
        if self.crop_mode == "border":
            image = _padded(image, width, height, tuple(round(255 * v) for v in self.mean))
        else:
            image = _padded(image, width, height, (0,) * self.channels)
        left = round((image.width - width) / 2)
        top = round((image.height - height) / 2)
        return image.crop((left, top, left + width, top + height))


def read_image(path: Path) -> Image.Image:
    """The decoded image.

    Raises:
        UsageError: the file is no image that Pillow decodes.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
            return image
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(f"{path} cannot be decoded as an image ({reason}): remove it") from error


class TextSteps:
    """How texts become integer arrays ``[B, N]``; needs the package ``tokenizers``."""

    def __init__(self, preprocessing: Mapping[str, Any]) -> None:
        self.tokenizer = _tokenizer(preprocessing)
        self.inputs = tuple(str(name) for name in preprocessing["inputs"])
        self.tokenizer.enable_truncation(int(preprocessing["max_length"]))
        padding = dict(self.tokenizer.padding or {})
        self.tokenizer.enable_padding(
            direction=padding.get("direction", "right"),
            pad_id=padding.get("pad_id", int(preprocessing.get("pad_id") or 0)),
            pad_token=padding.get("pad_token", "[PAD]"),
            length=preprocessing.get("length"),
        )

    def __call__(self, texts: Sequence[str]) -> dict[str, Array]:
        """``int64 [B, N]`` per input; N is the longest text's length, or the fixed one."""
        encoded = self.tokenizer.encode_batch(list(texts))
        fields = {
            "input_ids": "ids",
            "attention_mask": "attention_mask",
            "token_type_ids": "type_ids",
        }
        return {
            name: np.array([getattr(item, fields[name]) for item in encoded], dtype=np.int64)
            for name in self.inputs
        }


class LanguageSteps:
    """How a causal language model reads text and writes it; needs the package ``tokenizers``.

    Attributes:
        positions: number of positions that the model knows.
        ends: token ids that end a text.
    """

    def __init__(self, preprocessing: Mapping[str, Any]) -> None:
        self.tokenizer = _tokenizer(preprocessing)
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.positions = int(preprocessing["positions"])
        self.ends = tuple(int(end) for end in preprocessing["ends"])

    def read(self, text: str) -> list[int]:
        """Token ids of a text, with what the tokenizer puts round it."""
        return list(self.tokenizer.encode(text).ids)

    def writer(self) -> Callable[[int], str]:
        """Takes token ids one by one and gives what each adds to the text; a part of a character is
        held back until it is whole.
        """
        from tokenizers.decoders import DecodeStream

        stream = DecodeStream(skip_special_tokens=True)
        return lambda token: stream.step(self.tokenizer, token) or ""


def _tokenizer(preprocessing: Mapping[str, Any]) -> Any:
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise missing_extra("tokenizers", "hf", "text") from None
    path = Path(str(preprocessing.get("tokenizer")))
    if not path.is_file():
        raise UsageError(f"the tokenizer {path} is missing: give the model's folder again")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises plain Exception
        raise UsageError(f"{path} is not a tokenizer ({error}): fetch it again") from error


def _in_mode(image: Image.Image, channels: int) -> Image.Image:
    """Grey or RGB; transparent pixels keep their colour, as torchvision and timm have it."""
    mode = "L" if channels == 1 else "RGB"
    return image if image.mode == mode else image.convert(mode)


def _padded(image: Image.Image, width: int, height: int, fill: tuple[int, ...]) -> Image.Image:
    from PIL import Image

    extra_w, extra_h = max(0, width - image.width), max(0, height - image.height)
    if not extra_w and not extra_h:
        return image
    size = (image.width + extra_w, image.height + extra_h)
    canvas = Image.new(image.mode, size, fill if image.mode == "RGB" else fill[0])
    canvas.paste(image, (extra_w // 2, extra_h // 2))
    return canvas
