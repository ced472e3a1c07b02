"""Definition of ``adaptive_gate``: the gate of Wójcik et al., "Adaptive Computation Modules", AAAI 2025."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def adaptive_gate(x: Tensor, gate: Tensor, bias: Tensor) -> Tensor:
    """``k[b, t] = argmax over m of x[b, t] gate[m] + bias[m]``; of equal logits the first.

    Logits are float32, of a double x double.

    Args:
        x: ``[B, N, D]`` tokens.
        gate: ``[M, D]`` float32; made for few choices M, of at least one.
        bias: ``[M]`` float32.

    Returns:
        ``[B, N]`` int64, from 0 to M - 1, any of them if a logit is not a number.

    Raises:
        ValueError: shapes that do not fit.
    """
    check(x, gate, bias)
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.linear(x.to(wide), gate.to(wide), bias.to(wide)).argmax(-1)


def check(x: Tensor, gate: Tensor, bias: Tensor) -> None:
    """Refuse what does not fit together."""
    fits = gate.dim() == 2 and len(gate) > 0 and bias.shape == gate.shape[:1]
    if x.dim() != 3 or not fits or x.shape[2] != gate.shape[1]:
        shapes = ", ".join(str(list(given.shape)) for given in (x, gate, bias))
        raise ValueError(f"adaptive_gate wants x [B, N, D], gate [M, D] and bias [M], not {shapes}")


def fake(x: Tensor, gate: Tensor, bias: Tensor) -> Tensor:
    """Shape and dtype of the result."""
    check(x, gate, bias)
    return x.new_empty(x.shape[:2], dtype=torch.int64)
