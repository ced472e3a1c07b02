"""A bfloat16 model for back ends that have no such kernels, with the numbers of those that have."""

from __future__ import annotations

import onnx_ir as ir

NARROW, WIDE = ir.DataType.BFLOAT16, ir.DataType.FLOAT
_AS_IT_IS = frozenset({"Cast", "CastLike", "Constant", "ConstantOfShape"})  # known in every type


def widen(model: ir.Model) -> None:
    """Compute in float32 what computes in bfloat16, in place, and round each result to bfloat16.

    Products of bfloat16 numbers are exact in float32 and kernels add them up in it, so the results are
    those of a bfloat16 kernel but for the order of sums.  A step of ours is one node here: its body runs in
    float32 and its result is rounded once.
    """
    for node in list(model.graph):
        if node.op_type in _AS_IT_IS:
            continue
        for place, value in enumerate(node.inputs):
            if value is not None and value.dtype == NARROW:
                wide = ir.node("Cast", [value], {"to": WIDE})
                model.graph.insert_before(node, wide)
                node.replace_input_with(place, wide.outputs[0])
        for value in node.outputs:
            if value.dtype == NARROW:
                readers = tuple(value.uses())
                narrow = ir.node("Cast", [value], {"to": NARROW})
                narrow.outputs[0].dtype, narrow.outputs[0].shape = NARROW, value.shape
                value.dtype = WIDE
                model.graph.insert_after(node, narrow)
                for reader, place in readers:
                    reader.replace_input_with(place, narrow.outputs[0])
