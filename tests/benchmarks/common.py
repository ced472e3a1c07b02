"""What every quality benchmark shares: its options, and the product's comparison run with them.

A benchmark gives a Program and a function that scores a runnable; :func:`study` does the rest.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from thresher.compiler.contract import Context, Dataset
from thresher.compiler.program import Program
from thresher.compiler.variants import CONTROL, DENSE, Variant, variants
from thresher.runtime import Comparison, compare
from thresher.runtime.comparing import Evaluate
from thresher.runtime.conditions import load_average

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

BUDGETS = (0.8, 0.65, 0.5)
METHODS = ("tome", "evit", "diffrate", "topk-norm", CONTROL)


@dataclass
class Study:
    """A finished benchmark; ``notes`` are lines below its table."""

    title: str
    found: Comparison
    notes: list[str]


def parser(description: str | None, *, limit: int) -> argparse.ArgumentParser:
    """Options that all benchmarks have; ``limit`` is the full number of test items."""
    made = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    made.add_argument("--limit", type=int, default=limit, help="test items (default: all)")
    made.add_argument("--threads", type=int, default=2, help="CPU threads")
    made.add_argument("--batch", type=int, default=None, help="batch size when timing")
    made.add_argument("--rounds", type=int, default=15, help="timed rounds; 0: no timing")
    made.add_argument("--methods", nargs="*", default=list(METHODS), help="recipes or passes")
    made.add_argument("--budgets", nargs="*", type=float, default=list(BUDGETS))
    made.add_argument("--eager", action="store_true", help="run with torch instead of engines")
    made.add_argument("--json", type=Path, default=None, help="also write the result here")
    return made


def bound(session: InferenceSession, feeds: Mapping[str, np.ndarray]) -> Callable[[], Any]:
    """Runs on these inputs, into memory that is there already, as a node inside of a network does."""
    from onnxruntime import OrtValue

    binding = session.io_binding()
    for name, value in feeds.items():
        binding.bind_ortvalue_input(name, OrtValue.ortvalue_from_numpy(value))
    for output, value in zip(session.get_outputs(), session.run(None, dict(feeds)), strict=True):
        binding.bind_ortvalue_output(output.name, OrtValue.ortvalue_from_numpy(value))
    return partial(session.run_with_iobinding, binding)


def study(
    title: str,
    program: Program,
    evaluate: Evaluate | None,
    args: argparse.Namespace,
    *,
    batch: int,
    data: Dataset | None = None,
    sizes: Mapping[str, int] | None = None,
    notes: Sequence[str] = (),
    overrides: Sequence[str] = (),
) -> Study:
    """Reduce, export, score and time.

    Args:
        title: of the table.
        program: the dense model.
        evaluate: scores a runnable; None: time only.
        args: of :func:`parser`.
        data: what methods learn or calibrate on.
        batch: batch size when timing, unless the command line says otherwise.
        sizes: other symbolic sizes when timing.
        notes: lines below the table.
        overrides: further options of every method, as ``option=value``.
    """
    watch, load = Steps(title), load_average()
    made = variants(
        program,
        args.methods,
        args.budgets,
        Context(data=data, progress=watch),
        control=False,
        overrides=overrides,
    )
    found = compare(
        [Variant(DENSE, program=program, share=1.0), *made],
        evaluate,
        control=CONTROL,
        threads=args.threads,
        batch=args.batch or batch,
        rounds=args.rounds,
        sizes=sizes,
        eager=args.eager,
        load=load,
        progress=watch,
    )
    return Study(title, found, list(notes))


class Steps:
    """Progress as lines, one for each new step."""

    def __init__(self, title: str) -> None:
        self.title, self.last = title, ""

    def __call__(self, what: str, done: int, total: int) -> None:
        if what != self.last:
            say(f"{self.title}: {what}")
        self.last = what


def say(text: str) -> None:
    """Progress, on standard error."""
    print(text, file=sys.stderr, flush=True)
