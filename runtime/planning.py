"""Everything that stands between a Program and an engine, found without building one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from thresher.compiler.errors import (
    MissingRequirementError,
    RefusedError,
    ThresherError,
    UsageError,
)
from thresher.runtime.backends import TARGETS, Backend, Problem, backend
from thresher.runtime.bundle import check_room
from thresher.runtime.exporting import facts_of
from thresher.runtime.feeds import describe
from thresher.runtime.footprint import Footprint, footprint, largest
from thresher.runtime.manifest import CALIBRATED
from thresher.runtime.runner import tensor_info
from thresher.runtime.shapes import Shapes, narrowed

if TYPE_CHECKING:
    import onnx

    from thresher.compiler.program import Program


@dataclass(frozen=True)
class Trouble:
    """One thing that an export would fail at.

    ``about`` is ``node``, ``model``, ``shape``, ``precision`` or ``package``; the first has a ``node``
    with its operator and where it comes from.
    """

    about: str
    reason: str
    remedy: str
    node: str = ""
    op: str = ""
    source: str = ""

    @property
    def exit_code(self) -> int:
        """That of the export which would fail at it."""
        kinds: dict[str, type[ThresherError]] = {
            "package": MissingRequirementError,
            "shape": UsageError,
            "precision": UsageError,
        }
        return kinds.get(self.about, RefusedError).exit_code


@dataclass(frozen=True)
class Outlook:
    """All troubles at once, the memory that the engine will take if it can be told, and what the export
    has to be given besides."""

    troubles: tuple[Trouble, ...]
    memory: Footprint | None
    needs: str = ""


def outlook(
    program: Program, maker: Backend, precision: str = "fp32", shapes: Sequence[str] = ()
) -> Outlook:
    """What :func:`~thresher.runtime.exporting.export` would meet, all of it and not the first only."""
    from onnx_ir import to_proto

    from thresher.compiler.lowering import branch_prompts, to_onnx

    found = [*_package(maker), *_precision(maker, precision)]
    sizes, wrong = _shapes(program, maker, shapes)
    found += wrong
    needs = (
        f"{precision} is calibrated on data: give export --data" if precision in CALIBRATED else ""
    )
    known = precision if precision in maker.precisions else "fp32"
    try:
        lowered = to_onnx(program, precision=maker.graph_precision(known))
    except RefusedError as error:
        found.append(Trouble("model", str(error), "take another recipe, or change the model"))
        return Outlook(tuple(found), None, needs)
    if maker.branches:
        branch_prompts(lowered)
    model = to_proto(lowered)
    found += _nodes(maker, model)
    specs = tuple(map(tensor_info, program.inputs))
    room = footprint(model, largest(specs, sizes.ranges, sizes.usual))
    if room is not None:
        check_room(room, maker)
    return Outlook(tuple(found), room, needs)


def _package(maker: Backend) -> list[Trouble]:
    state = maker.available()
    return [] if state.ok else [Trouble("package", state.reason, state.install)]


def _precision(maker: Backend, precision: str) -> list[Trouble]:
    if precision in maker.precisions:
        return []
    reason = f"target {maker.name!r} has no precision {precision!r}"
    return [Trouble("precision", reason, f"choose {' or '.join(maker.precisions)}")]


def _shapes(program: Program, maker: Backend, given: Sequence[str]) -> tuple[Shapes, list[Trouble]]:
    """The sizes that are asked for, as far as they are right; every wrong one is told."""
    specs, ranges = tuple(map(tensor_info, program.inputs)), facts_of(program).ranges
    good: list[str] = []
    wrong: list[Trouble] = []
    for text in given:
        try:
            narrowed([*good, text], specs, ranges)
            good.append(text)
        except UsageError as error:
            fitting = ", ".join(f"{spec.name} {describe(spec)}" for spec in specs)
            wrong.append(Trouble("shape", str(error), f"give sizes that fit {fitting}"))
    sizes = narrowed(good, specs, ranges)
    try:
        maker.check_shapes(specs, sizes.ranges)
    except UsageError as error:
        reason, _, remedy = str(error).partition(": ")
        wrong.append(Trouble("shape", reason, remedy))
    return sizes, wrong


def _nodes(maker: Backend, model: onnx.ModelProto) -> list[Trouble]:
    problems = maker.problems(model)
    if not problems:
        return []
    others = {name: set(_keys(backend(name), model)) for name in TARGETS if name != maker.target}
    return [
        Trouble(
            "node",
            p.reason,
            _remedy(p, others),
            node=p.node,
            op=p.op,
            source=", ".join(filter(None, (p.source, p.inserted))),
        )
        for p in problems
    ]


def _keys(maker: Backend, model: onnx.ModelProto) -> list[tuple[str, str]]:
    return [(problem.node, problem.op) for problem in maker.problems(model)]


def _remedy(problem: Problem, others: dict[str, set[tuple[str, str]]]) -> str:
    """Leave out what inserted the node, or go where it is taken."""
    able = [name for name, refused in others.items() if (problem.node, problem.op) not in refused]
    ways = [f"leave out {problem.inserted}"] if problem.inserted else []
    ways += [f"take the target {' or '.join(able)}"] if able else []
    return ", or ".join(ways) or "change the model: no target takes it"
