"""A small network at a site: its tensors, where they begin, and what they are called elsewhere."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from thresher.compiler.analysis.sites import Site

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Place:
    """What the module of one site is made for.

    Attributes:
        layer: number of the block.
        number: of the module, from 0 in the order of the sites.
        protected: prefix tokens, which it does not look at.
        came: tokens behind the prefix that it finds, by the plan.
        kept: those that it leaves.
        patches: those at the first site.
        width: channels of a token.
        heads: of the block's attention.
    """

    layer: int
    number: int
    protected: int
    came: int
    kept: int
    patches: int
    width: int
    heads: int


class Module(ABC):
    """A network; it holds no tensors, so that one object serves all sites.

    Attributes:
        counted: its tensors are made for the number of tokens that stay.
    """

    counted: ClassVar[bool] = False

    @abstractmethod
    def shapes(self, place: Place) -> Shapes:
        """Of its tensors, by names without a dot."""

    def watched(self, site: Site) -> tuple[fx.Node, ...]:
        """The nodes whose values :meth:`initial` sees: the stream ``[B, N, C]`` at the site."""
        return (site.stream,)

    @abstractmethod
    def initial(
        self, place: Place, seen: Sequence[Tensor], generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Untrained float32 tensors, after what the dense model has at the :meth:`watched` nodes of a batch."""

    @abstractmethod
    def published(self, place: Place) -> Mapping[str, str]:
        """Names of the tensors in checkpoints of the published code."""

    def adopted(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of such a checkpoint as :meth:`shapes` has them."""
        return tensors


def normal(generator: torch.Generator, rows: int, columns: int) -> Tensor:
    """``[rows, columns]`` with which rows of unit variance stay so."""
    found: Tensor = torch.randn(rows, columns, generator=generator) * columns**-0.5
    return found


def anchored(features: Tensor, count: int) -> Tensor:
    """``[M, D]``: for each of ``count`` means a direction in which one token stands out from the others.

    A softmax that starts out flat has equal means, which learn nothing of each other for long.  The tokens
    lie at even distances, in all items by turns; logits have a standard deviation of
    :data:`SPREAD` over them.

    Args:
        features: ``[B, n, D]``, what the logits are linear in.
    """
    batch, tokens, _ = features.shape
    at = torch.linspace(0, tokens - 1, count).round().long()
    chosen = features[torch.arange(count) % batch, at]
    rows = features.flatten(0, 1)
    direction = chosen - rows.mean(0)
    deviation = (rows @ direction.T).std(0)
    return direction * (SPREAD / deviation.clamp(min=1e-6))[:, None]


SPREAD = 2.0
