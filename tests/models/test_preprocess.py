"""Preprocessing equals that of the libraries the models were trained with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.models.folders import tokenizer
from thresher.compiler.errors import UsageError
from thresher.models.preprocess import ImageSteps, TextSteps, kind_of, read_image

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def steps(**changes: Any) -> ImageSteps:
    plain = {"size": [8, 8], "channels": 3, "mean": MEAN, "std": STD, "interpolation": "bicubic"}
    return ImageSteps.of(plain | changes)


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(3, 64, 64), (3, 64, 48)])
def test_as_timm(crop_mode: str, interpolation: str, size: tuple[int, int, int]) -> None:
    data = pytest.importorskip("timm").data
    for crop_pct in (0.875, 0.9, 1.0):
        theirs = data.create_transform(
            input_size=size,
            interpolation=interpolation,
            mean=MEAN,
            std=STD,
            crop_pct=crop_pct,
            crop_mode=crop_mode,
        )
        ours = steps(
            size=size[1:], interpolation=interpolation, crop_pct=crop_pct, crop_mode=crop_mode
        )
        for height, width in ((100, 151), (60, 33), (64, 64), (301, 77)):
            image = picture(height, width)
            # one step of 8 bits is 1 / 255 / std = 0.02
            np.testing.assert_allclose(ours(image), theirs(image).numpy(), atol=1e-5)


def test_as_transformers(tmp_path: Path) -> None:
    """A shorter edge of 40 and a crop of 32, as CLIP and DINOv2 have it."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.CLIPImageProcessor(
        size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}
    )
    ours = steps(size=[32, 32], mean=theirs.image_mean, std=theirs.image_std, resize=40)
    image = picture(50, 70)
    wanted = np.asarray(theirs(image, return_tensors="np")["pixel_values"][0])
    # its resampling runs in torch, which rounds now and then to the next of 256 steps
    assert np.abs(ours(image) - wanted).max() <= 1.01 / 255 / min(theirs.image_std)


def test_grey() -> None:
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    grey = steps(channels=1, mean=[0.25], std=[0.5])
    wanted = (pixels.astype(np.float32) / 255 - 0.25) / 0.5
    np.testing.assert_allclose(grey(pixels), wanted[None], rtol=1e-6)
    assert grey(picture(8, 8)).shape == (1, 8, 8)
    assert steps()(pixels).shape == (3, 8, 8)


def test_arrays_and_modes() -> None:
    image = picture(8, 8)
    np.testing.assert_array_equal(steps()(np.asarray(image)), steps()(image))
    assert steps()(image.convert("RGBA")).shape == (3, 8, 8)
    assert steps()(image.convert("P")).shape == (3, 8, 8)
    assert steps()(image).dtype == np.float32


@pytest.mark.parametrize(
    "change", [{"size": [8]}, {"mean": None}, {"channels": "three"}, {"size": None}]
)
def test_damaged_preprocessing(change: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="damaged"):
        steps(**change)


def test_kinds() -> None:
    assert kind_of({"kind": "text"}, "text") == "text"
    with pytest.raises(UsageError, match=r"how an image becomes its input: give an \.npz"):
        kind_of(None, "an image")
    with pytest.raises(UsageError, match="did you mean 'image'"):
        kind_of({"kind": "imag"}, "an image")


def test_undecodable_image(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"no image")
    with pytest.raises(UsageError, match=r"a\.png cannot be decoded"):
        read_image(path)
    picture(40, 40).save(path)
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(UsageError, match=r"a\.png cannot be decoded"):
        read_image(path)


def text_steps(folder: Path, **changes: Any) -> TextSteps:
    plain = {
        "tokenizer": str(tokenizer(folder)),
        "inputs": ["input_ids", "attention_mask"],
        "max_length": 5,
        "pad_id": 0,
    }
    return TextSteps(plain | changes)


def test_text(tmp_path: Path) -> None:
    found = text_steps(tmp_path)(["good film", "very very bad film"])
    assert found["input_ids"].dtype == np.int64
    assert found["input_ids"].tolist() == [[2, 4, 6, 3, 0], [2, 7, 7, 5, 3]]
    assert found["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]


def test_text_of_fixed_length(tmp_path: Path) -> None:
    made = text_steps(tmp_path, length=5, inputs=["input_ids", "token_type_ids"])
    found = made(["good"])
    assert found["input_ids"].tolist() == [[2, 4, 3, 0, 0]]
    assert found["token_type_ids"].shape == (1, 5)


def test_missing_tokenizer(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    with pytest.raises(UsageError, match=r"nothing\.json is missing"):
        text_steps(tmp_path, tokenizer=str(tmp_path / "nothing.json"))
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(UsageError, match="is not a tokenizer"):
        text_steps(tmp_path, tokenizer=str(tmp_path / "bad.json"))
