"""Section ``engines``: dense against reduced on the back ends that use a GPU, as far as they are there."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
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
# How far an engine may be from PyTorch in float32, of the outputs' scale; near ties may merge otherwise.
TOLERANCES = {"fp16": 0.05, "bf16": 0.2, "fp32": 1e-3}
PRECISIONS = tuple(TOLERANCES)


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
        for precision, batch in product(PRECISIONS, setting.batches):
            # An export takes seconds: only the usual precision is measured at every size.
            usual = precision == PRECISIONS[0] or batch == setting.batches[0]
            if not usual or precision not in backend(target).precisions:
                continue
            case = f"{target} {precision}: {name} {recipe}"
            drawn = np.random.default_rng(0).standard_normal((batch, 3, side, side))
            x = drawn.astype(np.float32)
            try:
                yield from rows(setting, target, precision, x, case, [dense, reduced], ideal)
            except ThresherError as error:
                yield Row(SECTION, case, batch=batch, note=str(error))


def missing(target: str) -> str:
    """Why engines of a target cannot run here, or nothing."""
    try:
        found = backend(target)
    except UsageError as error:
        return str(error)
    state = found.available()
    return found.cannot_run() if state.ok else f"{state.reason}: {state.install}"


def rows(
    setting: Setting, target: str, precision: str, drawn: Any, case: str,
    programs: list[Program], ideal: float,
) -> Iterator[Row]:  # fmt: skip
    """What the engines of one batch size answer, beside PyTorch, and how long they take."""
    batch, shape = len(drawn), "x".join(map(str, drawn.shape))
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as opened:
        calls = []
        for number, program in enumerate(programs):
            made = export(
                program, Path(folder) / f"{number}.engine", target=target, precision=precision,
                shapes=[f"x={shape}"],
            )  # fmt: skip
            opened.callback(made.close)
            call = partial(made.run, {"x": drawn.astype(made.inputs[0].dtype)})
            worst = difference(call, program, drawn)
            yield Row(
                SECTION, f"{case}: {('dense', 'reduced')[number]} engine", batch=batch,
                passed=worst <= TOLERANCES[precision],
                note=f"{worst:.1e} of the outputs' scale from PyTorch on the CPU",
            )  # fmt: skip
            calls.append(call)
        dense, reduced = timed(setting, calls)
        yield compared(SECTION, case, dense, reduced, batch=batch, ideal=ideal, note=NOTE)


def difference(call: Callable[[], Any], program: Program, drawn: Any) -> float:
    """How far an engine's only output is from the Program's in float32, of its scale."""
    (found,) = call().values()
    with torch.inference_mode():
        expected: Any = program.module()(x=torch.from_numpy(drawn)).numpy()
    return float(np.abs(found.astype(np.float32) - expected).max() / np.abs(expected).max())
