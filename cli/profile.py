"""``thresher profile``: candidates measured side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from thresher.cli import options
from thresher.cli.console import progress, show, show_json, table
from thresher.cli.opening import axis_sizes, open_candidate

if TYPE_CHECKING:
    from thresher.runtime import Profile

NEGATIVE = 1


def profile(
    candidates: Annotated[
        list[str],
        typer.Argument(
            metavar="CANDIDATE",
            help=f"Engines or sources; the first is the baseline. A source is {options.SOURCES}.",
        ),
    ],
    target: options.Target = "cpu",
    precision: options.Precision = "fp32",
    batch: Annotated[str, typer.Option(help="Batch sizes, such as 1,8.")] = "1",
    size: options.Size = None,
    weights: options.Weights = None,
    resolution: options.Resolution = None,
    length: options.Length = None,
    threads: options.Threads = None,
    rounds: Annotated[int, typer.Option(min=1, help="Visits of every candidate.")] = 30,
    blocks: Annotated[
        bool, typer.Option("--blocks", help="Also time every block of the model.")
    ] = False,
    min_speedup: options.MinSpeedup = None,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a report: .html or .png.")
    ] = None,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Measure latency, throughput, memory and size of candidates, interleaved.

    Sources are exported for the target first, so that like is compared with like.
    """
    batches, sizes = options.numbers(batch, "--batch"), axis_sizes(size)
    wishes = options.wishes(weights, resolution, length)
    with progress() as tell:
        from thresher.runtime import profile as measure
        from thresher.runtime import write_report
        from thresher.runtime.measure import Plan

        found = measure(
            [open_candidate(name, wishes, tell) for name in candidates],
            batches=batches,
            target=target,
            precision=precision,
            threads=threads,
            plan=Plan(rounds=rounds),
            sizes=sizes,
            blocks=blocks,
            min_speedup=min_speedup,
            progress=tell,
        )
        if report is not None:
            write_report(found, report)
    if json:
        show_json("profile", found.to_json())
    else:
        show_profile(found)
    if not found.met:
        raise typer.Exit(NEGATIVE)


def show_profile(found: Profile) -> None:
    """Tables of times and sizes, the verdicts in words, and the conditions."""
    from thresher.runtime.tables import blocks, facts, sizes, times

    show(table("Time", *times(found)), table("Size and memory", *sizes(found)))
    if found.blocks:
        show(table("Blocks, milliseconds", *blocks(found)))
    show(*found.sentences, table("Conditions", ("", ""), facts(found)))
