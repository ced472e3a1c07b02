"""What skipped inputs cost SmolLM2-135M in perplexity: methods, allocations and shares; no times.

``python -m tests.benchmarks.skipped_inputs`` prints tables in markdown.  Thresholds come from the first
half of the editorials, perplexities from the second: windows of 256 tokens in which every token is masked,
which equals reading them token by token.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from math import exp
from pathlib import Path

import torch

from tests.benchmarks.data import editorials, folder
from tests.benchmarks.zoo import smollm2_folder
from thresher.cli.opening import open_measured
from thresher.compiler.contract import Context
from thresher.compiler.program import Program
from thresher.models.sources import load_source
from thresher.passes.learning import calibration
from thresher.passes.learning.tap import Tap, Taps
from thresher.passes.sparsity import criterion
from thresher.passes.sparsity.allocation import Even, Greedy
from thresher.passes.sparsity.blocks import skipped
from thresher.passes.sparsity.criterion import Judge
from thresher.passes.sparsity.report import report
from thresher.passes.sparsity.sites import Input, find
from thresher.passes.sparsity.thresholds import Thresholds

SHARES, BATCH = (0.25, 0.4, 0.5), 2


def main() -> None:
    """Parse the command line and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", default="teal,wina", help="of teal, wina, scap; or none")
    parser.add_argument("--windows", type=int, default=16, help="to measure on, and to judge on")
    parser.add_argument("--tokens", type=int, default=2048, help="on which blocks are tried")
    parser.add_argument("--rises", action="store_true", help="also the report at given rises")
    parser.add_argument("--threads", type=int, default=2)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    work = _made(folder() / "skipped-inputs")
    text = editorials()
    for name, part in (("learn", text[: len(text) // 2]), ("judge", text[len(text) // 2 :])):
        (work / f"{name}.txt").write_text(part)
    program = load_source(f"hf:{smollm2_folder()}")
    if chosen.rises:
        _say(risen(program, work, chosen.windows))
    methods = [method for method in chosen.methods.split(",") if method != "none"]
    if methods:
        _say(judged(program, work, methods, chosen.windows, chosen.tokens))


def risen(program: Program, work: Path, windows: int) -> list[str]:
    """Rows of the report: what CETT drops at a given rise, and the rise on held-out windows."""
    learn = open_measured(str(work / "learn.txt"), program)
    context = Context(
        data=learn, batch=BATCH, progress=_progress, checkpoints=_made(work / "report")
    )
    found = report(program, context, items=windows)
    rows = ["| asked | CETT | rise found | rise, held out | sparsity |", "|--:|--:|--:|--:|--:|"]
    for p in found.points:
        told = f"{p.reached:.2f} % | {p.held_out:.2f} % | {100 * p.sparsity:.1f} %"
        rows.append(f"| {p.asked:g} % | {p.cett:.4f} | {told} |")
    return rows


def judged(
    program: Program, work: Path, methods: Sequence[str], windows: int, tokens: int
) -> list[str]:
    """Rows of perplexities, and of the error of the blocks' outputs."""
    learn, text = (open_measured(str(work / f"{n}.txt"), program) for n in ("learn", "judge"))
    items = calibration.chosen_items(learn, windows)
    held = calibration.chosen_items(text, windows)
    judge = Judge(program, text, held, criterion.choose(program, text), BATCH)
    dense, found = exp(judge.dense), find(program)
    rows = [
        "| method | allocation | skipped | perplexity | rise | block error |",
        "|---|---|--:|--:|--:|--:|",
    ]
    rows.append(f"| dense | | 0 | {dense:.2f} | | |")
    for method in methods:
        place = _made(work / method)
        context = Context(data=learn, batch=BATCH, progress=_progress, checkpoints=place)
        identity = {"method": method}
        known = Thresholds(
            program, context, method, False, found.ffns, found.inputs, items, identity
        )
        greedy = Greedy(
            program, context, found.ffns, found.inputs, known.skip, max(SHARES), items,
            identity, tokens,
        )  # fmt: skip
        for share in SHARES:
            for name, spread in (("even", Even(found.inputs)), ("greedy", greedy)):
                amounts = spread.at(share)
                rise = judge.rise(taps(found.inputs, known, amounts))
                error = sum(errors := greedy.errors(amounts)) / len(errors)
                told = f"{dense * (1 + rise):.2f} | {100 * rise:+.1f} % | {error:.4f}"
                rows.append(f"| {method} | {name} | {100 * share:g} % | {told} |")
                print(rows[-1], file=sys.stderr, flush=True)
        print(_mean_shares(greedy.at(0.5)), file=sys.stderr, flush=True)
    return rows


def taps(inputs: Sequence[Input], known: Thresholds, amounts: dict[str, float]) -> Taps:
    """Masks on the inputs of all linears; in this model nothing else reads them."""

    def mask(entry: Input) -> Tap:
        skip = known.skip(entry, amounts[entry.name])
        return lambda x: skipped(x, skip)

    return {entry.node: mask(entry) for entry in inputs}


def _made(place: Path) -> Path:
    place.mkdir(parents=True, exist_ok=True)
    return place


def _mean_shares(shares: dict[str, float]) -> str:
    kinds: dict[str, list[float]] = {}
    for name, share in shares.items():
        kinds.setdefault(name.partition(".")[2], []).append(share)
    return ", ".join(f"{kind} {sum(v) / len(v):.2f}" for kind, v in kinds.items())


def _progress(what: str, done: int, total: int) -> None:
    print(f"{what} {done}/{total}", file=sys.stderr, flush=True)


def _say(rows: Sequence[str]) -> None:
    print(*rows, "", sep="\n", flush=True)


if __name__ == "__main__":
    main()
