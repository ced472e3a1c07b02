"""Section ``engines``: dense against reduced on the back ends that use a GPU, as far as they are there."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.gpu import models
from tests.gpu.rows import Row, Setting, compared, timed
from thresher.compiler.errors import ThresherError, UsageError
from thresher.compiler.pipeline import optimize
from thresher.compiler.program import Program
from thresher.compiler.recipe import load_recipe
from thresher.runtime import backend, export

SECTION = "engines"
TARGETS = ("cuda", "tensorrt", "tensorrt-rtx")
NOTE = "arrays in host memory, copies included"


def engines(setting: Setting) -> Iterator[Row]:
    """Rows by target and batch size; a target that cannot run is a row with the reason."""
    usable = []
    for target in ("cpu", "unknown") if setting.dry else TARGETS:
        reason = missing(target)
        if reason:
            yield Row(SECTION, target, note=reason)
        else:
            usable.append(target)
    if not usable:
        return
    name, recipe, overrides = (models.DRY if setting.dry else models.CASES)[0]
    side = 24 if setting.dry else 224
    # Engines are made of float32 Programs on the CPU, as the command line makes them.
    host = dataclasses.replace(setting, device="cpu")
    dense = models.traced(host, name, side, torch.float32)
    reduced = optimize(dense, load_recipe(recipe, overrides))
    ideal = next(float(r.details["ideal"]) for r in reduced.history if "ideal" in r.details)
    for target in usable:
        for batch in setting.batches:
            case = f"{target}: {name} {recipe}"
            try:
                dense_times, reduced_times = times(setting, target, batch, side, [dense, reduced])
            except ThresherError as error:
                yield Row(SECTION, case, batch=batch, note=str(error))
                continue
            yield compared(
                SECTION, case, dense_times, reduced_times, batch=batch, ideal=ideal, note=NOTE
            )


def missing(target: str) -> str:
    """Why engines of a target cannot run here, or nothing."""
    try:
        found = backend(target)
    except UsageError as error:
        return str(error)
    state = found.available()
    return found.cannot_run() if state.ok else f"{state.reason}: {state.install}"


def times(
    setting: Setting, target: str, batch: int, side: int, programs: list[Program]
) -> list[list[float]]:
    """Seconds of engines for one batch size, in half precision where the target has it."""
    precision = "fp16" if not setting.dry and "fp16" in backend(target).precisions else "fp32"
    drawn: Any = np.random.default_rng(0).standard_normal((batch, 3, side, side))
    with tempfile.TemporaryDirectory() as folder:
        made = [
            export(
                program, Path(folder) / f"{number}.engine", target=target, precision=precision,
                shapes=[f"x={batch}x3x{side}x{side}"],
            )
            for number, program in enumerate(programs)
        ]  # fmt: skip
        kinds = [engine.inputs[0].dtype for engine in made]
        calls = [
            partial(engine.run, {"x": drawn.astype(kind)})
            for engine, kind in zip(made, kinds, strict=True)
        ]
        try:
            return timed(setting, calls)
        finally:
            for engine in made:
                engine.close()
