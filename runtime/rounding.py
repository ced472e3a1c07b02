"""What rounding alone decides: a Program against itself, its weights off by rounding errors.

Where tokens are chosen, one choice between scores that are equal up to rounding changes the places of all
tokens behind it, and through attention their values.  Such a sample cannot tell whether an engine is right.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from thresher.runtime.batches import run_in_batches
from thresher.runtime.deviation import DEPTH, Tolerance
from thresher.runtime.feeds import Array
from thresher.runtime.runner import ProgramRunner, Runnable

TWINS = 4


def twins(
    program: Runnable, feeds: Mapping[str, Array], limit: Tolerance
) -> Iterator[dict[str, Array]]:
    """Outputs of a Program with other roundings of its weights; none of what is no Program.

    Weights are off by up to a sixteenth of the tolerance, which is that of 16 roundings in a row: where
    nothing is chosen, outputs stay within it.
    """
    if isinstance(program, ProgramRunner):
        for seed in range(TWINS):
            yield run_in_batches(program.rounded(limit.relative / DEPTH, seed), feeds)
