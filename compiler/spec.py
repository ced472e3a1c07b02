"""What a legal Program is at each stage, as rules that run.

A spec is a tuple of rules; a rule yields a :class:`Problem` for every node that breaks it.
:func:`verify` runs all rules of a stage and raises once, with everything that was found.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import fx
from torch.export.graph_signature import InputKind
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols, statically_known_true

from thresher.compiler.errors import RefusedError
from thresher.compiler.forbidden import forbidden
from thresher.compiler.program import LedgerEntry, Program, TensorSpec
from thresher.compiler.text import op_name, value_text

SHOWN = 5  # problems written out in a message; the error object carries all of them


@dataclass(frozen=True)
class Problem:
    """A node that breaks a rule, and how."""

    node: str
    message: str

    def __str__(self) -> str:
        return f"node {self.node!r} {self.message}"


@dataclass(frozen=True)
class Subject:
    """A Program under test, the Program that it came from, and whether output shapes must agree."""

    program: Program
    source: Program | None = None
    same_shapes: bool = True


@dataclass(frozen=True)
class Rule:
    """``says`` completes "a legal Program ..."; ``model``: a breach is the model's, not our bug."""

    says: str
    check: Callable[[Subject], Iterator[Problem]]
    model: bool = False


class SpecError(Exception):
    """A Program is not legal: a bug in what made it."""

    def __init__(self, stage: str, problems: tuple[Problem, ...]) -> None:
        super().__init__(f"the {stage} program is not legal: {summarise(problems)}")
        self.problems = problems


def verify(
    program: Program, stage: str, source: Program | None = None, *, same_shapes: bool = True
) -> None:
    """Check a Program against the spec of a stage: imported, optimised or lowerable.

    ``source`` is the Program that it was made from; its contract must be kept, shapes of outputs
    only with ``same_shapes``.

    Raises:
        SpecError: the Program is broken, which is a bug in thresher or in a plug-in.
        RefusedError: the Program is sound, but the model holds what cannot be lowered.
    """
    subject = Subject(program, source, same_shapes)
    found = [(rule, problem) for rule in SPECS[stage] for problem in rule.check(subject)]
    broken = tuple(problem for rule, problem in found if not rule.model)
    if broken:
        raise SpecError(stage, broken)
    if found:
        raise RefusedError(
            f"{program.info.source} is not {stage}: {summarise(tuple(p for _, p in found))};"
            " rewrite that part of the model without these operators"
        )


def summarise(found: tuple[Problem, ...]) -> str:
    """The first problems in words, and how many more there are."""
    more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return "; ".join(map(str, found[:SHOWN])) + more


# --- the graph itself -----------------------------------------------------------------------------


def _lint(subject: Subject) -> Iterator[Problem]:
    try:
        subject.program.graph.lint()
    except RuntimeError as error:
        yield Problem("output", f"ends a graph that is not well formed: {error}")


def _signature(subject: Subject) -> Iterator[Problem]:
    program = subject.program
    signature = program.exported.graph_signature
    placeholders = [n.name for n in program.graph.nodes if n.op == "placeholder"]
    declared = [spec.arg.name for spec in signature.input_specs]
    for have, want in _unequal(placeholders, declared):
        yield Problem(
            have or want, f"is placeholder {have or 'none'} where the signature has {want}"
        )
    returned = [getattr(n, "name", repr(n)) for n in program.output_nodes()]
    promised = [getattr(spec.arg, "name", "") for spec in signature.output_specs]
    for have, want in _unequal(returned, promised):
        yield Problem(have or want, f"is returned in place of {want or 'nothing'} in the signature")


