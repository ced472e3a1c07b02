"""Core neurons by their definitions in float64, on tiny language models of transformers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.models.folders import GROUPED, LANGUAGE, build, save, word_tokenizer

KINDS = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED, "mlp.down_proj"),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {**LANGUAGE, "n_inner": 48}, "mlp.c_proj"),
}
PROMPT, LENGTH, KEPT = 9, 20, 16
IDS = np.random.default_rng(3).integers(5, 120, (3, LENGTH))


def model(kind: str) -> Any:
    cls, config, settings, _ = KINDS[kind]
    return build(cls, config, **settings)


def written(kind: str, place: Path) -> Path:
    """The model's folder, with a tokenizer and IDS as a text."""
    place.mkdir(exist_ok=True)
    save(model(kind), place)
    word_tokenizer(place)
    (place / "text.txt").write_text(" ".join(f"w{number}" for number in IDS.flatten()))
    return place


def definition(hidden: np.ndarray[Any, Any], statistic: str, share: float) -> list[int]:
    """The KEPT neurons of ``[N, H]`` float64 in loops, as the papers have them."""
    width = hidden.shape[1]
    scores = []
    for j in range(width):
        if statistic == "griffin":
            scores.append(
                math.sqrt(sum((row[j] / math.sqrt((row**2).sum())) ** 2 for row in hidden))
            )
        else:
            count = 0
            for row in np.abs(hidden):
                positive = sorted(row[row > 0], reverse=True)
                count += row[j] >= positive[max(1, math.ceil(share * len(positive))) - 1]
            scores.append(float(count))
    return sorted(sorted(range(width), key=lambda j: -scores[j])[:KEPT])


def expected(kind: str, statistic: str, share: float) -> float:
    """Mean loss behind the prompt with the other neurons at zero there, by transformers in float64."""
    language = model(kind).double()
    read: dict[str, np.ndarray[Any, Any]] = {}
    sets: dict[str, list[int]] | None = None

    def hook(name: str) -> Any:
        def see(_: Any, given: tuple[Tensor]) -> tuple[Tensor]:
            (hidden,) = given
            if sets is None:
                read[name] = hidden[0].numpy()
                return (hidden,)
            masked = torch.zeros_like(hidden)
            masked[..., sets[name]] = hidden[..., sets[name]]
            return (torch.cat([hidden[:, :PROMPT], masked[:, PROMPT:]], 1),)

        return see

    for name, module in language.named_modules():
        if name.endswith(KINDS[kind][3]):
            module.register_forward_pre_hook(hook(name))
    losses = []
    for ids in torch.from_numpy(IDS):
        sets = None
        with torch.no_grad():
            language(input_ids=ids[None, :PROMPT])
            sets = {name: definition(h, statistic, share) for name, h in read.items()}
            logits = language(input_ids=ids[None]).logits[0]
        losses.append(
            float(torch.nn.functional.cross_entropy(logits[PROMPT - 1 : -1], ids[PROMPT:]))
        )
    return float(np.mean(losses))
