"""Early exit of the shipped ViT: what leaves, what it costs, and the time of real images, one by one and in batches.

python -m tests.benchmarks.adaptive  # prints this table below its own
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tests.benchmarks import fashion
from tests.benchmarks.common import say
from thresher.compiler.contract import Context
from thresher.compiler.errors import VerdictError
from thresher.compiler.program import Program
from thresher.models.data import Dataset
from thresher.passes.exits.early_exit import EarlyExit, ExitOptions
from thresher.runtime.engine import Engine
from thresher.runtime.exporting import export

DROPS = (0.1, 0.5, 1.0)  # points that may be lost
BLOCKS = (2, 3)  # of six, from 0
ROUNDS, TIMED = 5, 64  # visits of each engine, images in a visit
HEAD = (
    "exit behind",
    "may lose",
    "threshold",
    "left early",
    "accuracy",
    "change",
    "work left",
    "ideal",
    "batch 1",
    "batch 8",
)


def page(dense: Program, data: Dataset, steps: int, limit: int, threads: int) -> str:
    """A Markdown table of all exits; speed-ups are ratios of whole visits to the same real images, interleaved."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        with export(dense, place / "dense", check=False, threads=threads) as plain:
            right = fashion.accuracy(plain, limit)[0].items
            rows = list(_rows(dense, data, steps, limit, threads, place, plain, right))
    lines = [" | ".join(HEAD), "|".join(["---"] * len(HEAD)), *(" | ".join(row) for row in rows)]
    title = f"### Early exit, {limit:,} test images, dense {np.mean(right):.2%}"
    return "\n".join([title, "", *(f"| {line} |" for line in lines)])


def _rows(
    dense: Program,
    data: Dataset,
    steps: int,
    limit: int,
    threads: int,
    place: Path,
    plain: Engine,
    right: np.ndarray,
) -> Iterator[list[str]]:
    context = Context(data=data, batch=32)
    for block in BLOCKS:
        known: dict[str, object] = {}
        for drop in DROPS:
            began = time.perf_counter()
            options = ExitOptions.model_validate(
                {"block": block, "max_drop": drop, "steps": steps, **known}
            )
            try:
                made = EarlyExit(options)(dense, context)
            except VerdictError as error:
                say(str(error))
                continue
            say(f"exit behind block {block}, {drop:g}: {time.perf_counter() - began:.0f} s")
            if not known and made.calibration is not None:
                made.calibration.write(place)
                known = {"calibration": place / made.calibration.file}
            folder = place / f"{block}-{drop:g}"
            with export(made.program, folder, check=False, threads=threads) as engine:
                found = fashion.accuracy(engine, limit)[0].items
                left = engine.left_early
                assert left is not None
                share, (first, rest) = left.early / left.items, made.details["macs_of_graphs"]
                work = (first + (1 - share) * rest) / made.details["dense_macs"]
                change = found.astype(float) - right.astype(float)
                unsure = 100 * change.std() / np.sqrt(len(change))
                changed = f"{100 * change.mean():+.2f} ± {unsure:.2f}"
                yield [
                    f"block {block}", f"{drop:g}", f"{made.details['threshold']:.3f}", f"{share:.1%}",
                    f"{found.mean():.2%}", changed, f"{work:.1%}", f"{1 / work:.2f}",
                    *(f"{_speedup(plain, engine, batch):.2f}" for batch in (1, 8)),
                ]  # fmt: skip


def _speedup(plain: Engine, engine: Engine, batch: int) -> float:
    """The median over rounds of one visit to real images by the dense engine over one by the other."""
    images, _ = fashion.test_set(TIMED)

    def visit(one: Engine) -> float:
        began = time.perf_counter()
        for start in range(0, len(images), batch):
            one.run({"images": images[start : start + batch]})
        return time.perf_counter() - began

    visit(plain), visit(engine)
    return float(np.median([visit(plain) / visit(engine) for _ in range(ROUNDS)]))
