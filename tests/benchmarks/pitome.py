"""What costs PiToMe its quality on DINOv2-S: its steps, one changed at a time, and how alike what merges is.

All variants leave the same counts at every block, in eager PyTorch.

    python -m tests.benchmarks.pitome [--limit 300] [--budgets 0.8]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

import thresher.kernels.ops  # noqa: F401  (registers the operators)
from tests.benchmarks import zoo
from tests.benchmarks.common import parser
from tests.benchmarks.saliency import PROBE_SIZE, Probe
from thresher.compiler.program import Program
from thresher.compiler.variants import reduced
from thresher.kernels.gather_tokens.reference import gather_tokens
from thresher.runtime import ProgramRunner

LIMIT = 300
Energy = Callable[[Tensor, float], Tensor]
"""Unit keys ``[B, N, d]``, without the class token, and the margin to energies ``[B, N]``."""
Split = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""Tokens ``[B, N]`` by falling energy and r to sources and targets."""
ops: Any = torch.ops.thresher


def feel(cosine: Tensor, margin: float | Tensor) -> Tensor:
    """PiToMe's f."""
    return torch.where(cosine >= margin, cosine, (cosine - margin).exp() - 1)


def published(unit: Tensor, margin: float) -> Tensor:
    return feel(unit @ unit.mT, margin).mean(-1)


def own_scale(unit: Tensor, margin: float) -> Tensor:
    """The margin is the cosine that a tenth of an image's pairs reach."""
    cosine = unit @ unit.mT
    return feel(cosine, cosine.flatten(1).quantile(0.9, dim=1)[:, None, None]).mean(-1)


def level(unit: Tensor, margin: float) -> Tensor:
    """The margin of the first block at every block."""
    return feel(unit @ unit.mT, 0.9).mean(-1)


def continuous(unit: Tensor, margin: float) -> Tensor:
    """ELU of the cosine less the margin, as the published code has it."""
    return torch.nn.functional.elu(unit @ unit.mT - margin).mean(-1)


def mean_cosine(unit: Tensor, margin: float) -> Tensor:
    return (unit @ unit.mT).mean(-1)


def nearest(unit: Tensor, margin: float) -> Tensor:
    """The cosine to the most similar other token: no energy, a bound on what pairs can reach."""
    return (unit @ unit.mT - 9 * torch.eye(unit.shape[1])).amax(-1)


def random(unit: Tensor, margin: float) -> Tensor:
    drawn = torch.rand(unit.shape[1], generator=torch.Generator().manual_seed(int(1e6 * margin)))
    return drawn.expand(unit.shape[0], -1)


def in_turn(order: Tensor, count: int, *, times: float = 1.0) -> tuple[Tensor, Tensor]:
    """The 2 r of highest energy (or so many times more), sources and targets in turn."""
    pool = order[:, : round(2 * count * times)]
    return pool[:, ::2], pool[:, 1::2]


