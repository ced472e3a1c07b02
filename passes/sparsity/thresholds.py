"""The thresholds of a method as a function of how much is to be skipped, measured once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from thresher.compiler.analysis.ffn import FFN
from thresher.compiler.analysis.linears import weights_of
from thresher.compiler.contract import Context
from thresher.compiler.errors import UsageError
from thresher.compiler.program import Program
from thresher.passes.learning import calibration, saved
from thresher.passes.sparsity.cett import Cett, Union
from thresher.passes.sparsity.insert import Skip
from thresher.passes.sparsity.quantiles import Mode, Quantiles
from thresher.passes.sparsity.sites import Input


class Thresholds:
    """What the inputs of linears skip by one method.

    Args:
        program: the dense Program.
        context: with the data.
        method: ``teal``, ``wina``, ``scap``, ``cett`` or ``cats``.
        by_cett: for ``cett``: an amount is a CETT and not a share of the neurons.
        ffns, inputs: what was found in the Program, the inputs that are to be skipped.
        items: of the data, to measure on.
        identity: what checkpoints of the measuring answer to besides the Program.
    """

    def __init__(
        self,
        program: Program,
        context: Context,
        method: str,
        by_cett: bool,
        ffns: Sequence[FFN],
        inputs: Sequence[Input],
        items: Sequence[int],
        identity: Mapping[str, object],
    ) -> None:
        self.program, self.context = program, context
        self.method, self.by_cett = method, by_cett
        self.inputs, self.items, self.identity = inputs, items, identity
        gates = {ffn.layer: ffn.gate for ffn in ffns}
        self.node = {
            entry.name: (gates[entry.layer] if method == "cats" else None) or entry.node
            for entry in inputs
        }
        self.norms = {entry.name: self._norms(entry) for entry in inputs}
        self.shifts = self._shifts() if method == "scap" else {}
        self.curves: dict[str, Cett] = {}
        self.sizes: dict[str, Quantiles] = {}
        if method == "cett":
            downs = weights_of(program, [entry.linears[0] for entry in inputs])
            self.curves = {e.name: Cett(w) for e, w in zip(inputs, downs, strict=True)}
            self._collect(self.curves, "cett")
        else:
            scaled = method == "wina"
            self.sizes = {
                name: Quantiles(norms if scaled else None, self.shifts.get(name, 0.0))
                for name, norms in self.norms.items()
            }
            self._collect(self.sizes, "sizes")

    def skip(self, entry: Input, amount: float) -> Skip:
        """What one input skips at an amount: a share of its entries, or a CETT."""
        name, norms = entry.name, self.norms[entry.name]
        if self.method == "cett":
            curve = self.curves[name].curve()
            eps = curve.threshold(amount) if self.by_cett else curve.sparse(amount)
            threshold = eps / norms
        else:
            size = self.sizes[name].at(amount)
            even = torch.full((entry.width,), size)
            threshold = size / norms if self.method == "wina" else even
        return Skip(threshold.float(), self.shifts.get(name, 0.0))

    def at(self, amounts: Mapping[str, float]) -> dict[str, Tensor]:
        """Thresholds ``[I]``, and shifts, by what and input: ``"threshold.0.up"``."""
        found = {}
        for entry in self.inputs:
            skip = self.skip(entry, amounts[entry.name])
            found[f"threshold.{entry.name}"] = skip.threshold
            if self.shifts:
                found[f"shift.{entry.name}"] = torch.tensor(skip.shift)
        return found

    def unions(
        self, tensors: Mapping[str, Tensor], sizes: tuple[int, ...]
    ) -> dict[str, dict[int, float]]:
        """Measured share of the inputs that any of M tokens needs, by input and M."""
        unions = {
            e.name: Union(tensors[f"threshold.{e.name}"], sizes, self.shifts.get(e.name, 0.0))
            for e in self.inputs
        }
        self._collect(unions, "unions")
        return {name: union.shares() for name, union in unions.items()}

    def _norms(self, entry: Input) -> Tensor:
        """``[I]``: length of each column over all matrices that read the tensor."""
        squares = [w.float().square().sum(0) for w in weights_of(self.program, entry.linears)]
        return torch.stack(squares).sum(0).sqrt().clamp(min=1e-30)

    def _shifts(self) -> dict[str, float]:
        modes = {entry.name: Mode() for entry in self.inputs}
        self._collect(modes, "modes")
        return {name: mode.value() for name, mode in modes.items()}

    def _collect(self, by_site: Mapping[str, calibration.Collector], what: str) -> None:
        nodes = {self.node[name]: collector for name, collector in by_site.items()}
        if len(nodes) < len(by_site):
            raise UsageError("two groups of linears read the same tensor as different sites")
        name = f"{saved.numbered(self.program, 'sparsity')}-{what}"
        calibration.collect(self.program, self.context, self.items, nodes, name, self.identity)
