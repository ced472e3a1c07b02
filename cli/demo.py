"""The main job on the shipped network, end to end: ``make demo``.

Optimises, exports, checks against labelled images, measures, and prints one table; leaves the
engine, a report and a picture of the tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from thresher.cli.console import progress, show, table

if TYPE_CHECKING:
    from thresher.compiler.program import Program
    from thresher.models.data import Dataset
    from thresher.runtime.profiling import Timing
    from thresher.runtime.verifying import QualityKept

SOURCE, DATA = "thresher.models.fashion:vit", "fashion-mnist"
RECIPE, FLOPS = "tome", 0.65
BATCHES = (1, 8)
SHOWN = 9  # test image in the picture: an ankle boot


def run(folder: Path, limit: int | None, threads: int) -> None:
    """Do everything and write to ``folder``."""
    from thresher.compiler import load_recipe, optimize
    from thresher.models.data import open_dataset
    from thresher.models.sources import load_source
    from thresher.runtime import ProgramRunner, export, profile, verify, write_report

    folder.mkdir(parents=True, exist_ok=True)
    with progress() as tell:
        tell("optimising", 0, 0)
        dense = load_source(SOURCE)
        reduced = optimize(dense, load_recipe(RECIPE, [f"flops={FLOPS}"]))
        reduced.save(folder / "reduced", overwrite=True)
        tell("exporting", 0, 0)
        engines = [
            export(program, folder / f"{name}.engine", threads=threads, overwrite=True)
            for name, program in (("dense", dense), ("reduced", reduced))
        ]
        dataset = open_dataset(DATA, dense.info.preprocessing, labels=dense.info.labels)
        tell(f"checking {limit or len(dataset)} labelled images", 0, 0)
        found = verify(engines[0], engines[1], dataset=dataset, limit=limit, batch=50)
        tell("measuring", 0, 0)
        measured = profile([e for e in engines], batches=BATCHES, threads=threads, blocks=True)
        write_report(measured, folder / "report.html")
        write_report(measured, folder / "report.png")
        tell("drawing", 0, 0)
        _picture(reduced, dataset, folder / "tokens.png")
        runner = ProgramRunner(reduced)
        assert runner.outputs
    assert found.quality is not None
    tokens = reduced.history[0].details["tokens"]
    show(
        table(
            f"{SOURCE} on ONNX Runtime, {threads} threads, {found.quality.n} test images",
            ("", "accuracy", "batch", "ms a run", "speed-up", "predicted", "realised"),
            _rows(found.quality, measured.timings),
        ),
        f"tokens at the input and after each block: {' '.join(map(str, tokens))}",
        f"flips: {found.quality.right_to_wrong} right to wrong, {found.quality.wrong_to_right} wrong to"
        f" right; difference {100 * found.quality.difference:+.2f} points, standard error"
        f" {100 * found.quality.standard_error:.2f}",
        f"written to {folder}: reduced.engine (model.onnx runs in any ONNX Runtime), report.html, report.png, tokens.png",
    )


def _rows(quality: QualityKept, timings: Sequence[Timing]) -> list[tuple[str, ...]]:
    accuracy = (f"{100 * quality.accuracy_a:.2f} %", f"{100 * quality.accuracy_b:.2f} %")
    rows = []
    for timing in timings:
        reduced = timing.speedup is not None
        rows.append(
            (
                f"{RECIPE}, {FLOPS:.0%} of the work" if reduced else "dense",
                accuracy[reduced],
                str(timing.batch),
                f"{1e3 * timing.latency.median:.2f}",
                f"{timing.speedup.median:.2f}" if timing.speedup else "",
                f"{timing.ideal:.2f}" if timing.ideal and reduced else "",
                f"{timing.realised:.2f}" if timing.realised and reduced else "",
            )
        )
    return rows


def _picture(program: Program, dataset: Dataset, output: Path) -> None:
    from PIL import Image

    from thresher.cli.inspect import picture
    from thresher.models.fashion import TEST_SET

    import numpy as np  # isort: skip

    with np.load(TEST_SET) as arrays:
        image = Image.fromarray(arrays["images"][SHOWN])
    source = output.with_name("image.png")
    image.save(source)
    picture(program, source, output)


def main() -> None:
    """Entry point of ``python -m thresher.cli.demo``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=Path("build/demo"))
    parser.add_argument("--limit", type=int, default=None, help="test images; all by default")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    run(arguments.output, arguments.limit, arguments.threads)


if __name__ == "__main__":
    main()
