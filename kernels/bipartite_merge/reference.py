"""Definition of ``bipartite_merge``: the matching and merging step of ToMe (Bolya et al., ICLR 2023).

Tokens at even positions choose their most similar token at an odd position; the ``N - keep`` most
similar of these pairs merge by a mean weighted with the sizes (how many inputs a token stands for).
"""

from __future__ import annotations

import torch
from torch import Tensor

from thresher.kernels.gather_tokens.reference import gather_tokens

EPSILON = 1e-12  # a zero key gets similarity 0 to everything
PADDING = 1e4  # beyond every cosine: padding merges first and is never chosen


def bipartite_merge(
    x: Tensor, size: Tensor, metric: Tensor, keep: int, protected: int, by_index: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Merge ``N - keep`` source tokens into destination tokens.

    Sources are the even, destinations the odd positions from ``protected`` on.  Ties go to the lower
    index.  A size of 0 marks padding: it merges before all others, weighs nothing, and is not chosen.

    Args:
        x: ``[B, N, C]`` tokens.
        size: ``[B, N]`` float32.
        metric: ``[B, H, N, d]``; similarity is the cosine of the mean over H, in float32 or wider.
        keep: number K of tokens that leave; at least N minus the number of sources.
        protected: length of the prefix that passes unchanged.
        by_index: kept sources leave in index order, else by falling similarity.

    Returns:
        Tokens ``[B, K, C]`` in the order prefix, kept sources, destinations; their sizes ``[B, K]``;
        ``slot [B, N]`` int64, where each incoming token lives now; ``kept [B, K]`` int64, the incoming
        position that each outgoing token stands for.

    Raises:
        ValueError: ``keep`` cannot be reached.
    """
    batch, tokens, _ = x.shape
    check(tokens, keep, protected)
    source = _every_second(protected + protected % 2, tokens, x)
    target = _every_second(protected + 1 - protected % 2, tokens, x)
    merging, staying, into = _match(size, metric, source, target, tokens - keep, by_index)

    wide = torch.promote_types(x.dtype, torch.float32)
    s_target = size[:, target].to(wide)
    s_merging = size.gather(1, source[merging]).to(wide)
    joins = (into[:, None, :] == torch.arange(len(target), device=x.device)[:, None]).to(wide)
    total = s_target + (joins * s_merging[:, None, :]).sum(-1)
    empty = total == 0
    share = torch.where(empty, 1.0, s_target) / torch.where(empty, 1.0, total)
    shares = joins * (s_merging[:, None, :] / torch.where(empty, 1.0, total)[:, :, None])
    merged = share[..., None] * x[:, target].to(wide) + shares @ gather_tokens(
        x, source[merging]
    ).to(wide)

    prefix = torch.arange(protected, device=x.device).expand(batch, -1)
    passing = torch.cat([prefix, source[staying]], dim=1)
    kept = torch.cat([passing, target.expand(batch, -1)], dim=1)
    y = torch.cat([gather_tokens(x, passing), merged.to(x.dtype)], dim=1)
    out_size = torch.cat([size.gather(1, passing), total.to(size.dtype)], dim=1)
    slot = kept.new_empty(batch, tokens)
    slot.scatter_(1, kept, torch.arange(keep, device=x.device).expand(batch, -1))
    slot.scatter_(1, source[merging], into + passing.shape[1])
    return y, out_size, slot, kept


def check(tokens: int, keep: int, protected: int) -> None:
    """Refuse counts that no matching can reach."""
    sources = max((tokens - protected - protected % 2 + 1) // 2, 0)
    lowest = tokens - (sources if tokens - protected >= 2 else 0)
    if not lowest <= keep <= tokens:
        raise ValueError(
            f"bipartite_merge cannot leave {keep} of {tokens} tokens with {protected} protected:"
            f" from {lowest} to {tokens} are possible"
        )


def fake(
    x: Tensor, size: Tensor, metric: Tensor, keep: int, protected: int, by_index: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shapes and dtypes of the result; counts may be symbols."""
    batch, tokens, width = x.shape
    if isinstance(tokens, int) and isinstance(keep, int):
        check(tokens, keep, protected)
    indices = x.new_empty(batch, tokens, dtype=torch.int64)
    return (
        x.new_empty(batch, keep, width),
        size.new_empty(batch, keep),
        indices,
        indices.new_empty(batch, keep),
    )


def _match(
    size: Tensor, metric: Tensor, source: Tensor, target: Tensor, count: int, by_index: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Indices among the sources that merge and that stay, and the target that each merging one joins."""
    mean = metric.to(torch.promote_types(metric.dtype, torch.float32)).mean(1)
    unit = mean / mean.square().sum(-1, keepdim=True).sqrt().clamp(min=EPSILON)
    if len(target) == 0:
        order = torch.arange(len(source), device=size.device).expand(len(size), -1)
        return order[:, :0], order, order[:, :0]
    similarity = unit[:, source] @ unit[:, target].transpose(1, 2)
    similarity = torch.where(size[:, None, target] == 0, -PADDING, similarity)
    best = similarity.amax(-1)
    # The first of equal maxima; amax's gradient is not wanted and argmax promises no order.
    first = (similarity == best[..., None]).long().cumsum(-1).eq(0).sum(-1)
    rank = torch.where(size[:, source] == 0, PADDING, best)  # whatever padding holds, it ties
    order = rank.detach().argsort(dim=1, descending=True, stable=True)
    merging, staying = order[:, :count], order[:, count:]
    if by_index:
        staying = staying.sort(dim=1).values
    return merging, staying, first.gather(1, merging)


def _every_second(start: int, end: int, like: Tensor) -> Tensor:
    return torch.arange(start, max(start, end), 2, device=like.device)
