"""Side information follows the tokens: position tables, relative biases and masks are gathered."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from thresher.compiler.surgery import Rewriter


def follow(
    rewriter: Rewriter,
    table: fx.Node,
    axes: Mapping[int, int],
    rank: int,
    positions: fx.Node,
    batched: bool,
) -> fx.Node:
    """A table at the surviving tokens, one copy per item of the batch.

    Args:
        table: any tensor; ``axes`` maps its token axes to offsets (-P: the prefix is not in it).
        rank: of the node that uses it; missing leading axes are added, so that it broadcasts.
        positions: ``[B, N']`` int64, original position of each surviving token.
        batched: the table's first axis is the batch.
    """
    missing = rank - table.meta["val"].dim()
    (offset,) = set(axes.values())
    moved = sorted(axis + missing for axis in axes)

    def gather(table: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        table = table.reshape([1] * missing + list(table.shape))
        index = positions[:, -offset:] + offset if offset else positions
        if batched:
            for axis in moved:
                rows = torch.ops.thresher.gather_tokens(table.movedim(axis, 1), index)
                table = rows.movedim(1, axis)
            return table
        return _per_item(table.squeeze(0), [axis - 1 for axis in moved], index)

    return rewriter.inline(gather, table, positions)


def _per_item(table: torch.Tensor, axes: list[int], index: torch.Tensor) -> torch.Tensor:
    """Gather from a table without batch axis: result ``[B, ...]`` with ``axes`` at the given tokens."""
    front = table.movedim(axes, list(range(len(axes))))
    rest = list(front.shape[len(axes) :])
    if len(axes) == 2:
        index = index[:, :, None] * table.shape[axes[1]] + index[:, None, :]
        front = front.reshape([front.shape[0] * front.shape[1], *rest])
    rows = front[index]
    return rows.movedim(list(range(1, 1 + len(axes))), [axis + 1 for axis in axes])
