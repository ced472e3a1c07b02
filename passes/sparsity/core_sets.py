"""Which neurons matter to a prompt: one set for each feed-forward network, from its hidden values on that prompt."""

from __future__ import annotations

import torch
from torch import Tensor

LEAST = 1e-12


def griffin(hidden: Tensor, real: Tensor, share: float) -> Tensor:
    """``[H]``: length over tokens of each neuron's value in tokens of length one.

    ``s_j = sqrt(sum_i (h_ij / |h_i|)^2)``: GRIFFIN, Dong et al., "Prompt-prompted Adaptive Structured
    Pruning for Efficient LLM Generation" (2024).  ``share`` is not used.

    Args:
        hidden: ``[B, N, H]``.
        real: ``[B, N]``, 0 at padding.
        share: see :func:`core_infer`.
    """
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    lengths = wide.square().sum(-1, keepdim=True).sqrt().clamp(min=LEAST)
    unit = wide / lengths * real.to(wide.dtype).unsqueeze(-1)
    return unit.square().sum((0, 1)).sqrt()


def core_infer(hidden: Tensor, real: Tensor, share: float) -> Tensor:
    """``[H]`` int64: in how many tokens a neuron is among the largest, and among equals the first neurons.

    A token's core are the largest ``share`` of those of its ``|h_ij|`` that are not zero (rounded up);
    of the values ``f_j`` returned, ``f_j // H`` is the number of tokens that have neuron j in their core.
    CoreInfer (Wang et al., 2024), which has ReLU in mind, counts positive values; the product
    of a gated network has either sign, so that sizes are counted here.
    """
    width = hidden.shape[-1]
    sizes = hidden.abs()
    count = (sizes > 0).sum(-1, keepdim=True)
    place = (count * share).ceil().long().clamp(min=1) - 1
    bar = sizes.topk(width, dim=-1).values.gather(-1, place)
    core = (sizes >= bar) & (sizes > 0) & (real > 0).unsqueeze(-1)
    tokens = core.long().sum((0, 1))
    return tokens * width + torch.arange(width - 1, -1, -1, device=hidden.device)


STATISTICS = {"griffin": griffin, "coreinfer": core_infer}


def chosen(statistic: Tensor, keep: int) -> Tensor:
    """``[K]`` int64, the neurons of the largest statistic ``[H]``, the largest first."""
    return statistic.topk(keep).indices
