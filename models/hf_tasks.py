"""What to trace of a loaded Hugging Face model: module, examples, dynamic axes, preprocessing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from thresher.compiler.errors import RefusedError, UsageError
from thresher.compiler.program import Program, SourceInfo
from thresher.compiler.trace import trace
from thresher.models import hf_modules as modules
from thresher.models.hf_folder import (
    image_preprocessing,
    read_json,
    sentence_pooling,
    text_inputs,
    text_preprocessing,
)
from thresher.models.options import SourceOptions, keep_outputs

BATCH, LENGTH = "batch", "length"
# Sizes that models of symbolic length are traced at; costs are predicted and counts searched there.
WORDS, SAMPLES = 64, 16_000


@dataclass(frozen=True)
class Task:
    """A module ready to trace.

    ``shortest`` is the least size of the axis ``length`` that the model can process.
    """

    module: modules.Encoder
    example: dict[str, Tensor]
    dynamic: dict[str, dict[int, str]]
    preprocessing: dict[str, Any] | None = None
    shortest: int = 1

    def trace(self, info: SourceInfo, wanted: tuple[str, ...] | None) -> Program:
        """The Program with all outputs, or with those ``wanted``, in that order."""
        with torch.no_grad():
            names = tuple(self.module(**self.example))
        names = self.module.outputs = keep_outputs(names, wanted, info.source)
        least = {LENGTH: self.shortest}
        return trace(
            self.module,
            self.example,
            dynamic=self.dynamic,
            info=info,
            outputs=names,
            least=least,
        )


def _image(folder: Path, model: Any, options: SourceOptions) -> Task:
    side, channels = model.config.image_size, model.config.num_channels
    return Task(
        modules.Image(model),
        {"pixel_values": torch.zeros(2, channels, side, side)},
        {"pixel_values": {0: BATCH}},
        image_preprocessing(folder, side, channels, resized=options.resolution is not None),
    )


def _text(folder: Path, model: Any, options: SourceOptions) -> Task:
    config = model.config
    if getattr(config, "is_decoder", False):
        raise RefusedError(f"{folder} is configured as a decoder, and hf: reads encoders")
    limit = int(config.max_position_embeddings)
    _check_length(options.length, 1, limit, "tokens")
    length = options.length or min(WORDS, limit)
    names = text_inputs(folder, config)
    module = modules.ModernText if config.model_type == "modernbert" else modules.Text
    return Task(
        module(model, sentence_pooling(folder)),
        {name: torch.full((2, length), int(name == "attention_mask")) for name in names},
        {name: _axes(options.length) for name in names},
        text_preprocessing(folder, names, limit, options.length),
    )


def _spectrogram(folder: Path, model: Any, options: SourceOptions) -> Task:
    """Whisper's encoder takes frames of exactly twice its positions, 3000 as published."""
    encoder = model.get_encoder()
    limit = 2 * int(encoder.config.max_source_positions)
    _check_length(options.length, 2, limit, "frames")
    length = options.length or limit
    if length % 2:
        raise UsageError(f"Whisper halves the frames, so {length} must be even")
    if length != limit:
        positions = encoder.embed_positions.weight[: length // 2].detach()
        encoder.embed_positions = nn.Embedding(length // 2, positions.shape[1], _weight=positions)
        encoder.config.max_source_positions = length // 2
    return Task(
        modules.Spectrogram(encoder),
        {"input_features": torch.zeros(2, encoder.config.num_mel_bins, length)},
        {"input_features": {0: BATCH}},
    )


def _waveform(folder: Path, model: Any, options: SourceOptions) -> Task:
    """A model whose first norm is over time was trained without masks and takes none."""
    config = model.config
    shortest = 2  # frames: torch.export treats sizes 0 and 1 apart
    for kernel, stride in zip(config.conv_kernel[::-1], config.conv_stride[::-1], strict=True):
        shortest = (shortest - 1) * stride + kernel
    _check_length(options.length, shortest, None, "samples")
    length = options.length or max(4 * shortest, SAMPLES)
    example = {"input_values": torch.zeros(2, length)}
    extractor = read_json(folder / "preprocessor_config.json") or {}
    if extractor.get("return_attention_mask", config.feat_extract_norm == "layer"):
        example["attention_mask"] = torch.ones(2, length, dtype=torch.int64)
    return Task(
        modules.Waveform(model),
        example,
        {name: _axes(options.length) for name in example},
        shortest=shortest,
    )


TASKS: dict[str, Callable[[Path, Any, SourceOptions], Task]] = {
    "image": _image,
    "text": _text,
    "spectrogram": _spectrogram,
    "waveform": _waveform,
}


def _axes(length: int | None) -> dict[int, str]:
    return {0: BATCH} if length else {0: BATCH, 1: LENGTH}


def _check_length(length: int | None, low: int, high: int | None, unit: str) -> None:
    if length is not None and not low <= length <= (high or length):
        limit = f"{low} to {high}" if high else f"at least {low}"
        raise UsageError(f"this model takes {limit} {unit}, not {length}")
