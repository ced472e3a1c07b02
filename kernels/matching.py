"""What the definitions of merging operators have in common: the matching of two sides, and the merge."""

from __future__ import annotations

import torch
from torch import Tensor

from thresher.kernels.gather_tokens.reference import gather_tokens

EPSILON = 1e-12  # a zero key has similarity 0 to everything
PADDING = 1e4  # beyond every cosine and every score that is one


def best_target(
    size: Tensor, metric: Tensor, source: Tensor, target: Tensor
) -> tuple[Tensor, Tensor]:
    """The target that is most like each source: its cosine and its number, both ``[B, S]``.

    Cosines are of the metric's mean over the heads, in float32 or wider; ties go to the first target.
    Padding is never chosen: where there is nothing else, the cosine is ``-PADDING``.

    Args:
        size: ``[B, N]``; 0 is padding.
        metric: ``[B, H, N, d]``.
        source, target: positions ``[B, S]`` and ``[B, T]``, T of one or more.
    """
    mean = metric.to(torch.promote_types(metric.dtype, torch.float32)).mean(1)
    unit = mean / mean.square().sum(-1, keepdim=True).sqrt().clamp(min=EPSILON)
    similarity = gather_tokens(unit, source) @ gather_tokens(unit, target).transpose(1, 2)
    padding = size.gather(1, target) == 0
    similarity = torch.where(padding[:, None] | similarity.isnan(), -PADDING, similarity)
    # The first of equal maxima, which argmax does not promise.
    best = similarity.amax(-1)
    return best, (similarity == best[..., None]).long().cumsum(-1).eq(0).sum(-1)


def merged_into(
    x: Tensor, size: Tensor, source: Tensor, target: Tensor, into: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Every source joins a target, and the group becomes its size-weighted mean; the others stay as they are.

    Args:
        x: ``[B, N, C]`` tokens.
        size: ``[B, N]``; 0 is padding, which weighs nothing beside a real token.
        source, target: positions ``[B, R]`` and ``[B, T]``.
        into: ``[B, R]``, the number of each source's target.

    Returns:
        Tokens ``[B, N - R, C]`` in index order, their sizes ``[B, N - R]``; ``slot [B, N]`` int64, where
        each incoming token lives now; ``kept [B, N - R]`` int64, the incoming position of each outgoing one.
    """
    batch, tokens, width = x.shape
    wide = torch.promote_types(x.dtype, torch.float32)
    s_source, s_target = size.gather(1, source).to(wide), size.gather(1, target).to(wide)
    number = torch.arange(target.shape[1], device=x.device)
    joins = (into[:, None] == number[:, None]).to(wide)
    total = s_target + (joins * s_source[:, None]).sum(-1)
    empty = total == 0
    share = torch.where(empty, 1.0, s_target) / torch.where(empty, 1.0, total)
    shares = joins * (s_source[:, None] / torch.where(empty, 1.0, total)[..., None])
    merged = share[..., None] * gather_tokens(x, target).to(wide)
    merged = merged + shares @ gather_tokens(x, source).to(wide)

    places = torch.arange(tokens, device=x.device).expand(batch, -1)
    stays = torch.ones_like(places, dtype=torch.bool).scatter(1, source, False)
    kept = torch.where(stays, places, places + tokens).sort(dim=1).values
    kept = kept[:, : tokens - source.shape[1]].contiguous()
    position = stays.long().cumsum(1) - 1
    at = position.gather(1, target)
    y = gather_tokens(x, kept).scatter(1, at[..., None].expand(-1, -1, width), merged.to(x.dtype))
    out_size = size.gather(1, kept).scatter(1, at, total.to(size.dtype))
    return y, out_size, position.scatter(1, source, at.gather(1, into)), kept


def check_half(name: str, tokens: int, keep: int, protected: int) -> None:
    """Refuse counts that merging in pairs cannot reach.

    Raises:
        ValueError: naming the operator and what is possible.
    """
    behind = tokens - protected
    if behind < 1 or not tokens - behind // 2 <= keep <= tokens:
        raise ValueError(
            f"{name} cannot leave {keep} of {tokens} tokens with {protected} protected:"
            f" from {tokens - max(behind, 0) // 2} to {tokens} are possible, of one more than the prefix"
        )


def fake_merge(x: Tensor, size: Tensor, keep: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shapes and dtypes of what :func:`merged_into` returns; counts may be symbols."""
    batch, tokens, width = x.shape
    slot = x.new_empty(batch, tokens, dtype=torch.int64)
    return (
        x.new_empty(batch, keep, width),
        size.new_empty(batch, keep),
        slot,
        slot.new_empty(batch, keep),
    )
