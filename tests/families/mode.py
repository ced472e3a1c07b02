"""The function mode behind the oracle: changes attention, stream writes and means as they run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from .decisions import (
    Method,
    Score,
    Step,
    diverse,
    keep,
    merge,
    merge_by_size,
    merge_redundant,
    positions,
    prune_by_votes,
    prune_merge,
    sample,
)

SIMILAR = 3  # tokens that zero-tprune drops in its second stage
_ADDS = {"add", "add_", "__add__", "__radd__", "__iadd__"}
_NORMS = {"layer_norm"}


@dataclass(frozen=True)
class LayerMap:
    """Where the tokens are after one layer.

    Attributes:
        sequence: per sample, original token numbers in current order (a merged token goes by its
            destination, a fused one by the slot that hosts it).
        slot: int64 ``[B, N]``, place of each original token in that sequence, -1 when dropped;
            where padding went has no meaning.
        size: float64 ``[B, K]``, real tokens that each one stands for (DiffRate: scaled by cosines), 0
            behind a sequence that is shorter than others.
    """

    sequence: list[list[int]]
    slot: Tensor
    size: Tensor


@dataclass
class Attended:
    """What the attention of a layer leaves for the decision behind it."""

    metric: Tensor  # [B, N, d]
    class_row: Tensor  # [B, N]
    value: Tensor  # [B, N], length of the values of all heads together
    received: Tensor  # [B, N], mean over the queries that are tokens of their own
    weights: Tensor  # [B, H, N, N]


@dataclass(eq=False)
class Reduction(TorchFunctionMode):
    """The function mode; state is per original token, [B, N].

    ``mass`` is what a token counts as a key and in a mean.  The members of a merged group keep
    theirs; with DiffRate, whose sizes are no numbers of tokens, the destination has all of it.
    """

    method: Method
    counts: list[int] | None
    prefix: int
    class_token: int | None
    post_norm: bool
    score: Score
    proportional: bool
    fuse: bool
    mlerp: bool
    padding_mask: Tensor | None
    reveal: int | None
    maps: list[LayerMap] = field(default_factory=list)
    writes: int = 0
    attended: Attended | None = None
    norm_is_next: bool = False
    sequence: list[list[int]] = field(default_factory=list)
    real: Tensor = field(default_factory=lambda: torch.empty(0))

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is functional.scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name == "mean" and self._is_pool(*args, **kwargs):
            return self._mean(args[0])
        if name == "softmax" and self._is_pool(*args, **kwargs):
            return _softmax(args[0].transpose(1, 2) + self.mass.log()[:, None]).transpose(1, 2)
        result = func(*args, **kwargs)
        if name in _ADDS and self._is_stream(*args[:2]):
            self.norm_is_next = self.post_norm
            return result if self.post_norm else self._write(result, name)
        if name in _NORMS and self.norm_is_next and self._is_stream(args[0], args[0]):
            self.norm_is_next = False
            return self._write(result, name)
        return result

    # --- recognising the model's operations

    def _is_stream(self, a: Any, b: Any = None) -> bool:
        if not self.sequence or not isinstance(a, Tensor) or not isinstance(b, Tensor):
            return False
        return a.ndim == 3 and a.shape == b.shape and a.shape[:2] == self.real.shape

    def _is_pool(self, x: Any, dim: Any = None, **_: Any) -> bool:
        if not self.sequence or not isinstance(x, Tensor) or x.ndim != 3:
            return False
        tokens = self.real.shape[1]
        return dim in (1, (1,), [1]) and x.shape[1] in (tokens, tokens - self.prefix)

    # --- what they do instead

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if is_causal or dropout_p or enable_gqa:
            raise NotImplementedError("causal, dropped-out or grouped attention")
        own = q.shape[-2] == k.shape[-2]
        if not self.sequence:
            self._begin(k.shape[0], k.shape[-2])
        bias = _bias(attn_mask, q, k)
        if own:
            q, k = _rows(q, self.acting), _rows(k, self.acting)
            bias = _rows(_rows(bias, self.acting).transpose(-1, -2), self.acting).transpose(-1, -2)
        visible = self._keys().log()[:, None, None, -k.shape[-2] :]
        logits = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale) + bias
        weights = _softmax(logits + visible)
        if own:
            mean = weights.mean(dim=1)
            queries = (self.mass > 0).to(mean)
            received = torch.einsum("bq,bqk->bk", queries / queries.sum(1, keepdim=True), mean)
            value = v.transpose(1, 2).flatten(2).norm(dim=-1)
            row = mean[:, self.class_token or 0]
            self.attended = Attended(k.mean(dim=1), row, value, received, weights)
        return weights @ v

    def _keys(self) -> Tensor:
        """What each token counts as a key, float64 [B, N]."""
        if self.proportional:
            return self.mass
        keys = self.alive & self.real
        for b, owners in enumerate(self.acting.tolist()):
            seen: set[int] = set()
            for n, owner in enumerate(owners):
                keys[b, n] &= owner not in seen
                if keys[b, n]:
                    seen.add(owner)
        return keys.double()

    def _mean(self, x: Tensor) -> Tensor:
        weight = self.mass[:, -x.shape[1] :, None].to(x)
        return (x * weight).sum(dim=1) / weight.sum(dim=1)

    def _write(self, result: Tensor, name: str) -> Tensor:
        """A new value of the residual stream."""
        self.writes += 1
        x = result.clone()
        if self.attended is not None:
            self._reduce(x, self.attended)
            self.attended = None
        x = torch.where(self.alive[..., None], x, self.frozen.to(x))
        if self.writes == self.reveal:
            x = torch.where(self.host[..., None], self.frozen.to(x), x)
        return result.copy_(x) if name in ("add_", "__iadd__") else x

    def _begin(self, batch: int, tokens: int) -> None:
        self.sequence = [list(range(tokens)) for _ in range(batch)]
        self.acting = torch.arange(tokens).repeat(batch, 1)  # whose position a token acts from
        self.alive = torch.ones(batch, tokens, dtype=torch.bool)
        self.host = torch.zeros(batch, tokens, dtype=torch.bool)
        self.frozen = torch.zeros(batch, tokens, 1, dtype=torch.float64)
        mask = self.padding_mask
        self.real = torch.ones_like(self.alive) if mask is None else mask.clone()
        self.mass = self.real.double()

    # --- one layer's decision

    def _reduce(self, x: Tensor, attended: Attended) -> None:
        """Decide and overwrite ``x [B, N, C]`` in place."""
        layer = len(self.maps)
        target = None if self.counts is None else self.counts[layer]
        places = self.counts[layer - 1] if self.counts and layer else self.real.shape[1]
        self.frozen = self.frozen.expand(*x.shape).clone()
        for b in range(len(self.sequence)):
            if target is not None and target < places:  # some of them may be empty
                step = self._decide(layer, b, target, x[b], attended)
                self._apply(b, step, x[b], attended.class_row[b])
                self.sequence[b] = step.sequence
        self.maps.append(self._map())

    def _decide(self, layer: int, b: int, target: int, x: Tensor, attended: Attended) -> Step:
        sequence, prefix = self.sequence[b], self.prefix
        sizes = [self._size(b, token) for token in sequence]
        if self.method == "tome":
            merges = len(sequence) - target
            return merge(sequence, attended.metric[b, sequence], sizes, prefix, merges)
        if self.method == "atm":
            merges = len(sequence) - target
            return merge_by_size(sequence, attended.metric[b, sequence], sizes, prefix, merges)
        if self.method == "diffrate":
            ranking = attended.received if self.class_token is None else attended.class_row
            n = len(sequence)
            pruned = n if self.class_token is None else n - (n - target) // 2
            return prune_merge(
                sequence, ranking[b, sequence], x[sequence], sizes, prefix, pruned, target
            )
        if self.method == "pitome":
            margin = 0.9 - 0.9 * layer / len(self.counts or ())
            goes = len(sequence) - target
            return merge_redundant(
                sequence, attended.metric[b, sequence], sizes, prefix, goes, margin
            )
        if self.method in ("ats", "ats-capped"):
            significance = attended.class_row[b, sequence] * attended.value[b, sequence]
            capped = self.method == "ats-capped"
            return sample(sequence, significance, sizes, prefix, target - prefix, capped)
        if self.method == "zero-tprune":
            layers = len(self.counts or ())
            quarter = layers // 4
            votes = 30 if layer < quarter else 5 if layer < layers - quarter else 1
            graph = attended.weights[b][:, sequence][:, :, sequence]
            return prune_by_votes(
                sequence, graph, attended.metric[b, sequence], sizes, prefix, target - prefix,
                votes, SIMILAR, self.class_token,
            )  # fmt: skip
        if self.method == "max-min":
            return diverse(sequence, x[sequence], sizes, prefix, target - prefix)
        if self.method == "evit":
            worth = attended.class_row[b, sequence]
        elif self.method == "topk-norm":
            worth = x[sequence].norm(dim=-1)
        else:
            worth = self.score(layer, positions(len(sequence)))
        return keep(sequence, worth, sizes, prefix, target - prefix - int(self.fuse))

    def _apply(self, b: int, step: Step, x: Tensor, weight: Tensor) -> None:
        plain = self._plain_means(b, step, x) if self.method == "diffrate" else {}
        for source, destination in step.merged.items():
            self.acting[b, self.acting[b] == source] = destination
        for destination in set(step.merged.values()):
            group = self.acting[b] == destination
            members = group & self.real[b]
            mean = x[members].mean(dim=0) if members.any() else x[destination].clone()
            if self.mlerp and members.any() and float(mean.norm()):
                mean = mean / mean.norm() * x[members].norm(dim=-1).max()
            x[group] = plain.get(destination, mean)
        fused = sum((weight[n] * x[n] for n in step.dropped), torch.zeros_like(x[0]))
        for dropped in step.dropped:
            for n in (self.acting[b] == dropped).nonzero().flatten().tolist():
                self.alive[b, n], self.mass[b, n] = False, 0.0
                if not self.host[b, n]:
                    self.frozen[b, n] = x[n]
        if self.fuse and step.dropped:
            host = step.dropped[0]
            self.alive[b, host] = self.host[b, host] = True
            self.mass[b, host] = 1.0
            x[host] = fused
            step.sequence.append(host)

    def _plain_means(self, b: int, step: Step, x: Tensor) -> dict[int, Tensor]:
        """DiffRate's new values by destination; the sizes move into the destinations' mass."""
        means = {}
        for destination in set(step.merged.values()):
            sources = [s for s, d in step.merged.items() if d == destination and self.mass[b, s]]
            means[destination] = x[[destination, *sources]].mean(dim=0)
            total = float(self.mass[b, destination])
            total += sum(step.likeness[s] * float(self.mass[b, s]) for s in sources)
            self.mass[b, destination] = max(total, 1.0) if self.real[b, destination] else 0.0
        for source in step.merged:
            self.mass[b, source] = 0.0
        return means

    def _size(self, b: int, token: int) -> float:
        return float(self.mass[b, self.acting[b] == token].sum())

    def _map(self) -> LayerMap:
        slot = torch.full(self.acting.shape, -1, dtype=torch.int64)
        for b, sequence in enumerate(self.sequence):
            place = {token: i for i, token in enumerate(sequence)}
            for n, owner in enumerate(self.acting[b].tolist()):
                if self.alive[b, n] and not self.host[b, n]:
                    slot[b, n] = place[owner]
        size = torch.zeros(len(slot), max(map(len, self.sequence)), dtype=torch.float64)
        for b, tokens in enumerate(self.sequence):
            size[b, : len(tokens)] = torch.tensor(
                [self._size(b, t) for t in tokens], dtype=torch.float64
            )
        return LayerMap([list(s) for s in self.sequence], slot, size)


def _bias(mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor:
    """An attention mask as additive float64 bias [B, 1 or H, Nq, N]."""
    if mask is None:
        return q.new_zeros(q.shape[0], 1, q.shape[-2], k.shape[-2])
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=q.dtype).masked_fill(~mask, float("-inf"))
    mask = mask.reshape((1,) * (4 - mask.ndim) + tuple(mask.shape))
    return mask.expand(q.shape[0], -1, q.shape[-2], k.shape[-2])


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x [B, H, N, ...] picked per sample by index [B, N]."""
    return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def _softmax(logits: Tensor) -> Tensor:
    """Softmax over keys; a row without any key gives zeros, as in torch's attention."""
    return torch.nan_to_num(logits.softmax(dim=-1), nan=0.0)
