"""``thresher verify``: same function? quality kept?"""

from __future__ import annotations

from typing import Annotated

import typer

from thresher.cli import options
from thresher.cli.console import progress, show, show_json, table
from thresher.cli.opening import (
    Watched,
    axis_sizes,
    open_data,
    open_runner,
    open_steps,
    open_text,
)
from thresher.cli.profile import NEGATIVE
from thresher.compiler.errors import UsageError


def verify(
    a: Annotated[
        str, typer.Argument(metavar="A", help="The reference: an engine, or a source as below.")
    ],
    b: Annotated[
        str, typer.Argument(metavar="B", help=f"The candidate: an engine, or {options.SOURCES}.")
    ],
    data: options.Data = None,
    limit: options.Limit = None,
    max_drop: options.MaxDrop = None,
    same: Annotated[
        bool | None,
        typer.Option(
            "--same/--not-same",
            help="Whether the numbers must agree; by default when the same passes changed A and B.",
        ),
    ] = None,
    logits: options.Logits = None,
    batch: Annotated[int, typer.Option(min=1, help="Samples in a batch.")] = 8,
    size: options.Size = None,
    step: Annotated[
        int | None,
        typer.Option(min=1, help="Read a text so many tokens at once, 1 as in writing."),
    ] = None,
    steps: options.Steps = None,
    prompt_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Read so many tokens of a window first, and judge only the rest."),
    ] = None,
    weights: options.Weights = None,
    resolution: options.Resolution = None,
    length: options.Length = None,
    threads: options.Threads = None,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Compare B with A: is it the same function, and is the quality kept on labelled data?

    Of causal language models --data is a text file, and quality is perplexity: on the first --limit
    windows of 1024 tokens (--size sequence=N for others), each read on its own; --max-drop is then the
    percent that it may rise. With --step 1 a text is read token by token: skipped inputs are skipped only then.

    With --steps, B reads the first --prompt-tokens of a window and ENGINE the rest, which alone is judged; numbers
    are then not compared.

    Exit code 1 when a verdict that was demanded is negative.
    """
    if steps is not None and (data is None or prompt_tokens is None or same):
        raise UsageError(
            "--steps is judged on a text behind prompts: give --data TEXT and --prompt-tokens N, and not --same"
        )
    wishes = options.wishes(weights, resolution, length)
    with progress() as tell:
        from thresher.runtime import verify as compare

        with (
            open_runner(a, wishes, threads, tell) as reference,
            open_steps(b, steps, wishes, threads, tell) as candidate,
        ):
            tell("comparing", 0, 0)
            sizes, dataset = axis_sizes(size), None
            text = open_text(data, reference, limit, sizes, step, prompt_tokens)
            if text is None:
                dataset = open_data(data, reference, reference.outputs)
            found = compare(
                reference,
                candidate,
                dataset=dataset and Watched(dataset, limit, tell),
                batch=batch,
                limit=limit,
                max_drop=max_drop,
                same=False if steps is not None else same,
                output=logits,
                sizes=sizes,
                text=text,
                inputs=() if steps is not None else None,
            )
    if json:
        show_json("verify", found.to_json())
    else:
        head = ("output", "samples", "largest", "of scale", "mean", "SQNR dB", "cosine", "top-1")
        rows = [
            (
                error.name,
                error.samples,
                f"{error.max_abs:.2g}",
                f"{error.relative:.2g}",
                f"{error.mean_abs:.2g}",
                "" if error.sqnr_db is None else f"{error.sqnr_db:.1f}",
                f"{error.cosine:.6f}",
                "" if error.top1 is None else f"{error.top1:.2%}",
            )
            for error in found.same_function.outputs
        ]
        show(*([table(f"{b} against {a}", head, rows)] if rows else []), *found.sentences)
    if not found.met:
        raise typer.Exit(NEGATIVE)
