"""Passes for the tests of the framework: one that keeps the contract, and ways to break it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from tests.compiler.toys import Block, Toy, traced
from thresher.compiler.contract import Context, Options, Pass, PassResult
from thresher.compiler.program import Program, Refusal
from thresher.compiler.surgery import Rewriter

PROGRAM = traced(Toy(Block()))
aten = torch.ops.aten


def rewritten(
    program: Program, change: Callable[[Rewriter, list[fx.Node]], list[fx.Node]] | None = None
) -> Program:
    """A copy of a Program whose outputs went through ``change``."""
    rewriter = Rewriter(program, "test")
    for node in program.graph.nodes:
        if node.op != "output":
            rewriter.copy(node)
    outputs = [rewriter.map[n] for n in program.output_nodes()]
    exported = rewriter.finish(outputs if change is None else change(rewriter, outputs))
    return dataclasses.replace(program, exported=exported)


def negated(rewriter: Rewriter, outputs: list[fx.Node]) -> list[fx.Node]:
    """Every output negated: legal, and visible in the count of operators."""
    return [rewriter.emit(aten.neg.default, node) for node in outputs]


def node(program: Program, name: str) -> fx.Node:
    """The node ``linear`` is the first of that name, ``linear_2`` the third: torch numbers as it likes."""
    kind, _, number = name.rpartition("_")
    if not number.isdigit():
        kind, number = name, "0"
    alike = [n for n in program.graph.nodes if re.sub(r"_\d+$", "", n.name) == kind]
    found: fx.Node = alike[int(number)]
    return found


class NegateOptions(Options):
    """Options of the pass below."""

    times: int = 1


class Negate(Pass[NegateOptions]):
    """Keeps the contract."""

    name = "negate"
    summary = "negate every output"
    Options = NegateOptions

    def run(self, program: Program, context: Context) -> PassResult:
        return PassResult(rewritten(program, negated), 1, 1)


class Idle(Pass[Options]):
    """Applies nowhere, and says why."""

    name = "idle"
    summary = "refuse"

    def run(self, program: Program, context: Context) -> PassResult:
        why = ("too narrow", "too narrow", "too late")
        refused = tuple(Refusal(f"linear_{i}", reason) for i, reason in enumerate(why))
        return PassResult(program, 3, 0, refused)


def broken(body: Callable[[Program, Context], Any], **attributes: Any) -> Pass[Any]:
    """A pass named "broken" that does ``body``."""

    class Broken(Pass[Options]):
        name = "broken"
        summary = "break the contract"

        def run(self, program: Program, context: Context) -> PassResult:
            return body(program, context)  # type: ignore[no-any-return]

    for key, value in attributes.items():
        setattr(Broken, key, value)
    return Broken()
