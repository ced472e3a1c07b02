"""The sums and norms that a residual stream is made of."""

from __future__ import annotations

import torch
from torch import fx

aten = torch.ops.aten
ADDS = (aten.add.Tensor, aten.add_.Tensor)
NORMS = (aten.layer_norm.default, aten.rms_norm.default)


def summands(node: fx.Node) -> list[fx.Node]:
    """The two tensors that a node adds; none for any other node, nor for a sum with a number."""
    found = [a for a in node.args[:2] if isinstance(a, fx.Node)] if node.target in ADDS else []
    return found if len(found) == 2 else []
