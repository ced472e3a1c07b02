"""Profiles and comparisons in words and figures: the rows that reports and the command line print."""

from __future__ import annotations

from collections.abc import Sequence

from thresher.runtime.blocks import BlockTime
from thresher.runtime.comparing import Comparison, Row, Score
from thresher.runtime.profiling import Profile
from thresher.runtime.stats import milliseconds
from thresher.runtime.timing import Timing

Table = tuple[tuple[str, ...], list[tuple[str, ...]]]  # head, rows


def times(profile: Profile) -> Table:
    """One row for each candidate and batch size."""
    head = ("", "batch", "ms a run", "quartiles", "samples/s", "speed-up", "ideal", "realised")
    return head, [_times(timing) for timing in profile.timings]


def sizes(profile: Profile) -> Table:
    """One row for each candidate: what it is and what room it takes."""
    head = ("", "target", "precision", "threads", "weights", "file MB", "peak MB", "own MB")
    rows: list[tuple[str, ...]] = [
        (
            c.name,
            c.target,
            c.precision,
            str(c.threads or ""),
            c.weights,
            _megabytes(c.size),
            _megabytes(c.memory.peak if c.memory else None),
            _megabytes(c.memory.own if c.memory else None),
        )
        for c in profile.candidates
    ]
    return head, rows


def blocks(profile: Profile) -> Table:
    """One row for each block: milliseconds of every candidate, and of what was inserted there."""
    names = dict.fromkeys(block.block for found in profile.blocks for block in found.blocks)
    times = [{block.block: block for block in found.blocks} for found in profile.blocks]
    head = ("block", *(found.name for found in profile.blocks))
    return head, [(name, *(_block(found.get(name)) for found in times)) for name in names]


def facts(profile: Profile) -> list[tuple[str, str]]:
    """The conditions of the measurement, by name."""
    c = profile.conditions
    load = [f"{x:.2f}" if x is not None else "unknown" for x in (c.load_before, c.load_after)]
    return [
        ("CPU", f"{c.cpu}, {c.cores} cores, {c.usable} usable"),
        ("threads", str(c.threads)),
        ("governor", c.governor or "not readable"),
        ("load", f"{load[0]} before, {load[1]} after"),
        ("system", f"{c.system}, Python {c.python}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in c.versions.items())),
        ("rounds", f"{profile.timings[0].latency.n}, order shuffled, seed {profile.plan.seed}"),
    ]


def comparison(found: Comparison) -> Table:
    """One row for each model, with four columns for each metric."""
    names = [score.name for score in found.rows[0].scores]
    head = ["method", "work left", "tokens"]
    for name in names:
        head += [name, "change", "flips", f"over {found.control}"]
    head += ["ideal", "speed-up", "of ideal", "ms", "items/s"]
    return tuple(head), [_compared(row, len(names)) for row in found.rows]


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column to the left, the others to the right."""
    lines = [[cell.replace("|", "\\|") for cell in row] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]

    def line(row: Sequence[str]) -> str:
        cells = [row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]
        return "| " + " | ".join(cells) + " |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(lines[0]), "| " + " | ".join(rule) + " |", *map(line, lines[1:])])


def _compared(row: Row, metrics: int) -> tuple[str, ...]:
    asked = f"{100 * row.asked:.4g}/" if row.asked is not None else ""
    if row.refused:
        return (row.method, asked, "refused", *[""] * (4 * metrics + 5))
    spent = f"{100 * row.share:.1f}%" if row.share is not None else ""
    tokens = f"{row.tokens[0]}-{row.tokens[-1]}" if row.tokens else ""
    cells = [row.method, asked + spent, tokens]
    for score in row.scores:
        cells += _score(score)
    ratio = row.time.speedup if row.time else None
    return (
        *cells,
        f"{row.ideal:.2f}" if row.ideal else "",
        f"{ratio.median:.2f} ({ratio.low:.2f}-{ratio.high:.2f})" if ratio else "",
        f"{row.realised:.2f}" if row.realised else "",
        f"{1e3 * row.time.latency.median:.1f}" if row.time else "",
        f"{row.time.throughput:.1f}" if row.time else "",
    )


def _score(score: Score) -> list[str]:
    dense, control = score.against_dense, score.against_control
    scale, digits = (100, 2) if score.percent else (1, 4)
    change = flips = ""
    if dense is not None:
        change = f"{scale * dense.value:+.{digits}f} ± {scale * dense.error:.{digits}f}"
    if dense is not None and dense.worse is not None:
        flips = f"-{dense.worse} +{dense.better}"
    value = f"{scale * score.value:.{digits}f}{'%' if score.percent else ''}"
    return [value, change, flips, f"{control.sigmas:+.1f}" if control else ""]


def _times(timing: Timing) -> tuple[str, ...]:
    latency, ratio = timing.latency, timing.speedup
    return (
        timing.candidate,
        str(timing.batch),
        milliseconds(latency.median),
        f"{milliseconds(latency.low)} to {milliseconds(latency.high)}",
        f"{timing.throughput:.4g}",
        f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})" if ratio else "",
        f"{timing.ideal:.2f}" if timing.ideal else "",
        f"{timing.realised:.2f}" if timing.realised else "",
    )


def _block(time: BlockTime | None) -> str:
    if time is None:
        return ""
    inserted = f" + {milliseconds(time.inserted)} inserted" if time.inserted else ""
    return f"{milliseconds(time.own)}{inserted}"


def _megabytes(size: int | None) -> str:
    return f"{size / 1e6:.1f}" if size is not None else ""
