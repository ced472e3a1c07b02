"""Rules that a lowered model keeps, because some back end is silently wrong or refuses otherwise."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from thresher.compiler.errors import RefusedError
from thresher.kernels.registry import DOMAIN, called

_SIZED = "its output length depends on the data, which TensorRT refuses"
FORBIDDEN = {"NonZero": _SIZED, "Compress": _SIZED, "Unique": _SIZED}
SCATTERS = ("ScatterElements", "ScatterND")
KNOWN = ("", DOMAIN)


def problems(model: ir.Model) -> Iterator[str]:
    """Every broken rule, as a phrase that names the node; branches and portable bodies included."""
    owners: list[tuple[str, ir.Graph | ir.Function]] = [("", model.graph)]
    owners += [
        (f" in the body of {f.name}", f)
        for f in model.functions.values()
        if f.domain != DOMAIN or called(f.name).portable
    ]
    for owner, graph in owners:
        for node in ir.traversal.RecursiveGraphIterator(graph):
            reason = broken(node)
            if reason:
                yield f"{node.op_type} {node.name or '?'}{owner}: {reason}"


def broken(node: ir.Node) -> str | None:
    """The rule that a node breaks, or None."""
    if node.domain not in KNOWN:
        return f"its domain {node.domain!r} is known to one back end only"
    if node.domain == "" and node.op_type in FORBIDDEN:
        return FORBIDDEN[node.op_type]
    reduction = node.attributes.get("reduction")
    if node.op_type in SCATTERS and reduction is not None and reduction.as_string() != "none":
        return (
            f"scatter with reduction {reduction.as_string()!r} is wrong or refused on several"
            " back ends"
        )
    if node.op_type == "LayerNormalization" and any(o.uses() for o in node.outputs[1:]):
        return "TensorRT takes LayerNormalization with one output only"
    return None


def check(model: ir.Model) -> None:
    """Refuse a model that breaks a rule.

    Raises:
        RefusedError: naming every node and rule.
    """
    found = list(problems(model))
    if found:
        raise RefusedError("the lowered model breaks a rule: " + "; ".join(found))
