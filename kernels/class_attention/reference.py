"""Definition of ``class_attention``: the score of EViT (Liang et al., ICLR 2022, section 3.1)."""

from __future__ import annotations

import torch
from torch import Tensor


def class_attention(q: Tensor, k: Tensor, bias: Tensor | None, scale: float, row: int) -> Tensor:
    """``mean_h softmax_j(scale q[b, h, row] k[b, h, j] + bias)``: what one query pays to every key.

    Args:
        q: ``[B, H, Nq, d]``; only ``row`` is read.
        k: ``[B, H, N, d]``.
        bias: broadcastable to ``[B, H, Nq, N]``; added, or a bool mask (True = visible).
        scale: factor on the logits, usually ``d ** -0.5``.
        row: the query.

    Returns:
        ``[B, N]``, float32 or wider, each row summing to 1.

    Raises:
        ValueError: ``row`` is not a query.
    """
    check(q, row)
    wide = torch.promote_types(q.dtype, torch.float32)
    logits = scale * (k.to(wide) @ q[:, :, row, :, None].to(wide)).squeeze(-1)
    if bias is not None:
        at_row = bias if bias.dim() < 2 else bias.select(-2, row if bias.shape[-2] > 1 else 0)
        if bias.dtype == torch.bool:
            logits = logits.masked_fill(~at_row, torch.finfo(wide).min)
        else:
            logits = logits + at_row.to(wide)
    return logits.softmax(-1).mean(1)


def check(q: Tensor, row: int) -> None:
    """Refuse a row that is not there."""
    rows = q.shape[2]
    if row < 0 or (isinstance(rows, int) and row >= rows):
        raise ValueError(f"class_attention: row {row} is not one of the {rows} queries")


def fake(q: Tensor, k: Tensor, bias: Tensor | None, scale: float, row: int) -> Tensor:
    """Shape and dtype of the result."""
    check(q, row)
    dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(k.shape[0], k.shape[2], dtype=dtype)
