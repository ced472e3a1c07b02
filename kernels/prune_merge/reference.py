"""Definition of ``prune_merge``: the inference step of DiffRate (Chen et al., ICCV 2023, section 3).

One ranking decides both: its tail is pruned, what ranks just above joins the token most like it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from thresher.kernels.gather_tokens.reference import gather_tokens

EPSILON = 1e-12  # a zero vector gets similarity 0 to everything
PADDING = 1e4  # beyond every cosine: padding is chosen only where there is nothing else


def prune_merge(
    x: Tensor, size: Tensor, score: Tensor, pruned: int, keep: int, protected: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Prune to ``pruned`` tokens by score, then merge the worst of these until ``keep`` are left.

    The tokens behind the prefix are ranked by score, descending.  The first ``keep - protected``
    stay, the next ``pruned - keep`` each join the most similar of those that stay, the rest goes.
    Similarity is the cosine of ``x`` itself, in float32 or wider.  A group becomes its plain mean,
    whatever the sizes.  Its size is ``s + sum of cosine * s_joining``, and never less than
    ``min(s, 1)``: training clamps at 1, the published inference does not, so that a negative
    cosine makes log s of proportional attention NaN there.  All ties go to the lower index.

    A size of 0 marks padding: it ranks behind every other token, weighs nothing in a group, and is
    joined only where nothing else stays.

    Args:
        x: ``[B, N, C]`` tokens.
        size: ``[B, N]`` float32.
        score: ``[B, N]`` float32; the prefix's entries are not read.
        pruned: number P of tokens that pruning leaves, ``keep <= P <= N``.
        keep: number K of tokens that leave; with ``P > K`` at least one behind the prefix.
        protected: length of the prefix, which passes unchanged and is never joined.

    Returns:
        Tokens ``[B, K, C]``, the prefix and the others in index order; their sizes ``[B, K]``;
        ``slot [B, N]`` int64, where each incoming token lives now, -1 if pruned; ``kept [B, K]``
        int64, the incoming position that each outgoing token stands for.

    Raises:
        ValueError: ``pruned`` and ``keep`` cannot be reached.
    """
    batch, tokens, _ = x.shape
    check(tokens, pruned, keep, protected)
    wide = torch.promote_types(x.dtype, torch.float32)
    worth = score.masked_fill(size == 0, torch.finfo(score.dtype).min)[:, protected:]
    order = protected + worth.detach().argsort(dim=1, descending=True, stable=True)
    staying = order[:, : keep - protected].sort(dim=1).values
    joining = order[:, keep - protected : pruned - protected]
    prefix = torch.arange(protected, device=x.device).expand(batch, -1)
    kept = torch.cat([prefix, staying], dim=1)

    x_staying, x_joining = gather_tokens(x, staying).to(wide), gather_tokens(x, joining).to(wide)
    s_staying, s_joining = size.gather(1, staying).to(wide), size.gather(1, joining).to(wide)
    cosine, into = _nearest(x_joining, x_staying, s_staying)
    joins = (into[:, None, :] == torch.arange(keep - protected, device=x.device)[:, None]).to(wide)
    parts = joins * (s_joining != 0)[:, None, :]
    count = 1 + parts.sum(-1, keepdim=True)
    merged = x_staying / count + (parts / count) @ x_joining
    total = s_staying + (joins * (cosine * s_joining)[:, None, :]).sum(-1)
    total = torch.maximum(total, s_staying.clamp(max=1.0))

    y = torch.cat([x[:, :protected], merged.to(x.dtype)], dim=1)
    out_size = torch.cat([size[:, :protected], total.to(size.dtype)], dim=1)
    slot = kept.new_full((batch, tokens), -1)
    slot.scatter_(1, kept, torch.arange(keep, device=x.device).expand(batch, -1))
    slot.scatter_(1, joining, into + protected)
    return y, out_size, slot, kept


def check(tokens: int, pruned: int, keep: int, protected: int) -> None:
    """Refuse counts that cannot be had."""
    lowest = protected + int(pruned > keep)
    if not lowest <= keep <= pruned <= tokens:
        raise ValueError(
            f"prune_merge cannot prune {tokens} tokens to {pruned} and merge these to {keep} with"
            f" {protected} protected: {lowest} <= keep <= pruned <= {tokens} is possible"
        )


def fake(
    x: Tensor, size: Tensor, score: Tensor, pruned: int, keep: int, protected: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shapes and dtypes of the result; counts may be symbols."""
    batch, tokens, width = x.shape
    if isinstance(tokens, int) and isinstance(pruned, int) and isinstance(keep, int):
        check(tokens, pruned, keep, protected)
    indices = x.new_empty(batch, tokens, dtype=torch.int64)
    return (
        x.new_empty(batch, keep, width),
        size.new_empty(batch, keep),
        indices,
        indices.new_empty(batch, keep),
    )


def _nearest(x: Tensor, targets: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine to the most similar target, and its index, for each token of ``x``: ``[B, J]``."""
    if targets.shape[1] == 0:
        return x.new_zeros(x.shape[:2]), x.new_zeros(x.shape[:2], dtype=torch.int64)
    similarity = _unit(x) @ _unit(targets).transpose(1, 2)
    similarity = torch.where(size[:, None] == 0, -PADDING, similarity)
    best = similarity.amax(-1, keepdim=True)
    # The first of equal maxima; argmax promises no order.
    first = (similarity == best).long().cumsum(-1).eq(0).sum(-1)
    return similarity.gather(-1, first[..., None]).squeeze(-1), first


def _unit(x: Tensor) -> Tensor:
    return x / x.square().sum(-1, keepdim=True).sqrt().clamp(min=EPSILON)
