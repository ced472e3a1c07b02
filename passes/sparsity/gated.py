"""Gated networks in the form that one operator computes, so that rows of up are skipped as well as of down."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from thresher.compiler.analysis.ffn import FFN, Source
from thresher.compiler.analysis.linears import bias_of
from thresher.kernels.sparse_gated_ffn.reference import ACTIVATIONS


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
    form, x = ffn.form, ffn.x
    if form is None or form.factor is None or x is None or form.activation not in ACTIVATIONS:
        return None
    decides = ffn.hidden.target is torch.ops.aten.mul.Tensor and ffn.gate in ffn.hidden.args
    biased = any(bias_of(linear) is not None for linear in ffn.linears)
    return GatedForm(x, form.activation, form.bent, form.factor) if decides and not biased else None
