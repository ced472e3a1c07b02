"""``ModelSpec``: what a function named as ``module:function`` tells about the model it returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

ATTRIBUTE = "thresher_spec"


@dataclass(frozen=True)
class ModelSpec:
    """How to call a model.  Set it as the attribute ``thresher_spec`` of the returned module.

    Attributes:
        example: ``forward`` argument to a tensor, with a batch of 2 where the batch is dynamic.
        dynamic: input name to ``{axis: name}``; equal names are one size.  Without it the first
            axis of every input is the batch.
        outputs: names of the outputs, in order.
        preprocessing: see ``thresher.models.preprocess``.
        labels: class names in order.
        weights: the file that the function read, for the record.
        licence: of the weights.
    """

    example: Mapping[str, Tensor]
    dynamic: Mapping[str, Mapping[int, str]] | None = None
    outputs: Sequence[str] | None = None
    preprocessing: dict[str, Any] | None = None
    labels: Sequence[str] | None = None
    weights: Path | None = None
    licence: str | None = None

    def axes(self) -> dict[str, dict[int, str]]:
        """The dynamic axes, with the batch as the default."""
        if self.dynamic is None:
            return {name: {0: "batch"} for name in self.example}
        return {name: dict(axes) for name, axes in self.dynamic.items()}
