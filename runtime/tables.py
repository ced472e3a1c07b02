"""A profile in words and figures: the rows that the report and the command line print."""

from __future__ import annotations

from thresher.runtime.blocks import BlockTime
from thresher.runtime.profiling import Profile, Timing

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


def _times(timing: Timing) -> tuple[str, ...]:
    latency, ratio = timing.latency, timing.speedup
    return (
        timing.candidate,
        str(timing.batch),
        f"{1e3 * latency.median:.3g}",
        f"{1e3 * latency.low:.3g} to {1e3 * latency.high:.3g}",
        f"{timing.throughput:.4g}",
        f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})" if ratio else "",
        f"{timing.ideal:.2f}" if timing.ideal else "",
        f"{timing.realised:.2f}" if timing.realised else "",
    )


def _block(time: BlockTime | None) -> str:
    if time is None:
        return ""
    inserted = f" + {1e3 * time.inserted:.3g} inserted" if time.inserted else ""
    return f"{1e3 * time.own:.3g}{inserted}"


def _megabytes(size: int | None) -> str:
    return f"{size / 1e6:.1f}" if size is not None else ""
