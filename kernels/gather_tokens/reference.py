"""Definition of ``gather_tokens``: ``out[b, j] = x[b, index[b, j]]``."""

from __future__ import annotations

from torch import Tensor


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Pick tokens by position.

    Args:
        x: ``[B, N, ...]`` of any dtype and rank from 2 on.
        index: ``[B, K]`` int64 in ``[0, N)``.

    Returns:
        ``[B, K, ...]``, dtype of x.

    Raises:
        ValueError: wrong ranks.
    """
    check(x, index)
    rest = x.shape[2:]
    places = index.reshape(*index.shape, *(1 for _ in rest)).expand(*index.shape, *rest)
    return x.gather(1, places)


def check(x: Tensor, index: Tensor) -> None:
    """Refuse ranks that have no tokens."""
    if x.dim() < 2 or index.dim() != 2:
        raise ValueError(
            f"gather_tokens: x has rank {x.dim()} (2 or more) and index rank {index.dim()} (2)"
        )


def fake(x: Tensor, index: Tensor) -> Tensor:
    """Shape and dtype of the result."""
    check(x, index)
    return x.new_empty(x.shape[0], index.shape[1], *x.shape[2:])
