"""Tiny random models in the Hugging Face layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
IMAGE = {"image_size": 32, "patch_size": 8}
MODERN = {
    "vocab_size": 50,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "cls_token_id": 1,
    "sep_token_id": 2,
    "local_attention": 4,
    "layer_types": ["full_attention", "sliding_attention"],
}
SPEECH = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "num_mel_bins": 16,
    "max_source_positions": 20,
    "vocab_size": 60,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
WAVE = {
    "vocab_size": 30,
    "conv_dim": (16, 16),
    "conv_kernel": (10, 3),
    "conv_stride": (5, 2),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}

LANGUAGE = {
    "vocab_size": 120,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = {**LANGUAGE, "intermediate_size": 48, "num_key_value_heads": 2}  # as Llama has it


def build(cls: str, config: str, **settings: Any) -> Any:
    """A model of transformers with every parameter drawn at random, biases too."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = getattr(transformers, cls)(getattr(transformers, config)(**settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def save(model: Any, folder: Path, **files: Any) -> str:
    """Write the model, and JSON files beside it; the source that names the folder."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model.save_pretrained(folder)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return f"hf:{folder}"


def words(batch: int, length: int) -> dict[str, torch.Tensor]:
    """Token numbers whose rows are two shorter each, padded with 0."""
    real = torch.arange(length)[None] < length - 2 * torch.arange(batch)[:, None]
    real[:, 0] = True
    ids = torch.randint(5, 50, (batch, length)) * real
    return {"input_ids": ids, "attention_mask": real.long()}


def word_tokenizer(folder: Path) -> Path:
    """A tokenizer without special tokens: ``w7`` is token 7."""
    tokenizers = pytest.importorskip("tokenizers")
    table = {"[UNK]": 0, **{f"w{number}": number for number in range(1, 120)}}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(table, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    path = folder / "tokenizer.json"
    made.save(str(path))
    return path


def tokenizer(folder: Path) -> Path:
    """A word-level tokenizer that brackets a text with [CLS] and [SEP]."""
    tokenizers = pytest.importorskip("tokenizers")
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "film", "very"]
    table = {name: number for number, name in enumerate(names)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(table, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    path = folder / "tokenizer.json"
    made.save(str(path))
    return path
