"""The trained part of one network of experts: a router that tells how much each of them would add."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thresher.passes.adaptive.learners import Learners

ROUTER = ("inner", "inner_bias", "outer", "outer_bias")


class Mixture(nn.Module):
    """``y = bias + sum over e that run of hidden_e(x) w2[e]``, and a router.

    The experts are a dense network's neurons in groups, and are not trained.  The router regresses the
    length of what each would add: ``r(x) = |relu(x inner + b) outer + c|``, in units of the mean length,
    which the rule does not read.

    Args:
        experts: ``w1 [E, D, H], b1 [E, H], w2 [E, H, D], bias [D]``.
        router: ``inner [R, D], inner_bias [R], outer [E, R], outer_bias [E]``.
    """

    inner: Tensor
    inner_bias: Tensor
    outer: Tensor
    outer_bias: Tensor

    def __init__(self, experts: Learners, router: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.experts = experts.requires_grad_(False)
        for name in ROUTER:
            self.register_parameter(name, nn.Parameter(router[name].detach().clone()))

    @classmethod
    def untrained(
        cls, experts: Learners, width: int, mean: Tensor, generator: torch.Generator
    ) -> Mixture:
        """A router with ``width`` neurons that tells the mean lengths ``[E]`` of the experts for every token."""
        inputs = experts.w1.shape[1]
        scale = mean.mean().clamp(min=1e-12)
        return cls(
            experts,
            {
                "inner": torch.randn(width, inputs, generator=generator) * inputs**-0.5,
                "inner_bias": torch.zeros(width),
                "outer": torch.zeros(len(mean), width),
                "outer_bias": (mean / scale).float(),
            },
        )

    @property
    def count(self) -> int:
        """Experts E."""
        return self.experts.count

    @property
    def router_macs(self) -> int:
        """Multiply-accumulates of the router for one token."""
        return self.inner.numel() + self.outer.numel()

    def router(self) -> dict[str, nn.Parameter]:
        """The parameters that are trained, by name."""
        own = dict(self.named_parameters())
        return {name: own[name] for name in ROUTER}

    def lengths(self, x: Tensor) -> Tensor:
        """``[T, D] -> [T, E]``: of what each expert adds to each token."""
        added = self.experts.hidden(x).transpose(0, 1) @ self.experts.w2
        lengths: Tensor = added.norm(dim=-1).T
        return lengths

    def told(self, x: Tensor) -> Tensor:
        """``[..., D] -> [..., E]``: what the router expects of each expert, at least 0."""
        return F.linear(
            F.linear(x, self.inner, self.inner_bias).relu(), self.outer, self.outer_bias
        ).abs()

    def mixed(self, x: Tensor, run: Tensor) -> Tensor:
        """The result where the experts ``run [..., E]`` run: ``[..., D] -> [..., D]``."""
        return self.experts.mixed(x, run.to(x.dtype))


def running(told: Tensor, tau: float | Tensor) -> Tensor:
    """``[..., E]`` bool: the experts within a share ``tau`` of the largest, ``r_e >= (1 - tau) max r``.

    Written as ``max r - r_e <= tau max r``, so that at 0 the largest runs and at 1 all do, whatever the rounding.
    """
    most = told.amax(-1, keepdim=True)
    return most - told <= tau * most
