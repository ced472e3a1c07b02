"""The report of activation sparsity: how sparse each layer is at a given loss, and what that is worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, fx

from thresher.compiler.analysis.axes import hint_of
from thresher.compiler.analysis.cost import node_cost, parameters, total_macs
from thresher.compiler.analysis.ffn import FFN, find
from thresher.compiler.analysis.finder import find_sites
from thresher.compiler.analysis.linears import weights_of
from thresher.compiler.contract import Context
from thresher.compiler.errors import RefusedError
from thresher.compiler.program import Program, Refusal
from thresher.passes.learning import calibration
from thresher.passes.learning.tap import Tap, Taps
from thresher.passes.sparsity import criterion, payoff
from thresher.passes.sparsity.cett import Cett, Curve, Union
from thresher.passes.sparsity.criterion import Judge
from thresher.passes.sparsity.payoff import Part, Verdict

RISES = (1.0, 5.0, 10.0)  # per cent
MANY = (1, 2, 4, 8, 16, 64)  # tokens at once
LEAST_ITEMS = 8
ITEMS, WINDOWS = 128, 16  # of each half, by default; windows of a text hold hundreds of tokens each


@dataclass(frozen=True)
class Layer:
    """One feed-forward network; ``sparsity`` and ``eps`` by rise, ``union`` by M at the smallest rise.

    ``weights`` and ``macs`` are the shares of the model's parameters and multiply-accumulates that
    the down projection holds: what a mask on the hidden neurons can skip.
    """

    layer: int
    path: str
    neurons: int
    outputs: int
    exact_zeros: float
    sparsity: dict[float, float]
    eps: dict[float, float]
    union: dict[int, float]
    weights: float
    macs: float

    def part(self, share: float) -> Part:
        """The down projection, with its share of the work."""
        return Part(share, self.union, self.neurons, self.outputs)


@dataclass(frozen=True)
class Point:
    """One rise: asked for and reached on the calibration data, and seen on held-out data; in per cent."""

    asked: float
    cett: float
    reached: float
    held_out: float
    sparsity: float

    @property
    def met(self) -> bool:
        """Whether it was reached to within the tolerance."""
        return abs(self.reached - self.asked) <= 100 * criterion.TOLERANCE * 1.001


@dataclass(frozen=True)
class Report:
    """Everything that is told about one model on some data."""

    data: str
    items: int
    criterion: str
    meaning: str
    tokens: int
    layers: tuple[Layer, ...]
    points: tuple[Point, ...]
    verdicts: tuple[Verdict, ...]
    refused: tuple[Refusal, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        verdicts = [asdict(v) | {"pays": v.pays} for v in self.verdicts]
        points = [asdict(p) | {"met": p.met} for p in self.points]
        return asdict(self) | {"verdicts": verdicts, "points": points}


def report(program: Program, context: Context, *, items: int | None = None) -> Report:
    """Measure a Program on data: one half calibrates, the other is held out; at most ``items`` of each.

    Raises:
        RefusedError: there is no feed-forward network to measure.
        UsageError: there is too little data, or it gives values that are no numbers.
    """
    found, data = find(program), context.data
    assert data is not None
    if not found.ffns:
        raise RefusedError(f"{program.info.source} cannot be measured: {found.refusals[0].reason}")
    if items is None:
        items = WINDOWS if criterion.is_causal(program) else ITEMS
    ours, held = calibration.halves(data, items, LEAST_ITEMS, context.seed)
    downs = [ffn.down for ffn in found.ffns]
    weights = weights_of(program, downs)
    tables = {f.hidden: Cett(w) for f, w in zip(found.ffns, weights, strict=True)}
    calibration.collect(program, context, ours, tables, "sparsity", {})
    judged = criterion.choose(program, data)
    points, eps = _points(program, context, found.ffns, tables, ours, held)
    union = {
        f.hidden: Union(eps[RISES[0]][i] / _norms(tables[f.hidden]), MANY)
        for i, f in enumerate(found.ffns)
    }
    calibration.collect(program, context, ours, union, "union", {"cett": points[0].cett})
    stored = parameters(program)
    macs = total_macs(program.graph)
    layers = tuple(
        Layer(
            f.layer,
            f.path,
            f.width,
            w.shape[0],
            tables[f.hidden].exact_zeros,
            {p: _at(tables[f.hidden].curve(), eps[p][i]) for p in RISES},
            {p: eps[p][i] for p in RISES},
            union[f.hidden].shares(),
            w.numel() / stored,
            node_cost(f.down).macs / macs,
        )
        for i, (f, w) in enumerate(zip(found.ffns, weights, strict=True))
    )
    tokens, decodes = item_tokens(program), criterion.is_causal(program)
    if decodes and tokens == 1:  # with a cache: an item is a prompt as long as the data has them
        tokens = data.take(ours[:1])[0]["input_ids"].shape[1]
    return Report(
        data.name,
        len(ours),
        judged.kind,
        judged.meaning,
        tokens,
        layers,
        tuple(points),
        tuple(_verdicts(layers, tokens, decodes)),
        tuple(found.refusals),
    )


def taps(program: Program, ffns: Sequence[FFN], eps: Sequence[float]) -> Taps:
    """Taps that zero each hidden value whose contribution is shorter than its layer's eps."""

    def drop(threshold: Tensor) -> Tap:
        return lambda hidden: torch.where(hidden.abs() < threshold, 0.0, hidden)

    weights = weights_of(program, [ffn.down for ffn in ffns])
    made: dict[fx.Node, Tap] = {}
    for ffn, weight, least in zip(ffns, weights, eps, strict=True):
        norms = weight.float().norm(dim=0).clamp(min=1e-30)
        made[ffn.hidden] = drop((least / norms).to(weight.dtype))
    return made


