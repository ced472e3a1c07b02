"""A second oracle: timm transformers walked block by block, with tokens really removed.

Written apart from ``oracle``: here the sequence shrinks, sizes are carried and enter attention as
log sizes, positions (RoPE rows, relative-bias rows and columns) are gathered, and the selection
is done on whole batches by sorting.  The two share no code, so they check each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .decisions import Method


@dataclass(frozen=True)
class State:
    """Tokens on their way.

    Attributes:
        x: ``[B, n, C]``.
        size: ``[B, n]``, 0 at padding.
        place: ``[B, n]``, original position of each token left.
        slot: ``[B, N]``, where each original token is now, -1 when dropped.
    """

    x: Tensor
    size: Tensor
    place: Tensor
    slot: Tensor

    @classmethod
    def start(cls, x: Tensor, size: Tensor) -> State:
        """All tokens in their places."""
        place = torch.arange(x.shape[1]).repeat(len(x), 1)
        return cls(x, size, place, place)


def shortened_logits(
    model: Any,
    images: Tensor,
    method: Method,
    counts: Sequence[int],
    *,
    prefix: int,
    fuse: bool = False,
    mlerp: bool = False,
    proportional: bool = True,
    classed: bool = True,
    seed: int = 0,
) -> tuple[Tensor, list[State]]:
    """Logits of a timm VisionTransformer, Eva or Beit whose tokens shrink to ``counts``.

    Counts include the prefix and, with ``fuse``, the fused token.  Returns the state after each
    layer too.  Without ``proportional``, attention and attention pooling leave the sizes out;
    without ``classed``, DiffRate has no class row and prunes nothing.
    """
    x, rope = _embed(model, images)
    state = State.start(x, x.new_ones(x.shape[:2]))
    states = []
    for layer, (block, target) in enumerate(zip(model.blocks, counts, strict=True)):
        update, key, row, column, value = _attention(block, state, rope, prefix, proportional)
        state = replace(state, x=state.x + _scale(block, 1) * update)
        if target < state.x.shape[1] and method == "tome":
            state = merge_step(state, key, state.x.shape[1] - target, prefix, mlerp)
        elif target < state.x.shape[1] and method == "pitome":
            margin = 0.9 * (1 - layer / len(counts))
            state = energy_step(state, key, state.x.shape[1] - target, prefix, margin)
        elif target < state.x.shape[1] and method == "diffrate":
            n = state.x.shape[1]
            pruned = n - (n - target) // 2 if classed else n
            state = prune_merge_step(state, row if classed else column, pruned, target, prefix)
        elif target < state.x.shape[1]:
            if method == "max-min":
                score = _order_of_picks(state.x, prefix)
            elif method == "ats":
                score = _samples(row * value, target, prefix)
            else:
                score = _score(method, state.x, row, layer, seed)
            state = _drop(state, score, row, target, prefix, fuse)
        mlp = block.mlp(block.norm2(state.x))
        state = replace(state, x=state.x + _scale(block, 2) * mlp)
        states.append(state)
    if not proportional and getattr(model, "attn_pool", None) is not None:
        state = replace(state, size=torch.ones_like(state.size))
    return _head(model, replace(state, x=model.norm(state.x)), prefix), states


def _embed(model: Any, images: Tensor) -> tuple[Tensor, Tensor | None]:
    x = model.patch_embed(images)
    if not hasattr(model, "_pos_embed"):  # Beit
        return torch.cat([model.cls_token.expand(len(x), -1, -1), x], dim=1), None
    embedded = model._pos_embed(x)
    x, rope = embedded if isinstance(embedded, tuple) else (embedded, None)
    return model.norm_pre(x), rope


def _scale(block: Any, half: int) -> Tensor | float:
    """LayerScale of the attention (1) or MLP (2) branch."""
    gamma = getattr(block, f"gamma_{half}", None)
    if gamma is None:
        gamma = getattr(getattr(block, f"ls{half}", None), "gamma", None)
    return 1.0 if gamma is None else gamma


def _attention(
    block: Any, state: State, rope: Tensor | None, prefix: int, proportional: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Attention output [B, n, C], mean key [B, n, d], class row, mean row and value lengths [B, n]."""
    attention, x = block.attn, block.norm1(state.x)
    batch, n, _ = x.shape
    qkv = x @ attention.qkv.weight.T
    if attention.qkv.bias is not None:
        qkv = qkv + attention.qkv.bias
    if getattr(attention, "q_bias", None) is not None:
        qkv = qkv + torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])
    heads = attention.num_heads
    q, k, v = (t.reshape(batch, n, heads, -1).transpose(1, 2) for t in qkv.chunk(3, dim=-1))
    if hasattr(attention, "q_norm"):
        q, k = attention.q_norm(q), attention.k_norm(k)
    if rope is not None:
        half = getattr(attention, "rotate_half", False)
        q, k = (_rotate(t, rope, state.place, prefix, half) for t in (q, k))
    logits = torch.einsum("bhid,bhjd->bhij", q, k) / q.shape[-1] ** 0.5
    if getattr(attention, "relative_position_bias_table", None) is not None:
        bias = attention._get_rel_pos_bias()[0]  # [H, N, N]
        rows, columns = state.place[:, :, None], state.place[:, None, :]
        logits = logits + bias[:, rows, columns].transpose(0, 1)
    if proportional:
        logits = logits + state.size.log()[:, None, None, :]
    weights = logits.softmax(dim=-1)
    row, column = weights[:, :, 0].mean(dim=1), weights.mean(dim=(1, 2))
    out = (weights @ v).transpose(1, 2).reshape(batch, n, -1)
    return (
        attention.proj(getattr(attention, "norm", torch.nn.Identity())(out)),
        k.mean(1),
        row,
        column,
        v.square().sum(dim=(1, 3)).sqrt(),
    )