def high_to_all(order: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The r of highest energy are the sources, and all others targets."""
    return order[:, :count], order[:, count:]


@dataclass(frozen=True)
class Step:
    """One variant of PiToMe's step."""

    energy: Energy = published
    split: Split = in_turn
    prop_attn: bool = True


VARIANTS = {
    "as published": Step(),
    "pool of 4 r, its r most similar pairs": Step(split=partial(in_turn, times=2)),
    "pool of all tokens, their r most similar pairs": Step(split=partial(in_turn, times=1e3)),
    "r sources of highest energy, all others targets": Step(split=high_to_all),
    "margin in the image's own scale": Step(own_scale),
    "margin 0.9 at every block": Step(level),
    "ELU of the shifted cosine": Step(continuous),
    "mean cosine for an energy": Step(mean_cosine),
    "nearest cosine for an energy": Step(nearest),
    "random numbers for an energy": Step(random),
    "no sizes in attention": Step(prop_attn=False),
}


def unit_keys(metric: Tensor) -> Tensor:
    """``[B, N, d]`` of ``[B, H, N, d]``."""
    return torch.nn.functional.normalize(metric.mean(1), dim=-1)


def merge(step: Step, margin: float, x: Tensor, size: Tensor, metric: Tensor, keep: int) -> Any:
    """Tokens ``[B, K, C]``, sizes, ``slot`` and ``kept`` behind a step; the class token stays."""
    unit = unit_keys(metric)
    count = x.shape[1] - keep
    order = 1 + step.energy(unit[:, 1:], margin).argsort(dim=1, descending=True, stable=True)
    sources, targets = step.split(order, count)
    best, into = (gather_tokens(unit, sources) @ gather_tokens(unit, targets).mT).max(-1)
    picked = best.argsort(dim=1, descending=True)[:, :count]
    goes, joins = sources.gather(1, picked), targets.gather(1, into.gather(1, picked))
    stays = torch.ones(size.shape, dtype=torch.bool).scatter(1, goes, False)
    kept = stays.nonzero()[:, 1].reshape(-1, keep)
    place = stays.long().cumsum(1) - 1
    slot = place.scatter(1, goes, place.gather(1, joins))
    total = torch.zeros(len(x), keep).scatter_add(1, slot, size)
    wide = slot[..., None].expand_as(x)
    y = torch.zeros(len(x), keep, x.shape[2]).scatter_add(1, wide, x * size[..., None])
    return y / total[..., None], total, slot, kept


class Watched:
    """A reduced Program in torch, with another step if one is given.

    Of each token that went: ``cosines`` to what it joined, and whether its patch was ``blank``: nearly of one colour.
    """

    def __init__(self, program: Program, step: Step | None) -> None:
        self.module = cast(Any, program.module())
        self.cosines: list[float] = []
        self.blank: list[bool] = []
        self.still = torch.empty(0)  # whether the patches of the tokens that are left are blank
        margin = 0.0
        for node in self.module.graph.nodes:
            if node.target is ops.token_energy.default:
                margin = node.args[2]
            if node.target is ops.redundant_merge.default and step is not None:
                x, size, metric, _, keep, _ = node.args
                node.args = (x, size, metric, keep)
                node.target = self._watch(partial(merge, step, margin))
            elif node.target in (ops.redundant_merge.default, ops.bipartite_merge.default):
                node.target = self._watch(node.target)
        self.module.recompile()

    def _watch(self, made: Callable[..., Any]) -> Callable[..., Any]:
        def watched(x: Tensor, size: Tensor, metric: Tensor, *rest: Any) -> Any:
            _, _, slot, kept = found = made(x, size, metric, *rest)
            unit = unit_keys(metric)
            cosine = (unit * gather_tokens(unit, kept.gather(1, slot))).sum(-1)
            gone = torch.ones_like(size, dtype=torch.bool).scatter(1, kept, False)
            self.cosines += cosine[gone].tolist()
            self.blank += self.still[gone].tolist()
            self.still = self.still.gather(1, kept)
            return found

        return watched

    def run(self, feeds: dict[str, Any]) -> dict[str, Any]:
        pixels = torch.from_numpy(feeds["pixel_values"])
        patches = torch.nn.functional.unfold(pixels[:, :1], zoo.PATCH, stride=zoo.PATCH)
        blank = patches.amax(1) - patches.amin(1) < 0.1
        self.still = torch.cat([torch.zeros_like(blank[:, :1]), blank], 1)
        with torch.inference_mode():
            made = self.module(pixel_values=pixels)
        return {name: value.numpy() for name, value in made.items()}


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__, limit=LIMIT)
    options.add_argument("--steps", nargs="*", default=list(VARIANTS), choices=VARIANTS)
    options.set_defaults(budgets=[0.8])
    args = options.parse_args(argv)
    program, probe = zoo.saliency(PROBE_SIZE, head=False), Probe(3 * args.limit, args.limit)
    dense = np.asarray(probe(ProgramRunner(program, threads=args.threads))[0].items, np.float64)
    print(f"dense: {dense.mean():.2%} of {args.limit} images\n")
    print(
        "| work | step | cosine of what merged | blank | accuracy | change |\n|---|---|--:|--:|--:|--:|"
    )
    rows: list[tuple[str, str, Step | None]] = [
        ("`tome`", "tome", None),
        ("`pitome`", "pitome", None),
        *((name, "pitome", VARIANTS[name]) for name in args.steps),
    ]
    for share in args.budgets:
        for name, method, step in rows:
            plain = step is not None and not step.prop_attn
            made = reduced(program, method, share, ["prop_attn=false"] if plain else [])
            assert made.program is not None
            watched = Watched(made.program, step)
            change = np.asarray(probe(watched)[0].items, np.float64) - dense  # type: ignore[arg-type]
            error = change.std() / np.sqrt(len(change))
            print(
                f"| {share:.0%} | {name} | {np.mean(watched.cosines):.3f} | {np.mean(watched.blank):.0%}"
                f" | {(change + dense).mean():.2%}"
                f" | {100 * change.mean():+.2f} ± {100 * error:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
