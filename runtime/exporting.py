"""From a Program to an engine folder: lower, build, compare with the eager program."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thresher.compiler.errors import UsageError, VerdictError
from thresher.compiler.handed import CORE
from thresher.runtime.backends.base import Tell, silent
from thresher.runtime.bundle import Facts, join, package, ready
from thresher.runtime.calibration import SAMPLES, CalibrationData, calibrate
from thresher.runtime.deviation import DECIDED, OutputError, plain
from thresher.runtime.engine import Engine
from thresher.runtime.feeds import Array
from thresher.runtime.generate import with_own_past
from thresher.runtime.manifest import CALIBRATED, Prediction
from thresher.runtime.runner import ProgramRunner, Runnable, symbol_ranges, tensor_info
from thresher.runtime.sample import random_inputs
from thresher.runtime.scoring import Dataset
from thresher.runtime.shapes import narrowed
from thresher.runtime.verifying import ROUNDS, SameFunction, verify

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
    tell: Tell = silent,
    data: Dataset | None = None,
    samples: int = SAMPLES,
    max_drop: float | None = None,
) -> Engine:
    """Lower a Program, build an engine folder for a target, and return the loaded engine.

    Args:
        program: what to lower.
        folder: output; appears only when everything has succeeded.
        target: a back end, such as ``"cpu"`` or ``"tensorrt-rtx:sm89"``.
        precision: ``"fp32"``, ``"fp16"``, ``"int8"``, or where the target has it ``"bf16"``.
        threads: of the returned engine.
        overwrite: replace an older engine of that name.
        recipe: the resolved recipe, kept in the manifest.
        check: run the engine once against the eager program before the folder gets its name.
        shapes: sizes that inputs will have, such as ``"x=8x3x224x224"``; see
            :mod:`~thresher.runtime.shapes`.
        data: what int8 is calibrated on; the check runs on it too, instead of on random inputs.
        samples: of the data, spread evenly.
        max_drop: points of accuracy that may be lost, on all of the data; needs ``check``.
        tell: called with (what, done, total) while it is built.

    Raises:
        UsageError: unknown target or precision, shapes that do not fit, the folder is taken, or the
            precision or ``max_drop`` needs data that is missing or does not serve, or the check.
        MissingRequirementError: the back end is not installed.
        RefusedError: the back end or the precision does not take the model.
        VerdictError: the engine's numbers differ from the program's, or too much accuracy is lost.
    """
    maker = ready(target, precision, folder, overwrite=overwrite, calibrated=data is not None)
    if max_drop is not None and data is None:
        raise UsageError("a largest drop needs labelled data: give --data, or leave --max-drop out")
    if max_drop is not None and not check:
        raise UsageError("a largest drop is measured by the check: leave check=False out")
    facts, specs = facts_of(program, recipe), tuple(map(tensor_info, program.inputs))
    wanted = narrowed(shapes, specs, facts.ranges)
    maker.check_shapes(specs, wanted.ranges)
    facts = dataclasses.replace(facts, ranges=wanted.ranges, usual=wanted.usual)
    from thresher.compiler.exits import joined
    from thresher.compiler.lowering import branch_prompts, to_onnx

    agrees = None
    if check:
        reference = ProgramRunner(program, threads=threads)
        agrees = partial(agree, reference, data=data, samples=samples, max_drop=max_drop)
    if joined(program) is not None:
        if precision in CALIBRATED:
            raise UsageError(
                f"precision {precision!r} is calibrated on inputs, and the second graph of a model with an exit"
                " takes what the first one gives: choose fp32 or fp16"
            )
        make = partial(
            export, target=target, precision=precision, threads=threads, check=False, shapes=shapes,
            tell=tell,
        )  # fmt: skip
        return _export_halves(program, folder, make, facts, agrees, overwrite=overwrite)
    tell("lowering", 0, 0)
    model = to_onnx(program, precision=maker.graph_precision(precision))
    if precision in CALIBRATED and data is not None:
        chosen = CalibrationData(data, samples)
        told = calibrate(model, specs, wanted.ranges, chosen, threads=threads)
        facts = dataclasses.replace(facts, calibration=told)
    if maker.branches:
        branch_prompts(model)
    return package(
        model,
        folder,
        facts=facts,
        target=target,
        precision=precision,
        threads=threads,
        overwrite=overwrite,
        check=agrees,
        tell=tell,
    )


def _export_halves(
    program: Program,
    folder: Path | str,
    make: partial[Engine],
    facts: Facts,
    check: Callable[[Engine], dict[str, Any]] | None,
    *,
    overwrite: bool,
) -> Engine:
    """A Program with an exit as an engine of two graphs."""
    from thresher.compiler.exits import halves

    cut = halves(program)
    return join(
        folder,
        {"first": partial(make, cut.first), "rest": partial(make, cut.rest)},
        tuple(map(tensor_info, program.inputs)),
        tuple(map(tensor_info, program.outputs)),
        facts=facts,
        target=make.keywords["target"],
        precision=make.keywords["precision"],
        threads=make.keywords["threads"],
        overwrite=overwrite,
        check=check,
    )


def agree(
    reference: Runnable,
    engine: Engine,
    *,
    data: Dataset | None = None,
    samples: int = SAMPLES,
    max_drop: float | None = None,
) -> dict[str, Any]:
    """Compare on data, or on a random batch; returns the numbers for the manifest.

    A batch on some samples of which rounding decides is followed by three more.

    Raises:
        UsageError: ``max_drop`` is given and the data has no labels.
        VerdictError: the engine differs beyond the tolerance of its precision, or loses too much.
    """
    if data is None:
        what = "standard normal, seed 0"
        found = verify(reference, engine, inputs=[_drawn(reference, engine, 0)])
        if any(error.undecided for error in found.same_function.outputs):
            what = f"standard normal, seeds 0 to {ROUNDS - 1}"
            more = [_drawn(reference, engine, seed) for seed in range(ROUNDS)]
            found = verify(reference, engine, inputs=more)
    else:
        what = data.name
        limit = samples if max_drop is None else None
        found = verify(reference, engine, dataset=data, limit=limit, max_drop=max_drop)
    same, quality = found.same_function, found.quality
    for error in same.outputs:
        if not error.same:
            raise VerdictError(f"{_difference(error, same)}: nothing was written")
    if quality is not None and quality.kept is False:
        raise VerdictError(
            f"the engine is right on {quality.accuracy_b:.2%} of {quality.n} samples and the program"
            f" on {quality.accuracy_a:.2%}, a loss of {-quality.difference:.2f} points where"
            f" {max_drop:g} may be lost: nothing was written"
        )
    return {
        "inputs": what,
        "run by": engine.details["provider"],
        "tolerance": same.tolerance,
        "outputs": plain({error.name: _told(error) for error in same.outputs}),
        **({} if quality is None else {"quality": plain(dataclasses.asdict(quality))}),
    }


def _drawn(reference: Runnable, engine: Engine, seed: int) -> dict[str, Array]:
    drawn = random_inputs(engine.inputs, batch=CHECK_BATCH, ranges=engine.ranges, seed=seed)
    return with_own_past(reference, drawn)


def _difference(error: OutputError, same: SameFunction) -> str:
    if error.name.startswith(CORE):
        return (
            f"of {error.samples} core neurons that the program picked for {error.name!r} the engine picked"
            f" {error.agreeing}"
        )
    if not error.decided:
        return (
            f"the engine's output {error.name!r} agrees with the program's in {error.agreeing} of"
            f" {error.samples + error.undecided} samples and {DECIDED:.0%} have to; in {error.undecided} rounding"
            " changes the tokens that the program itself chooses: other inputs (--data) may decide"
        )
    if same.share < 1 and error.agreeing < same.share * error.samples:
        return (
            f"the engine's output {error.name!r} agrees with the program's in {error.agreeing} of"
            f" {error.samples} samples and {same.share:.0%} have to ({same.reason})"
        )
    return (
        f"the engine's output {error.name!r} differs from the program's by"
        f" {error.relative:.2g} of its scale and {same.tolerance:.2g} is allowed ({same.reason})"
    )


def _told(error: OutputError) -> dict[str, Any]:
    """Of one output, for the manifest."""
    names = ("relative", "sqnr_db", "samples", "agreeing", "top1")
    told = {name: value for name in names if (value := getattr(error, name)) is not None}
    return told | ({"undecided": error.undecided} if error.undecided else {})


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
