"""Causal language models of Hugging Face with their cache as plain tensors, in one graph.

The graph takes the usual inputs and outputs of ONNX decoders.  With no past it reads a prompt, with
one token and a past it makes the next step, and everything in between works too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from thresher.models.hf_modules import Encoder

Pair = dict[str, Tensor]  # "key" and "value", each [batch, key-value heads, tokens, head size]


class Past:
    """What a layer of transformers asks of its cache: keys and values before and with the new ones."""

    def __init__(self, layers: Sequence[Pair]) -> None:
        self.layers = [(pair["key"], pair["value"]) for pair in layers]

    def update(self, key: Tensor, value: Tensor, layer: int, *_: Any) -> tuple[Tensor, Tensor]:
        """Append ``[B, H, N, d]`` to the past of a layer; all keys and values so far."""
        old_key, old_value = self.layers[layer]
        self.layers[layer] = torch.cat([old_key, key], 2), torch.cat([old_value, value], 2)
        return self.layers[layer]


class Decoder(Encoder):
    """``input_ids, position_ids [B, N]``, ``attention_mask [B, P + N]`` and P past keys and values.

    Gives ``logits [B, N, vocabulary]`` and ``present.L.key``, ``present.L.value`` of every layer L,
    ``[B, key-value heads, P + N, head size]``, which are the past of the next call.
    """

    outputs = ()  # all of them

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past_key_values: Sequence[Pair],
    ) -> dict[str, Tensor]:
        past, new = past_key_values[0]["key"].shape[2], input_ids.shape[1]
        torch._check(attention_mask.shape[1] == past + new)
        cache = Past(past_key_values)
        result = self.model(
            input_ids=input_ids,
            attention_mask=causal(attention_mask, past, new),
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        found = {"logits": result.logits}
        for layer, (key, value) in enumerate(cache.layers):
            found |= {f"present.{layer}.key": key, f"present.{layer}.value": value}
        return {name: found[name] for name in self.outputs or found}


def causal(attention_mask: Tensor, past: int, new: int) -> Tensor:
    """``[B, P + N] -> bool [B, 1, N, P + N]``: what each new token sees.

    A token sees real ones up to itself.  Padding sees itself too: a row that sees nothing is NaN in
    some engines.
    """
    key = torch.arange(past + new, device=attention_mask.device)[None]
    own = torch.arange(past, past + new, device=attention_mask.device)[:, None]
    real = attention_mask.ne(0)[:, None, None, :]
    return (key <= own) & (real | (key == own))


def plain_linears(model: nn.Module) -> None:
    """Put ``nn.Linear`` in place of GPT-2's ``Conv1D``, which keeps its weight transposed.

    Passes and cost rules then see one kind of layer.
    """
    from transformers.pytorch_utils import Conv1D

    found: list[tuple[str, Any]] = [
        (name, module) for name, module in model.named_modules() if isinstance(module, Conv1D)
    ]
    for name, old in found:
        inputs, outputs = old.weight.shape
        with torch.device("meta"):
            new = nn.Linear(inputs, outputs)
        new.weight = nn.Parameter(old.weight.detach().T.contiguous())
        new.bias = nn.Parameter(old.bias.detach())
        model.set_submodule(name, new)
