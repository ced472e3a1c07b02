"""What ``inspect --sparsity`` measures and shows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from thresher.cli.console import Progress, show, table
from thresher.cli.opening import at_once, open_measured

if TYPE_CHECKING:
    from thresher.compiler.program import Program
    from thresher.passes.sparsity.report import Point, Report


def measure(program: Program, data: str, items: int | None, seed: int, tell: Progress) -> Report:
    """The report of a Program on the data that ``--data`` names."""
    from thresher.compiler.contract import Context
    from thresher.passes.sparsity.report import report

    opened = open_measured(data, program)
    context = Context(seed, opened, at_once(program), progress=tell)
    return report(program, context, items=None if items is None else max(1, items // 2))


def show_report(source: str, report: Report) -> None:
    """The report as tables and sentences."""
    rises = [point.asked for point in report.points]
    many = sorted({size for layer in report.layers for size in layer.union})
    head = (
        "network", "neurons", "exact zeros", *(f"sparse at {p:g} %" for p in rises),
        *(f"needed by {m}" for m in many), "of weights", "of MACs",
    )  # fmt: skip
    rows = [
        (
            layer.path,
            layer.neurons,
            f"{layer.exact_zeros:.1%}",
            *(f"{layer.sparsity[p]:.1%}" for p in rises),
            *(f"{layer.union[m]:.0%}" if m in layer.union else "" for m in many),
            f"{layer.weights:.1%}",
            f"{layer.macs:.1%}",
        )
        for layer in report.layers
    ]
    title = f"Activation sparsity of {source} on {report.items} items of {report.data}"
    show(table(title, head, rows, narrow=True))
    points = [
        (
            f"{p.asked:g} %",
            f"{p.cett:.4f}",
            f"{p.reached:.2f} %",
            f"{p.held_out:.2f} %",
            f"{p.sparsity:.1%}",
            _shortfall(p),
        )
        for p in report.points
    ]
    columns = ("rise", "CETT", "on calibration data", "held out", "sparsity", "")
    show(table(f"Rise of the {report.meaning}", columns, points))
    show(*(verdict.sentence for verdict in report.verdicts))


def _shortfall(point: Point) -> str:
    """Why a rise was not reached."""
    if point.met:
        return ""
    return "not even without all neurons" if point.cett >= 1 else "the loss rises in steps"


def draw(report: Report, path: Path) -> None:
    """Sparsity of every layer at each rise, and how masks fill up with tokens, as a PNG."""
    from thresher.compiler.files import atomic_file
    from thresher.runtime.charts import LIGHT, TALL, figure_of, png

    figure, (sparse, needed) = figure_of([TALL, TALL], LIGHT)
    blocks, ink = [layer.layer for layer in report.layers], LIGHT.candidate
    for point, alpha in zip(report.points, (1.0, 0.7, 0.45), strict=False):
        shares = [100 * layer.sparsity[point.asked] for layer in report.layers]
        label = f"{point.asked:g} % worse"
        sparse.plot(blocks, shares, "o-", color=ink, alpha=alpha, label=label)
    zeros = [100 * layer.exact_zeros for layer in report.layers]
    sparse.plot(blocks, zeros, "s--", color=LIGHT.baseline, label="exact zeros")
    sparse.set(xlabel="network", ylabel="neurons that a token does not need, %", ylim=(0, 102))
    sparse.legend(frameon=False, fontsize=8, labelcolor=LIGHT.text)
    for place, layer in enumerate(report.layers, 1):
        shares = [100 * share for share in layer.union.values()]
        shade = 0.3 + 0.7 * place / len(blocks)
        needed.plot(list(layer.union), shares, "o-", color=ink, alpha=shade)
    ticks = sorted({size for layer in report.layers for size in layer.union})
    needed.set(xscale="log", ylabel="neurons that any of them needs, %", ylim=(0, 102))
    needed.set_xticks(ticks, [str(size) for size in ticks], minor=False)
    needed.minorticks_off()
    needed.set_xlabel(f"tokens at once, at {report.points[0].asked:g} % worse; darker is later")
    figure.set_facecolor("white")
    with atomic_file(path) as partial:
        partial.write_bytes(png(figure, transparent=False))
