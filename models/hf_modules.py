"""Thin modules round Hugging Face models: named tensors in, a dict of named tensors out.

transformers builds its padding masks from index arithmetic, and under ``torch.export`` it builds
one of ones where nothing is padded.  Here a mask is prepared in four dimensions, which the models
take as it is, and attention goes to ``scaled_dot_product_attention`` under a name of our own, for
which transformers builds no mask.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ATTENTION = "thresher"


def register_attention() -> None:
    """Make ``attn_implementation="thresher"`` known to transformers; harmless when repeated."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, attention)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """``[B, H, N, d]`` three times -> ``[B, N, H, d]``; keys and values may have fewer heads.

    What may be seen is the mask's business, causal order too.
    """
    shared = {"enable_gqa": True} if key.shape[1] != query.shape[1] else {}
    mixed = F.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, scale=scaling, **shared
    )
    return mixed.transpose(1, 2), None


def pool(hidden: Tensor, mask: Tensor, how: str) -> Tensor:
    """``[B, N, C], [B, N] -> [B, C]``: the first token, or the mean over the real ones."""
    if how == "cls":
        return hidden[:, 0]
    weight = mask.to(hidden.dtype).unsqueeze(-1)
    return (hidden * weight).sum(1) / weight.sum(1)


class Encoder(nn.Module):
    """Base: holds the model and the names of the outputs to give, in order."""

    outputs: tuple[str, ...] = (
        "logits",
        "image_embeds",
        "last_hidden_state",
        "pooler_output",
        "sentence_embedding",
    )

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def named(self, result: Any) -> dict[str, Tensor]:
        """Those of a model's answers that are there and wanted."""
        return {key: result[key] for key in self.outputs if result.get(key) is not None}


class Image(Encoder):
    """``pixel_values [B, C, H, W]``."""

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        return self.named(self.model(pixel_values=pixel_values))


class Spectrogram(Encoder):
    """``input_features [B, mel bins, frames]`` for a Whisper encoder, which knows no padding."""

    def forward(self, input_features: Tensor) -> dict[str, Tensor]:
        return self.named(self.model(input_features))


class Text(Encoder):
    """``input_ids, attention_mask [, token_type_ids] [B, N]`` for BERT and its like.

    Positions and segments are given explicitly: the tables in the model would bound the length.
    """

    def __init__(self, model: Any, sentence: tuple[str, bool] | None = None) -> None:
        super().__init__(model)
        self.sentence = sentence

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> dict[str, Tensor]:
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        real = attention_mask.ne(0)
        result = self.model(
            input_ids=input_ids,
            attention_mask=real[:, None, None, :],
            token_type_ids=token_type_ids,
            position_ids=torch.arange(input_ids.shape[1], device=input_ids.device)[None],
        )
        return self.named(self.with_sentence(result, real))

    def with_sentence(self, result: Any, real: Tensor) -> dict[str, Tensor]:
        """Add ``sentence_embedding [B, C]`` where the folder says how sentences are pooled."""
        outputs = dict(result)
        if self.sentence is not None:
            how, unit_length = self.sentence
            vector = pool(outputs["last_hidden_state"], real, how)
            outputs["sentence_embedding"] = F.normalize(vector, dim=-1) if unit_length else vector
        return outputs


class ModernText(Text):
    """``input_ids, attention_mask [B, N]`` for ModernBERT, whose layers alternate in reach."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        real = attention_mask.ne(0)
        everywhere = real[:, None, None, :]
        place = torch.arange(input_ids.shape[1], device=input_ids.device)
        distance = (place[:, None] - place[None, :]).abs()
        near = everywhere & (distance <= self.model.config.sliding_window)
        # padding far from any word sees itself: a row that sees nothing is NaN in some engines
        masks = {"full_attention": everywhere, "sliding_attention": near | (distance == 0)}
        body = getattr(self.model, "model", self.model)
        hidden = body(input_ids=input_ids, attention_mask=masks).last_hidden_state
        if body is self.model:
            return self.named(self.with_sentence({"last_hidden_state": hidden}, real))
        pooled = pool(hidden, real, self.model.config.classifier_pooling)
        return {"logits": self.model.classifier(self.model.head(pooled))}


class Waveform(Encoder):
    """``input_values [, attention_mask] [B, samples]`` for wav2vec2, masked without writing."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        body = self.body()
        nn.utils.parametrize.remove_parametrizations(body.encoder.pos_conv_embed.conv, "weight")

    def body(self) -> Any:
        return getattr(self.model, "wav2vec2", self.model)

    def forward(
        self, input_values: Tensor, attention_mask: Tensor | None = None
    ) -> dict[str, Tensor]:
        body = self.body()
        frames = body.feature_extractor(input_values).transpose(1, 2)
        hidden = body.feature_projection(frames)[0]
        if attention_mask is None:
            hidden = self.encode(hidden, None)
        else:
            real = self.real_frames(attention_mask, hidden.shape[1])
            hidden = self.encode(torch.where(real[..., None], hidden, 0.0), real[:, None, None, :])
        if body is self.model:
            return {"last_hidden_state": hidden}
        return {"logits": self.model.lm_head(hidden)}

    def real_frames(self, attention_mask: Tensor, frames: int) -> Tensor:
        """``[B, samples] -> bool [B, frames]``: frames that come from real samples."""
        config = self.body().config
        length = attention_mask.sum(1)
        for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
            length = (length - kernel) // stride + 1
        return torch.arange(frames, device=attention_mask.device)[None] < length[:, None]

    def encode(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """The transformer of wav2vec2 on ``[B, frames, C]``, normalised before or after."""
        encoder = self.body().encoder
        last = self.body().config.do_stable_layer_norm
        hidden = hidden + encoder.pos_conv_embed(hidden)
        hidden = hidden if last else encoder.layer_norm(hidden)
        for layer in encoder.layers:
            hidden = layer(hidden, attention_mask=mask)
        return encoder.layer_norm(hidden) if last else hidden
