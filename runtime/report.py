"""A profile as one HTML file that needs nothing else, or as a PNG picture."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from string import Template

from thresher.compiler.errors import UsageError
from thresher.compiler.files import atomic_file
from thresher.runtime.candidates import Candidate
from thresher.runtime.charts import DARK, LIGHT, Ink, block_chart, latency_chart
from thresher.runtime.profiling import Profile, Timing

PAGE = Template("""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; --line: #d0d0d0; --soft: #666; }
@media (prefers-color-scheme: dark) { :root { --line: #444; --soft: #aaa; } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 54rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin-top: 2rem }
div { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .9rem .25rem 0; text-align: right; border-bottom: 1px solid var(--line) }
th { font-weight: 600 } th:first-child, td:first-child { text-align: left }
p.note, dl { color: var(--soft); font-size: .9rem } img { max-width: 100% }
dl { display: grid; grid-template-columns: max-content auto; gap: 0 1rem } dd { margin: 0 }
</style>
<h1>$title</h1>
<ul>$sentences</ul>
<h2>Time</h2>
$latency
<div>$times</div>
<p class="note">$copies. Speed-up: median of the ratios within a round, with a confidence interval.
Ideal: ratio of the multiply-accumulates.</p>
$blocks
<h2>Size and memory</h2>
<div>$sizes</div>
<p class="note">Memory: $memory.</p>
<h2>Conditions</h2>
<dl>$conditions</dl>
</html>
""")


def write_report(profile: Profile, path: Path | str) -> None:
    """Write ``path``: ``.html`` for the whole report, ``.png`` for the chart of times.

    Raises:
        UsageError: another suffix, or the file cannot be written.
        MissingRequirementError: matplotlib is not installed.
    """
    path = Path(path)
    if path.suffix not in (".html", ".png"):
        raise UsageError(f"a report is an .html or a .png file, not {path.name!r}")
    picture = path.suffix == ".png"
    content = latency_chart(profile, LIGHT) if picture else page(profile).encode()
    with atomic_file(path) as partial:
        partial.write_bytes(content)


def page(profile: Profile) -> str:
    """The HTML text."""
    names = " and ".join(candidate.name for candidate in profile.candidates)
    blocks = ""
    if profile.blocks:
        chart = _picture(lambda ink: block_chart(profile.blocks, ink), "Time of each block")
        blocks = f"<h2>Blocks</h2>\n{chart}"
    return PAGE.substitute(
        title=escape(f"Profile of {names}"),
        sentences="".join(f"<li>{escape(said)}</li>" for said in profile.sentences),
        latency=_picture(lambda ink: latency_chart(profile, ink), "Time of a run"),
        times=_times(profile),
        blocks=blocks,
        copies=escape(profile.copies.capitalize()),
        sizes=_sizes(profile.candidates),
        memory=escape(profile.memory),
        conditions="".join(f"<dt>{escape(k)}<dd>{escape(v)}" for k, v in _conditions(profile)),
    )


def _times(profile: Profile) -> str:
    head = ("", "batch", "ms a run", "quartiles", "samples/s", "speed-up", "ideal", "realised")
    return _table(head, [_time_row(timing) for timing in profile.timings])


def _time_row(timing: Timing) -> tuple[str, ...]:
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


def _sizes(candidates: Sequence[Candidate]) -> str:
    head = ("", "target", "precision", "threads", "weights", "file MB", "peak MB", "own MB")
    rows = [
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
        for c in candidates
    ]
    return _table(head, rows)


def _conditions(profile: Profile) -> list[tuple[str, str]]:
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


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    first = "".join(f"<th>{escape(cell)}" for cell in head)
    rest = "".join("<tr>" + "".join(f"<td>{escape(cell)}" for cell in row) for row in rows)
    return f"<table><tr>{first}{rest}</table>"


def _picture(draw: Callable[[Ink], bytes], alt: str) -> str:
    """One chart in two appearances; the browser takes the one that suits the page."""
    light, dark = (base64.b64encode(draw(ink)).decode() for ink in (LIGHT, DARK))
    data = "data:image/png;base64,"
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{data}{dark}">'
        f'<img alt="{escape(alt)}" src="{data}{light}"></picture>'
    )


def _megabytes(size: int | None) -> str:
    return f"{size / 1e6:.1f}" if size is not None else ""
