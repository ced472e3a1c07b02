"""Definition of ``thresher::class_attention``."""

from __future__ import annotations

import torch

HIDDEN = -1e4  # logit added where a boolean mask hides a key; finite in float16


def class_attention(
    q: torch.Tensor, k: torch.Tensor, bias: torch.Tensor | None, scale: float, row: int
) -> torch.Tensor:
    """Mean over heads of one row of the attention map, float32 ``[B, N]``.

    Args:
        q: ``[B, H, Nq, d]``.
        k: ``[B, H, N, d]``.
        bias: additive or boolean (True: visible), broadcastable to ``[B, H, Nq, N]``, or None.
        scale: of the logits.
        row: which query.

    Only H N d products: the map itself is never formed (EViT, section 3.1, needs no more).
    """
    logits = (q[:, :, row : row + 1].float() * scale) @ k.float().transpose(-1, -2)
    if bias is not None:
        line = bias if bias.shape[-2] == 1 else bias[..., row : row + 1, :]
        logits = logits + (torch.where(line, 0.0, HIDDEN) if line.dtype == torch.bool else line.float())
    return logits.softmax(dim=-1).mean(dim=1).squeeze(1)


def shape(q: torch.Tensor, k: torch.Tensor, bias: torch.Tensor | None, scale: float, row: int) -> torch.Tensor:
    """Shapes and dtypes of the result."""
    return q.new_empty([q.shape[0], k.shape[2]], dtype=torch.float32)
