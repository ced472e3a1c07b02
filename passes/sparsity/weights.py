"""Weights of the linears of a graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx

from thresher.compiler.program import Program
from thresher.passes.sparsity.sites import operand, stored_weights


def weights_of(program: Program, linears: Sequence[fx.Node]) -> list[Tensor]:
    """``[O, I]`` weights of linears, detached."""
    names = stored_weights(program)
    stored: dict[str, Any] = {**program.exported.constants, **program.exported.state_dict}
    return [stored[names[operand(linear, 1)]].detach() for linear in linears]
