"""Definition of ``keep_tokens``: top-k selection, with the fused token of EViT (Liang et al., ICLR 2022)."""

from __future__ import annotations

import torch
from torch import Tensor

from thresher.kernels.gather_tokens.reference import gather_tokens


def keep_tokens(
    x: Tensor, score: Tensor, keep: int, protected: int, fuse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Keep the prefix and the best-scored other tokens, in index order; ties go to the lower index.

    Args:
        x: ``[B, N, C]`` tokens.
        score: ``[B, N]`` float32; the prefix's entries are not read.
        keep: number K of tokens that leave, the fused one included (so ``fuse`` drops N - K + 1).
        protected: length of the prefix that passes unchanged.
        fuse: the last token is ``sum_i score_i x_i`` over the dropped ones (not normalised, as published).

    Returns:
        Tokens ``[B, K, C]``; ``slot [B, N]`` int64, where each incoming token lives now, -1 if dropped;
        ``kept [B, K]`` int64, the incoming position that each outgoing token stands for (for the fused
        one, the best-scored dropped token).

    Raises:
        ValueError: ``keep`` cannot be reached.
    """
    batch, tokens, _ = x.shape
    check(tokens, keep, protected, fuse)
    chosen = keep - protected - int(fuse)
    order = protected + score[:, protected:].argsort(dim=1, descending=True, stable=True)
    staying, dropped = order[:, :chosen].sort(dim=1).values, order[:, chosen:]
    prefix = torch.arange(protected, device=x.device).expand(batch, -1)
    kept = torch.cat([prefix, staying], dim=1)
    slot = kept.new_full((batch, tokens), -1)
    slot.scatter_(1, kept, torch.arange(kept.shape[1], device=x.device).expand(batch, -1))
    y = gather_tokens(x, kept)
    if fuse:
        wide = torch.promote_types(x.dtype, torch.float32)
        weight = score.gather(1, dropped).to(wide)
        fused = weight[:, None, :] @ gather_tokens(x, dropped).to(wide)
        y = torch.cat([y, fused.to(x.dtype)], dim=1)
        kept = torch.cat([kept, dropped[:, :1]], dim=1)
    return y, slot, kept


def check(tokens: int, keep: int, protected: int, fuse: bool) -> None:
    """Refuse counts that cannot be had."""
    lowest, highest = protected + int(fuse), tokens
    if not lowest <= keep <= highest:
        raise ValueError(
            f"keep_tokens cannot leave {keep} of {tokens} tokens with {protected} protected:"
            f" from {lowest} to {highest} are possible"
        )


def fake(
    x: Tensor, score: Tensor, keep: int, protected: int, fuse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes and dtypes of the result; counts may be symbols."""
    batch, tokens, width = x.shape
    if isinstance(tokens, int) and isinstance(keep, int):
        check(tokens, keep, protected, fuse)
    indices = x.new_empty(batch, tokens, dtype=torch.int64)
    return x.new_empty(batch, keep, width), indices, indices.new_empty(batch, keep)
