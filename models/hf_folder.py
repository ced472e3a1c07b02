"""What the JSON files of a Hugging Face folder say about labels, images, texts and sentences."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from thresher.compiler.errors import UsageError

_PILLOW_FILTERS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
_TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, or None where there is no such file.

    Raises:
        UsageError: the file is no JSON object.
    """
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path} is not valid JSON ({error}): fetch it again") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} should hold a JSON object: fetch it again")
    return content


def label_names(config: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Class names in order of their index; None where the config has only placeholders."""
    table = {int(key): str(name) for key, name in (config.get("id2label") or {}).items()}
    names = tuple(table[key] for key in sorted(table))
    placeholders = all(name == f"LABEL_{key}" for key, name in table.items())
    return None if placeholders else names


def image_preprocessing(
    folder: Path, side: int, channels: int, *, resized: bool
) -> dict[str, Any] | None:
    """The steps of ``preprocessor_config.json``; None where the folder has none.

    Args:
        side: height and width in pixels that the model takes.
        resized: the side is the user's choice; margins of a crop keep their proportion.
    """
    config = read_json(folder / "preprocessor_config.json")
    if config is None or channels not in (1, 3):
        return None
    size, crop = _extent(config.get("size")), _extent(config.get("crop_size"))
    edge, shorter = size or (side, False)
    cropped = bool(config.get("do_center_crop")) and crop is not None
    target = crop[0] if cropped and crop else edge
    scale = side / target if resized else 1.0
    unit = 1.0 if config.get("do_rescale", True) else 255.0
    normalise = config.get("do_normalize", True)
    black, white = [0.0] * channels, [1.0 / unit] * channels
    return {
        "kind": "image",
        "input": "pixel_values",
        "size": [side, side],
        "channels": channels,
        "mean": _per_channel(config, "image_mean", channels, unit) if normalise else black,
        "std": _per_channel(config, "image_std", channels, unit) if normalise else white,
        "interpolation": _PILLOW_FILTERS[int(config.get("resample", 2))],
        "resize": round(edge * scale) if cropped or shorter else side,
        "crop_mode": "center" if shorter else "squash",
    }


def text_inputs(folder: Path, config: Any) -> tuple[str, ...]:
    """Names of the token inputs that the folder's tokenizer produces."""
    if config.model_type == "modernbert":
        return _TEXT_INPUTS[:2]
    named = (read_json(folder / "tokenizer_config.json") or {}).get("model_input_names")
    if named is None:
        return _TEXT_INPUTS if config.type_vocab_size > 1 else _TEXT_INPUTS[:2]
    return tuple(name for name in _TEXT_INPUTS if name in named or name == "attention_mask")


def text_preprocessing(
    folder: Path, inputs: tuple[str, ...], limit: int, length: int | None
) -> dict[str, Any] | None:
    """How to turn text into token inputs; None where the folder has no ``tokenizer.json``.

    Args:
        inputs: names of the token inputs.
        limit: number of positions that the model knows.
        length: fixed number of tokens, or None for as many as the text has.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        return None
    config = read_json(folder / "tokenizer_config.json") or {}
    sentence = read_json(folder / "sentence_bert_config.json") or {}
    longest = [limit, config.get("model_max_length"), sentence.get("max_seq_length")]
    model = read_json(folder / "config.json") or {}
    return {
        "kind": "text",
        "tokenizer": str(file.resolve()),
        "inputs": list(inputs),
        "max_length": length or min(int(v) for v in longest if v),
        "length": length,
        "pad_id": int(model.get("pad_token_id") or 0),
    }


def language_preprocessing(folder: Path, positions: int) -> dict[str, Any] | None:
    """How a causal language model reads and ends a text; None without ``tokenizer.json``.

    Args:
        positions: number of positions that the model knows.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        return None
    files = (read_json(folder / name) or {} for name in ("generation_config.json", "config.json"))
    ends: Any = next((found for f in files if (found := f.get("eos_token_id")) is not None), [])
    return {
        "kind": "language",
        "tokenizer": str(file.resolve()),
        "positions": positions,
        "ends": [int(end) for end in (ends if isinstance(ends, list) else [ends])],
    }


def sentence_pooling(folder: Path) -> tuple[str, bool] | None:
    """``("mean" | "cls", scaled to unit length)`` of a sentence-transformers folder."""
    pooling = read_json(folder / "1_Pooling" / "config.json")
    if pooling is None:
        return None
    modes = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token"}
    on = [key for key, value in pooling.items() if key.startswith("pooling_mode") and value]
    how = next((how for how, key in modes.items() if on == [key]), None)
    if how is None:
        return None
    steps = folder / "modules.json"
    unit_length = steps.is_file() and "Normalize" in steps.read_text(encoding="utf-8")
    return how, unit_length


def _extent(value: Any) -> tuple[int, bool] | None:
    """``(pixels, is the shorter edge)`` of the ways in which configs write a size."""
    if isinstance(value, int):
        return value, False
    if isinstance(value, Mapping):
        if "shortest_edge" in value:
            return int(value["shortest_edge"]), True
        if "height" in value:
            return int(value["height"]), False
    return None


def _per_channel(config: Mapping[str, Any], key: str, channels: int, unit: float) -> list[float]:
    """Values for pixels scaled to [0, 1]; ``unit`` mends configs that leave them at 0..255."""
    default = 0.5 * unit
    values = config.get(key) or [default]
    values = values if isinstance(values, list) else [values]
    return [float(v) / unit for v in (values * channels)[:channels]]