def _points(
    program: Program,
    context: Context,
    ffns: Sequence[FFN],
    tables: Mapping[fx.Node, Cett],
    ours: Sequence[int],
    held: Sequence[int],
) -> tuple[list[Point], dict[float, list[float]]]:
    """For each rise the common CETT at which it is reached, and the layers' eps there."""
    data = context.data
    assert data is not None
    judged = criterion.choose(program, data)
    curves = [tables[ffn.hidden].curve() for ffn in ffns]
    judge, held_out = (Judge(program, data, some, judged, context.batch) for some in (ours, held))

    def thresholds(cett: float) -> list[float]:
        return [curve.threshold(cett) for curve in curves]

    def rise(cett: float) -> float:
        context.progress("searching thresholds", len(known), 0)
        return judge.rise(taps(program, ffns, thresholds(cett)))

    known: dict[float, float] = {}
    points, eps = [], {}
    for p in RISES:
        cett, reached = criterion.largest(rise, p / 100, known=known)
        eps[p] = thresholds(cett)
        seen = held_out.rise(taps(program, ffns, eps[p]))
        shares = [_at(curve, e) for curve, e in zip(curves, eps[p], strict=True)]
        points.append(Point(p, cett, 100 * reached, 100 * seen, sum(shares) / len(shares)))
    return points, eps


def _norms(table: Cett) -> Tensor:
    norms: Tensor = table.norms.clamp(min=1e-30)
    return norms


def _at(curve: Curve, eps: float) -> float:
    """Sparsity of a layer at a threshold, interpolated in the table."""
    import numpy as np

    if eps <= 0:
        return 0.0
    return float(np.interp(np.log(eps), np.log(curve.eps), curve.sparsity))


def item_tokens(program: Program) -> int:
    """Tokens of one item as traced, 1 where no token axis is known."""
    sites = find_sites(program)
    return hint_of(sites.tokens) if sites.token is not None and sites.tokens else 1


def _verdicts(layers: Sequence[Layer], tokens: int, decodes: bool) -> list[Verdict]:
    """A decoder's step is bound by the weights that it reads, a prompt or another whole item by arithmetic."""
    found = []
    for target in (*payoff.KERNELS, payoff.OTHERS):
        if decodes:
            steps = {layer.path: layer.part(layer.weights) for layer in layers}
            found.append(payoff.verdict(target, 1, steps))
        if tokens > 1:
            whole = {layer.path: layer.part(layer.macs) for layer in layers}
            found.append(payoff.verdict(target, tokens, whole))
    return found
