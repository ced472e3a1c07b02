"""Adaptive feed-forward networks of the shipped ViT and their relatives: accuracy, work and time at several budgets.

One training serves all budgets of a row name: ``acm`` is trained at ``--trained`` and its gates are
shifted to the others; ``acm own`` is trained at each of them (``--own``); ``diffrate + acm`` is trained
behind that pass, as are others that ``--before`` names, likewise once; ``--sites`` trains ``acm`` once more on each
choice of sites; ``experts`` trains its routers once, and
``relufy + experts`` once more behind a model with ReLUs.  Trains on the training split (Debian's
dataset-fashion-mnist) and judges on the 10,000 test images.  Early exits have a table of their own, with times on
real images.

    python -m tests.benchmarks.adaptive [--own] [--steps 100 50 200] [--before "diffrate: {flops: 0.7, steps: 100}"]
        [--chart FILE]
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from tests.benchmarks import early_exit, fashion
from tests.benchmarks.common import Study, parser, say
from tests.benchmarks.data import fashion_mnist
from tests.benchmarks.report import finish
from thresher.compiler.analysis.cost import total_macs
from thresher.compiler.contract import Context
from thresher.compiler.files import atomic_file
from thresher.compiler.pipeline import PassReport, run
from thresher.compiler.program import Program
from thresher.compiler.recipe import Recipe, built_in, parse_recipe
from thresher.compiler.variants import CONTROL, DENSE, Variant, variants
from thresher.models import fashion as shipped
from thresher.models.data import Dataset
from thresher.runtime import compare
from thresher.runtime.comparison_chart import comparison_chart
from thresher.runtime.conditions import load_average

BUDGETS = (0.25, 0.4, 0.6, 0.75)
BATCH = 32  # of training
MEASURE = ("drop-blocks", "skip-tokens")  # methods that cannot do without data


def training_set() -> Dataset:
    """The 60,000 images of the training split."""
    images, labels = fashion_mnist("train")

    def read(chosen: Sequence[int]) -> dict[str, object]:
        scaled = (images[list(chosen)].astype("float32") / 255 - shipped.MEAN) / shipped.STD
        return {"images": scaled[:, None].astype("float32")}

    return Dataset("fashion-mnist train", len(images), labels, read)  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True)
class Trained:
    """A pass that is trained once at some options, and what it takes for another budget besides."""

    name: str
    options: Mapping[str, object]
    anew: Mapping[str, object] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.name}: {{{', '.join(f'{key}: {value}' for key, value in self.options.items())}}}"


class Trainer:
    """Trains once, and moves what it trained to other budgets."""

    def __init__(self, program: Program, context: Context) -> None:
        self.program, self.context = program, context

    def rows(
        self, name: str, before: Sequence[str], trained: Trained, budgets: Sequence[float]
    ) -> Iterator[Variant]:
        """A variant for each budget."""
        text = f"passes: [{', '.join([*before, str(trained), 'cleanup: {allow_zero: true}'])}]"
        with tempfile.TemporaryDirectory() as folder:
            recipe = self._trained(parse_recipe(text, name), Path(folder), name)
            for budget in budgets:
                began = time.perf_counter()
                made = run(self.program, _at(recipe, trained, budget), self.context)
                say(f"{name} {budget:g}: {time.perf_counter() - began:.0f} s")
                share = total_macs(made.graph) / total_macs(self.program.graph)
                record = next(r for r in made.history if r.name == trained.name)
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


def _at(recipe: Recipe, trained: Trained, budget: float) -> Recipe:
    """The recipe with another budget for what was trained."""
    changed = {"budget": budget, **trained.anew}
    return dataclasses.replace(
        recipe,
        passes=tuple(
            dataclasses.replace(entry, options=entry.options.model_copy(update=changed))
            if entry.name == trained.name
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
    trainer = Trainer(dense, context)
    steps = dict(zip(("distil_steps", "gate_steps", "steps"), args.steps, strict=True))

    def acm(budget: float, **more: object) -> Trained:
        return Trained("acm", {"budget": budget, **steps, **more})

    experts = Trained("experts", {"budget": args.trained, "steps": args.routers}, {"tau": None})
    rows = list(trainer.rows("acm", (), acm(args.trained), args.budgets))
    if args.own:
        for budget in args.budgets:
            rows += trainer.rows("acm own", (), acm(budget), [budget])
    for sites in args.sites:
        more = acm(args.trained, sites=f"[{sites}]")
        rows += trainer.rows(f"acm of {sites}", (), more, args.budgets)
    for before in args.before:
        name = f"{before.partition(':')[0]} + acm"
        rows += trainer.rows(name, [before], acm(args.trained), args.budgets)
    if args.routers:
        rows += trainer.rows("experts", (), experts, args.budgets)
    if args.relufy:
        bent = run(
            dense, parse_recipe(f"passes: [relufy: {{steps: {args.relufy}}}]", "relufy"), context
        )
        rows += Trainer(bent, context).rows("relufy + experts", (), experts, args.budgets)
    even = [name for name in args.methods if name not in MEASURE]
    others = variants(dense, even, args.flops, Context(progress=tell), control=False)
    measured = [name for name in args.methods if name in MEASURE]
    others += variants(dense, measured, args.flops, context, control=False)
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
    together = " + ".join(map(str, args.steps))
    notes = [
        f"acm trained at budget {args.trained:g} in at most {together} steps of {BATCH} training images",
        *(f"{row.name}: {row.note}" for row in rows),
    ]
    if args.chart is not None:
        with atomic_file(args.chart) as target:
            target.write_bytes(comparison_chart(found, "Adaptive networks of the shipped ViT"))
    return Study("Adaptive feed-forward networks of the shipped ViT", found, notes)


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__, limit=10_000)
    methods = [name for name in ("diffrate", "drop-blocks") if name in built_in()]
    options.set_defaults(methods=methods, budgets=list(BUDGETS))
    options.add_argument(
        "--sites", nargs="*", default=[], help='what else acm converts, such as "ffn, qkv, out"'
    )
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
    options.add_argument(
        "--relufy", type=int, default=200, help="its steps before experts; 0: without"
    )
    options.add_argument("--routers", type=int, default=200, help="of experts; 0: without")
    options.add_argument("--exits", type=int, default=200, help="steps of early exits; 0: without")
    options.add_argument("--chart", type=Path, default=None, help="also draw accuracy against time")
    args = options.parse_args(argv)
    finish([study(args)], args)
    if args.exits:
        data = training_set()
        print(
            "",
            early_exit.page(fashion.program(), data, args.exits, args.limit, args.threads),
            sep="\n",
        )


if __name__ == "__main__":
    main()