def _weights(subject: Subject) -> Iterator[Problem]:
    program = subject.program
    stored: dict[str, Any] = {**program.exported.state_dict, **program.exported.constants}
    values = {n.name: n.meta.get("val") for n in program.graph.nodes if n.op == "placeholder"}
    for spec in program.exported.graph_signature.input_specs:
        if spec.kind in (InputKind.USER_INPUT, InputKind.TOKEN, InputKind.CUSTOM_OBJ):
            continue
        weight = stored.get(spec.target or "")
        if weight is None:
            yield Problem(spec.arg.name, f"reads the weight {spec.target!r}, which is not stored")
        elif (why := _difference(values.get(spec.arg.name), weight)) is not None:
            yield Problem(spec.arg.name, f"does not fit its weight {spec.target!r}: {why}")


# --- metadata -------------------------------------------------------------------------------------


def _described(subject: Subject) -> Iterator[Problem]:
    for node in subject.program.graph.nodes:
        yields = getattr(getattr(node.target, "_schema", None), "returns", True)
        if node.op in ("placeholder", "call_function") and yields and "val" not in node.meta:
            yield Problem(node.name, "has no shape and dtype (meta['val'])")


def _recomputed(subject: Subject) -> Iterator[Problem]:
    nodes = subject.program.graph.nodes
    mode = next((v.fake_mode for n in nodes if hasattr(v := n.meta.get("val"), "fake_mode")), None)
    if mode is None:
        return
    with mode, torch.no_grad(), _quietly(mode.shape_env):
        for node in nodes:
            if not _computable(node):
                continue
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
            try:
                value = node.target(*args, **kwargs)
            except Exception as error:  # any operator may fail in any way on wrong operands
                first = str(error).strip().partition("\n")[0]
                yield Problem(node.name, f"({op_name(node.target)}) cannot be computed: {first}")
                continue
            if (why := _difference(node.meta["val"], value)) is not None:
                yield Problem(node.name, f"({op_name(node.target)}) is wrongly described: {why}")


@contextlib.contextmanager
def _quietly(shapes: Any) -> Iterator[None]:
    """Computing again must teach the shape environment nothing."""
    if shapes is None:
        yield
        return
    with shapes.suppress_guards(), shapes.ignore_fresh_unbacked_symbols():
        yield


def _computable(node: fx.Node) -> bool:
    if node.op != "call_function" or isinstance(node.target, torch._ops.HigherOrderOperator):
        return False
    if getattr(getattr(node.target, "_schema", None), "is_mutable", False):
        return False
    return "val" in node.meta and all("val" in n.meta for n in node.all_input_nodes)


def _difference(stated: Any, actual: Any) -> str | None:
    """How two values differ in kind, dtype or shape, or None.  Strides are not compared."""
    if isinstance(stated, torch.Tensor) and isinstance(actual, torch.Tensor):
        same = stated.dtype == actual.dtype and len(stated.shape) == len(actual.shape)
        agree = same and all(map(_same_size, stated.shape, actual.shape))
    elif isinstance(stated, list | tuple) and isinstance(actual, list | tuple):
        agree = len(stated) == len(actual)
        agree = agree and all(
            _difference(a, b) is None for a, b in zip(stated, actual, strict=True)
        )
    elif isinstance(stated, torch.Tensor) or isinstance(actual, torch.Tensor):
        agree = False
    else:
        agree = _same_size(stated, actual)
    return None if agree else f"states {value_text(stated, {})} and is {value_text(actual, {})}"


def _same_size(stated: Any, actual: Any) -> bool:
    if str(stated) == str(actual):  # a loaded Max is another class than a computed one
        return True
    if not any(isinstance(s, torch.SymInt | torch.SymFloat) for s in (stated, actual)):
        return False
    if free_unbacked_symbols([stated, actual]):  # drawn anew each time
        return True
    return statically_known_true(stated == actual)


# --- what came from the source --------------------------------------------------------------------


def _contract(subject: Subject) -> Iterator[Problem]:
    program, source = subject.program, subject.source
    if source is None or any("val" not in n.meta for n in program.output_nodes()):
        return
    yield from _contracts("input", program.inputs, source.inputs, True)
    yield from _contracts("output", program.outputs, source.outputs, subject.same_shapes)


