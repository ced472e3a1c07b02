"""Definition of ``thresher::bipartite_merge``: one step of Token Merging (Bolya et al., 2023, section 3)."""

from __future__ import annotations

import torch

from thresher.kernels.gather_tokens.reference import gather_tokens

EPSILON = 1e-12  # under the root of the squared key norm: a zero key is similar to nothing
NEVER, FIRST = -1e4, 1e4  # similarities of padding: not a destination, first to go


def bipartite_merge(
    x: torch.Tensor, size: torch.Tensor, metric: torch.Tensor, keep: int, protected: int, by_index: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Merge the ``N - keep`` sources that are most similar to a destination into it.

    Sources are the even positions behind the prefix, destinations the odd ones.  Each source picks its
    most similar destination by the cosine of the head-averaged metric; the most similar sources merge
    (ties: lower index), each destination becoming the size-weighted mean of its group.

    Args:
        x: ``[B, N, C]``.
        size: float32 ``[B, N]``, input tokens per token; 0 marks padding, which merges first and weighs
            nothing, and which no real token merges into.
        metric: ``[B, H, N, d]``, the keys of the block's attention.
        keep: K, tokens in the result; at least N - (N - protected) // 2.
        protected: prefix tokens that neither merge nor are merged into.
        by_index: kept sources in index order, else in order of descending similarity.

    Returns:
        ``y [B, K, C]`` (prefix, kept sources, destinations); its sizes float32 ``[B, K]``; ``slot`` int64
        ``[B, N]``, where each token lives now; ``kept`` int64 ``[B, K]``, which position each stands for.
    """
    batch, tokens, _ = x.shape
    merged_count = tokens - keep
    sources, destinations = positions(tokens, protected, x.device)
    similarity, choice = match(size, metric, sources, destinations)
    order = torch.sort(similarity, dim=1, descending=True, stable=True).indices
    gone, stay = order[:, :merged_count], order[:, merged_count:]
    if by_index:
        stay = stay.sort(dim=1).values
    prefix = torch.arange(protected, device=x.device)
    kept = torch.cat(
        [prefix.expand(batch, -1), sources[stay], destinations.expand(batch, -1)], dim=1
    )
    target = torch.gather(choice, 1, gone) + (keep - len(destinations))
    gone = sources[gone]
    places = torch.arange(keep, device=x.device).expand(batch, -1)
    slot = torch.zeros((batch, tokens), dtype=torch.int64, device=x.device)
    slot = slot.scatter(1, kept, places).scatter(1, gone, target)
    group = (slot.unsqueeze(1) == torch.arange(keep, device=x.device)[None, :, None]).to(torch.float32)
    weight = group * size.unsqueeze(1)
    out_size = weight.sum(dim=2)
    alone = torch.nn.functional.one_hot(kept, tokens).to(torch.float32)
    share = torch.where((out_size > 0).unsqueeze(2), weight / out_size.clamp(min=1e-30).unsqueeze(2), alone)
    y = gather_tokens(x, kept)
    touched = (group.sum(dim=2) > 1).unsqueeze(2)
    return torch.where(touched, share.to(x.dtype) @ x, y), out_size, slot, kept


def positions(tokens: int, protected: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Source and destination positions: even and odd ones behind the prefix."""
    place = torch.arange(protected, tokens, device=device)
    return place[place % 2 == 0], place[place % 2 == 1]


def match(
    size: torch.Tensor, metric: torch.Tensor, sources: torch.Tensor, destinations: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Best similarity ``[B, S]`` of each source and the destination (its rank among them) that has it."""
    keys = metric.to(torch.promote_types(metric.dtype, torch.float32)).mean(dim=1)
    keys = keys / (keys.square().sum(dim=-1, keepdim=True) + EPSILON).sqrt()
    similarity = keys[:, sources] @ keys[:, destinations].transpose(1, 2)
    similarity = torch.where((size[:, destinations] > 0).unsqueeze(1), similarity, NEVER)
    best, choice = similarity.max(dim=2)
    return torch.where(size[:, sources] > 0, best, FIRST), choice


def shape(
    x: torch.Tensor, size: torch.Tensor, metric: torch.Tensor, keep: int | torch.SymInt, protected: int, by_index: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Shapes and dtypes of the result.

    Raises:
        ValueError: more tokens would have to merge than there are pairs.
    """
    batch, tokens, width = x.shape
    if isinstance(keep, int) and isinstance(tokens, int):
        least = tokens - (tokens - protected) // 2
        if not least <= keep <= tokens:
            raise ValueError(f"bipartite_merge: keep={keep} of {tokens} tokens; it must be {least} to {tokens}")
    index = torch.int64
    return (
        x.new_empty([batch, keep, width]),
        size.new_empty([batch, keep]),
        x.new_empty([batch, tokens], dtype=index),
        x.new_empty([batch, keep], dtype=index),
    )
