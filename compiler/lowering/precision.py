"""Which nodes of a half-precision model stay in float32: decided on the graph, before anything is rewritten.

Half precision, float16 or bfloat16, pays in the large products and in what moves the residual stream.  An island is

- an operator that needs range or resolution: norms, softmax, powers, sums, angles;
- everything that no weight and no float input flows into (positions, rotary tables, masks), which
  is small and may hold numbers that float16 lacks;
- what a pass inserted, except for what replaces a node of the model, and for the operators of ours,
  which declare the types of their operands;
- an elementwise node that only islands read, so that a mask meets its logits in float32;
- in bfloat16, whatever is not known to have a kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch.export.graph_signature import InputKind

from thresher.compiler.program import Program, provenance
from thresher.kernels.registry import BY_TORCH_NAME, Operator

HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}
FLOAT32 = "tensor(float)"
OURS = "thresher"  # name space of our operators

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
# What ONNX Runtime's CUDA provider computes in bfloat16, as it is lowered at opset 20.  It lacks Conv,
# which ONNX itself allows there from opset 22 on, Pad, Clip, comparisons, Einsum, pooling and Resize.
IN_BFLOAT16 = ELEMENTWISE - {"clamp", "clamp_min"} | {
    "linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "scaled_dot_product_attention",
    "abs", "erf", "gelu", "relu", "sigmoid", "silu", "tanh",
    "view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "expand",
    "expand_as", "permute", "transpose", "t", "movedim", "cat", "stack", "slice", "select", "narrow",
    "split", "split_with_sizes", "chunk", "unbind", "repeat", "clone", "contiguous", "alias",
    "detach", "dropout", "embedding", "index", "index_select", "gather",
}
# fmt: on
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def islands(program: Program, precision: str) -> frozenset[fx.Node]:
    """Nodes that compute in float32 although the precision is one of :data:`HALF`."""
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
            or (note and not note.get("replaces"))
            or (precision == "bf16" and name not in IN_BFLOAT16)
            or (name in ELEMENTWISE and sheltered)
        ):
            found.add(node)
    return frozenset(found)


def operator_name(node: fx.Node) -> str | None:
    """``"add"`` for ``aten.add.Tensor``; None for what is no operator and for those of ours."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return None
    space, name = str(schema.name).split("::")
    return None if space == OURS else name


def our_operator(node: fx.Node) -> Operator | None:
    """The operator of ours that a node calls, if it does."""
    schema = getattr(node.target, "_schema", None)
    space, _, name = str(schema.name).partition("::") if schema is not None else ("", "", "")
    return BY_TORCH_NAME[name] if space == OURS else None


def declared(node: fx.Node, operator: Operator) -> Iterator[tuple[str, Any, str]]:
    """Arguments of a call of our operator: name, value and the type that it declares, ``""`` for attributes."""
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    for name, value in (*zip(names, node.args, strict=False), *node.kwargs.items()):
        yield name, value, operator.inputs.get(name, "")


def wants_float32(user: fx.Node, operand: fx.Node) -> bool:
    """Whether ``user`` is an operator of ours that declares ``operand`` as float32."""
    operator = our_operator(user)
    return operator is not None and all(
        kind == FLOAT32 for _, value, kind in declared(user, operator) if value is operand
    )


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