def _contracts(
    kind: str, have: tuple[TensorSpec, ...], want: tuple[TensorSpec, ...], shapes: bool
) -> Iterator[Problem]:
    if len(have) != len(want):
        yield Problem(kind, f"count is {len(have)} instead of {len(want)}")
    for new, old in zip(have, want, strict=False):
        fields = ("name", "dtype", "shape") if shapes else ("name", "dtype")
        for field in fields:
            if getattr(new, field) != getattr(old, field):
                change = f"{field} {getattr(new, field)} instead of {getattr(old, field)}"
                yield Problem(old.name, f"({kind}) has {change}")


def _ledger(subject: Subject) -> Iterator[Problem]:
    nodes = {n.name: n for n in subject.program.graph.nodes}
    for entry in subject.program.ledger:
        if entry.node not in nodes:
            yield Problem(entry.node, f"is in the ledger (block {entry.layer}), not in the graph")
            continue
        outputs = nodes[entry.node].meta.get("val")
        for name, index, count in _maps(entry):
            have = value_text(outputs[index], {}) if _has(outputs, index) else "no such output"
            if not re.fullmatch(rf"int64 \[[^,]+, {re.escape(str(count))}\]", have):
                want = f"output {index} ({name}) as int64 [batch, {count}]"
                yield Problem(entry.node, f"has {have} and the ledger states {want}")


def _ledger_order(subject: Subject) -> Iterator[Problem]:
    place = {n.name: number for number, n in enumerate(subject.program.graph.nodes)}
    known = [entry for entry in subject.program.ledger if entry.node in place]
    for first, second in pairwise(known):
        if place[first.node] > place[second.node]:
            yield Problem(first.node, f"is listed before {second.node}, which runs before it")


def _has(outputs: object, index: int) -> bool:
    return isinstance(outputs, list | tuple) and index < len(outputs)


def _maps(entry: LedgerEntry) -> tuple[tuple[str, int, int | str], ...]:
    return ("slot", entry.slot, entry.tokens_in), ("kept", entry.kept, entry.tokens_out)


# --- operators -----------------------------------------------------------------------------------


def _lowerable(subject: Subject) -> Iterator[Problem]:
    for node in subject.program.graph.nodes:
        if (why := forbidden(node)) is not None:
            yield Problem(node.name, f"({op_name(node.target)}) {why}")


def _nothing_new(subject: Subject) -> Iterator[Problem]:
    """A pass may not bring in what the model did not have."""
    if subject.source is None:
        return
    old = {problem.node for problem in _lowerable(Subject(subject.source))}
    new = list(_lowerable(subject))
    if len(new) > len(old):
        yield from (problem for problem in new if problem.node not in old)


def _unequal(have: list[str], want: list[str]) -> Iterator[tuple[str, str]]:
    length = max(len(have), len(want))
    padded = ([*names, *[""] * (length - len(names))] for names in (have, want))
    return ((a, b) for a, b in zip(*padded, strict=True) if a != b)


IMPORTED = (
    Rule("is a well-formed graph", _lint),
    Rule("has the placeholders and outputs of its signature", _signature),
    Rule("stores every weight that it reads", _weights),
    Rule("describes every node", _described),
    Rule("describes every node as it computes", _recomputed),
)
OPTIMISED = (
    *IMPORTED,
    Rule("keeps the inputs and outputs of its source", _contract),
    Rule("has a ledger that agrees with its nodes", _ledger),
    Rule("has a ledger in the order of its nodes", _ledger_order),
    Rule("has no forbidden operator that its source had not", _nothing_new),
)
LOWERABLE = (
    *OPTIMISED,
    Rule("has no operator that back ends get wrong or that has no static shape", _lowerable, True),
)
SPECS = {"imported": IMPORTED, "optimised": OPTIMISED, "lowerable": LOWERABLE}
