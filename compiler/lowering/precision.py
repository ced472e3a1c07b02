"""Which nodes of a float16 model stay in float32: decided on the graph, before anything is rewritten.

Half precision pays in the large products and in what moves the residual stream.  An island is

- an operator that needs range or resolution: norms, softmax, powers, sums, angles;
- everything that no weight and no float input flows into (positions, rotary tables, masks), which
  is small and may hold numbers that float16 lacks;
- what a pass inserted, except for what replaces a node of the model, and for the operators of ours,
  which mind their own precision or are products;
- an elementwise node that only islands read, so that a mask meets its logits in float32.
"""

from __future__ import annotations

import torch
from torch import fx
from torch.export.graph_signature import InputKind

from thresher.compiler.program import Program, provenance

# fmt: off
SENSITIVE = frozenset({
    "layer_norm", "native_layer_norm", "rms_norm", "group_norm", "batch_norm", "instance_norm",
    "_native_batch_norm_legit_no_training", "linalg_vector_norm", "norm", "softmax", "_softmax",
    "log_softmax", "_log_softmax", "logsumexp", "pow", "square", "rsqrt", "sqrt", "exp", "log",
    "log1p", "sum", "mean", "var", "std", "cumsum", "sin", "cos",
})
ELEMENTWISE = frozenset({
    "add", "sub", "rsub", "mul", "div", "neg", "masked_fill", "where", "clamp", "clamp_min",
    "maximum", "minimum",
})
PRODUCTS = frozenset({
    "linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "convolution", "conv1d",
    "conv2d", "conv3d", "scaled_dot_product_attention",
})
# fmt: on
OUR_PRODUCTS = frozenset({"adaptive_mlp", "adaptive_gated_mlp"})
PRODUCTS |= OUR_PRODUCTS
_FLOATS = (torch.float32, torch.float16)


def islands(program: Program) -> frozenset[fx.Node]:
    """Nodes that compute in float32 whatever the precision."""
    flowing = _flowing(program)
    found: set[fx.Node] = set()
    for node in reversed(program.graph.nodes):
        if node.op != "call_function" or operator_name(node) is None:
            continue
        name, note = operator_name(node), provenance(node)
        sheltered = bool(node.users) and all(user in found for user in node.users)
        if (
            name in SENSITIVE
            or node not in flowing
            or (note and not note.get("replaces") and name not in OUR_PRODUCTS)
            or (name in ELEMENTWISE and sheltered)
        ):
            found.add(node)
    return frozenset(found)


def operator_name(node: fx.Node) -> str | None:
    """``"add"`` for ``aten.add.Tensor``; None for what is no operator and for those of ours, but for products."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return None
    space, name = str(schema.name).split("::")
    return None if space == "thresher" and name not in OUR_PRODUCTS else name


def is_float(node: fx.Node) -> bool:
    """Whether a node is a tensor that has a half-precision counterpart."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype in _FLOATS


def _flowing(program: Program) -> set[fx.Node]:
    """Nodes that a weight or a float input of the user flows into."""
    names = {spec.arg.name: spec.kind for spec in program.exported.graph_signature.input_specs}
    flowing: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.op == "placeholder":
            kind = names[node.name]
            starts = kind is InputKind.PARAMETER or (
                kind is InputKind.USER_INPUT and is_float(node)
            )
        else:
            starts = any(operand in flowing for operand in node.all_input_nodes)
        if starts:
            flowing.add(node)
    return flowing
