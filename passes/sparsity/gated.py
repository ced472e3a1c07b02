"""Gated networks in the form that one operator computes, so that rows of up are skipped as well as of down."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from thresher.passes.sparsity.cut import bias_of
from thresher.passes.sparsity.sites import FFN, Source, operand, source_of

aten = torch.ops.aten
_ACTIVATIONS: dict[object, str] = {
    aten.silu.default: "silu",
    aten.gelu.default: "gelu",
    aten.relu.default: "relu",
}


@dataclass(frozen=True)
class GatedForm:
    """``down(activation(gate(x)) * up(x))``, neither gate nor up with a bias.

    Attributes:
        x: ``[..., I]``, what both read.
        activation: as ``sparse_gated_ffn`` calls it.
        gate: the factor that is activated.
        up: the other one.
    """

    x: fx.Node
    activation: str
    gate: Source
    up: Source

    @property
    def width(self) -> int:
        """Channels of x."""
        return int(self.x.meta["val"].shape[-1])

    @property
    def linears(self) -> tuple[fx.Node, ...]:
        """Each linear, once."""
        return tuple(dict.fromkeys((self.gate.linear, self.up.linear)))


def gated_form(ffn: FFN) -> GatedForm | None:
    """The form of a network, or None if it has another one."""
    if ffn.gate is None or ffn.hidden.target is not aten.mul.Tensor:
        return None
    others = [n for n in ffn.hidden.args if n is not ffn.gate]
    if len(others) != 1 or not isinstance(others[0], fx.Node):
        return None
    activation = _ACTIVATIONS.get(ffn.gate.target)
    if activation is None or ffn.gate.kwargs.get("approximate", "none") != "none":
        return None
    gate, up = source_of(operand(ffn.gate, 0)), source_of(others[0])
    if gate is None or up is None:
        return None
    x = operand(gate.linear, 0)
    biased = any(bias_of(source.linear) is not None for source in (gate, up))
    return None if biased or operand(up.linear, 0) is not x else GatedForm(x, activation, gate, up)
