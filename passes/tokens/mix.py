"""The soft step: every token that stays is a weighted mean of all that came."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, fx

import thresher.kernels.ops  # noqa: F401  (registers the operators)
from thresher.compiler.analysis.sites import Sites
from thresher.passes.tokens.budget import Limits, Size
from thresher.passes.tokens.modules.module import Module
from thresher.passes.tokens.sizes import MASKED
from thresher.passes.tokens.step import Step, StepResult
from thresher.passes.tokens.view import SiteView


class Mixer(Module):
    """Weighs the tokens for each one that stays."""

    counted = True

    @abstractmethod
    def emit(self, site: SiteView) -> tuple[fx.Node, fx.Node]:
        """Append logits ``[B, N, M]``, float32 or wider, and ``[B, N, C]`` what is averaged."""


@dataclass(frozen=True)
class Mix(Step):
    """Means of all tokens behind the prefix, weighed by a module; padding weighs nothing.

    A module has one output for each token that stays, so lengths have to be fixed.  Means have no
    size: attention counts each of them once, as published.
    """

    mixer: Mixer

    @property
    def between(self) -> bool:
        return True

    @property
    def combine(self) -> str:
        return "mix"

    def objection(self, sites: Sites) -> str | None:
        if isinstance(sites.tokens, int):
            return None
        return (
            "its module has one output for each token that stays, and the input length is dynamic:"
            " give a fixed --length"
        )

    def limits(self, protected: int) -> Limits:
        return Limits(protected)

    def emit(self, site: SiteView, keep: Size, pruned: int | None) -> StepResult:
        logits, values = self.mixer.emit(site)
        if site.size is not None:
            logits = site.inline(without_padding, logits, site.size)
        node = site.emit(
            torch.ops.thresher.soft_merge.default,
            site.x, values, logits, site.protected,
        )  # fmt: skip
        x, slot, kept = site.rewriter.outputs(node)
        size = None
        if site.size is not None:
            size = site.emit(torch.ops.thresher.gather_tokens.default, site.size, kept)
        return StepResult(node, x, size, slot, kept, 1, 2)


def without_padding(logits: Tensor, size: Tensor) -> Tensor:
    """Logits ``[B, N, M]``, far below all others where the size ``[B, N]`` is 0."""
    return torch.where(size[..., None] > 0, logits, torch.full_like(logits, MASKED))
