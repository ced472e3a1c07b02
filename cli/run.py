"""``thresher run``: an engine on files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from thresher.cli import options
from thresher.cli.console import progress, say, show, show_json, table
from thresher.cli.generating import continue_text
from thresher.compiler.errors import UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

MOST_VALUES = 4096  # of an output that is written out as JSON; larger ones need --save


def run(
    engine: Annotated[str, typer.Argument(metavar="ENGINE", help="A folder that 'export' wrote.")],
    input: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="An image, a text file with a sentence a line, or arrays (.npz, .npy);"
            " may be repeated: all files make one batch.",
        ),
    ] = None,
    text: Annotated[
        list[str] | None, typer.Option(metavar="SENTENCE", help="A text; may be repeated.")
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="A text that a causal language model continues."),
    ] = None,
    tokens: Annotated[
        int, typer.Option(min=1, help="How many tokens to add to the prompt at most.")
    ] = 128,
    steps: options.Steps = None,
    top: Annotated[int, typer.Option(min=1, help="How many classes to name.")] = 5,
    save: Annotated[
        Path | None, typer.Option(metavar="NPZ", help="Write the outputs as arrays.")
    ] = None,
    threads: options.Threads = None,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Run an engine on images, texts or arrays; inputs are prepared as the model wants them.

    With --prompt a causal language model writes on, the likeliest token at each step, until the text
    ends; the tokens read and made in a second are told on standard error.
    """
    if prompt is not None:
        if input or text or save is not None:
            raise UsageError(
                "--prompt goes with none of --input, --text and --save: leave them out"
            )
        continue_text(engine, prompt, tokens, threads, steps, json=json)
        return
    if steps is not None:
        raise UsageError("--steps goes with --prompt: give the text to continue")
    with progress() as tell:
        from thresher.cli.inputs import feeds_of
        from thresher.runtime import Engine
        from thresher.runtime.batches import run_in_batches

        tell(f"loading {engine}", 0, 0)
        with Engine.load(engine, threads=threads) as loaded:
            names = [spec.name for spec in loaded.inputs]
            manifest = loaded.manifest
            feeds = feeds_of(loaded.preprocessing, names, input or (), text or ())
            outputs = run_in_batches(loaded, feeds)
            left = loaded.left_early
    if save is not None:
        _save(save, outputs)
    if left is not None:
        say(str(left))
    samples = [*map(str, text or ()), *map(str, input or ())]
    ranked = best(outputs, manifest.labels, top)
    if json:
        found = {name: _plain(value) for name, value in outputs.items()}
        early = None if left is None else {"early": left.early, "items": left.items}
        told = {"engine": engine, "inputs": samples, "outputs": found, "top": ranked}
        show_json("run", told if early is None else {**told, "left": early})
    elif ranked is not None:
        _show_classes(samples, ranked)
    else:
        head = ("output", "dtype", "shape", "lowest", "mean", "highest")
        rows = [(name, v.dtype, list(v.shape), *_range(v)) for name, v in outputs.items()]
        show(table(engine, head, rows))


def best(
    outputs: Mapping[str, NDArray[Any]], labels: Sequence[str] | None, top: int
) -> list[list[dict[str, Any]]] | None:
    """The likeliest classes of every sample, if the only output ``[B, classes]`` has labels."""
    import numpy as np

    logits = next(iter(outputs.values()))
    if len(outputs) > 1 or logits.ndim != 2 or labels is None or len(labels) != logits.shape[1]:
        return None
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    probability = shifted / shifted.sum(axis=1, keepdims=True)
    order = np.argsort(-probability, axis=1, kind="stable")[:, :top]
    return [
        [
            {"class": int(c), "label": labels[c], "probability": float(probability[row, c])}
            for c in classes
        ]
        for row, classes in enumerate(order)
    ]


def _show_classes(samples: Sequence[str], ranked: list[list[dict[str, Any]]]) -> None:
    if len(samples) != len(ranked):  # arrays and text files hold several samples
        samples = [f"sample {index}" for index in range(len(ranked))]
    rows = [
        ("" if place else name, entry["label"], f"{entry['probability']:.1%}")
        for name, entries in zip(samples, ranked, strict=True)
        for place, entry in enumerate(entries)
    ]
    show(table("Classes", ("input", "class", "probability"), rows))


def _save(path: Path, outputs: Mapping[str, NDArray[Any]]) -> None:
    import numpy as np

    from thresher.compiler.files import atomic_file

    with atomic_file(path) as partial, partial.open("wb") as stream:
        np.savez(stream, **outputs)  # type: ignore[arg-type]  # output names are never its options


def _plain(value: NDArray[Any]) -> dict[str, Any]:
    values = value.tolist() if value.size <= MOST_VALUES else None
    return {"dtype": value.dtype.name, "shape": list(value.shape), "values": values}


def _range(value: NDArray[Any]) -> tuple[str, ...]:
    if not value.size:
        return "", "", ""
    return tuple(f"{float(number):.4g}" for number in (value.min(), value.mean(), value.max()))
