"""Clean-up: fold what depends on weights alone, drop what nobody uses."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import fx
from torch.export.graph_signature import InputKind

from thresher.compiler.contract import Context, Options, Pass, PassResult
from thresher.compiler.program import Program
from thresher.compiler.surgery import Rewriter

GROWTH = (
    4  # a folded result may be at most this many times as large as the weights that it replaces
)
_SMALL = 4096  # elements: always worth folding


class CleanupOptions(Options):
    """Clean-up has no options."""


class Cleanup(Pass[CleanupOptions]):
    """Constant folding and dead-code elimination.

    A tensor that depends on weights only (a gathered relative-position bias, a resized position
    table) is computed once, here, unless the result is much larger than its sources.
    """

    name = "cleanup"
    summary = "fold constants, drop dead code and unused weights"
    exact = True
    allow_zero = True
    Options: ClassVar[type[CleanupOptions]] = CleanupOptions

    def match(self, program: Program, context: Context) -> PassResult:
        """How many nodes would go."""
        count = len(_foldable(program)) + len(_unused(program))
        return PassResult(program, count, count)

    def run(self, program: Program, context: Context) -> PassResult:
        values = _foldable(program)
        frontier = {n: v for n, v in values.items() if any(user not in values for user in n.users)}
        if not frontier and not _unused(program):
            return PassResult(program, 0, 0)
        rewriter = Rewriter(program, self.name)
        constants: dict[str, torch.Tensor] = {}
        for node in program.graph.nodes:
            if node.op == "output" or node in values:
                continue
            if node.op == "placeholder" and node in program.input_nodes() and not constants:
                constants = {f"folded_{n.name}": v for n, v in frontier.items()}
                for source in frontier:
                    rewriter.map[source] = rewriter.constant(
                        f"folded_{source.name}", constants[f"folded_{source.name}"]
                    )
            rewriter.copy(node)
        outputs = [rewriter.map[n] for n in program.output_nodes()]
        dropped = frozenset(n.name for n in _unused(program)) | _freed(program, values)
        exported = rewriter.finish(outputs, constants, dropped)
        count = len(values) + len(_unused(program))
        return PassResult(
            dataclasses.replace(program, exported=exported),
            count,
            count,
            details={"folded": len(frontier)},
        )


def _weights(program: Program) -> dict[str, torch.Tensor]:
    exported = program.exported
    stored: dict[str, Any] = {**exported.state_dict, **exported.constants}
    return {
        spec.arg.name: stored[spec.target]
        for spec in exported.graph_signature.input_specs
        if spec.kind is not InputKind.USER_INPUT and spec.target in stored
    }


def _foldable(program: Program) -> dict[fx.Node, torch.Tensor]:
    """Nodes computed from weights and literals alone, with their values."""
    known: dict[fx.Node, Any] = {
        n: _weights(program)[n.name] for n in program.graph.nodes if n.name in _weights(program)
    }
    sources = set(known)
    for node in program.graph.nodes:
        if node.op != "call_function" or not all(n in known for n in node.all_input_nodes):
            continue
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()) or not _worth(
            node
        ):
            continue
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: known[n])
        with torch.no_grad():
            known[node] = node.target(*args, **kwargs)
    return {n: v for n, v in known.items() if n not in sources and isinstance(v, torch.Tensor)}


def _worth(node: fx.Node) -> bool:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return isinstance(value, (tuple, list))
    if any(not isinstance(size, int) for size in value.shape):
        return False
    sources = sum(
        n.meta["val"].numel()
        for n in node.all_input_nodes
        if isinstance(n.meta.get("val"), torch.Tensor)
    )
    return bool(value.numel() <= max(GROWTH * sources, _SMALL))


def _unused(program: Program) -> list[fx.Node]:
    """Weights that no node reads."""
    return [
        n
        for n in program.graph.nodes
        if n.op == "placeholder" and not n.users and n not in program.input_nodes()
    ]


def _freed(program: Program, folded: dict[fx.Node, torch.Tensor]) -> frozenset[str]:
    """Weights whose only readers were folded."""
    return frozenset(
        n.name
        for n in program.graph.nodes
        if n.op == "placeholder"
        and n.users
        and all(user in folded for user in n.users)
        and n not in program.input_nodes()
    )
