"""``thresher optimize``: a recipe makes a smaller Program of a model."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from thresher.cli import options
from thresher.cli.console import progress, say, show, show_json
from thresher.cli.opening import (
    RECIPE,
    Watched,
    answers_with_classes,
    at_once,
    open_data,
    open_learning,
    open_program,
    reads_text,
)
from thresher.cli.passes import as_json, foreseen, foresight, pass_table, warn
from thresher.compiler.errors import UsageError, VerdictError

if TYPE_CHECKING:
    from thresher.compiler.contract import Calibration
    from thresher.compiler.pipeline import PassReport
    from thresher.compiler.program import Program
    from thresher.compiler.recipe import Recipe
    from thresher.runtime import Verification

GLANCE = 512  # samples of the data that are looked at when no accuracy is demanded


def optimize(
    source: options.Source,
    output: options.Output,
    recipe: options.Recipe = options.DEFAULT_RECIPE,
    settings: options.Settings = None,
    flops: options.Flops = None,
    speedup: options.Speedup = None,
    budget: options.Budget = None,
    data: options.Data = None,
    learn_data: options.LearnData = None,
    limit: options.Limit = None,
    max_drop: options.MaxDrop = None,
    target: options.MeantFor = "cpu",
    weights: options.Weights = None,
    resolution: options.Resolution = None,
    length: options.Length = None,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    threads: options.Threads = None,
    dump_dir: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Write the graph as text before and after each pass."),
    ] = None,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Reduce a model by a recipe and save it with its history.

    With --data the quality is compared with the dense model's; with --max-drop nothing is written
    when more is lost.
    """
    if max_drop is not None and data is None:
        raise UsageError("--max-drop needs labelled data to measure on: add --data DATA")
    reports: list[PassReport] = []
    with progress() as tell:
        import torch

        from thresher.compiler import workers
        from thresher.compiler.contract import Context
        from thresher.compiler.files import check_free
        from thresher.compiler.pipeline import run
        from thresher.compiler.recipe import LearnedOn, load_recipe
        from thresher.runtime.backends import backend

        check_free(output, overwrite=overwrite)
        chosen = load_recipe(recipe, options.overrides(settings, flops, speedup, budget))
        chosen = chosen.rounding(backend(target).multiple)
        warn(chosen)
        dense = open_program(source, options.wishes(weights, resolution, length), tell)
        if data is not None and reads_text(dense):
            raise UsageError(
                "the quality of a causal language model is judged on engines: give the text as"
                " --learn-data, export both, and use 'thresher verify A B --data TEXT --step 1'"
            )
        dataset = open_data(data, dense.info, dense.outputs)
        learned_on = open_learning(learn_data, data, dense) or dataset
        if threads is not None:
            torch.set_num_threads(threads)
        unfinished = output.with_name(f"{output.name}.unfinished")
        context = Context(seed, learned_on, at_once(dense), tell, dump_dir, checkpoints=unfinished)
        with kept_when_interrupted(unfinished):
            reduced = run(dense, chosen, context, observe=reports.append)
        if workers.rank() != 0:
            return  # the first process of a torchrun writes for all
        ran = [report.record.options for report in reports]
        told = None if learned_on is None else LearnedOn(learned_on.name, source)
        chosen = chosen.decided(ran, told)
        quality = None
        if dataset is not None:
            count = limit or (None if max_drop is not None else GLANCE)
            classify = max_drop is not None or answers_with_classes(dense)
            watched = Watched(dataset, count, tell, classify=classify)
            quality = _compare(dense, reduced, watched, count, max_drop, threads)
        tell(f"writing {output}", 0, 0)
        measured = [report.calibration for report in reports if report.calibration is not None]
        save(reduced, chosen, output, measured, overwrite=overwrite)
        shutil.rmtree(unfinished, ignore_errors=True)
    _print(source, output, chosen, reduced, reports, quality, as_data=json)


def save(
    program: Program,
    recipe: Recipe,
    output: Path,
    measured: Sequence[Calibration] = (),
    *,
    overwrite: bool,
) -> None:
    """Write the Program, the resolved recipe and its calibrations, whole or not at all."""
    from thresher.compiler.files import atomic_folder

    with atomic_folder(output, overwrite=overwrite) as partial:
        program.write(partial)
        (partial / RECIPE).write_text(recipe.to_yaml())
        for calibration in measured:
            calibration.write(partial)
        for record in program.history:
            if "learning" in record.details:
                from thresher.cli.learning_chart import draw

                draw(record.details, partial / "counts.png")


@contextmanager
def kept_when_interrupted(unfinished: Path) -> Iterator[None]:
    """Say where the work so far lies when the user stops a training."""
    try:
        yield
    except KeyboardInterrupt:
        if unfinished.exists():
            say(f"the training so far is in {unfinished}: repeat the command to go on with it")
        raise


def closeness(found: Verification) -> list[str]:
    """How near the reduced model's outputs are to the dense one's, in words."""
    return [
        f"{error.name}: mean cosine {error.cosine:.4f} to the dense model's on {error.samples} samples"
        for error in found.same_function.outputs
    ]


def _compare(
    dense: Program,
    reduced: Program,
    dataset: Watched,
    limit: int | None,
    max_drop: float | None,
    threads: int | None,
) -> Verification:
    """Dense against reduced, both run eagerly on the data.

    Raises:
        VerdictError: more is lost than ``max_drop`` allows.
    """
    from thresher.runtime import ProgramRunner, verify

    runners = [
        ProgramRunner(program, name=name, threads=threads)
        for program, name in ((dense, "dense"), (reduced, "reduced"))
    ]
    found = verify(*runners, dataset=dataset, limit=limit, max_drop=max_drop, same=False)
    if not found.met:
        raise VerdictError(
            f"{found.sentences[-1]}: nothing was written; ask for less reduction or allow more"
        )
    return found


def _print(
    source: str,
    output: Path,
    recipe: Recipe,
    program: Program,
    reports: Sequence[PassReport],
    quality: Verification | None,
    *,
    as_data: bool,
) -> None:
    records = [report.record for report in reports]
    if as_data:
        data: dict[str, Any] = {
            "output": str(output),
            "source": source,
            "weights": program.info.weights,
            "recipe": recipe.plain(),
            "passes": as_json(records),
            "prediction": foreseen(records),
            "quality": quality and quality.to_json(),
        }
        show_json("optimize", data)
        return
    show(pass_table(f"{recipe.name} on {source}", records), *foresight(records))
    if quality is not None:
        show(*closeness(quality), *quality.sentences[1:])
    show(f"written: {output}")
