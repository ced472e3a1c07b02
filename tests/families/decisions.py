"""Which tokens go: the definitions of the methods, one sample at a time, in plain loops.

A *sequence* is the list of original token numbers that are left, in current order; the first
``prefix`` of them are never touched.  A merged token goes by the number of its destination.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import networkx as nx
import numpy as np
import torch
from torch import Tensor

EPSILON = 1e-12

Method = Literal[
    "tome",
    "evit",
    "topk-norm",
    "random",
    "diffrate",
    "max-min",
    "pitome",
    "atm",
    "ats",
    "ats-capped",
    "zero-tprune",
]

Score = Callable[[int, Tensor], Tensor]
"""(layer, positions int64 [n] in the current sequence) -> score [n]; larger stays."""


@dataclass(frozen=True)
class Step:
    """What happens to one sample in one layer, in original token numbers.

    ``merged`` maps sources to destinations, ``likeness`` to their cosine where that matters later;
    ``dropped`` runs from the best score to the worst.
    """

    sequence: list[int]
    merged: dict[int, int] = field(default_factory=dict)
    dropped: list[int] = field(default_factory=list)
    likeness: dict[int, float] = field(default_factory=dict)


def hash_score(base_seed: int = 0) -> Score:
    """The score of the ``random`` method: an integer hash of layer and position, mod 65521."""

    def score(layer: int, positions: Tensor) -> Tensor:
        seed = base_seed + 1000003 * layer
        return ((positions * 7919 + seed) * 104729) % 65521

    return score


def merge(
    sequence: Sequence[int],
    metric: Tensor,
    sizes: Sequence[float],
    prefix: int,
    count: int,
    found: dict[int, float] | None = None,
) -> Step:
    """ToMe: the ``count`` sources most similar to a destination are merged into it.

    Args:
        sequence: current sequence, n tokens.
        metric: ``[n, d]`` in sequence order.
        sizes: per token in sequence order; 0 is padding.
        prefix: protected tokens in front.
        count: wanted merges; clipped to half of the unprotected tokens.
        found: to be filled with the cosine of each source to its target.
    """
    n = len(sequence)
    count = min(count, (n - prefix) // 2)
    unit = metric / metric.norm(dim=-1, keepdim=True).clamp_min(EPSILON)
    sources = [i for i in range(prefix, n) if i % 2 == 0]
    targets = [i for i in range(prefix, n) if i % 2 == 1]
    # nothing goes into padding as long as there is anything else
    allowed = [j for j in targets if sizes[j] > 0] or targets
    likeness, choice = {}, {}
    for i in sources:
        values = {j: float(unit[i] @ unit[j]) for j in allowed}
        if values:
            choice[i] = max(values, key=lambda j: (values[j], -j))
            likeness[i] = float("inf") if sizes[i] == 0 else values[choice[i]]
    if found is not None:
        found.update(likeness)
    ranked = sorted(choice, key=lambda i: (-likeness[i], i))
    gone = ranked[:count]
    kept = [i for i in sources if i not in gone] if prefix else ranked[count:]
    order = [*range(prefix), *kept, *targets]
    return Step(
        sequence=[sequence[i] for i in order],
        merged={sequence[i]: sequence[choice[i]] for i in gone},
    )


def merge_by_size(
    sequence: Sequence[int],
    metric: Tensor,
    sizes: Sequence[float],
    prefix: int,
    count: int,
    found: dict[int, float] | None = None,
) -> Step:
    """ATM's last blocks: as :func:`merge`, from the smaller half of the tokens into the larger half."""

    def cosine(i: int, j: int) -> float:
        lengths = float(metric[i].norm() * metric[j].norm())
        return float(metric[i] @ metric[j]) / lengths if lengths else 0.0

    pool = sorted(range(prefix, len(sequence)), key=lambda i: (sizes[i], i))
    small, large = pool[: len(pool) // 2], pool[len(pool) // 2 :]
    allowed = [j for j in large if sizes[j] > 0] or large
    choice = {i: max(allowed, key=lambda j: (cosine(i, j), -large.index(j))) for i in small}
    likeness = {i: float("inf") if sizes[i] == 0 else cosine(i, j) for i, j in choice.items()}
    if found is not None:
        found.update(likeness)
    gone = sorted(small, key=lambda i: (-likeness[i], small.index(i)))[:count]
    return Step(
        sequence=[token for i, token in enumerate(sequence) if i not in gone],
        merged={sequence[i]: sequence[choice[i]] for i in gone},
    )


def keep(
    sequence: Sequence[int], score: Tensor, sizes: Sequence[float], prefix: int, count: int
) -> Step:
    """Top-k: the ``count`` best tokens behind the prefix stay, in their order.

    Args:
        sequence: current sequence, n tokens.
        score: ``[n]`` in sequence order; larger stays, ties go to the earlier token.
        sizes: per token in sequence order; padding (0) goes first.
        prefix: protected tokens in front.
        count: tokens that stay besides the prefix.
    """
    n = len(sequence)
    worth = [float("-inf") if sizes[i] == 0 else float(score[i]) for i in range(n)]
    ranked = sorted(range(prefix, n), key=lambda i: (-worth[i], i))
    stays = [*range(prefix), *sorted(ranked[:count])]
    return Step(
        sequence=[sequence[i] for i in stays],
        dropped=[sequence[i] for i in ranked[count:]],
    )


def diverse(
    sequence: Sequence[int], x: Tensor, sizes: Sequence[float], prefix: int, count: int
) -> Step:
    """Max-min: one token after the other, each as far as can be from the nearest that stays.

    The first is the one whose nearest other token is farthest; padding (size 0) comes last.
    """
    real = [i for i in range(prefix, len(sequence)) if sizes[i] > 0]
    padding = [i for i in range(prefix, len(sequence)) if sizes[i] <= 0]

    def distance(i: int, j: int) -> float:
        lengths = float(x[i].norm() * x[j].norm())
        return 1.0 - (float(x[i] @ x[j]) / lengths if lengths else 0.0)

    apart = {(i, j): distance(i, j) for i in real for j in real if i != j}
    picked: list[int] = []
    while len(picked) < min(count, len(real)):
        left = [i for i in real if i not in picked]
        room = {
            i: min((apart[i, j] for j in picked or real if j != i), default=float("inf"))
            for i in left
        }
        picked.append(max(left, key=lambda i: (room[i], -i)))
    picked = sorted(picked + padding[: count - len(picked)])
    return Step(
        sequence=[sequence[i] for i in [*range(prefix), *picked]],
        dropped=[sequence[i] for i in range(prefix, len(sequence)) if i not in picked],
    )


def sample(
    sequence: Sequence[int],
    worth: Tensor,
    sizes: Sequence[float],
    prefix: int,
    count: int,
    capped: bool,
) -> Step:
    """ATS: one quantile after the other takes the token whose cumulative worth is nearest to it.

    Args:
        sequence: current sequence, n tokens.
        worth: ``[n]`` in sequence order, not negative, scaled here to a sum of one behind the prefix.
        sizes: per token in sequence order; padding (0) is never sampled.
        prefix: protected tokens in front.
        count: quantiles, and tokens that stay besides the prefix.
        capped: only what was sampled stays; else the worthiest others make up the count.
    """
    n = len(sequence)
    real = [i for i in range(prefix, n) if sizes[i] > 0]
    total = sum(float(worth[i]) for i in real)
    cumulative, so_far = {}, 0.0
    for i in real:
        so_far += float(worth[i]) / total
        cumulative[i] = so_far
    taken: set[int] = set()
    for k in range(1, count + 1):
        quantile = (2 * k - 1) / (2 * count)
        taken.add(min(real, key=lambda i: (abs(cumulative[i] - quantile), i)))
    others = sorted((i for i in real if i not in taken), key=lambda i: (-float(worth[i]), i))
    others += [i for i in range(prefix, n) if sizes[i] <= 0]
    stays = sorted(taken | set([] if capped else others[: count - len(taken)]))
    return Step(
        sequence=[sequence[i] for i in [*range(prefix), *stays]],
        dropped=[sequence[i] for i in range(prefix, n) if i not in stays],
    )


def votes_of(
    attention: Tensor,
    nodes: Sequence[int],
    votes: int,
    favoured: int | None,
    variance: tuple[float, float] = (0.01, 0.7),
) -> dict[int, float]:
    """Zero-TPrune's importance of nodes, by networkx: PageRank without damping, after some votes.

    Args:
        attention: ``[H, n, n]``, rows vote for columns.
        nodes: indices that are part of the graph.
        votes: number of votes.
        favoured: the node that starts with sqrt(nodes) times the weight of others, or None.
        variance: of a head's scores of mean one, between which the head counts.
    """
    heads = []
    for weights in attention.tolist():
        graph: nx.DiGraph[int] = nx.DiGraph()
        graph.add_weighted_edges_from((i, j, weights[i][j]) for i in nodes for j in nodes)
        chances = nx.to_numpy_array(nx.stochastic_graph(graph), nodelist=list(nodes))
        start = np.array([len(nodes) ** 0.5 if i == favoured else 1.0 for i in nodes])
        score = start @ np.linalg.matrix_power(chances, votes)
        heads.append(score / score.mean())
    kept = [score for score in heads if variance[0] <= score.var() <= variance[1]] or heads
    joined = np.sqrt(np.mean(np.square(kept), axis=0))
    return dict(zip(nodes, joined.tolist(), strict=True))


def prune_by_votes(
    sequence: Sequence[int],
    attention: Tensor,
    metric: Tensor,
    sizes: Sequence[float],
    prefix: int,
    count: int,
    votes: int,
    similar: int,
    favoured: int | None,
) -> Step:
    """Zero-TPrune: of the less important half the most repetitive go, then what gets the fewest votes.

    Args:
        sequence: current sequence, n tokens.
        attention: ``[H, n, n]`` in sequence order.
        metric: ``[n, d]`` in sequence order.
        sizes: per token in sequence order; padding (0) goes first and does not vote.
        prefix: protected tokens in front.
        count: tokens that stay besides the prefix.
        votes: in the second stage; the first has one.
        similar: tokens that go for being alike, if so many go.
        favoured: the class token's index, or None.
    """
    pool = list(range(prefix, len(sequence)))
    real = [i for i in range(len(sequence)) if sizes[i] > 0]

    def ranked(score: dict[int, float]) -> list[int]:
        return sorted(pool, key=lambda i: (-score.get(i, -1.0), i))

    def nearest(i: int) -> float:
        if i not in real:
            return float("inf")
        lengths = {j: float(metric[i].norm() * metric[j].norm()) for j in upper if j in real}
        return max(float(metric[i] @ metric[j]) / length for j, length in lengths.items())

    half = len(pool) // 2
    order = ranked(votes_of(attention, real, 1, favoured))
    upper, lower = order[: len(pool) - half], sorted(order[len(pool) - half :])
    most = min(similar, len(pool) - count, half)
    gone = set(sorted(lower, key=lambda i: (-nearest(i), -i))[:most])
    left = [i for i in real if i not in gone]
    last = [i for i in ranked(votes_of(attention, left, votes, favoured)) if i not in gone]
    stays = [*range(prefix), *sorted(last[:count])]
    return Step(
        sequence=[sequence[i] for i in stays],
        dropped=[sequence[i] for i in pool if i not in stays],
    )


def merge_redundant(
    sequence: Sequence[int],
    metric: Tensor,
    sizes: Sequence[float],
    prefix: int,
    count: int,
    margin: float,
) -> Step:
    """PiToMe: of the ``2 count`` tokens of highest energy every second joins the most similar other.

    Args:
        sequence: current sequence, n tokens.
        metric: ``[n, d]`` in sequence order.
        sizes: per token in sequence order; padding (0) pairs up first, and is nobody's company.
        prefix: protected tokens in front.
        count: tokens that go.
        margin: cosine from which the energy is linear.
    """

    def cosine(i: int, j: int) -> float:
        lengths = float(metric[i].norm() * metric[j].norm())
        return float(metric[i] @ metric[j]) / lengths if lengths else 0.0

    pool = range(prefix, len(sequence))
    energy = {}
    for i in pool:
        felt = [c if c >= margin else math.expm1(c - margin) for c in
                (cosine(i, j) for j in pool if sizes[j] > 0)]  # fmt: skip
        energy[i] = sum(felt) / len(felt) if sizes[i] > 0 else float("inf")
    ranked = sorted(pool, key=lambda i: (-energy[i], i))[: 2 * count]
    merged = {}
    for i in ranked[::2]:
        targets = [j for j in ranked[1::2] if sizes[j] > 0] or ranked[1::2]
        merged[i] = max(targets, key=lambda j: (cosine(i, j), -targets.index(j)))
    return Step(
        sequence=[sequence[i] for i in range(len(sequence)) if i not in merged],
        merged={sequence[i]: sequence[j] for i, j in merged.items()},
    )


def prune_merge(
    sequence: Sequence[int],
    score: Tensor,
    x: Tensor,
    sizes: Sequence[float],
    prefix: int,
    pruned: int,
    count: int,
) -> Step:
    """DiffRate: what ranks behind ``pruned`` goes, what ranks behind ``count`` joins one that stays.

    Args:
        sequence: current sequence, n tokens.
        score: ``[n]`` in sequence order; larger stays, ties go to the earlier token.
        x: ``[n, C]`` in sequence order.
        sizes: per token in sequence order; 0 is padding, which ranks last.
        prefix: protected tokens in front.
        pruned, count: tokens left after pruning and after merging, prefix included.
    """
    worth = [float("-inf") if size == 0 else float(s) for s, size in zip(score, sizes, strict=True)]
    ranked = sorted(range(prefix, len(sequence)), key=lambda i: (-worth[i], i))
    stays = sorted(ranked[: count - prefix])
    joins, gone = ranked[count - prefix : pruned - prefix], ranked[pruned - prefix :]
    allowed = [j for j in stays if sizes[j] > 0] or stays[:1]
    merged, likeness = {}, {}
    for i in joins:
        cosines = {}
        for j in allowed:
            lengths = float(x[i].norm()) * float(x[j].norm())
            cosines[j] = float(x[i] @ x[j]) / lengths if lengths else 0.0
        best = max(allowed, key=lambda j: (cosines[j], -j))
        merged[sequence[i]], likeness[sequence[i]] = sequence[best], cosines[best]
    return Step(
        sequence=[sequence[i] for i in [*range(prefix), *stays]],
        merged=merged,
        dropped=[sequence[i] for i in gone],
        likeness=likeness,
    )


def positions(n: int) -> Tensor:
    """Places in the current sequence, int64 ``[n]``."""
    return torch.arange(n, dtype=torch.int64)
