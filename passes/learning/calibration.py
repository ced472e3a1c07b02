"""Measuring a Program on data: which items, and sums over the rows of some of its nodes, resumable."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, TypeAlias

import torch
from torch import Tensor, fx

from thresher.compiler.contract import Context, Dataset
from thresher.compiler.digests import program_digest
from thresher.compiler.errors import UsageError
from thresher.compiler.program import Program
from thresher.passes.learning import checkpoint
from thresher.passes.learning.tap import Tap, Tapped

SAVE_EVERY = 50  # batches between checkpoints

View: TypeAlias = Callable[[Tapped, fx.Node, Tensor], Tensor]


class Collector(Protocol):
    """Sums over the rows of one node's value."""

    def add(self, rows: Tensor) -> None:
        """Take ``[T, C]`` more rows."""

    def state(self) -> dict[str, Tensor]:
        """The sums so far."""

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from these sums."""


def chosen_items(data: Dataset, limit: int, least: int = 1) -> list[int]:
    """Numbers of at most ``limit`` items, spread evenly over the data.

    Raises:
        UsageError: there are fewer than ``least``.
    """
    total = min(len(data), limit)
    if total < least:
        asked, remedy = ("", "give more data")
        if total < len(data):
            asked, remedy = f", of which {limit} are asked for,", "ask for more"
        raise UsageError(
            f"{data.name} has {len(data)} items{asked} and calibration needs at least {least}: {remedy}"
        )
    return [index * len(data) // total for index in range(total)]


def halves(data: Dataset, limit: int, least: int, seed: int) -> tuple[list[int], list[int]]:
    """Numbers of at most ``limit`` items to measure on and of as many that are held out, by chance.

    Raises:
        UsageError: there are fewer than ``least`` of each.
    """
    chosen = chosen_items(data, 2 * limit, 2 * least)
    random.Random(seed).shuffle(chosen)
    half = (len(chosen) + 1) // 2
    return sorted(chosen[:half]), sorted(chosen[half:])


def every_row(tapped: Tapped, node: fx.Node, value: Tensor) -> Tensor:
    """``[..., C] -> [T, C]``: all tokens that are no padding."""
    return tapped.rows(value)


def collect(
    program: Program,
    context: Context,
    items: Sequence[int],
    collectors: Mapping[fx.Node, Collector],
    name: str,
    fingerprint: Mapping[str, object],
    view: View = every_row,
) -> None:
    """Run the Program on some items of the data and show every collector its node's rows.

    ``view`` says which: rows ``[T, C]`` out of a node's value.  With ``context.checkpoints`` the sums are saved now and
    then, and a stopped calibration of the same Program goes on from there; ``fingerprint`` says what else must agree.

    Raises:
        UsageError: a value that is no number came up, or a checkpoint of another run is in the way.
    """
    data = context.data
    assert data is not None
    path = None if context.checkpoints is None else context.checkpoints / f"{name}.pt"
    identity = {
        **fingerprint,
        "program": program_digest(program),
        "data": data.name,
        "items": len(items),
        "batch": context.batch,
    }
    batches = [items[i : i + context.batch] for i in range(0, len(items), context.batch)]
    tapped, done = Tapped(program), _resume(path, identity, collectors)

    def tap(node: fx.Node, collector: Collector) -> Tap:
        def see(value: Tensor) -> None:
            rows = view(tapped, node, value)
            if not torch.isfinite(rows).all():
                raise UsageError(
                    f"calibration on {data.name}: {node.name} has values that are no finite numbers, so"
                    " nothing can be measured there: mend the data or the weights"
                )
            collector.add(rows)

        return see

    taps = {node: tap(node, collector) for node, collector in collectors.items()}
    for number in range(done, len(batches)):
        context.progress(f"calibrating {name}", number, len(batches))
        arrays, _ = data.take(batches[number])
        tapped.outputs({key: torch.from_numpy(array) for key, array in arrays.items()}, taps)
        if path is not None and (number + 1) % SAVE_EVERY == 0:
            _save(path, identity, collectors, number + 1)


def _save(
    path: Path,
    identity: Mapping[str, object],
    collectors: Mapping[fx.Node, Collector],
    done: int,
) -> None:
    states = {node.name: collector.state() for node, collector in collectors.items()}
    checkpoint.save(path, identity, {"done": done, "states": states})


def _resume(
    path: Path | None, identity: Mapping[str, object], collectors: Mapping[fx.Node, Collector]
) -> int:
    """Batches that are done already."""
    state = None if path is None else checkpoint.load(path, identity)
    if state is None:
        return 0
    for node, collector in collectors.items():
        collector.restore(state["states"][node.name])
    return int(state["done"])
