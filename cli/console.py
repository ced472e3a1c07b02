"""How every verb talks: results on standard output, everything else on standard error."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

PIPE_WIDTH = 120  # columns of a table that goes to a file or a pipe
Progress = Callable[[str, int, int], None]
log = logging.getLogger("thresher")


def show(*things: RenderableType) -> None:
    """Print a result for a person."""
    console = _console(sys.stdout)
    for thing in things:
        console.print(thing, markup=False, soft_wrap=isinstance(thing, str))


def show_json(verb: str, data: Mapping[str, Any]) -> None:
    """Print a result for a program; ``schema`` changes when a field changes its meaning."""
    print(json.dumps({"schema": f"thresher.{verb}/1", **data}, indent=2))


def say(sentence: str) -> None:
    """Tell something that is no result."""
    print(sentence, file=sys.stderr)


def table(
    title: str, head: Sequence[str], rows: Iterable[Sequence[object]], *, narrow: bool = False
) -> RenderableType:
    """A table under its title; columns of numbers (or nothing) are aligned to the right.

    ``narrow`` is for many columns: one blank less between them, and heads broken at blanks.
    """
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    made = Table(
        box=box.SIMPLE_HEAD, show_header=any(head), pad_edge=False, collapse_padding=narrow
    )
    cells = [["" if cell is None else str(cell) for cell in row] for row in rows]
    for index, name in enumerate(head):
        numeric = all(_numeric(row[index]) for row in cells)
        name = name.replace(" ", "\n") if narrow else name
        made.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in cells:
        made.add_row(*(Text(cell) for cell in row))
    return Group(Text(title, style="bold", no_wrap=True, overflow="ignore"), made)


@contextmanager
def progress() -> Iterator[Progress]:
    """Yield ``tell(what, done, total)``, which draws bars where a person is watching.

    ``total`` 0 is work of unknown length; a new ``what`` ends the one before.
    """
    if not sys.stderr.isatty():
        yield lambda what, done, total: None
        return
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=_console(sys.stderr), transient=True) as bars:
        task = bars.add_task("", total=None, visible=False)

        def tell(what: str, done: int, total: int) -> None:
            bars.update(task, description=what, completed=done, total=total or None, visible=True)

        yield tell


def be_verbose(verbose: bool) -> bool:
    """Send thresher's own log, and with ``verbose`` the libraries' warnings, to standard error."""
    for handler in list(log.handlers):
        log.removeHandler(handler)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Plain())
    log.addHandler(handler)
    log.propagate = False
    log.setLevel(logging.INFO if verbose else logging.WARNING)
    warnings.simplefilter("default" if verbose else "ignore")
    return verbose


class _Plain(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return f"{record.levelname.lower()}: {record.getMessage()}"


def _console(stream: TextIO) -> Console:
    from rich.console import Console

    width = None if stream.isatty() else PIPE_WIDTH
    return Console(file=stream, highlight=False, width=width)


def _numeric(text: str) -> bool:
    return not text or text.lstrip("+-")[:1].isdigit()
