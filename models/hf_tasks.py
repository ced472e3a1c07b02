"""What to trace of a loaded Hugging Face model: module, examples, dynamic axes, preprocessing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from thresher.compiler.errors import RefusedError, UsageError
from thresher.compiler.program import Program, SourceInfo
from thresher.compiler.trace import trace
from thresher.models import hf_modules as modules
from thresher.models.hf_decoders import Decoder, plain_linears
from thresher.models.hf_folder import (
    image_preprocessing,
    language_preprocessing,
    read_json,
    sentence_pooling,
    text_inputs,
    text_preprocessing,
)
from thresher.models.options import SourceOptions, keep_outputs

BATCH, LENGTH = "batch", "length"
PAST, SEQUENCE = "past", "sequence"  # tokens in the cache of a language model, and new ones
# Sizes that models of symbolic length are traced at; costs are predicted and counts searched there.
WORDS, SAMPLES = 64, 16_000


@dataclass(frozen=True)
class Task:
    """A module ready to trace.

    ``least`` are the smallest sizes of symbolic axes that the model can process, where not 1.
    """

    module: modules.Encoder
    example: dict[str, Any]
    dynamic: dict[str, dict[int, str]]
    preprocessing: dict[str, Any] | None = None
    least: dict[str, int] = field(default_factory=dict)

    def trace(self, info: SourceInfo, wanted: tuple[str, ...] | None) -> Program:
        """The Program with all outputs, or with those ``wanted``, in that order."""
        with torch.no_grad():
            names = tuple(self.module(**self.example))
        names = self.module.outputs = keep_outputs(names, wanted, info.source)
        return trace(
            self.module,
            self.example,
            dynamic=self.dynamic,
            info=info,
            outputs=names,
            least=self.least,
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
        least={LENGTH: shortest},
    )


def _causal(folder: Path, model: Any, options: SourceOptions) -> Task:
    """Batch, past and new tokens are all symbolic; the past may be empty."""
    config = model.config
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        raise RefusedError(
            f"{folder} attends within a sliding window of {config.sliding_window} tokens, and the"
            " cache of hf: keeps all: set sliding_window to null for texts that are shorter"
        )
    if getattr(config, "add_cross_attention", False):
        raise RefusedError(f"{folder} also attends to an encoder, and hf: reads decoders alone")
    plain_linears(model)
    batch, past, new = 2, 4, 3  # sizes of the example; any will do
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layers = [
        {part: torch.zeros(batch, heads, past, size) for part in ("key", "value")}
        for _ in range(config.num_hidden_layers)
    ]
    names = [f"past_key_values.{i}.{part}" for i, layer in enumerate(layers) for part in layer]
    return Task(
        Decoder(model),
        {
            "input_ids": torch.zeros(batch, new, dtype=torch.int64),
            "attention_mask": torch.ones(batch, past + new, dtype=torch.int64),
            "position_ids": torch.zeros(batch, new, dtype=torch.int64),  # one tensor is one input
            "past_key_values": layers,
        },
        {
            "input_ids": {0: BATCH, 1: SEQUENCE},
            "attention_mask": {0: BATCH, 1: f"{PAST} + {SEQUENCE}"},
            "position_ids": {0: BATCH, 1: SEQUENCE},
            **{name: {0: BATCH, 2: PAST} for name in names},
        },
        language_preprocessing(folder, int(config.max_position_embeddings)),
        least={PAST: 0},
    )


TASKS: dict[str, Callable[[Path, Any, SourceOptions], Task]] = {
    "image": _image,
    "text": _text,
    "spectrogram": _spectrogram,
    "waveform": _waveform,
    "causal": _causal,
}


def _axes(length: int | None) -> dict[int, str]:
    return {0: BATCH} if length else {0: BATCH, 1: LENGTH}


def _check_length(length: int | None, low: int, high: int | None, unit: str) -> None:
    if length is not None and not low <= length <= (high or length):
        limit = f"{low} to {high}" if high else f"at least {low}"
        raise UsageError(f"this model takes {limit} {unit}, not {length}")
