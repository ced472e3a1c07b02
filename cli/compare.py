"""``thresher compare``: methods and budgets side by side, quality against measured time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from thresher.cli import options
from thresher.cli.console import Progress, progress, say, show, show_json, table
from thresher.cli.opening import (
    Watched,
    answers_with_classes,
    axis_sizes,
    open_data,
    open_learning,
    open_program,
)
from thresher.cli.profile import NEGATIVE
from thresher.compiler.errors import RefusedError, UsageError

if TYPE_CHECKING:
    from thresher.compiler.program import Program
    from thresher.compiler.variants import Variant
    from thresher.models.data import Dataset
    from thresher.models.options import SourceOptions
    from thresher.runtime import Runnable
    from thresher.runtime.comparison_report import Report
    from thresher.runtime.paired import Metric

SCORED = 32  # samples in a batch when scoring, unless the model fixes it
TIMED = 8  # and when timing


def compare(
    context: typer.Context,
    source: options.Source,
    data: options.DemandedData,
    methods: Annotated[
        str, typer.Option(metavar="NAME,...", help="Recipes, passes or recipe files.")
    ] = "tome,evit,topk-norm",
    flops: Annotated[
        str,
        typer.Option(
            metavar="SHARE,...", help="Shares of the dense multiply-accumulates to compare at."
        ),
    ] = "0.8,0.65,0.5",
    control: Annotated[
        bool,
        typer.Option(
            "--control/--no-control", help="Add random dropping, which a method has to beat."
        ),
    ] = True,
    learn_data: options.LearnData = None,
    limit: options.Limit = None,
    max_drop: Annotated[
        float | None,
        typer.Option(
            help="Points of accuracy (hundredths) that may be lost; exit code 1 if no row keeps it."
        ),
    ] = None,
    target: options.Target = "cpu",
    precision: options.Precision = "fp32",
    batch: Annotated[int, typer.Option(min=1, help="Samples in a timed batch.")] = TIMED,
    rounds: Annotated[int, typer.Option(min=1, help="Timed visits of every model.")] = 15,
    size: options.Size = None,
    logits: options.Logits = None,
    weights: options.Weights = None,
    resolution: options.Resolution = None,
    length: options.Length = None,
    seed: Annotated[int, typer.Option(min=0, help="Of everything random.")] = 0,
    threads: options.Threads = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="DIR", help="Write table, chart and JSON to this folder."
        ),
    ] = None,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Reduce a model by several methods at several budgets; score and time all of them.

    Differences are paired, with standard errors. Data without class labels is scored by agreement
    with the dense model. A method that refuses the model is a row that says why. No method sees the
    data that it is scored on: one that learns does so on --learn-data.
    """
    names, shares = options.listed(methods, "--methods"), options.shares(flops, "--flops")
    sizes, wishes = axis_sizes(size), options.wishes(weights, resolution, length)
    with progress() as tell:
        from thresher.compiler.contract import Context
        from thresher.compiler.files import check_free
        from thresher.compiler.variants import CONTROL, DENSE, Variant, variants
        from thresher.runtime import compare as measure
        from thresher.runtime.bundle import demand_target
        from thresher.runtime.comparing import judged
        from thresher.runtime.comparison_report import Report
        from thresher.runtime.conditions import load_average

        load = load_average()
        demand_target(target, precision)
        if output is not None:
            check_free(output, overwrite=overwrite)
        dense = _open_dense(source, wishes, batch, tell)
        dataset = open_data(data, dense.info, dense.outputs)
        assert dataset is not None
        quality = _Quality(dense, dataset, limit, logits, tell)
        if max_drop is not None and not quality.labelled:
            raise UsageError(f"--max-drop needs class labels, and {quality.lack}: leave it out")
        passes = Context(seed, open_learning(learn_data, data, dense), progress=tell)
        made = variants(dense, names, shares, passes, control=control)
        _demand_one(made, source)
        found = measure(
            [Variant(DENSE, program=dense, share=1.0), *made],
            quality,
            control=CONTROL,
            target=target,
            precision=precision,
            threads=threads,
            batch=batch,
            rounds=rounds,
            sizes=sizes,
            seed=seed,
            load=load,
            progress=tell,
        )
        verdict = None if max_drop is None else judged(found, names, max_drop)
        report = Report(
            found, source, quality.text, options.command_line(context), dense.info.weights, verdict
        )
        if output is not None:
            tell(f"writing {output}", 0, 0)
            report.write(output, overwrite=overwrite)
    _print(report, output, as_data=json)
    if verdict is not None and not verdict.met:
        raise typer.Exit(NEGATIVE)


