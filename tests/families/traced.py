"""The zoo's models as Programs: traced as the sources trace them, in any dtype."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from tests.families.entry import Entry
from tests.families.zoo import BY_NAME
from thresher.compiler.program import Program, SourceInfo
from thresher.compiler.trace import trace

_WRAPPERS = {"Pixels": "Image", "Text": "Text", "Mel": "Spectrogram", "Wave": "Waveform"}


def program(name: str, dtype: torch.dtype = torch.float64, *, fixed: bool = False) -> Program:
    """A Program of one entry, with symbolic batch, and unless ``fixed`` length where it has one."""
    varies = any(set(axes) != {0} for axes in BY_NAME[name].dynamic.values())
    return _traced(name, dtype, fixed and varies)


@cache
def _traced(name: str, dtype: torch.dtype, fixed: bool) -> Program:
    entry = BY_NAME[name]
    model, inputs = entry.build(dtype)
    example = cast(inputs(2), dtype)
    kept = {name: {0: axes[0]} if fixed else axes for name, axes in entry.dynamic.items()}
    return trace(
        _wrapped(entry, model),
        example,
        dynamic=kept,
        info=SourceInfo(name, "random"),
        outputs=getattr(model, "outputs", None),
        least={} if fixed else {"samples": 65},  # two frames of wav2vec2's feature extractor
    )


def cast(inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Floating-point inputs in another dtype."""
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}


def _wrapped(entry: Entry, model: Any) -> nn.Module:
    """Hugging Face models get the masks that thresher's own source prepares."""
    if not entry.name.startswith("hf:"):
        return model  # type: ignore[no-any-return]
    from thresher.models import hf_modules

    hf_modules.register_attention()
    inner = model.model
    inner.config._attn_implementation = hf_modules.ATTENTION
    kind = "ModernText" if "modernbert" in entry.name else _WRAPPERS[type(model).__name__]
    wrapped = getattr(hf_modules, kind)(inner)
    wrapped.outputs = getattr(model, "outputs", ("last_hidden_state",))
    return wrapped  # type: ignore[no-any-return]
