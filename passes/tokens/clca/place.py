"""Where cache and head stand in a Program, before they are trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from thresher.compiler.program import Program, Refusal
from thresher.passes.tokens.clca.anatomy import Anatomy, read
from thresher.passes.tokens.clca.head import Shapes, folded_shapes
from thresher.passes.tokens.clca.insert import Insertion
from thresher.passes.tokens.clca.recount import Unfit, dense

TOKEN = "token"


@dataclass(frozen=True)
class Place:
    """A reduced Program, the one that it was reduced from, and the one with cache and head.

    Attributes:
        shapes: of the tensors that the head holds, and of the token.
        stored: names of their placeholders.
        stacked: name of the node that holds the class tokens ``[B, C, S]``.
        appended: behind which block how many tokens are appended; -1 is before the first.
    """

    name: str
    program: Program
    anatomy: Anatomy
    dense: Program
    inserted: Program
    shapes: Shapes
    stored: Mapping[str, str]
    stacked: str
    appended: Mapping[int, int]

    @property
    def width(self) -> int:
        """C, of the stream."""
        return int(self.anatomy.last.meta["val"].shape[-1])

    def filled(self, weights: Mapping[str, Tensor]) -> Program:
        """The Program with cache and head, and these tensors in them."""
        return Insertion(self.program, self.anatomy, self.name, weights).inserted()

    @property
    def facts(self) -> dict[str, str]:
        """What a trained head answers to."""
        return {
            "blocks": " ".join(map(str, sorted(self.anatomy.reduced))),
            "cache": str(TOKEN in self.stored),
        }


def find_place(program: Program, name: str, *, cache: bool) -> Place | Refusal:
    """The place, or the node that stands against it and why."""
    anatomy = read(program)
    if isinstance(anatomy, Refusal):
        return anatomy
    width = int(anatomy.last.meta["val"].shape[-1])
    classes = int(program.output_nodes()[0].meta["val"].shape[-1])
    shapes: Shapes = folded_shapes(width, len(anatomy.read), classes)
    shapes = {**shapes, **({TOKEN: (width,)} if cache else {})}
    zeros = {key: torch.zeros(shape) for key, shape in shapes.items()}
    insertion = Insertion(program, anatomy, name, zeros)
    try:
        inserted, whole = insertion.inserted(), dense(program, anatomy, name)
    except Unfit as error:
        return error.refusal
    stored = {key: node.name for key, node in insertion.stored.items()}
    return Place(
        name,
        program,
        anatomy,
        whole,
        inserted,
        shapes,
        stored,
        insertion.stacked,
        insertion.appended,
    )
