"""The pipeline: one list of passes, checked before it starts and verified after every pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

from thresher.compiler import registry, spec
from thresher.compiler.contract import Calibration, Context, ContractError, Pass, PassResult
from thresher.compiler.dumps import Dumps
from thresher.compiler.errors import RefusedError, ThresherError, UsageError
from thresher.compiler.program import PassRecord, Program, Refusal
from thresher.compiler.recipe import Recipe, load_recipe
from thresher.compiler.text import op_delta

IMPORTED = "imported"  # the fact that holds for every Program
REASONS = 3  # refusals written out in a message


@dataclass(frozen=True)
class PassReport:
    """One finished pass, for the console.

    Attributes:
        number, total: place in the pipeline, from 1.
        record: what went into the history; its ``seconds`` are those of the pass alone.
        ops: operators whose number of calls changed, and by how much.
        program: the Program behind the pass.
        calibration: what the pass measured on data, to be kept beside the recipe.
    """

    number: int
    total: int
    record: PassRecord
    ops: dict[str, int]
    program: Program
    calibration: Calibration | None = None


Observer = Callable[[PassReport], None]


def optimize(
    program: Program,
    recipe: Recipe | str | Path,
    context: Context | None = None,
    *,
    observe: Observer | None = None,
) -> Program:
    """Run a recipe, given as such, by built-in name or by file, on a Program.

    Raises:
        UsageError: the recipe is wrong, or its order breaks what a pass demands.
        RefusedError: a pass applied nowhere and the recipe does not allow that.
        ContractError: a pass is broken.
    """
    loaded = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    return run(program, loaded, context, observe=observe)


def run(
    program: Program,
    recipe: Recipe,
    context: Context | None = None,
    *,
    observe: Observer | None = None,
) -> Program:
    """Run the passes of a recipe; raises like :func:`optimize`."""
    return run_passes(program, recipe.build(), context, observe=observe)


def explain(
    program: Program, recipe: Recipe, context: Context | None = None
) -> tuple[PassRecord, ...]:
    """What each pass of a recipe, asked by itself, would do to this Program."""
    context = context or Context()
    records = []
    for one in recipe.build():
        start = perf_counter()
        result = one.explain(program, context)
        records.append(_record(one, result, perf_counter() - start))
    return tuple(records)


def run_passes(
    program: Program,
    passes: Sequence[Pass[Any]],
    context: Context | None = None,
    *,
    observe: Observer | None = None,
) -> Program:
    """Run passes in order; raises like :func:`optimize`."""
    context, total = context or Context(), len(passes)
    check_order(passes, program)
    _check_data(passes, context)
    dumps = Dumps(context.dump_dir, total) if context.dump_dir is not None else None
    spec.verify(program, program.stage)
    source = program
    for number, one in enumerate(passes, 1):
        context.progress(f"pass {one.name}", number - 1, total)
        if dumps is not None:
            dumps.before(number, one, program)
        after, result = _apply(one, program, context)
        record = after.history[-1]
        if dumps is not None:
            dumps.after(number, record, after)
        _demand_effect(one, record, program)
        if record.applied:
            _verify(one, after, source)
        if observe is not None:
            delta = op_delta(program, after)
            observe(PassReport(number, total, record, delta, after, result.calibration))
        program = after
        if not (one.keeps_outputs and one.keeps_interface):
            source = program
    context.progress("passes", total, total)
    return program


def check_order(passes: Sequence[Pass[Any]], program: Program) -> None:
    """Check ``after``, ``before`` and ``requires`` of a pipeline against its order.

    Passes in the history of ``program`` count as passes that came first.

    Raises:
        UsageError: naming both passes.
    """
    names = [one.name for one in passes]
    done = [record.name for record in program.history]
    facts = _facts(program)
    for index, one in enumerate(passes):
        late = one.after.intersection(names[index + 1 :])
        if late:
            raise UsageError(
                f"pass {one.name!r} must come after {min(late)!r}: move it down in the recipe"
            )
        early = one.before.intersection(names[:index])
        if early:
            raise UsageError(
                f"pass {one.name!r} must come before {min(early)!r}: move it up in the recipe"
            )
        over = one.before.intersection(done)
        if over:
            raise UsageError(
                f"pass {one.name!r} must come before {min(over)!r}, which was applied already:"
                " start from the original model"
            )
        _check_facts(one, facts, passes[index + 1 :])
        facts |= one.ensures


def _check_facts(one: Pass[Any], facts: set[str], later: Sequence[Pass[Any]]) -> None:
    for fact in sorted(one.requires - facts):
        source = next((other.name for other in later if fact in other.ensures), None)
        remedy = (
            f"put {source!r} before it in the recipe"
            if source
            else "put a pass before it that ensures this"
        )
        raise UsageError(f"pass {one.name!r} needs a program that is {fact!r}: {remedy}")


def _facts(program: Program) -> set[str]:
    """What holds for a Program by its history; passes that are not installed here add nothing."""
    known = registry.names()
    applied = {record.name for record in program.history if record.applied}
    return {IMPORTED}.union(*(registry.load(name).ensures for name in applied if name in known))


def _check_data(passes: Sequence[Pass[Any]], context: Context) -> None:
    """Say that data is missing before anything long runs."""
    for one in passes:
        one.demand_data(context)


def _apply(one: Pass[Any], program: Program, context: Context) -> tuple[Program, PassResult]:
    start = perf_counter()
    try:
        result = one(program, context)
    except ThresherError as error:
        if one.name in str(error):
            raise
        raise type(error)(f"pass {one.name!r}: {error}") from error
    except ContractError as error:
        raise ContractError(f"{error} ({_ran(program)})") from error
    except Exception as error:
        raise ContractError(
            f"pass {one.name!r} failed with {type(error).__name__}: {error} ({_ran(program)})"
        ) from error
    record = _record(one, result, perf_counter() - start)
    return replace(result.program, history=(*program.history, record)), result


def _verify(one: Pass[Any], program: Program, source: Program) -> None:
    """Check what a pass made."""
    try:
        kept = source if one.keeps_interface else None
        spec.verify(program, program.stage, kept, same_shapes=one.keeps_outputs)
    except spec.SpecError as error:
        before = replace(program, history=program.history[:-1])
        raise ContractError(f"pass {one.name!r} broke it: {error} ({_ran(before)})") from error


def _record(one: Pass[Any], result: PassResult, seconds: float) -> PassRecord:
    options = (result.options or one.options).model_dump(mode="json")
    return PassRecord(
        one.name,
        options,
        result.matched,
        result.applied,
        result.refused,
        seconds,
        result.details,
        one.exact,
        one.chooses_tokens,
    )


def _ran(program: Program) -> str:
    names = [record.name for record in program.history]
    return f"passes that ran before: {', '.join(names)}" if names else "no pass ran before"


def _demand_effect(one: Pass[Any], record: PassRecord, program: Program) -> None:
    if record.applied or one.allow_zero:
        return
    if record.refused:
        why = _reasons(record.refused)
    elif record.matched:
        why = f"{record.matched} places would do, but its options ask for no change"
    else:
        why = "it found no place that it is made for"
    raise RefusedError(
        f"pass {one.name!r} applied nowhere in {program.info.source}: {why};"
        " choose another pass or other options, or say allow_zero: true for it in the recipe"
    )


def _reasons(refused: Sequence[Refusal]) -> str:
    """The commonest reasons, each with its first node."""
    counts = Counter(refusal.reason for refusal in refused)
    nodes = {refusal.reason: refusal.node for refusal in reversed(refused)}
    shown = []
    for reason, count in counts.most_common(REASONS):
        more = f" and {count - 1} more" if count > 1 else ""
        shown.append(f"{reason} (node {nodes[reason]!r}{more})" if nodes[reason] else reason)
    rest = len(counts) - REASONS
    return "; ".join(shown) + (f"; and {rest} other reasons" if rest > 0 else "")