def _rotate(x: Tensor, rope: Tensor, place: Tensor, prefix: int, half: bool) -> Tensor:
    """Rotary embedding of the tokens behind the prefix, each at its own place."""
    table = torch.cat([rope.new_zeros(prefix, rope.shape[-1]), rope])
    sin, cos = table[place][:, None].chunk(2, dim=-1)
    cos = torch.where(place[:, None, :, None] < prefix, torch.ones_like(cos), cos)
    if half:
        a, b = x.chunk(2, dim=-1)
        turned = torch.cat([-b, a], dim=-1)
    else:
        turned = torch.stack([-x[..., 1::2], x[..., 0::2]], dim=-1).flatten(-2)
    return x * cos + turned * sin


def _take(x: Tensor, index: Tensor) -> Tensor:
    return torch.stack([row[i] for row, i in zip(x, index, strict=True)])


def merge_step(state: State, key: Tensor, count: int, prefix: int, mlerp: bool = False) -> State:
    """ToMe on a whole batch; ``key [B, n, d]`` is the metric."""
    n, size = key.shape[1], state.size
    count = min(count, (n - prefix) // 2)
    a = torch.arange(prefix + prefix % 2, n, 2)
    b = torch.arange(prefix + (prefix + 1) % 2, n, 2)
    key = torch.nn.functional.normalize(key, dim=-1)
    similarity = key[:, a] @ key[:, b].transpose(1, 2) - 4.0 * (size[:, b] == 0)[:, None, :]
    best, choice = similarity.max(dim=-1)
    order = torch.where(size[:, a] == 0, 9.0, best).argsort(dim=-1, descending=True, stable=True)
    gone, stay = order[:, :count], order[:, count:]
    if prefix:
        stay = stay.sort(dim=-1).values
    front = torch.arange(prefix).repeat(len(key), 1)
    kept = torch.cat([front, a[stay], b.repeat(len(key), 1)], dim=1)
    into = choice.gather(1, gone)
    onehot = (into[:, None, :] == torch.arange(len(b))[None, :, None]).double()
    mass = torch.cat([size[:, b, None], size[:, b, None] * state.x[:, b]], dim=-1)
    source = _take(size, a[gone])[..., None]
    mass = mass + onehot @ torch.cat([source, source * _take(state.x, a[gone])], dim=-1)
    # a group of nothing but padding has no mean; any finite value will do
    x = mass[..., 1:] / mass[..., :1].clamp_min(1.0)
    if mlerp:
        length = state.x.norm(dim=-1)
        joined = (onehot * _take(length, a[gone])[:, None]).max(dim=-1).values
        x = (
            torch.nn.functional.normalize(x, dim=-1)
            * torch.maximum(joined, length[:, b])[..., None]
        )
    passing = kept.shape[1] - len(b)
    moved = _places(kept, n).scatter(1, a[gone], passing + into)
    return State(
        torch.cat([_take(state.x, kept[:, :passing]), x], dim=1),
        torch.cat([_take(size, kept[:, :passing]), mass[..., 0]], dim=1),
        _take(state.place, kept),
        moved.gather(1, state.slot),
    )


def energy_step(state: State, key: Tensor, count: int, prefix: int, margin: float) -> State:
    """PiToMe on a whole batch without padding; ``key [B, n, d]``."""
    n = key.shape[1]
    unit = torch.nn.functional.normalize(key, dim=-1)
    cosine = unit @ unit.transpose(1, 2)
    pool = cosine[:, prefix:, prefix:]
    energy = torch.where(pool < margin, torch.expm1(pool - margin), pool).mean(dim=-1)
    order = energy.argsort(dim=-1, descending=True, stable=True) + prefix
    a, b = order[:, 0 : 2 * count : 2], order[:, 1 : 2 * count : 2]
    between = torch.stack([c[i][:, j] for c, i, j in zip(cosine, a, b, strict=True)])
    owner = torch.arange(n).repeat(len(key), 1).scatter(1, a, b.gather(1, between.argmax(dim=-1)))
    members = torch.nn.functional.one_hot(owner, n).double().transpose(1, 2) * state.size[:, None]
    kept = torch.stack([row.unique() for row in owner])
    x = (members @ state.x) / members.sum(dim=-1, keepdim=True).clamp_min(1e-9)
    moved = _places(kept, n).gather(1, owner).gather(1, state.slot)
    return State(_take(x, kept), _take(members.sum(dim=-1), kept), _take(state.place, kept), moved)


def prune_merge_step(state: State, score: Tensor, pruned: int, target: int, prefix: int) -> State:
    """DiffRate on a whole batch without padding; ``score [B, n]``."""
    n = score.shape[1]
    order = score[:, prefix:].argsort(dim=-1, descending=True, stable=True) + prefix
    stay = order[:, : target - prefix].sort(dim=-1).values
    gone = order[:, target - prefix : pruned - prefix]
    kept = torch.cat([torch.arange(prefix).repeat(len(score), 1), stay], dim=1)
    unit = torch.nn.functional.normalize(state.x, dim=-1)
    cosine, into = (_take(unit, gone) @ _take(unit, stay).transpose(1, 2)).max(dim=-1)
    onehot = torch.nn.functional.one_hot(into, target - prefix).double().transpose(1, 2)
    count = 1 + onehot.sum(dim=-1, keepdim=True)
    x = (_take(state.x, stay) + onehot @ _take(state.x, gone)) / count
    size = (
        _take(state.size, stay) + (onehot @ (cosine * _take(state.size, gone))[..., None])[..., 0]
    )
    moved = _places(kept, n).scatter(1, gone, prefix + into)
    moved = moved.gather(1, state.slot.clamp_min(0))
    return State(
        torch.cat([state.x[:, :prefix], x], dim=1),
        torch.cat([state.size[:, :prefix], size.clamp_min(1.0)], dim=1),
        _take(state.place, kept),
        torch.where(state.slot < 0, -1, moved),
    )


def _places(kept: Tensor, n: int) -> Tensor:
    """Inverse of a selection: [B, n], place of each old token among the kept ones, or -1."""
    ranks = torch.arange(kept.shape[1]).repeat(len(kept), 1)
    return torch.full((len(kept), n), -1).scatter(1, kept, ranks)


def _score(method: Method, x: Tensor, row: Tensor, layer: int, seed: int) -> Tensor:
    if method == "evit":
        return row
    if method == "topk-norm":
        return x.square().sum(dim=-1).sqrt()
    i = torch.arange(x.shape[1])
    hashed = (i * 7919 + seed + 1000003 * layer) * 104729 % 65521
    return hashed.double().expand(len(x), -1)


def _samples(worth: Tensor, target: int, prefix: int) -> Tensor:
    """ATS as a score [B, n]: a token is sampled if quantiles lie between the middles of its neighbours.

    Below a height h lie ``ceil(K h - 1/2)`` of the quantiles ``(2 k - 1) / (2 K)``.
    """
    points = target - prefix
    share = worth[:, prefix:] / worth[:, prefix:].sum(dim=1, keepdim=True)
    middle = share.cumsum(dim=1) - share / 2
    below = (points * middle - 0.5).ceil().clamp(0, points)
    below[:, 0] = 0
    above = torch.cat([below[:, 1:], torch.full_like(below[:, :1], points)], dim=1)
    return torch.cat([worth[:, :prefix], share + (above > below)], dim=1)


def _order_of_picks(x: Tensor, prefix: int) -> Tensor:
    """Max-min as a score [B, n]: all tokens picked one after the other, the first has the largest."""
    unit = torch.nn.functional.normalize(x[:, prefix:], dim=-1)
    likeness = unit @ unit.transpose(1, 2)
    score = x.new_zeros(x.shape[:2])
    for b, rows in enumerate(likeness):
        nearest = (rows - 4.0 * torch.eye(len(rows))).max(dim=1).values
        for turn in range(len(rows)):
            pick = int(nearest.argmin())
            nearest = rows[pick].clone() if turn == 0 else torch.maximum(nearest, rows[pick])
            taken = score[b, prefix:] > 0
            taken[pick] = True
            nearest[taken] = 9.0
            score[b, prefix + pick] = len(rows) - turn
    return score


def _drop(state: State, score: Tensor, row: Tensor, target: int, prefix: int, fuse: bool) -> State:
    order = score[:, prefix:].argsort(dim=-1, descending=True, stable=True) + prefix
    kept = order[:, : target - prefix - int(fuse)].sort(dim=-1).values
    kept = torch.cat([torch.arange(prefix).repeat(len(kept), 1), kept], dim=1)
    x, place = _take(state.x, kept), _take(state.place, kept)
    moved = _places(kept, score.shape[1]).gather(1, state.slot.clamp_min(0))
    if fuse:
        left = order[:, target - prefix - 1 :]
        weight = _take(row, left)[:, None, :]
        x = torch.cat([x, weight @ _take(state.x, left)], dim=1)
        place = torch.cat([place, _take(state.place, left[:, :1])], dim=1)
    slot = torch.where(state.slot < 0, -1, moved)
    return State(x, x.new_ones(x.shape[:2]), place, slot)


def _head(model: Any, state: State, prefix: int) -> Tensor:
    x, size = state.x[:, prefix:], state.size[:, prefix:, None]
    if getattr(model, "attn_pool", None) is not None:
        pooled = _attention_pool(model.attn_pool, x, size[..., 0])
    elif model.global_pool == "avg":
        pooled = (x * size).sum(dim=1) / size.sum(dim=1)
    else:
        pooled = state.x[:, 0]
    logits: Tensor = model.head(model.fc_norm(pooled))
    return logits


def _attention_pool(pool: Any, x: Tensor, size: Tensor) -> Tensor:
    batch, n, _ = x.shape
    q = pool.q(pool.latent).reshape(1, 1, pool.num_heads, -1).transpose(1, 2)
    k, v = (t.reshape(batch, n, pool.num_heads, -1) for t in pool.kv(x).chunk(2, dim=-1))
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    logits = pool.q_norm(q) @ pool.k_norm(k).transpose(-1, -2) / q.shape[-1] ** 0.5
    weights = (logits + size.log()[:, None, None, :]).softmax(dim=-1)
    out = pool.proj((weights @ v).transpose(1, 2).flatten(-2))
    result: Tensor = (out + pool.mlp(pool.norm(out)))[:, 0]
    return result
