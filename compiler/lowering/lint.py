"""Rules that a lowered model keeps, because some back end is silently wrong or refuses otherwise."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from thresher.compiler.errors import RefusedError

FORBIDDEN = {
    "NonZero": "its output length depends on the data, which TensorRT refuses",
    "Compress": "its output length depends on the data, which TensorRT refuses",
    "Unique": "its output length depends on the data, which TensorRT refuses",
}
_SCATTERS = ("ScatterElements", "ScatterND")


def problems(model: ir.Model) -> Iterator[str]:
    """Every broken rule, as a phrase that names the node."""
    for owner, nodes in [("", model.graph), *((f.name, f) for f in model.functions.values())]:
        for node in nodes:
            where = f"{node.op_type} {node.name or '?'}" + (
                f" in the body of {owner}" if owner else ""
            )
            if node.domain == "" and node.op_type in FORBIDDEN:
                yield f"{where}: {FORBIDDEN[node.op_type]}"
            if (
                node.op_type in _SCATTERS
                and "reduction" in node.attributes
                and node.attributes["reduction"].as_string() != "none"
            ):
                yield f"{where}: scatter with a reduction is wrong or refused on several back ends"
            if (
                node.op_type == "LayerNormalization"
                and len([o for o in node.outputs if o.uses()]) > 1
            ):
                yield f"{where}: TensorRT takes LayerNormalization with one output only"


def check(model: ir.Model) -> None:
    """Refuse a model that breaks a rule.

    Raises:
        RefusedError: naming every node and rule.
    """
    found = list(problems(model))
    if found:
        raise RefusedError("the lowered model breaks a rule: " + "; ".join(found))
