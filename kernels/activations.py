"""Activations that operators know by name, in torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor


def identity(x: Tensor) -> Tensor:
    """None: of a linear map in two steps."""
    return x


def quick_gelu(x: Tensor) -> Tensor:
    """``x sigmoid(1.702 x)``, with which CLIP was trained (Hendrycks and Gimpel, 2016)."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "identity": identity,
    "quick_gelu": quick_gelu,
    "relu": F.relu,
    "silu": F.silu,
}
