"""Experts cut out of dense networks, and routers trained to tell how much each expert adds.

Szatkowski et al., "Exploiting Activation Sparsity with Dense to Dynamic-k Mixture-of-Experts Conversion",
NeurIPS 2024: neurons are grouped by balanced k-means on the normalised rows of the first linear, and a router
regresses the lengths of the experts' outputs.  Its first step, training for sparse activations, is
another pass (``relufy``).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from thresher.compiler import workers
from thresher.compiler.analysis.ffn import FFN
from thresher.passes.adaptive.forward import NetworkForward
from thresher.passes.adaptive.job import Job
from thresher.passes.adaptive.learners import Learners
from thresher.passes.adaptive.start import dense
from thresher.passes.experts.clusters import balanced
from thresher.passes.experts.job import ExpertsOptions
from thresher.passes.experts.mixture import Mixture
from thresher.passes.learning.batches import Batches
from thresher.passes.learning.saved import numbered
from thresher.passes.learning.training import Keeping, Phase, Step, Training

RATE = 5e-3
TOKENS = 2048  # of a batch that are looked at, in each network


def orders(job: Job[FFN, ExpertsOptions]) -> list[Tensor]:
    """``[H]`` of each network: its neurons, expert by expert."""
    found = []
    for ffn in job.sites:
        rows = dense(job.program, ffn).w1[0].detach().double().T.numpy()
        groups = balanced(rows, job.options.experts, job.context.seed)
        found.append(torch.from_numpy(groups.flatten()))
    return found


def cut(job: Job[FFN, ExpertsOptions], chosen: Sequence[Tensor]) -> list[Learners]:
    """The networks as experts."""
    return [
        dense(job.program, ffn).cut(order, job.options.experts)
        for ffn, order in zip(job.sites, chosen, strict=True)
    ]


class RouterTraining:
    """Routers that learn, all at once, from what the dense model's networks read.

    Raises:
        UsageError: there is too little data, or a checkpoint of another run is in the way.
    """

    def __init__(self, job: Job[FFN, ExpertsOptions], experts: Sequence[Learners]) -> None:
        assert job.context.data is not None
        self.job = job
        self.batches = Batches(job.context.data, job.context.batch, job.context.seed, labels=False)
        self.forward = NetworkForward(job.program, job.sites)
        self.mixtures = self._untrained(experts)
        self.unit = [mean.mean() for mean in self._means]
        phase = Phase("training routers: error {:.4f}", job.options.steps, (RATE,), self._error)
        parameters = {
            f"{name}.{place}": parameter
            for place, mixture in enumerate(self.mixtures)
            for name, parameter in mixture.router().items()
        }
        keeping = Keeping(job.context, numbered(job.program, "experts"), job.fingerprint)
        self.training = Training([parameters], [phase], keeping, job.options.patience)

    @property
    def history(self) -> list[float]:
        """The loss of each step."""
        return [row[0] for rows in self.training.history for row in rows]

    def run(self) -> None:
        """All steps, or as many as bring something."""
        self.training.run()

    def explained(self) -> tuple[float, ...]:
        """By network, the share of the variance of the experts' lengths on held-out data that the router tells.

        Variance is about each expert's own mean.
        """
        rows: list[list[tuple[Tensor, Tensor]]] = [[] for _ in self.mixtures]
        with torch.no_grad():
            for number, (inputs, _) in enumerate(self.batches.held_out()):
                for index, x, _ in self.forward.tokens(
                    inputs, TOKENS, self._generator(-1 - number)
                ):
                    mixture = self.mixtures[index]
                    wanted = mixture.lengths(x).double() / self.unit[index]
                    rows[index].append((mixture.told(x).double(), wanted))
        found = []
        for pairs in rows:
            told, wanted = (torch.cat(parts) for parts in zip(*pairs, strict=True))
            spread = (wanted - wanted.mean(0)).square().sum().clamp(min=1e-30)
            found.append(float(1 - (told - wanted).square().sum() / spread))
        return tuple(found)

    def _untrained(self, experts: Sequence[Learners]) -> list[Mixture]:
        """Routers that begin with the experts' mean lengths on the first batch of all workers."""
        seen = self.forward.tokens(self.batches.at(0)[0], TOKENS, self._generator(0))
        made, self._means = list[Mixture](), list[Tensor]()
        with torch.no_grad():
            for index, x, _ in seen:
                generator = torch.Generator().manual_seed(self.job.context.seed * 1009 + index)
                added = experts[index].hidden(x).transpose(0, 1) @ experts[index].w2
                mean = workers.mean(added.norm(dim=-1).double().mean(1))
                self._means.append(mean)
                width = self.job.options.router
                made.append(Mixture.untrained(experts[index], width, mean, generator))
        return made

    def _error(self, step: int) -> Step:
        terms = []
        seen = self.forward.tokens(self.batches.at(step)[0], TOKENS, self._generator(step))
        for index, x, _ in seen:
            mixture = self.mixtures[index]
            with torch.no_grad():
                wanted = mixture.lengths(x) / self.unit[index].to(x.dtype)
            terms.append((mixture.told(x) - wanted).square().mean())
        total = torch.stack(terms).mean()
        return total, [float(total.detach())]

    def _generator(self, step: int) -> torch.Generator:
        """Of one step's random numbers, so that a resumed training draws the same."""
        number = self.job.context.seed * 1_000_003 + step + 1_000
        return workers.generator(number)
