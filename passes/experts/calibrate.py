"""The tau that meets a budget, and how much runs at any other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from thresher.compiler.analysis.cost import node_cost
from thresher.compiler.analysis.ffn import FFN
from thresher.passes.adaptive.forward import NetworkForward
from thresher.passes.experts.mixture import Mixture, running
from thresher.passes.learning.batches import Batch, Batches

CLOSE = 0.002  # of the budget
ROUNDS = 8
DIGITS, STEP = 6, 1e-6  # of tau
GRID = torch.linspace(0, 1, 101)


@dataclass(frozen=True)
class Runner:
    """A Program with experts in the places of its networks.

    Attributes:
        work: of each network, the multiply-accumulates of all of its experts for one item.
    """

    forward: NetworkForward
    mixtures: Sequence[Mixture]
    work: Sequence[int]

    def whole(self, shares: Sequence[float]) -> float:
        """Of the experts' work altogether, what is run where networks run these shares of theirs."""
        return whole(shares, self.work)


@dataclass(frozen=True)
class Seen:
    """What happens at one tau.

    Attributes:
        short: of each network ``[T E]``, how far experts fall short of the token's largest, in shares of it.
        shares: of each network's experts, how many run for a token on average.
        share: the same of all work.
    """

    short: Sequence[Tensor]
    shares: tuple[float, ...]
    share: float

    def curves(self) -> list[Tensor]:
        """``[101]`` of each network: its share at tau 0, 0.01, ... 1, if its tokens stayed as they are."""
        ranked = [values.sort().values for values in self.short]
        return [torch.searchsorted(r, GRID, right=True).double() / len(r) for r in ranked]


def work_of(ffns: Sequence[FFN]) -> list[int]:
    """Multiply-accumulates of dense networks for one item."""
    return [sum(node_cost(linear).macs for linear in (*ffn.linears, ffn.down)) for ffn in ffns]


def whole(shares: Sequence[float], work: Sequence[int]) -> float:
    """The mean of shares, each counting as its network's work."""
    return sum(share * each for share, each in zip(shares, work, strict=True)) / sum(work)


def seen_at(tau: float, runner: Runner, batches: Iterable[Batch]) -> Seen:
    """Run the experts of some batches; padding counts nowhere."""
    forward, mixtures = runner.forward, runner.mixtures
    short: list[list[Tensor]] = [[] for _ in mixtures]
    run: list[list[float]] = [[0.0, 0.0] for _ in mixtures]

    def instead(site: int, x: Tensor) -> Tensor:
        told = mixtures[site].told(x)
        chosen, real = running(told, tau), forward.alive(x) > 0
        most = told.amax(-1, keepdim=True)
        short[site].append((((most - told) / most.clamp(min=1e-30))[real]).flatten())
        run[site][0] += float(chosen[real].sum())
        run[site][1] += chosen[real].numel()
        return mixtures[site].mixed(x, chosen)

    with torch.no_grad():
        for inputs, _ in batches:
            forward.replaced(inputs, instead)
    shares = tuple(some / every for some, every in run)
    return Seen([torch.cat(parts) for parts in short], shares, runner.whole(shares))


def calibrated(runner: Runner, batches: Batches, budget: float) -> float:
    """The tau at which a sample of the training data runs so large a share of the work.

    What a router reads changes with the experts before it, so the tau that fits what routers told last is
    tried and mended until the budget is met.
    """
    tau, best = 1.0, float("inf")
    found = tau
    for _ in range(ROUNDS):
        seen = seen_at(tau, runner, batches.sample())
        if abs(seen.share - budget) < best:
            best, found = abs(seen.share - budget), tau
        if best <= CLOSE * budget:
            break
        tau = _fitting(seen, runner.work, budget)
    return found


def _fitting(seen: Seen, work: Sequence[int], budget: float) -> float:
    """The tau at which what was seen would meet the budget."""
    short = np.concatenate([values.numpy() for values in seen.short])
    each = [
        np.full(len(values), macs / len(values))
        for values, macs in zip(seen.short, work, strict=True)
    ]
    order = np.argsort(short, kind="stable")
    done = np.concatenate(each)[order].cumsum()
    place = min(int(np.searchsorted(done, budget * done[-1])), len(order) - 1)
    least = float(short[order[place]])
    return min(1.0, round(least + 0.5 * STEP, DIGITS))
