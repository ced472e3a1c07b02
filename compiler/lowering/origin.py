"""Where each ONNX node comes from: the module of the model, and the pass that inserted it.

The exporter's own notes hold stack traces with the paths of the machine that exported, so they are
replaced by two short ones, which the profiler reads.
"""

from __future__ import annotations

import onnx_ir as ir

from thresher.compiler.program import Program, module_path, provenance

MODULE, PASS = "thresher.module", "thresher.pass"
_SOURCE = "pkg.torch.onnx.fx_node"  # "%name : [num_users=1] = call_function[...]"


def note_origins(model: ir.Model, program: Program, lowering: str) -> None:
    """Replace the exporter's metadata by :data:`MODULE` and :data:`PASS`.

    Args:
        model: as exported from ``program``.
        program: its nodes carry the origin.
        lowering: name under which the lowering notes nodes of its own; they are nobody's insertion.
    """
    sources = {node.name: node for node in program.graph.nodes}
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        name = node.metadata_props.get(_SOURCE, "").removeprefix("%").split(" ", 1)[0]
        node.metadata_props.clear()
        node.doc_string = None
        for output in node.outputs:
            output.metadata_props.clear()
        source = sources.get(name)
        if source is None:
            continue
        if path := module_path(source):
            node.metadata_props[MODULE] = path
        made_by = provenance(source).get("pass")
        if made_by and made_by != lowering:
            node.metadata_props[PASS] = made_by
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.metadata_props.clear()
