"""``thresher demo``: the main job, end to end, on the model and the images that are shipped.

Checkpoint in, faster engine out, with what it cost: optimise, export dense and reduced, compare
them on labelled images, measure them side by side, and draw where the tokens of an image went.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from thresher.cli import options
from thresher.cli.console import Progress, progress, say, show, show_json, table
from thresher.cli.opening import Watched, open_data, open_program
from thresher.cli.optimize import save
from thresher.cli.passes import foresight
from thresher.cli.profile import NEGATIVE

if TYPE_CHECKING:
    from thresher.runtime import Profile, Verification

SOURCE, DATA = "thresher.models.fashion:vit", "fashion-mnist"
RECIPE, BUDGET, MAX_DROP = "tome", "flops=0.5", 1.0
BATCHES = (1, 8)
SHOWN = 1  # number of the test image in the picture


def demo(
    output: options.Output = Path("build/demo"),
    limit: options.Limit = None,
    threads: options.Threads = None,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Make the model that is shipped faster, and say what that cost.

    Exit code 1 when it costs more than a point of accuracy.
    """
    with progress() as tell:
        quality, times, foreseen = work(output, limit, threads, tell)
    if json:
        show_json("demo", {"quality": quality.to_json(), "profile": times.to_json()})
    else:
        head, rows = summary(quality, times)
        show(table("The shipped vision transformer, dense and reduced", head, rows), *foreseen)
        show(*quality.sentences[1:], *times.sentences)
    say(f"engine: {output / 'reduced.engine'}")
    say(f"pictures: {output / 'kept.png'}, {output / 'report.html'}")
    if not quality.met:
        raise typer.Exit(NEGATIVE)


def work(
    output: Path, limit: int | None, threads: int | None, tell: Progress
) -> tuple[Verification, Profile, list[str]]:
    """Run every step; leaves engines, picture and report in ``output``."""
    from thresher.cli.inspect import picture
    from thresher.compiler.contract import Context
    from thresher.compiler.pipeline import run
    from thresher.compiler.recipe import load_recipe
    from thresher.models.options import SourceOptions
    from thresher.runtime import export, profile, verify, write_report

    recipe = load_recipe(RECIPE, [BUDGET])
    dense = open_program(SOURCE, SourceOptions(), tell)
    reduced = run(dense, recipe, Context(progress=tell))
    save(reduced, recipe, output / "reduced", overwrite=True)
    tell("exporting", 0, 0)
    engines = [
        export(program, output / f"{name}.engine", threads=threads, overwrite=True, recipe=told)
        for name, program, told in (("dense", dense, None), ("reduced", reduced, recipe.plain()))
    ]
    dataset = open_data(DATA, dense.info, dense.outputs)
    assert dataset is not None
    watched = Watched(dataset, limit, tell)
    quality = verify(*engines, dataset=watched, limit=limit, batch=32, max_drop=MAX_DROP)
    times = profile(engines, batches=BATCHES, threads=engines[0].threads, progress=tell)
    tell("drawing", 0, 0)
    picture(reduced, _image(output / "image.png"), output / "kept.png")
    write_report(times, output / "report.html")
    return quality, times, foresight(reduced.history)


def summary(quality: Verification, times: Profile) -> tuple[list[str], list[list[str]]]:
    """The one table: quality beside speed, predicted beside realised."""
    assert quality.quality is not None
    accuracies = (quality.quality.accuracy_a, quality.quality.accuracy_b)
    head = ["", "accuracy", *(f"ms, batch {batch}" for batch in BATCHES), "predicted"]
    head += [f"realised, batch {batch}" for batch in BATCHES]
    rows = []
    for candidate, accuracy in zip(times.candidates, accuracies, strict=True):
        row = [times.timing(candidate.name, batch) for batch in BATCHES]
        ideal = row[0].ideal
        rows.append(
            [
                candidate.name,
                f"{accuracy:.2%}",
                *(f"{1e3 * timing.latency.median:.1f}" for timing in row),
                f"{ideal:.2f}x" if ideal else "",
                *(f"{t.speedup.median:.2f}x" if t.speedup else "" for t in row),
            ]
        )
    return head, rows


def _image(path: Path) -> Path:
    """One test image as a file."""
    import numpy as np
    from PIL import Image

    from thresher.models.fashion import TEST_SET

    with np.load(TEST_SET) as arrays:
        Image.fromarray(arrays["images"][SHOWN]).save(path)
    return path
