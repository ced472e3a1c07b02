"""Operators that no lowerable Program may hold, with the reason."""

from __future__ import annotations

import torch
from torch import fx

from thresher.compiler.text import op_name

_REDUCES = "combines values that meet at one position, which back ends refuse or get wrong"
_SIZED = "has a result whose size depends on values, so the graph has no static shapes"
_READS = "reads a value out of a tensor while the graph runs"
FORBIDDEN = {
    "aten.scatter_reduce": _REDUCES,
    "aten.scatter_add": _REDUCES,
    "aten.scatter.reduce": _REDUCES,
    "aten.scatter.value_reduce": _REDUCES,
    "aten.index_reduce": _REDUCES,
    "aten.index_add": _REDUCES,
    "aten.nonzero": _SIZED,
    "aten.nonzero_numpy": _SIZED,
    "aten.argwhere": _SIZED,
    "aten.masked_select": _SIZED,
    "aten._unique": _SIZED,
    "aten._unique2": _SIZED,
    "aten.unique_dim": _SIZED,
    "aten.unique_consecutive": _SIZED,
    "aten.unique_dim_consecutive": _SIZED,
    "aten.bincount": _SIZED,
    "aten.repeat_interleave.Tensor": _SIZED,
    "aten.repeat_interleave.self_Tensor": _SIZED,
    "aten.item": _READS,
    "aten._local_scalar_dense": _READS,
}


def forbidden(node: fx.Node) -> str | None:
    """Why a node can be in no lowerable Program, or None."""
    if node.op != "call_function":
        return None
    name = op_name(node.target)
    packet = ".".join(name.split(".")[:2])
    if name in FORBIDDEN or packet in FORBIDDEN:
        return FORBIDDEN.get(name) or FORBIDDEN[packet]
    if packet == "aten.index_put" and (len(node.args) > 3 and node.args[3] is True):
        return _REDUCES
    if packet == "aten.index" and any(_is_mask(n) for n in node.all_input_nodes[1:]):
        return _SIZED
    return None


def _is_mask(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype in (torch.bool, torch.uint8)
