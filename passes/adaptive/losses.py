"""What the phases of the distillation minimise.

Wójcik et al., "Adaptive Computation Modules", AAAI 2025 (arXiv 2312.10193).  Two things differ from
what was published: the term of diversity is subtracted, as the authors' code does and their
formula does not, and labels of gates may be 0 and 1, which a token gets whose first learners help little.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from thresher.passes.adaptive.learners import learners_run

HELPS = 1 / 1.2  # tau: a learner helps a token if it brings its distance below this part


def distillation(prefixes: Tensor, target: Tensor) -> Tensor:
    """Mean square of ``h(z, n) - o`` over tokens and n = 1 ... L, over that of o; ``[L + 1, T, D], [T, D]``."""
    return (prefixes[1:] - target).square().mean() / target.square().mean().clamp(min=1e-12)


def gate_labels(prefixes: Tensor, target: Tensor) -> Tensor:
    """``[T]`` int64: learners that each token is worth.

    With ``d(n) = |h(z, n) - o|``, the least n whose next learner does not help,
    ``d(n + 1) >= tau d(n)``, or else L.
    """
    distance = (prefixes - target).norm(dim=-1)
    useless = distance[1:] >= HELPS * distance[:-1]
    never = torch.ones_like(useless[:1])
    return torch.cat([useless, never]).int().argmax(0)


@dataclass(frozen=True)
class Choice:
    """What a site's gate chose.

    Attributes:
        made: ``[B, N, L + 1]``, one-hot.
        alive: ``[B, N]``: 1, or 0 for padding, which counts nowhere.
        macs: of one learner for one token.
    """

    made: Tensor
    alive: Tensor
    macs: int

    @property
    def run(self) -> Tensor:
        """``[B]``: learners that a sample runs."""
        return (learners_run(self.made) * self.alive).sum(1)

    @property
    def every(self) -> Tensor:
        """``[B]``: learners that it could run."""
        return self.alive.sum(1) * (self.made.shape[-1] - 1)


def budget(choices: Sequence[Choice], wanted: float) -> Tensor:
    """``|mean share of the learners' work - wanted|``.

    The mean over the batch is taken inside, so that samples may differ.
    """
    return (share(choices) - wanted).abs()


def share(choices: Sequence[Choice]) -> Tensor:
    """Multiply-accumulates of the learners that run over those of all learners."""
    run = torch.stack([choice.run.sum() * choice.macs for choice in choices]).sum()
    return run / torch.stack([choice.every.sum() * choice.macs for choice in choices]).sum()


def negative_entropy(choices: Sequence[Choice]) -> Tensor:
    """``sum a log a / log(L + 1)``, a the choices' frequencies in a sample and site; in [-1, 0].

    Least where the tokens of a sample choose differently.
    """
    terms = []
    for choice in choices:
        count = choice.alive.sum(1, keepdim=True).clamp(min=1)
        frequency = ((choice.made * choice.alive[..., None]).sum(1) / count).clamp(min=1e-6)
        most = torch.log(torch.tensor(float(choice.made.shape[-1]), dtype=frequency.dtype))
        terms.append((frequency * frequency.log()).sum(-1).mean() / most)
    return torch.stack(terms).mean()


def diversity(choices: Sequence[Choice]) -> Tensor:
    """``mean over pairs of samples |b_i - b_m|``, b a sample's share of learners that run."""
    run = torch.stack([choice.run for choice in choices]).sum(0)
    shares = run / torch.stack([choice.every for choice in choices]).sum(0).clamp(min=1)
    return (shares[:, None] - shares).abs().mean()
