"""The text form of a Program: one line per node, made to be read and diffed; weights never in it.

A line is ``name = operator(arguments) : dtype [shape]  # module path  @pass``.  Nothing in it
depends on time, memory addresses or the numbers of symbols.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

if TYPE_CHECKING:
    from thresher.compiler.program import PassRecord, Program, TensorSpec

ITEMS = 12  # a longer list of plain numbers is cut
_TO_END = 2**63 - 1


def render(program: Program) -> str:
    """Listing of a Program: what it is, what was done to it, and its nodes."""
    symbols = program.symbols
    weights = {s.arg.name: s.target for s in program.exported.graph_signature.input_specs}
    lines = header(program)
    for node in program.graph.nodes:
        lines.append(node_line(node, symbols, weights.get(node.name)))
    return "\n".join(lines) + "\n"


def header(program: Program) -> list[str]:
    """Comment lines: source, inputs, outputs, history and token counts."""
    lines = [f"# {program.stage} program of {program.info.source}, weights {program.info.weights}"]
    lines += [f"# input  {_spec(spec)}" for spec in program.inputs]
    lines += [f"# output {_spec(spec)}" for spec in program.outputs]
    lines += [f"# pass   {record_line(record)}" for record in program.history]
    for entry in program.ledger:
        counts = f"{entry.tokens_in} -> {entry.tokens_out} tokens"
        lines.append(f"# tokens block {entry.layer}: {counts} by {entry.method} ({entry.node})")
    return lines


def record_line(record: PassRecord) -> str:
    """``tome(r=13): matched 12, applied 12, refused 0``."""
    options = options_text(record.options)
    counts = f"matched {record.matched}, applied {record.applied}, refused {len(record.refused)}"
    return f"{record.name}({options}): {counts}"


def options_text(options: Mapping[str, Any]) -> str:
    """``r=13, inflect=0.0``; options that are null are left out."""
    return ", ".join(f"{key}={value}" for key, value in options.items() if value is not None)


def node_line(node: fx.Node, symbols: Mapping[str, str], weight: str | None = None) -> str:
    """One node; ``symbols`` names the symbolic sizes, ``weight`` what a placeholder reads."""
    from thresher.compiler.program import module_path, provenance

    if node.op == "output":
        return f"return {_argument(node.args[0])}"
    if node.op == "placeholder":
        call = "input" if weight is None else f"weight {weight}"
    else:
        parts = [_argument(a) for a in node.args]
        parts += [f"{key}={_argument(a)}" for key, a in node.kwargs.items()]
        call = f"{op_name(node.target)}({', '.join(parts)})"
    notes = []
    if path := module_path(node):
        notes.append(path)
    if made := provenance(node):
        notes.append(f"@{made.get('pass', '?')}")
    line = f"{node.name} = {call} : {value_text(node.meta.get('val'), symbols)}"
    return f"{line}  # {'  '.join(notes)}" if notes else line


def op_name(target: object) -> str:
    """``aten.linear``, ``aten.slice.Tensor``, ``thresher.keep_tokens``, ``add``."""
    if isinstance(target, str):
        return target
    if isinstance(target, torch._ops.OpOverload):
        return str(target).removesuffix(".default")
    return getattr(target, "__name__", type(target).__name__)


def op_counts(program: Program) -> Counter[str]:
    """How often each operator is called."""
    return Counter(op_name(n.target) for n in program.graph.nodes if n.op == "call_function")


def op_delta(before: Program, after: Program) -> dict[str, int]:
    """Operators whose number of calls changed, and by how much, sorted by name."""
    old, new = op_counts(before), op_counts(after)
    return {name: new[name] - old[name] for name in sorted(old | new) if new[name] != old[name]}


def value_text(value: Any, symbols: Mapping[str, str]) -> str:
    """``float32 [batch, 197, 384]``; tuples in parentheses; ``?`` where a node says nothing."""
    if isinstance(value, torch.Tensor):
        sizes = ", ".join(size_text(size, symbols) for size in value.shape)
        return f"{str(value.dtype).removeprefix('torch.')} [{sizes}]"
    if isinstance(value, list | tuple):
        return f"({', '.join(value_text(item, symbols) for item in value)})"
    return "?" if value is None else f"size {size_text(value, symbols)}"


def size_text(size: object, symbols: Mapping[str, str]) -> str:
    """A size with symbols under the user's names."""
    text = str(size)
    return re.sub(r"\b[A-Za-z_]\w*", lambda m: symbols.get(m.group(), m.group()), text)


def _spec(spec: TensorSpec) -> str:
    return f"{spec.name} : {spec.dtype} [{', '.join(map(str, spec.shape))}]"


def _argument(value: Any) -> str:
    if isinstance(value, list | tuple):
        shown = [_argument(item) for item in value]
        if len(shown) > ITEMS and not any(isinstance(item, fx.Node) for item in value):
            shown = [*shown[:ITEMS], f"... {len(value)} items"]
        return f"[{', '.join(shown)}]"
    if isinstance(value, str):
        return repr(value)
    return "end" if value == _TO_END and type(value) is int else str(value).removeprefix("torch.")
