"""Checks of shapes before a kernel reads memory by them, and sizes of blocks."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def demand(operator: str, name: str, tensor: Tensor, wanted: Sequence[int]) -> None:
    """Raise ValueError unless the tensor has the shape that the others ask for."""
    if tuple(tensor.shape) != tuple(wanted):
        raise ValueError(
            f"{operator}: {name} has the shape {list(tensor.shape)} and {list(wanted)} is needed"
        )


def demand_prefix(operator: str, protected: int, tokens: int) -> None:
    """Raise ValueError unless the prefix lies within the tokens."""
    if not 0 <= protected <= tokens:
        raise ValueError(f"{operator}: protected is {protected} and from 0 to {tokens} is possible")


def demand_scored(
    operator: str, tensors: tuple[Tensor, Tensor, Tensor, Tensor], protected: int
) -> None:
    """Raise ValueError unless size ``[B, N]``, metric ``[B, H, N, d]``, score ``[B, N]`` and the prefix fit x."""
    x, size, metric, score = tensors
    batch, tokens, _ = x.shape
    demand_prefix(operator, protected, tokens)
    demand(operator, "size", size, (batch, tokens))
    demand(operator, "metric", metric, (batch, metric.shape[1], tokens, metric.shape[-1]))
    demand(operator, "score", score, (batch, tokens))


def blocks(count: int, block: int) -> int:
    """How many blocks hold ``count``."""
    return -(-count // block)


def power(count: int, least: int, most: int) -> int:
    """The smallest power of two that holds ``count``, between two bounds that are powers themselves."""
    return min(max(1 << max(count - 1, 0).bit_length(), least), most)
