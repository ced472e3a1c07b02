"""A profile as one HTML file that needs nothing else, or as a PNG picture."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from string import Template

from thresher.compiler.errors import UsageError
from thresher.compiler.files import atomic_file
from thresher.runtime.charts import DARK, LIGHT, Ink, block_chart, latency_chart, picture
from thresher.runtime.profiling import Profile
from thresher.runtime.tables import facts, sizes, times

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
    """Write ``path``: ``.html`` for the whole report, ``.png`` for its charts.

    Raises:
        UsageError: another suffix, or the file cannot be written.
        MissingRequirementError: matplotlib is not installed.
    """
    path = Path(path)
    if path.suffix not in (".html", ".png"):
        raise UsageError(f"a report is an .html or a .png file, not {path.name!r}")
    content = picture(profile) if path.suffix == ".png" else page(profile).encode()
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
        times=_table(*times(profile)),
        blocks=blocks,
        copies=escape(profile.copies.capitalize()),
        sizes=_table(*sizes(profile)),
        memory=escape(profile.memory),
        conditions="".join(f"<dt>{escape(k)}<dd>{escape(v)}" for k, v in facts(profile)),
    )


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
