"""The operators once more, in plain Python loops over float64: what the tests compare with.

Written from the papers' descriptions, without looking at the torch definitions.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class Merged(NamedTuple):
    """Results of :func:`bipartite_merge`, and the smallest gap between similarities it decided by."""

    y: Array
    out_size: Array
    slot: Array
    kept: Array
    margin: float


def unit(vector: list[float]) -> list[float]:
    length = math.sqrt(sum(v * v for v in vector))
    return [v / length if length else 0.0 for v in vector]


def gap(values: list[float], chosen: float) -> float:
    """Distance to the nearest value that is neither equal nor a rounding away from being equal."""
    return min((abs(v - chosen) for v in values if v != chosen), default=math.inf)


def bipartite_merge(
    x: Array, size: Array, metric: Array, keep: int, protected: int, by_index: bool
) -> Merged:
    batch, tokens, width = x.shape
    heads, depth = metric.shape[1], metric.shape[3]
    y, out_size = np.zeros((batch, keep, width)), np.zeros((batch, keep))
    slot = np.full((batch, tokens), -7)
    kept = np.full((batch, keep), -7)
    margin = math.inf
    for b in range(batch):
        unit_of = {
            n: unit([sum(float(metric[b, h, n, c]) for h in range(heads)) for c in range(depth)])
            for n in range(protected, tokens)
        }
        sources = [n for n in range(protected, tokens) if n % 2 == 0]
        targets = [n for n in range(protected, tokens) if n % 2 == 1]
        best: dict[int, tuple[float, int]] = {}
        for s in sources:
            likeness = []
            for t in targets:
                cosine = sum(p * q for p, q in zip(unit_of[s], unit_of[t], strict=True))
                likeness.append(cosine if size[b, t] != 0 else -1e4)
            if likeness:
                best[s] = (max(likeness), targets[likeness.index(max(likeness))])
                margin = min(margin, gap(likeness, max(likeness)))
            else:
                best[s] = (0.0, -1)
        ranks = {s: 1e4 if size[b, s] == 0 else best[s][0] for s in sources}
        if targets:
            margin = min([margin, *(gap(list(ranks.values()), rank) for rank in ranks.values())])
        order = sorted(sources, key=lambda s: (-ranks[s], s))
        merging, staying = order[: tokens - keep], order[tokens - keep :]
        if by_index:
            staying = sorted(staying)
        places = [*range(protected), *staying, *targets]
        for j, n in enumerate(places):
            group = [n, *(s for s in merging if best[s][1] == n)]
            total = sum(float(size[b, m]) for m in group)
            kept[b, j], out_size[b, j] = n, total
            for m in group:
                slot[b, m] = j
            for c in range(width):
                y[b, j, c] = (
                    sum(float(size[b, m]) / total * float(x[b, m, c]) for m in group)
                    if total and len(group) > 1
                    else float(x[b, n, c])
                )
    return Merged(y, out_size, slot, kept, margin)


def class_attention(q: Array, k: Array, bias: Array | None, scale: float, row: int) -> Array:
    batch, heads, queries, depth = q.shape
    tokens = k.shape[2]
    full = None if bias is None else np.broadcast_to(bias, (batch, heads, queries, tokens))
    score = np.zeros((batch, tokens))
    for b in range(batch):
        for h in range(heads):
            logits = []
            for n in range(tokens):
                dot = sum(float(q[b, h, row, c]) * float(k[b, h, n, c]) for c in range(depth))
                logit = scale * dot
                if full is not None and full.dtype == bool:
                    logit = logit if full[b, h, row, n] else -math.inf
                elif full is not None:
                    logit += float(full[b, h, row, n])
                logits.append(logit)
            top = max(logits)
            weights = [math.exp(v - top) for v in logits]
            for n in range(tokens):
                score[b, n] += weights[n] / sum(weights) / heads
    return score


def keep_tokens(
    x: Array, score: Array, keep: int, protected: int, fuse: bool
) -> tuple[Array, Array, Array]:
    batch, tokens, width = x.shape
    y = np.zeros((batch, keep, width))
    slot, kept = np.full((batch, tokens), -1), np.full((batch, keep), -7)
    for b in range(batch):
        ranked = sorted(range(protected, tokens), key=lambda n: (-float(score[b, n]), n))
        count = keep - protected - int(fuse)
        places = [*range(protected), *sorted(ranked[:count])]
        dropped = ranked[count:]
        for j, n in enumerate(places):
            kept[b, j], slot[b, n], y[b, j] = n, j, x[b, n]
        if fuse:
            kept[b, keep - 1] = dropped[0]
            for c in range(width):
                y[b, keep - 1, c] = sum(float(score[b, n]) * float(x[b, n, c]) for n in dropped)
    return y, slot, kept


def gather_tokens(x: Array, index: Array) -> Array:
    return np.stack([np.stack([x[b, i] for i in row]) for b, row in enumerate(index)])


def restore_tokens(x: Array, slot: Array, aside: Array) -> Array:
    y = np.array(aside)
    for b, row in enumerate(slot):
        for n, j in enumerate(row):
            if j >= 0:
                y[b, n] = x[b, j]
    return y


def prune_merge(
    x: Array, size: Array, score: Array, pruned: int, keep: int, protected: int
) -> Merged:
    batch, tokens, width = x.shape
    y, out_size = np.zeros((batch, keep, width)), np.zeros((batch, keep))
    slot, kept = np.full((batch, tokens), -1), np.full((batch, keep), -7)
    margin = math.inf
    for b in range(batch):
        worth = [-math.inf if size[b, n] == 0 else float(score[b, n]) for n in range(tokens)]
        ranked = sorted(range(protected, tokens), key=lambda n: (-worth[n], n))
        staying = sorted(ranked[: keep - protected])
        joining: dict[int, list[tuple[int, float]]] = {n: [] for n in staying}
        for n in ranked[keep - protected : pruned - protected]:
            own = unit([float(v) for v in x[b, n]])
            cosines = []
            for m in staying:
                other = unit([float(v) for v in x[b, m]])
                cosine = sum(p * q for p, q in zip(own, other, strict=True))
                cosines.append(cosine if size[b, m] != 0 else -1e4)
            nearest = staying[cosines.index(max(cosines))]
            joining[nearest].append((n, max(cosines)))
            margin = min(margin, gap(cosines, max(cosines)))
        for j, n in enumerate([*range(protected), *staying]):
            kept[b, j], slot[b, n] = n, j
            group, total = [n], float(size[b, n])
            for m, cosine in joining.get(n, []):
                slot[b, m] = j
                if size[b, m] != 0:
                    group.append(m)
                    total += cosine * float(size[b, m])
            if size[b, n] != 0 and total < 1:
                total = 1.0
            out_size[b, j] = total
            for c in range(width):
                y[b, j, c] = sum(float(x[b, m, c]) / len(group) for m in group)
    return Merged(y, out_size, slot, kept, margin)


class Selected(NamedTuple):
    """Results of :func:`select_diverse`, and the smallest gap between similarities it decided by."""

    y: Array
    slot: Array
    kept: Array
    margin: float


def select_diverse(x: Array, size: Array, keep: int, protected: int) -> Selected:
    """Distances to the picked tokens are found anew in every round."""
    batch, tokens, width = x.shape
    y = np.zeros((batch, keep, width))
    slot, kept = np.full((batch, tokens), -1), np.full((batch, keep), -7)
    margin = math.inf
    for b in range(batch):
        units = [unit([float(v) for v in row]) for row in x[b]]
        real = [n for n in range(protected, tokens) if size[b, n] != 0]
        picked: list[int] = []
        while len(picked) < min(keep - protected, len(real)):
            gaps = {}
            for n in real:
                if n in picked:
                    continue
                others = picked or [m for m in real if m != n]
                cosines = [
                    sum(p * q for p, q in zip(units[n], units[m], strict=True)) for m in others
                ]
                gaps[n] = min((1 - cosine for cosine in cosines), default=math.inf)
            best = max(gaps, key=lambda n: (gaps[n], -n))
            if math.isfinite(gaps[best]):
                margin = min(margin, gap(list(gaps.values()), gaps[best]))
            picked.append(best)
        padding = [n for n in range(protected, tokens) if size[b, n] == 0]
        picked += padding[: keep - protected - len(picked)]
        for j, n in enumerate([*range(protected), *sorted(picked)]):
            kept[b, j], slot[b, n], y[b, j] = n, j, x[b, n]
    return Selected(y, slot, kept, margin)


def redundant_merge(
    x: Array, size: Array, metric: Array, score: Array, keep: int, protected: int
) -> Merged:
    batch, tokens, width = x.shape
    heads, depth = metric.shape[1], metric.shape[3]
    y, out_size = np.zeros((batch, keep, width)), np.zeros((batch, keep))
    slot, kept = np.full((batch, tokens), -7), np.full((batch, keep), -7)
    margin = math.inf
    for b in range(batch):
        worth = {n: 1e4 if size[b, n] == 0 else score[b, n] for n in range(protected, tokens)}
        ranked = sorted(worth, key=lambda n: (-worth[n], n))[: 2 * (tokens - keep)]
        keys = {
            n: unit([sum(float(metric[b, h, n, c]) for h in range(heads)) for c in range(depth)])
            for n in ranked
        }
        targets = ranked[1::2]
        groups: dict[int, list[int]] = {n: [n] for n in range(tokens)}
        for source in ranked[::2]:
            cosines = []
            for target in targets:
                cosine = sum(p * q for p, q in zip(keys[source], keys[target], strict=True))
                cosines.append(cosine if size[b, target] != 0 else -1e4)
            groups[targets[cosines.index(max(cosines))]].append(source)
            margin = min(margin, gap(cosines, max(cosines)))
            del groups[source]
        _write_groups(b, groups, x, size, (y, out_size, slot, kept))
    return Merged(y, out_size, slot, kept, margin)


def _write_groups(
    b: int,
    groups: dict[int, list[int]],
    x: Array,
    size: Array,
    results: tuple[Array, Array, Array, Array],
) -> None:
    """Size-weighted means of the groups of one item, by the token that each goes by, in index order."""
    y, out_size, slot, kept = results
    for j, n in enumerate(sorted(groups)):
        total = sum(float(size[b, m]) for m in groups[n])
        kept[b, j], out_size[b, j] = n, total
        for m in groups[n]:
            slot[b, m] = j
        for c in range(x.shape[2]):
            y[b, j, c] = (
                sum(float(size[b, m]) / total * float(x[b, m, c]) for m in groups[n])
                if total
                else float(x[b, n, c])
            )


def split_merge(
    x: Array, size: Array, metric: Array, score: Array, keep: int, protected: int
) -> Merged:
    batch, tokens, width = x.shape
    heads, depth = metric.shape[1], metric.shape[3]
    y, out_size = np.zeros((batch, keep, width)), np.zeros((batch, keep))
    slot, kept = np.full((batch, tokens), -7), np.full((batch, keep), -7)
    margin = math.inf
    for b in range(batch):
        worth = {n: -1e30 if size[b, n] == 0 else score[b, n] for n in range(protected, tokens)}
        ranked = sorted(worth, key=lambda n: (worth[n], n))
        half = len(ranked) // 2
        keys = {
            n: unit([sum(float(metric[b, h, n, c]) for h in range(heads)) for c in range(depth)])
            for n in ranked
        }
        likeness, choice = {}, {}
        for source in ranked[:half]:
            cosines = []
            for target in ranked[half:]:
                cosine = sum(p * q for p, q in zip(keys[source], keys[target], strict=True))
                cosines.append(cosine if size[b, target] != 0 else -1e4)
            choice[source] = ranked[half:][cosines.index(max(cosines))]
            likeness[source] = 1e4 if size[b, source] == 0 else max(cosines)
            margin = min(margin, gap(cosines, max(cosines)))
        best = sorted(choice, key=lambda n: (-likeness[n], ranked.index(n)))
        for source in best:
            margin = min(margin, gap(list(likeness.values()), likeness[source]))
        groups: dict[int, list[int]] = {n: [n] for n in range(tokens)}
        for source in best[: tokens - keep]:
            groups[choice[source]].append(source)
            del groups[source]
        _write_groups(b, groups, x, size, (y, out_size, slot, kept))
    return Merged(y, out_size, slot, kept, margin)


class Energies(NamedTuple):
    """Result of :func:`token_energy`, and how near a cosine comes to a margin where f jumps."""

    score: Array
    margin: float


def token_energy(metric: Array, size: Array, margin: float, protected: int) -> Energies:
    batch, heads, tokens, depth = metric.shape
    score, nearest = np.zeros((batch, tokens)), math.inf
    for b in range(batch):
        keys = [
            unit([sum(float(metric[b, h, n, c]) for h in range(heads)) for c in range(depth)])
            for n in range(tokens)
        ]
        others = [n for n in range(protected, tokens) if size[b, n] > 0]
        for n in range(tokens):
            felt = []
            for other in others:
                cosine = sum(p * q for p, q in zip(keys[n], keys[other], strict=True))
                felt.append(cosine if cosine >= margin else math.expm1(cosine - margin))
                if margin:  # at 0 both sides meet
                    nearest = min(nearest, abs(cosine - margin))
            score[b, n] = sum(felt) / len(felt) if felt else 0.0
    return Energies(score, nearest)


def soft_merge(x: Array, values: Array, logits: Array, protected: int) -> Selected:
    batch, tokens, width = x.shape
    means = logits.shape[2]
    y = np.zeros((batch, protected + means, width))
    slot, kept = np.full((batch, tokens), -7), np.full((batch, protected + means), -7)
    margin = math.inf
    for b in range(batch):
        for n in range(protected):
            y[b, n], slot[b, n], kept[b, n] = x[b, n], n, n
        weights: dict[int, list[float]] = {n: [] for n in range(protected, tokens)}
        for j in range(means):
            column = {n: float(logits[b, n, j]) for n in range(protected, tokens)}
            powers = {n: math.exp(v - max(column.values())) for n, v in column.items()}
            total = sum(powers.values())
            for n, power in powers.items():
                weights[n].append(power / total)
            heaviest = max(powers, key=lambda n: (powers[n], -n))
            margin = min(
                margin, gap([p / total for p in powers.values()], powers[heaviest] / total)
            )
            kept[b, protected + j] = heaviest
            for c in range(width):
                y[b, protected + j, c] = sum(
                    power / total * float(values[b, n, c]) for n, power in powers.items()
                )
        for n, shares in weights.items():
            slot[b, n] = protected + shares.index(max(shares))
            margin = min(margin, gap(shares, max(shares)))
    return Selected(y, slot, kept, margin)


def sparse_linear(x: Array, weight: Array, threshold: Array, most_tokens: int) -> Array:
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    y = np.zeros((len(rows), weight.shape[1]))
    for b, row in enumerate(rows):
        for i, value in enumerate(row):
            if len(rows) > most_tokens or not abs(value) <= threshold[i]:
                y[b] += float(value) * weight[i].astype(float)
    return y.reshape(*x.shape[:-1], -1)


def activated(x: float, activation: str) -> float:
    if activation == "silu":
        return x / (1 + math.exp(-x))
    return x * (1 + math.erf(x / math.sqrt(2))) / 2 if activation == "gelu" else max(x, 0.0)


def sparse_gated_ffn(
    x: Array, gate: Array, up: Array, down: Array, threshold: Array, activation: str,
    most_tokens: int,
) -> Array:  # fmt: skip
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).astype(float)
    y = np.zeros((len(rows), down.shape[1]))
    for b, row in enumerate(rows):
        for n, limit in enumerate(threshold):
            h = activated(float(row @ gate[:, n].astype(float)), activation)
            if len(rows) > most_tokens or not abs(h) <= limit:
                y[b] += h * float(row @ up[n].astype(float)) * down[n].astype(float)
    return y.reshape(*x.shape[:-1], -1)