class _Quality:
    """Scores a runnable: accuracy where data and model have classes, else agreement with dense.

    The first runnable that is scored is the dense one.
    """

    def __init__(
        self,
        dense: Program,
        dataset: Dataset,
        limit: int | None,
        logits: str | None,
        tell: Progress,
    ) -> None:
        self.dataset, self.limit, self.logits, self.tell = dataset, limit, logits, tell
        self.batch = _fixed_batch(dense) or SCORED
        self.classes = logits is not None or answers_with_classes(dense)
        self.labelled = self._watched("").classes
        self.reference: Runnable | None = None

    @property
    def lack(self) -> str:
        """Why there is no accuracy."""
        if self.dataset.labels is None:
            return f"{self.dataset.name} has no labels"
        if not self.classes:
            return "the model does not answer with classes"
        return f"the labels of {self.dataset.name} are no classes"

    @property
    def text(self) -> str:
        """What is measured on what, for the head of the table."""
        items = f"{self._watched('').total} samples of {self.dataset.name}"
        if self.labelled:
            return f"quality: accuracy on {items}"
        return f"quality: agreement with the dense model on {items}, as {self.lack}"

    def __call__(self, runnable: Runnable) -> list[Metric]:
        from thresher.runtime.scoring import accuracy, agreement

        data = self._watched(f"scoring {runnable.name}")
        if self.labelled:
            return [
                accuracy(runnable, data, batch=self.batch, limit=self.limit, output=self.logits)
            ]
        self.reference = self.reference or runnable
        return agreement(
            runnable,
            self.reference,
            data,
            batch=self.batch,
            limit=self.limit,
            output=self.logits,
            classes=self.classes,
        )

    def _watched(self, what: str) -> Watched:
        def tell(_: str, done: int, total: int) -> None:
            self.tell(what, done, total)

        return Watched(self.dataset, self.limit, tell, classify=self.classes)


def _open_dense(source: str, wishes: SourceOptions, batch: int, tell: Progress) -> Program:
    """The model to reduce.

    Raises:
        UsageError: it has been reduced already, or does not take the batch that is timed.
    """
    dense = open_program(source, wishes, tell)
    if dense.ledger:
        raise UsageError(f"{source} was reduced already: give the SOURCE that it was made from")
    fixed = _fixed_batch(dense)
    if fixed not in (None, batch):
        raise UsageError(f"{source} has a fixed batch of {fixed}, not {batch}: use --batch {fixed}")
    return dense


def _fixed_batch(program: Program) -> int | None:
    """The batch size of a model that has only one."""
    first = program.inputs[0].shape[0]
    return first if isinstance(first, int) else None


def _demand_one(made: Sequence[Variant], source: str) -> None:
    """Raise RefusedError when there is no reduced model at all."""
    if all(variant.program is None for variant in made):
        raise RefusedError(f"no method reduces {source}: {made[0].name} says {made[0].refused}")


def _print(report: Report, output: Path | None, *, as_data: bool) -> None:
    if as_data:
        show_json("compare", report.to_json())
    else:
        from thresher.runtime.tables import comparison

        rows = comparison(report.found)
        show(table(report.title, *rows, narrow=True), *report.sentences())
    if output is not None:
        say(f"written: {output}")
