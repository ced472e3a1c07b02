"""What the definitions of networks cut into learners share; experts are such learners."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from thresher.kernels.activations import ACTIVATIONS


def add_where(y: Tensor, runs: Tensor, one: Tensor) -> Tensor:
    """One learner's results ``[B, N, D]`` added where ``runs [B, N]``."""
    return y + torch.where(runs[..., None], one, torch.zeros_like(one))


def demand(
    operator: str,
    choice: str,
    fits: bool,
    tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor],
    activation: str,
) -> None:
    """Refuse what does not fit together.

    Args:
        operator: its name.
        choice: what chooses the learners should be, such as ``k [B, N]``.
        fits: whether it is that.
        tensors: tokens, choice, w1, b1, w2 and b2.
        activation: should be a name among :data:`~thresher.kernels.activations.ACTIVATIONS`.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"{operator}: no activation {activation!r}, only {', '.join(ACTIVATIONS)}")
    x, chosen, w1, b1, w2, b2 = tensors
    learners, width, hidden = w1.shape
    networks = b1.shape == (learners, hidden) and w2.shape == (learners, hidden, width)
    if not (fits and networks and b2.shape == (width,) and x.dim() == 3 and x.shape[2] == width):
        shapes = ", ".join(str(list(given.shape)) for given in tensors)
        raise ValueError(
            f"{operator} wants x [B, N, D], {choice}, w1 [L, D, H], b1 [L, H], w2 [L, H, D] and b2 [D],"
            f" not {shapes} with {chosen.dtype}"
        )


def fake_of(check: Callable[..., None]) -> Callable[..., Tensor]:
    """The shape function of an operator with such a check: shape and dtype of the tokens."""

    def fake(x: Tensor, *others: Tensor | str) -> Tensor:
        check(x, *others)
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    return fake
