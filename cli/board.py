"""The state of a search on standard error: a live table for a person, a line a trial elsewhere."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from thresher.cli.console import say, table

if TYPE_CHECKING:
    from thresher.passes.tokens.search.front import Demands
    from thresher.passes.tokens.search.outcome import Counts, Known, Outcome

LAST = 5  # trials shown beside the best one


class Board:
    """Shows each trial when it is done, and the best one so far.

    Args:
        trials: how many there will be at most.
        cost: what quality is weighed against.
        demands: decide which is the best.
        known: trials of earlier calls and other processes.
    """

    def __init__(self, trials: int, cost: str, demands: Demands, known: Known) -> None:
        self.trials, self.cost, self.demands = trials, cost, demands
        self.found = dict(known)
        self.rows: list[tuple[str, ...]] = []
        self.live: Any = None

    def __enter__(self) -> Board:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            self.live = Live(console=Console(file=sys.stderr), transient=True)
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the terminal to others."""
        if self.live is not None:
            self.live.stop()
            self.live = None

    def add(self, done: int, counts: Counts, outcome: Outcome) -> None:
        """One more trial of this process; ``done`` are finished in all processes."""
        from thresher.passes.tokens.search.front import best

        self.found[counts] = outcome
        self.rows.append((str(done), *cells(counts, outcome)))
        top = best(self.found, self.demands, self.cost)
        if self.live is None:
            tokens, *values = cells(counts, outcome)
            quality = self.found[top].quality.score
            say(
                f"trial {done} of {self.trials}: {tokens}: {', '.join(filter(None, values))};"
                f" best so far {quality:.2%} with {' '.join(map(str, top))}"
            )
            return
        rows = [*self.rows[-LAST:], ("best", *cells(top, self.found[top]))]
        title = f"trial {done} of {self.trials}"
        head = ("", "tokens after each block", "quality", "multiply-accumulates", "speed-up")
        self.live.update(table(title, head, rows), refresh=True)


def cells(counts: Counts, outcome: Outcome) -> tuple[str, str, str, str]:
    """Counts, quality, share and speed-up as text."""
    timing = outcome.timing
    return (
        " ".join(map(str, counts)),
        f"{outcome.quality.score:.2%}",
        f"{outcome.share:.1%}",
        f"{timing.speedup:.2f}x" if timing else "",
    )
