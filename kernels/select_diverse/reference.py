"""Definition of ``select_diverse``: greedy max-min selection, as DivPrune has it (Alvar et al., CVPR 2025)."""

from __future__ import annotations

import torch
from torch import Tensor

from thresher.kernels.gather_tokens.reference import gather_tokens

EPSILON = 1e-12  # a zero row has similarity 0 to everything
PADDING, CHOSEN = 1e4, 2e4  # beyond every cosine: picked last, and never again


def select_diverse(
    x: Tensor, size: Tensor, keep: int, protected: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Keep the prefix and tokens of which the nearest two are as far apart as a greedy choice has them.

    The first is the token whose nearest other token is farthest; each next one is farthest from the
    nearest of those that were picked.  Distance is one minus the cosine, in float32 or wider.  The
    prefix takes no part in it.  Ties go to the lower index; padding comes after all other tokens.

    Args:
        x: ``[B, N, C]`` tokens.
        size: ``[B, N]`` float32; 0 is padding, other values are not read.
        keep: number K of tokens that leave.
        protected: length of the prefix that passes unchanged.

    Returns:
        Tokens ``[B, K, C]`` in index order; ``slot [B, N]`` int64, where each incoming token lives
        now, -1 if dropped; ``kept [B, K]`` int64, the incoming position of each outgoing token.

    Raises:
        ValueError: ``keep`` cannot be reached.
    """
    batch, tokens, _ = x.shape
    check(tokens, keep, protected)
    nearest, closeness = _similarities(x[:, protected:], size[:, protected:] == 0)
    items = torch.arange(batch, device=x.device)
    rank, reached = nearest, torch.full_like(nearest, -PADDING)
    picks = []
    for _ in range(keep - protected):
        pick = _first_least(rank)
        rank = reached = torch.maximum(reached, closeness[items, pick])
        picks.append(protected + pick)
    prefix = torch.arange(protected, device=x.device).expand(batch, -1)
    kept = torch.cat([prefix, torch.stack(picks, dim=1).sort(dim=1).values], dim=1)
    slot = kept.new_full((batch, tokens), -1)
    slot.scatter_(1, kept, torch.arange(keep, device=x.device).expand(batch, -1))
    return gather_tokens(x, kept), slot, kept


def _similarities(x: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
    """Of each token to its nearest other one ``[B, M]``, and of all pairs ``[B, M, M]``.

    The second says in row i what the others are no nearer to once i is picked.
    """
    wide = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    unit = wide / wide.square().sum(-1, keepdim=True).sqrt().clamp(min=EPSILON)
    cosine = unit @ unit.transpose(1, 2)
    # A product may round (i, j) and (j, i) apart, and tokens that are each other's nearest have to tie.
    cosine = torch.maximum(cosine, cosine.transpose(1, 2))
    cosine = torch.where(cosine.isnan(), -PADDING, cosine)  # NaN is far from everything
    itself = torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
    others = torch.where(itself | padding[:, None], -PADDING, cosine)
    nearest = torch.where(padding, PADDING, others.amax(-1))
    last = torch.where(padding[:, None], PADDING, cosine)
    return nearest, torch.where(itself, CHOSEN, last)


def _first_least(values: Tensor) -> Tensor:
    """Index of the first of the smallest ones, which argmin does not promise."""
    return (values == values.amin(-1, keepdim=True)).long().cumsum(-1).eq(0).sum(-1)


def check(tokens: int, keep: int, protected: int) -> None:
    """Refuse counts that cannot be had."""
    if not protected < keep <= tokens:
        raise ValueError(
            f"select_diverse cannot leave {keep} of {tokens} tokens with {protected} protected:"
            f" from {protected + 1} to {tokens} are possible"
        )


def fake(x: Tensor, size: Tensor, keep: int, protected: int) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes and dtypes of the result; counts may be symbols."""
    batch, tokens, width = x.shape
    if isinstance(tokens, int) and isinstance(keep, int):
        check(tokens, keep, protected)
    slot = x.new_empty(batch, tokens, dtype=torch.int64)
    return x.new_empty(batch, keep, width), slot, slot.new_empty(batch, keep)
