"""Definition of ``thresher::keep_tokens``."""

from __future__ import annotations

import torch

from thresher.kernels.gather_tokens.reference import gather_tokens


def keep_tokens(
    x: torch.Tensor, score: torch.Tensor, keep: int, protected: int, fuse: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keep the best-scored tokens in index order.

    Args:
        x: ``[B, N, C]``.
        score: float32 ``[B, N]``; larger is kept, ties go to the lower index.
        keep: K, tokens in the result, prefix and fused token included.
        protected: prefix tokens that stay whatever their score.
        fuse: append the sum of the dropped tokens times their scores.  It is *not* normalised, so its
            norm is small; that is the published method (EViT, section 3.2).

    Returns:
        ``y [B, K, C]``; ``slot`` int64 ``[B, N]``, -1 for dropped tokens; ``kept`` int64 ``[B, K]``.  The
        fused token stands for the best of the dropped.
    """
    batch, tokens, _ = x.shape
    chosen = keep - protected - int(fuse)
    order = torch.sort(score[:, protected:], dim=1, descending=True, stable=True).indices + protected
    best, rest = order[:, :chosen].sort(dim=1).values, order[:, chosen:]
    prefix = torch.arange(protected, device=x.device).expand(batch, -1)
    kept = torch.cat([prefix, best], dim=1)
    y = gather_tokens(x, kept)
    places = torch.arange(protected + chosen, device=x.device).expand(batch, -1)
    slot = torch.full((batch, tokens), -1, device=x.device).scatter(1, kept, places)
    if fuse:
        weight = torch.gather(score, 1, rest).to(x.dtype).unsqueeze(1)
        y = torch.cat([y, weight @ gather_tokens(x, rest)], dim=1)
        kept = torch.cat([kept, rest[:, :1]], dim=1)
    return y, slot, kept


def shape(
    x: torch.Tensor, score: torch.Tensor, keep: int | torch.SymInt, protected: int, fuse: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Shapes and dtypes of the result.

    Raises:
        ValueError: the count leaves out the prefix, exceeds the tokens, or leaves nothing to fuse.
    """
    batch, tokens, width = x.shape
    if isinstance(keep, int) and isinstance(tokens, int):
        least, most = protected + int(fuse), tokens
        if not least <= keep <= most:
            raise ValueError(f"keep_tokens: keep={keep} of {tokens} tokens; it must be {least} to {most}")
    index = torch.int64
    return (
        x.new_empty([batch, keep, width]),
        x.new_empty([batch, tokens], dtype=index),
        x.new_empty([batch, keep], dtype=index),
    )
