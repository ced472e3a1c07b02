"""What the phases of the distillation minimise.

Wójcik et al., "Adaptive Computation Modules", AAAI 2025 (arXiv 2312.10193).  Two things differ from
what was published: the term of diversity is subtracted, as the authors' code does and their
formula does not, and labels of gates may be 0 and 1, which a token gets whose first learners help little.
"""

from __future__ import annotations

from collections.abc import Sequence

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


def budget(choices: Sequence[Tensor], macs: Sequence[int], wanted: float) -> Tensor:
    """``|mean share of the learners' work - wanted|``; choices ``[B, N, L + 1]`` by site.

    The mean over the batch is taken inside, so that samples may differ.
    """
    return (share(choices, macs) - wanted).abs()


def share(choices: Sequence[Tensor], macs: Sequence[int]) -> Tensor:
    """Multiply-accumulates of the learners that run over those of all learners."""
    run = sum(learners_run(c).sum() * m for c, m in zip(choices, macs, strict=True))
    everything = sum(
        c[..., 0].numel() * (c.shape[-1] - 1) * m for c, m in zip(choices, macs, strict=True)
    )
    assert isinstance(run, Tensor)
    return run / everything


def negative_entropy(choices: Sequence[Tensor]) -> Tensor:
    """``sum a log a / log(L + 1)``, a the choices' frequencies in a sample and site; in [-1, 0].

    Least where the tokens of a sample choose differently.
    """
    terms = []
    for choice in choices:
        frequency = choice.mean(1).clamp(min=1e-6)
        most = torch.log(torch.tensor(float(choice.shape[-1]), dtype=choice.dtype))
        terms.append((frequency * frequency.log()).sum(-1).mean() / most)
    return torch.stack(terms).mean()


def diversity(choices: Sequence[Tensor]) -> Tensor:
    """``mean over pairs of samples |b_i - b_m|``, b a sample's share of learners that run."""
    run = sum(learners_run(choice).sum(1) for choice in choices)
    everything = sum(choice.shape[1] * (choice.shape[2] - 1) for choice in choices)
    assert isinstance(run, Tensor)
    shares = run / everything
    return (shares[:, None] - shares).abs().mean()
