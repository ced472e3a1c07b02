"""Which block of the model an ONNX node belongs to, also after ONNX Runtime's fusions."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

DOMAIN = "thresher"
MODULE, PASS = "thresher.module", "thresher.pass"  # metadata that the lowering writes
TORCH_SCOPES = "pkg.torch.onnx.name_scopes"  # metadata of torch's own exporter
OUTSIDE = "(rest)"


@dataclass(frozen=True)
class Origin:
    """Module path (``"blocks.3.attn"``) and the inserted operator a node is part of, if any."""

    module: str
    inserted: str | None = None


def origins(model: onnx.ModelProto) -> dict[str, Origin]:
    """Origin of every value of a graph, by the name of the value."""
    found: dict[str, Origin] = {}
    for node in nodes_of(model.graph):
        origin = node_origin(node)
        found.update({name: origin for name in node.output if name})
    return found


def nodes_of(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Nodes, and before each the nodes of its branches."""
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from nodes_of(attribute.g)
        yield node


def node_origin(node: onnx.NodeProto) -> Origin:
    """What a node's metadata and domain say."""
    module, inserted = node_source(node)
    return Origin(module, node.op_type if node.domain == DOMAIN else inserted or None)


def node_source(node: onnx.NodeProto) -> tuple[str, str]:
    """The module that a node's metadata names, and the pass that inserted it, or ``""``."""
    notes = {entry.key: entry.value for entry in node.metadata_props}
    module = notes.get(MODULE) or _innermost(notes.get(TORCH_SCOPES, ""))
    return module, notes.get(PASS, "")


def traced(optimised: onnx.ModelProto, known: Mapping[str, Origin]) -> list[Origin]:
    """Origin of every node of an optimised graph, in the order of :func:`nodes_of`.

    A fused node keeps the name of the last value it computes.  A node whose values are all new (the
    inside of an inlined function, an inserted reorder) belongs to what its results feed.
    """
    reached: dict[str, Origin] = {}
    made: list[Origin] = []
    for node in reversed(list(nodes_of(optimised.graph))):
        own = [known[name] for name in node.output if name in known]
        fed = [reached[name] for name in node.output if name in reached]
        origin = next(iter(own or fed), Origin(""))
        for name in node.input:
            reached.setdefault(name, origin)
        made.append(origin)
    return made[::-1]


def block_names(paths: Iterable[str]) -> dict[str, str]:
    """Block of every module path.

    A block is a numbered module with parts of its own (``blocks.3.attn`` lies in ``blocks.3``); a
    plain list such as a stem counts as one.  Everything else goes by its outermost name.
    """
    unique = set(paths)
    inside: dict[str, set[str]] = {}
    for path in unique:
        block, rest = _numbered(path)
        if block:
            inside.setdefault(block, set()).add(rest)
    real = {block for block, parts in inside.items() if len(parts - {""}) > 1}
    wrappers = {block.split(".")[0] for block in real if block.count(".") > 1}
    return {path: _block(path, real, wrappers) for path in unique}


def _block(path: str, real: set[str], wrappers: set[str]) -> str:
    numbered, _ = _numbered(path)
    if numbered in real:
        return numbered
    parts = path.split(".")
    return ".".join(parts[: 2 if parts[0] in wrappers else 1]) or OUTSIDE


def _numbered(path: str) -> tuple[str, str]:
    """Split behind the first number: ``("blocks.3", "attn.qkv")``; ``("", path)`` without one."""
    parts = path.split(".")
    for index, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: index + 1]), ".".join(parts[index + 1 :])
    return "", path


def _innermost(scopes: str) -> str:
    """The module before the node's own name in torch's list of scopes."""
    try:
        names = ast.literal_eval(scopes) if scopes else []
    except (ValueError, SyntaxError):
        return ""
    modules = [name for name in names[:-1] if name and not name.startswith("_")]
    return str(modules[-1]) if modules else ""
