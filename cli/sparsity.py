"""What ``inspect --sparsity`` measures and shows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from thresher.cli.console import Progress, show, table
from thresher.cli.opening import open_data

if TYPE_CHECKING:
    from thresher.compiler.program import Program
    from thresher.passes.sparsity.report import Report


def measure(program: Program, data: str, items: int | None, seed: int, tell: Progress) -> Report:
    """The report of a Program on the data that ``--data`` names."""
    from thresher.compiler.contract import Context
    from thresher.passes.sparsity.report import ITEMS, report

    opened = open_data(data, program.info, program.outputs)
    context = Context(seed, opened, progress=tell)
    return report(program, context, items=ITEMS if items is None else max(1, items // 2))


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
    show(table(f"Activation sparsity of {source} on {report.items} items of {report.data}", head, rows, narrow=True))  # fmt: skip
    points = [
        (f"{p.asked:g} %", f"{p.cett:.4f}", f"{p.reached:.2f} %", f"{p.held_out:.2f} %",
         f"{p.sparsity:.1%}", "" if p.met else "not reached: the loss rises in steps")
        for p in report.points
    ]  # fmt: skip
    columns = ("rise", "CETT", "on calibration data", "held out", "sparsity", "")
    show(table(f"Rise of the {report.meaning}", columns, points))
    show(*(verdict.sentence for verdict in report.verdicts))


def draw(report: Report, path: Path) -> None:
    """Sparsity of every layer at each rise, and how masks fill up with tokens, as a PNG."""
    from thresher.compiler.files import atomic_file
    from thresher.runtime.charts import LIGHT, TALL, figure_of, png

    figure, panels = figure_of([TALL, TALL], LIGHT)
    numbers = [layer.layer for layer in report.layers]
    style: dict[str, Any] = {"frameon": False, "fontsize": 8, "labelcolor": LIGHT.text}
    for point, alpha in zip(report.points, (1.0, 0.7, 0.45), strict=False):
        shares = [100 * layer.sparsity[point.asked] for layer in report.layers]
        panels[0].plot(numbers, shares, "o-", color=LIGHT.candidate, alpha=alpha, label=f"{point.asked:g} % worse")  # fmt: skip
    zeros = [100 * layer.exact_zeros for layer in report.layers]
    panels[0].plot(numbers, zeros, "s--", color=LIGHT.baseline, label="exact zeros")
    panels[0].set(
        xlabel="block", ylabel="neurons not needed by a token, %", ylim=(0, 100), xticks=numbers
    )
    panels[0].legend(**style)
    for layer in report.layers:
        sizes, needed = list(layer.union), [100 * share for share in layer.union.values()]
        panels[1].plot(sizes, needed, "o-", color=LIGHT.candidate, alpha=0.3 + 0.7 * layer.layer / max(1, len(numbers)))  # fmt: skip
    panels[1].set(xscale="log", xlabel="tokens at once", ylabel="neurons that any of them needs, %", ylim=(0, 100))  # fmt: skip
    panels[1].set_title(f"at {report.points[0].asked:g} % worse, darker: later blocks", loc="left", fontsize=10)  # fmt: skip
    figure.set_facecolor("white")
    with atomic_file(path) as partial:
        partial.write_bytes(png(figure, transparent=False))
