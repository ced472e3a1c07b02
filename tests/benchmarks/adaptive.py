"""Adaptive feed-forward networks of the shipped ViT: accuracy, work and time at several budgets.

One training serves all budgets of a row name: ``acm`` is trained at ``--trained`` and its gates are
shifted to the others; ``acm own`` is trained at each of them (``--own``); ``diffrate + acm`` is trained
behind that pass, as are others that ``--before`` names, likewise once.  Trains on the training split (Debian's
dataset-fashion-mnist) and judges on the 10,000 test images.

    python -m tests.benchmarks.adaptive [--own] [--steps 100 50 200] [--before "diffrate: {flops: 0.7, steps: 100}"]
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from tests.benchmarks import fashion
from tests.benchmarks.common import Study, parser, say
from tests.benchmarks.data import fashion_mnist
from tests.benchmarks.report import finish
from thresher.compiler.analysis.cost import total_macs
from thresher.compiler.contract import Context
from thresher.compiler.pipeline import PassReport, run
from thresher.compiler.program import Program
from thresher.compiler.recipe import Recipe, built_in, parse_recipe
from thresher.compiler.variants import CONTROL, DENSE, Variant, variants
from thresher.models import fashion as shipped
from thresher.models.data import Dataset
from thresher.runtime import compare
from thresher.runtime.conditions import load_average

BUDGETS = (0.25, 0.4, 0.6, 0.75)
BATCH = 32  # of training


def training_set() -> Dataset:
    """The 60,000 images of the training split."""
    images, labels = fashion_mnist("train")

    def read(chosen: Sequence[int]) -> dict[str, object]:
        scaled = (images[list(chosen)].astype("float32") / 255 - shipped.MEAN) / shipped.STD
        return {"images": scaled[:, None].astype("float32")}

    return Dataset("fashion-mnist train", len(images), labels, read)  # type: ignore[arg-type]


class Trainer:
    """Trains once, and shifts the gates of what it trained to other budgets."""

    def __init__(self, program: Program, context: Context, steps: Sequence[int]) -> None:
        self.program, self.context = program, context
        self.steps = dict(zip(("distil_steps", "gate_steps", "steps"), steps, strict=True))

    def rows(
        self, name: str, before: Sequence[str], trained: float, budgets: Sequence[float]
    ) -> Iterator[Variant]:
        """A variant for each budget, trained at one of them."""
        settings = ", ".join(f"{k}: {v}" for k, v in {"budget": trained, **self.steps}.items())
        text = f"passes: [{', '.join([*before, f'acm: {{{settings}}}', 'cleanup: {allow_zero: true}'])}]"
        with tempfile.TemporaryDirectory() as folder:
            recipe = self._trained(parse_recipe(text, name), Path(folder), name)
            for budget in budgets:
                began = time.perf_counter()
                made = run(self.program, _at(recipe, budget), self.context)
                say(f"{name} {budget:g}: {time.perf_counter() - began:.0f} s")
                share = total_macs(made.graph) / total_macs(self.program.graph)
                record = next(r for r in made.history if r.name == "acm")
                note = f"{record.details['share']:.3f} of the feed-forward work on items held out"
                yield Variant(f"{name}@{budget:g}", program=made, share=share, note=note)

    def _trained(self, recipe: Recipe, folder: Path, name: str) -> Recipe:
        began, reports = time.perf_counter(), list[PassReport]()
        run(self.program, recipe, self.context, observe=reports.append)
        say(f"{name}: trained in {time.perf_counter() - began:.0f} s")
        for report in reports:
            if report.calibration is not None:
                report.calibration.write(folder)
        return recipe.decided([report.record.options for report in reports], None).beside(folder)


def _at(recipe: Recipe, budget: float) -> Recipe:
    """The recipe with another budget for ``acm``."""
    changed = {"budget": budget}
    return dataclasses.replace(
        recipe,
        passes=tuple(
            dataclasses.replace(entry, options=entry.options.model_copy(update=changed))
            if entry.name == "acm"
            else entry
            for entry in recipe.passes
        ),
    )


def study(args: argparse.Namespace) -> Study:
    """Train, convert, export, score and time."""
    torch.set_num_threads(args.threads)
    load, dense = load_average(), fashion.program()
    last = ""

    def tell(what: str, done: int, total: int) -> None:
        nonlocal last
        if what.split(":")[0] != last:
            last = what.split(":")[0]
            say(last)

    context = Context(data=training_set(), batch=BATCH, progress=tell)
    trainer = Trainer(dense, context, args.steps)
    rows = list(trainer.rows("acm", (), args.trained, args.budgets))
    if args.own:
        for budget in args.budgets:
            rows += trainer.rows("acm own", (), budget, [budget])
    for before in args.before:
        name = f"{before.partition(':')[0]} + acm"
        rows += trainer.rows(name, [before], args.trained, args.budgets)
    others = variants(dense, args.methods, args.flops, Context(progress=tell), control=False)
    found = compare(
        [Variant(DENSE, program=dense, share=1.0), *rows, *others],
        lambda runnable: fashion.accuracy(runnable, args.limit),
        control=CONTROL,
        threads=args.threads,
        batch=args.batch or 8,
        rounds=args.rounds,
        eager=args.eager,
        load=load,
        progress=tell,
    )
    steps = " + ".join(map(str, args.steps))
    notes = [
        f"trained at budget {args.trained:g} in at most {steps} steps of {BATCH} training images",
        *(f"{row.name}: {row.note}" for row in rows),
    ]
    return Study("Adaptive feed-forward networks of the shipped ViT", found, notes)


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__, limit=10_000)
    methods = [name for name in ("diffrate", "drop-blocks") if name in built_in()]
    options.set_defaults(methods=methods, budgets=list(BUDGETS))
    options.add_argument("--trained", type=float, default=0.4, help="budget of the one training")
    options.add_argument("--own", action="store_true", help="also a training for each budget")
    options.add_argument(
        "--before",
        nargs="*",
        default=["diffrate: {flops: 0.7, steps: 100}"],
        help="passes to train behind",
    )
    options.add_argument("--flops", nargs="*", type=float, default=[0.9, 0.8, 0.7, 0.6, 0.5])
    options.add_argument("--steps", nargs=3, type=int, default=[100, 50, 200], help="of each phase")
    args = options.parse_args(argv)
    finish([study(args)], args)


if __name__ == "__main__":
    main()
