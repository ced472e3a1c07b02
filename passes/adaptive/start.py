"""What modules are before their training: what is dense, the most important part in the first learners."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, fx

from thresher.compiler import workers
from thresher.compiler.analysis.ffn import FFN
from thresher.compiler.analysis.linears import bias_of, operand, stored_values
from thresher.compiler.program import Program
from thresher.passes.adaptive.forward import NetworkForward
from thresher.passes.adaptive.job import AcmOptions, Job
from thresher.passes.adaptive.learners import Learners
from thresher.passes.adaptive.projections import Projection
from thresher.passes.adaptive.sites import Site
from thresher.passes.learning.batches import Batches

LOOKED_AT = 4  # batches


class Start(Protocol):
    """Makes a module of what a dense part reads and writes on data."""

    def see(self, x: Tensor, y: Tensor) -> None:
        """Take one batch, ``[T, D]`` both."""

    def module(self) -> tuple[Learners, float]:
        """The module, and the part of the results' variance that all its learners keep."""


def begin(job: Job[Site, AcmOptions], batches: Batches) -> tuple[list[Learners], tuple[float, ...]]:
    """A module for every site, and what each keeps of the dense results' variance.

    All workers see batches of their own and make the same modules.
    """
    forward = NetworkForward(job.program, job.sites)
    starts = [_start(job.program, site, job.options.learners) for site in job.sites]
    with torch.no_grad():
        for step in range(LOOKED_AT):
            for index, (x, y) in forward.watched(batches.at(step)[0]).items():
                starts[index].see(x, y)
        made = [start.module() for start in starts]
    return [module for module, _ in made], tuple(kept for _, kept in made)


def _start(program: Program, site: Site, learners: int) -> Start:
    if isinstance(site, Projection):
        stored = stored_values(program)
        weight, *bias = (stored[node] for node in site.weights)
        given = bias[0] if bias else weight.new_zeros(len(weight))
        return Principal(weight, given, site.rank, learners)
    assert isinstance(site, FFN)
    return _Ranked(program, site, learners)


class _Ranked:
    """A feed-forward network, its neurons ordered by ``E|h_i| |w2_i|``: what each adds to the output."""

    def __init__(self, program: Program, ffn: FFN, learners: int) -> None:
        self.network, self.learners = dense(program, ffn), learners
        self.size = torch.zeros(ffn.width, dtype=torch.float64)

    def see(self, x: Tensor, y: Tensor) -> None:
        """Sizes of the hidden values."""
        self.size += self.network.hidden(x).abs().double().flatten(0, -2).mean(0)

    def module(self) -> tuple[Learners, float]:
        """All of it."""
        effect = workers.mean(self.size) * self.network.w2[0].detach().double().norm(dim=1)
        order = effect.argsort(descending=True, stable=True)
        return self.network.cut(order, self.learners), 1.0


class Principal:
    """A linear in the principal axes ``U`` of its results: ``y = m + U U^T (W x + b - m)``, m their mean.

    The first axes make the affine map of that rank with the least mean square error on the data, so each
    prefix of the learners is the best of its rank (Eckart and Young, 1936, for the matrix of results).
    ``weight [O, D]``, ``bias [O]``; learners have equal parts of ``rank``, which they divide.
    """

    def __init__(self, weight: Tensor, bias: Tensor, rank: int, learners: int) -> None:
        self.weight, self.bias = weight, bias
        self.rank, self.learners = rank, learners
        self.mean = weight.new_zeros(len(weight), dtype=torch.float64)
        self.square = weight.new_zeros(len(weight), len(weight), dtype=torch.float64)

    def see(self, x: Tensor, y: Tensor) -> None:
        """Moments of the results."""
        rows = y.double()
        self.mean += rows.mean(0) / LOOKED_AT
        self.square += rows.T @ rows / len(rows) / LOOKED_AT

    def module(self) -> tuple[Learners, float]:
        """As many axes as the rank has."""
        mean = workers.mean(self.mean)
        variance, axes = torch.linalg.eigh(workers.mean(self.square) - mean.outer(mean))
        kept, blocks = axes.flip(1)[:, : self.rank], (self.learners, self.rank // self.learners)
        into = self.weight.double().T @ kept
        weights = {
            "w1": into.unflatten(1, blocks).transpose(0, 1),
            "b1": (kept.T @ (self.bias.double() - mean)).reshape(blocks),
            "w2": kept.T.unflatten(0, blocks),
            "bias": mean,
        }
        like = {name: tensor.to(self.weight.dtype).contiguous() for name, tensor in weights.items()}
        told = variance.clamp(min=0).flip(0)
        return Learners(like, "identity"), float(
            told[: self.rank].sum() / told.sum().clamp(min=1e-30)
        )


def dense(program: Program, ffn: FFN) -> Learners:
    """A feed-forward network as one learner."""
    stored, form = stored_values(program), ffn.form
    assert form is not None

    def rows(linear: fx.Node, start: int, count: int) -> tuple[Tensor, Tensor | None]:
        bias = bias_of(linear)
        chosen = slice(start, start + count)
        return stored[operand(linear, 1)][chosen], None if bias is None else stored[bias][chosen]

    bent, factor = form.bent, form.factor
    return Learners.dense(
        rows(bent.linear, bent.start, ffn.width),
        None if factor is None else rows(factor.linear, factor.start, ffn.width),
        rows(ffn.down, 0, ffn.down.meta["val"].shape[-1]),
        form.activation,
    )
