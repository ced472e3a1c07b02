"""From a Program to an engine folder: lower, build, compare with the eager program."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thresher.compiler.errors import VerdictError
from thresher.runtime.batches import run_in_batches
from thresher.runtime.bundle import Facts, package, ready
from thresher.runtime.deviation import Deviations, tolerance
from thresher.runtime.engine import Engine
from thresher.runtime.generate import with_own_past
from thresher.runtime.manifest import Prediction
from thresher.runtime.runner import ProgramRunner, Runnable, symbol_ranges, tensor_info
from thresher.runtime.sample import random_inputs
from thresher.runtime.shapes import narrowed

if TYPE_CHECKING:
    from thresher.compiler.program import Program

CHECK_BATCH = 4  # unlike the 2 that models are traced with; one tie in a reduced model may pass


def export(
    program: Program,
    folder: Path | str,
    *,
    target: str = "cpu",
    precision: str = "fp32",
    threads: int | None = None,
    overwrite: bool = False,
    recipe: Mapping[str, Any] | None = None,
    check: bool = True,
    shapes: Sequence[str] = (),
) -> Engine:
    """Lower a Program, build an engine folder for a target, and return the loaded engine.

    Args:
        program: what to lower.
        folder: output; appears only when everything has succeeded.
        target: a back end, such as ``"cpu"`` or ``"tensorrt-rtx:sm89"``.
        precision: ``"fp32"``, ``"fp16"``, or where the target has it ``"bf16"``.
        threads: of the returned engine.
        overwrite: replace an older engine of that name.
        recipe: the resolved recipe, kept in the manifest.
        check: run the engine once against the eager program before the folder gets its name.
        shapes: sizes that inputs will have, such as ``"x=8x3x224x224"``; see
            :mod:`~thresher.runtime.shapes`.

    Raises:
        UsageError: unknown target or precision, shapes that do not fit, or the folder is taken.
        MissingRequirementError: the back end is not installed.
        RefusedError: the back end does not take the model.
        VerdictError: the engine's numbers differ from the program's.
    """
    maker = ready(target, precision, folder, overwrite=overwrite)
    facts, specs = facts_of(program, recipe), tuple(map(tensor_info, program.inputs))
    wanted = narrowed(shapes, specs, facts.ranges)
    maker.check_shapes(specs, wanted.ranges)
    facts = dataclasses.replace(facts, ranges=wanted.ranges, usual=wanted.usual)
    from thresher.compiler.lowering import to_onnx

    model = to_onnx(program, precision=maker.graph_precision(precision))
    agrees = partial(agree, ProgramRunner(program, threads=threads)) if check else None
    return package(
        model,
        folder,
        facts=facts,
        target=target,
        precision=precision,
        threads=threads,
        overwrite=overwrite,
        check=agrees,
    )


def agree(reference: Runnable, engine: Engine) -> dict[str, Any]:
    """Compare one random batch; returns the numbers for the manifest.

    Raises:
        VerdictError: the engine differs beyond the tolerance of its precision.
    """
    limit = tolerance(engine.precision)
    drawn = random_inputs(engine.inputs, batch=CHECK_BATCH, ranges=engine.ranges)
    feeds = with_own_past(reference, drawn)
    deviations = Deviations(limit, discrete=engine.reduced)
    deviations.add(reference.run(feeds), run_in_batches(engine, feeds))
    errors = deviations.results()
    for error in errors:
        if not error.same:
            raise VerdictError(
                f"the engine's output {error.name!r} differs from the program's by"
                f" {error.relative:.2g} of its scale and {limit.relative:.2g} is allowed"
                f" ({limit.reason}): nothing was written"
            )
    return {
        "inputs": "standard normal, seed 0",
        "run by": engine.details["provider"],
        "tolerance": limit.relative,
        "outputs": {error.name: {"relative": error.relative} for error in errors},
    }


def _prediction(details: Sequence[Mapping[str, Any]]) -> Prediction | None:
    """Cost of one sample before the first and after the last reduction."""
    told = [entry for entry in details if "macs" in entry and "dense_macs" in entry]
    if not told:
        return None
    dense, macs = int(told[0]["dense_macs"]), int(told[-1]["macs"])
    return Prediction(dense_macs=dense, macs=macs, ideal=dense / macs)


def facts_of(program: Program, recipe: Mapping[str, Any] | None = None) -> Facts:
    """What a Program knows about itself, as plain data."""
    details = [record.details for record in program.history]
    tokens = next((d["tokens"] for d in reversed(details) if "tokens" in d), None)
    return Facts(
        source=dataclasses.asdict(program.info),
        ranges=symbol_ranges(program),
        recipe=dict(recipe) if recipe is not None else None,
        passes=tuple(dataclasses.asdict(record) for record in program.history),
        sites=len(program.ledger),
        tokens=tuple(tokens) if tokens is not None else None,
        prediction=_prediction(details),
        preprocessing=program.info.preprocessing,
        labels=program.info.labels,
    )
