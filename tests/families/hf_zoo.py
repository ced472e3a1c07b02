"""The Hugging Face half of the zoo: vision, text with padding, audio."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from .entry import Dynamic, Entry, draw, images

_VOCABULARY = 500
_CLASS: dict[str, Any] = {"prefix": 1, "class_token": 0}
_BOTH = ("last_hidden_state", "pooler_output")
_HIDDEN = ("last_hidden_state",)
_HF_IMAGE: dict[str, Any] = {"image_size": 96, "patch_size": 16, "intermediate_size": 96}
_PIXELS: Dynamic = {"pixel_values": {0: "batch"}}
_TEXT: Dynamic = {
    "input_ids": {0: "batch", 1: "sequence"},
    "attention_mask": {0: "batch", 1: "sequence"},
}
_WAVE: Dynamic = {
    "input_values": {0: "batch", 1: "samples"},
    "attention_mask": {0: "batch", 1: "samples"},
}
_WORDS: dict[str, Any] = {
    "vocab_size": _VOCABULARY,
    "intermediate_size": 80,
    "max_position_embeddings": 128,
}


class Pixels(nn.Module):
    """A Hugging Face vision model with the named outputs."""

    def __init__(self, model: nn.Module, outputs: tuple[str, ...]) -> None:
        super().__init__()
        self.model = model
        self.outputs = outputs

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        result = self.model(pixel_values=pixel_values)
        return {name: result[name] for name in self.outputs}


class Text(nn.Module):
    """A Hugging Face text encoder with the named outputs."""

    def __init__(self, model: nn.Module, outputs: tuple[str, ...]) -> None:
        super().__init__()
        self.model = model
        self.outputs = outputs

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        result = self.model(input_ids=input_ids, attention_mask=attention_mask)
        return {name: result[name] for name in self.outputs}


class Mel(nn.Module):
    """The encoder of a Hugging Face Whisper model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_features: Tensor) -> dict[str, Tensor]:
        result = self.model(input_features=input_features)
        return {"last_hidden_state": result.last_hidden_state}


class Wave(nn.Module):
    """A Hugging Face wav2vec2 encoder with a mask over samples."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_values: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        result = self.model(input_values=input_values, attention_mask=attention_mask)
        return {"last_hidden_state": result.last_hidden_state}


def _lengths(batch: int, full: int) -> Tensor:
    """Valid lengths [B]: the first row is full, each further one is a fifth shorter."""
    return torch.tensor([max(full - row * (full // 5), full // 2) for row in range(batch)])


def _padding(batch: int, full: int) -> Tensor:
    return (torch.arange(full)[None, :] < _lengths(batch, full)[:, None]).long()


def _words(batch: int = 2, seq: int | None = None) -> dict[str, Tensor]:
    seq = seq or 30
    generator = torch.Generator().manual_seed(batch * 1000 + seq)
    ids = torch.randint(5, _VOCABULARY, (batch, seq), generator=generator)
    return {"input_ids": ids, "attention_mask": _padding(batch, seq)}


def _mels(batch: int = 2, seq: int | None = None) -> dict[str, Tensor]:
    return {"input_features": draw(batch, 16, 64)}


def _samples(batch: int = 2, seq: int | None = None) -> dict[str, Tensor]:
    seq = seq or 660
    return {"input_values": draw(batch, seq), "attention_mask": _padding(batch, seq)}


def _hf(model: str, config: str, wrap: Callable[..., nn.Module], *args: Any, **options: Any) -> Any:
    def make() -> nn.Module:
        transformers = pytest.importorskip("transformers")
        shape = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
        built = getattr(transformers, config)(**{**shape, **options})
        built._attn_implementation = "sdpa"
        network = getattr(transformers, model)(built)
        return wrap(network.encoder if wrap is Mel else network, *args)

    return make


def _text_mask(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    return inputs["attention_mask"].bool()


def _wave_mask(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    inner: Any = model.model
    config = inner.config
    frames, valid = inputs["input_values"].shape[1], inputs["attention_mask"].sum(dim=1)
    for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
        frames = (frames - kernel) // stride + 1
        valid = (valid - kernel) // stride + 1
    return torch.arange(frames)[None, :] < valid[:, None]


HUGGING_FACE: tuple[Entry, ...] = (
    Entry(
        "hf:vit",
        _hf("ViTModel", "ViTConfig", Pixels, _BOTH, **_HF_IMAGE),
        images(96, "pixel_values"),
        layers=3,
        dense=_HIDDEN,
        dynamic=_PIXELS,
        **_CLASS,
    ),
    Entry(
        "hf:clip-vision",
        _hf("CLIPVisionModel", "CLIPVisionConfig", Pixels, ("pooler_output",), **_HF_IMAGE),
        images(96, "pixel_values"),
        layers=3,
        dynamic=_PIXELS,
        **_CLASS,
    ),
    Entry(
        "hf:dinov2",
        _hf("Dinov2Model", "Dinov2Config", Pixels, _BOTH, **_HF_IMAGE),
        images(96, "pixel_values"),
        layers=3,
        dense=_HIDDEN,
        dynamic=_PIXELS,
        **_CLASS,
    ),
    Entry(
        "hf:bert",
        _hf("BertModel", "BertConfig", Text, _BOTH, **_WORDS),
        _words,
        layers=3,
        post_norm=True,
        dense=_HIDDEN,
        dynamic=_TEXT,
        real=_text_mask,
        **_CLASS,
    ),
    Entry(
        "hf:modernbert",
        _hf(
            "ModernBertModel",
            "ModernBertConfig",
            Text,
            _HIDDEN,
            **{**_WORDS, "num_hidden_layers": 4},
            global_attn_every_n_layers=2,
            local_attention=12,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            cls_token_id=1,
            sep_token_id=2,
        ),
        _words,
        layers=4,
        pooling="tokens",
        dense=_HIDDEN,
        dynamic=_TEXT,
        real=_text_mask,
        positional=True,
        tolerance=1e-5,  # rotates q and k in float32 whatever the model's dtype
    ),
    Entry(
        "hf:whisper-encoder",
        _hf(
            "WhisperModel",
            "WhisperConfig",
            Mel,
            d_model=48,
            encoder_layers=3,
            encoder_attention_heads=4,
            encoder_ffn_dim=80,
            decoder_layers=1,
            decoder_attention_heads=4,
            decoder_ffn_dim=16,
            num_mel_bins=16,
            max_source_positions=32,
            vocab_size=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
        ),
        _mels,
        layers=3,
        pooling="tokens",
        dense=_HIDDEN,
        dynamic={"input_features": {0: "batch"}},
    ),
    Entry(
        "hf:wav2vec2",
        _hf(
            "Wav2Vec2Model",
            "Wav2Vec2Config",
            Wave,
            intermediate_size=80,
            conv_dim=(24, 24),
            conv_kernel=(10, 8),
            conv_stride=(5, 4),
            num_feat_extract_layers=2,
            num_conv_pos_embeddings=8,
            num_conv_pos_embedding_groups=4,
            mask_time_prob=0.0,
        ),
        _samples,
        layers=3,
        post_norm=True,
        pooling="tokens",
        dense=_HIDDEN,
        dynamic=_WAVE,
        real=_wave_mask,
    ),
)
