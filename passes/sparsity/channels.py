"""Static channel sets: neurons that hardly vary are left out of every feed-forward network.

One set serves all tokens, so linears become smaller dense linears, which are faster on every target.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, fx

from thresher.compiler.analysis.cost import node_cost, total_macs
from thresher.compiler.analysis.ffn import FFN
from thresher.compiler.analysis.linears import weights_of
from thresher.compiler.contract import Calibration, Context, Options, Pass, PassResult
from thresher.compiler.digests import weights_digest
from thresher.compiler.errors import VerdictError
from thresher.compiler.program import Program, Refusal, provenance
from thresher.passes.learning import calibration, saved
from thresher.passes.options import Flops
from thresher.passes.sparsity import cut, toast
from thresher.passes.sparsity.cut import Channels, Cuts, rounded
from thresher.passes.sparsity.moments import Moments
from thresher.passes.sparsity.sites import Found, Input, find

LEAST_ITEMS = 8  # of calibration data
BISECTIONS = 30
DEFAULT_RATIO = 0.2


class ChannelOptions(Options):
    """Which neurons go, and how many: at most one of ``ratio`` and ``flops``."""

    ratio: Annotated[
        float | None, Field(ge=0, lt=1, description="share of the neurons to leave out")
    ] = None
    flops: Flops = None
    score: Annotated[
        Literal["variance", "output", "magnitude", "toast"],
        Field(
            description="what a neuron is worth: its variance, the variance that it brings into the"
            " output, its mean size, or that size by what the class token looks at"
        ),
    ] = "variance"
    spread: Annotated[
        Literal["even", "free"],
        Field(description="the same share in every network, or one ranking over all of them"),
    ] = "even"
    inputs: Annotated[
        float,
        Field(ge=0, lt=1, description="share of the channels that the first linears read to leave"
            " out too; they are gathered at run time"),
    ] = 0.0  # fmt: skip
    fold: Annotated[
        bool, Field(description="fold the mean of what goes into the bias behind it")
    ] = True
    multiple: Annotated[
        int, Field(ge=1, description="round the number that stays up to a multiple; 8 pays on GPUs")
    ] = 1
    items: Annotated[int, Field(ge=LEAST_ITEMS, description="items of the data to measure on")] = (
        512
    )
    calibration: Annotated[
        Path | None, Field(description="what was measured before, instead of data")
    ] = None

    @model_validator(mode="after")
    def _one_budget(self) -> ChannelOptions:
        if self.ratio is not None and self.flops is not None:
            raise ValueError("give one budget only, not ratio and flops")
        return self

    @property
    def facts(self) -> dict[str, str]:
        """What a calibration answers to: ToaSt's importance is measured only if it is asked for."""
        return {"score": self.score} if self.score == "toast" else {}


class ChannelPruning(Pass[ChannelOptions]):
    """Leave out the hidden neurons of feed-forward networks that hardly vary, and fold their means.

    Variance-Based Pruning (2025): neurons of least variance go, and ``b2 += W2[:, i] E[h_i]`` stands
    for them.  ``score: output`` weighs the variance by ``|W2[:, i]|^2``, which is the squared error that
    leaving neuron i out by itself causes.  ``score: magnitude`` is the mean of ``|h_i|`` over all tokens,
    ``score: toast`` that of ToaSt (2026): by the class token's attention, or over a sample of the tokens.
    Training-free; what is measured on the data is saved beside the recipe.
    """

    name = "channels"
    summary = "leave out hidden neurons that hardly vary, their means folded into biases"
    Options = ChannelOptions
    needs_data: ClassVar[bool] = True

    def run(self, program: Program, context: Context) -> PassResult:
        found = find(program)
        ffns = [ffn for ffn in found.ffns if provenance(ffn.down).get("pass") != self.name]
        again = (
            Refusal(f.down.name, f"{f.path} was cut already") for f in found.ffns if f not in ffns
        )
        refused = (*found.refusals, *again)
        if not ffns:
            return PassResult(program, len(found.ffns), 0, refused)
        inputs = _inputs(found, ffns) if self.options.inputs else []
        measured = self._measure(program, context, ffns, inputs)
        cuts = self._cuts(program, ffns, inputs, measured)
        dense = total_macs(program.graph)
        if not cuts.neurons and not cuts.inputs:
            return PassResult(program, len(found.ffns), 0, refused)
        exported = cut.apply(program, cuts, self.name)
        macs = total_macs(exported.graph)
        file = f"{saved.numbered(program, self.name)}.safetensors"
        cut_networks = {f.layer for f in cuts.neurons} | {entry.layer for entry in cuts.inputs}
        return PassResult(
            dataclasses.replace(program, exported=exported),
            len(found.ffns),
            len(cut_networks),
            refused,
            {
                "neurons": {f.path: [f.width, len(kept.keep)] for f, kept in cuts.neurons.items()},
                "dense_macs": dense,
                "macs": macs,
                "ideal": dense / macs,
            },
            self.options.model_copy(update={"calibration": Path(file)}),
            Calibration(file, weights_digest(program), measured, self.options.facts),
        )

    # --- measuring ----------------------------------------------------------------------------

    def _measure(
        self, program: Program, context: Context, ffns: Sequence[FFN], inputs: Sequence[Input]
    ) -> dict[str, Tensor]:
        """Means, variances and magnitudes, and ToaSt's importance if asked, by ``"moment.layer.kind"``, float32."""
        digest = weights_digest(program)
        if self.options.calibration is not None:
            sites = [*(f"{ffn.layer}.down" for ffn in ffns), *(entry.name for entry in inputs)]
            return saved.read(
                self.options.calibration, digest, self.name, sites, self.options.facts
            )
        data = context.data
        assert data is not None
        items = calibration.chosen_items(data, self.options.items, LEAST_ITEMS)
        moments = {f"{ffn.layer}.down": (ffn.hidden, Moments(ffn.width)) for ffn in ffns}
        moments |= {entry.name: (entry.node, Moments(entry.width)) for entry in inputs}
        identity: dict[str, object] = {"nodes": len(moments)}
        name = saved.numbered(program, self.name)
        calibration.collect(program, context, items, dict(moments.values()), name, identity)
        measured = {
            f"{kind}.{site}": tensor
            for site, (_, sums) in moments.items()
            for kind, tensor in sums.tensors().items()
        }
        if self.options.score == "toast":
            layers = {f.hidden: f.layer for f in ffns} | {
                entry.node: entry.layer for entry in inputs
            }
            view = toast.importance(program, layers, context.seed)
            identity |= {"seed": context.seed}
            seen = {site: (node, Moments(len(sums.mean))) for site, (node, sums) in moments.items()}
            calibration.collect(
                program, context, items, dict(seen.values()), f"{name}-toast", identity, view
            )
            measured |= {
                f"toast.{site}": sums.tensors()["mean"] for site, (_, sums) in seen.items()
            }
        return measured

    # --- choosing -----------------------------------------------------------------------------

    def _cuts(
        self,
        program: Program,
        ffns: Sequence[FFN],
        inputs: Sequence[Input],
        measured: Mapping[str, Tensor],
    ) -> Cuts:
        scores = [self._score(program, f.down, measured, f"{f.layer}.down") for f in ffns]
        ranked = [score.argsort(descending=True, stable=True) for score in scores]
        counts = self._counts(program, ffns, scores)
        neurons = {
            ffn: self._channels(order[:count], measured, f"{ffn.layer}.down")
            for ffn, order, count in zip(ffns, ranked, counts, strict=True)
            if count < ffn.width
        }
        read = {}
        for entry in inputs:
            score = self._score(program, entry.linears[0], measured, entry.name)
            count = self._rounded((1 - self.options.inputs) * entry.width, entry.width)
            order = score.argsort(descending=True, stable=True)[:count]
            read[entry] = self._channels(order, measured, entry.name)
        return Cuts(neurons, read)

    def _channels(self, keep: Tensor, measured: Mapping[str, Tensor], name: str) -> Channels:
        mean = measured[f"mean.{name}"] if self.options.fold else None
        return Channels(keep.sort().values, mean)

    def _score(
        self, program: Program, linear: fx.Node, measured: Mapping[str, Tensor], name: str
    ) -> Tensor:
        """``[C]`` float64: what each channel is worth."""
        kind = "variance" if self.options.score == "output" else self.options.score
        score = measured[f"{kind}.{name}"].double()
        if self.options.score == "output":
            score = score * weights_of(program, [linear])[0].double().square().sum(0)
        return score

    def _counts(self, program: Program, ffns: Sequence[FFN], scores: Sequence[Tensor]) -> list[int]:
        """Neurons that stay in each network.

        Raises:
            VerdictError: the budget of multiply-accumulates cannot be met.
        """
        if self.options.flops is None:
            ratio = DEFAULT_RATIO if self.options.ratio is None else self.options.ratio
            return self._at(ratio, ffns, scores)
        dense, costs = total_macs(program.graph), [_cost_of_a_neuron(f) for f in ffns]

        def share(counts: Sequence[int]) -> float:
            gone = sum(c * (f.width - n) for c, f, n in zip(costs, ffns, counts, strict=True))
            return 1 - gone / dense

        least = share(self._at(1.0, ffns, scores))
        if least > self.options.flops:
            raise VerdictError(
                f"the budget flops={self.options.flops:g} cannot be met: the feed-forward networks hold"
                f" so little of this model that {least:.3f} is left without them; ask for less, or"
                " reduce tokens too"
            )
        good, bad = 1.0, 0.0
        for _ in range(BISECTIONS):
            middle = (good + bad) / 2
            if share(self._at(middle, ffns, scores)) <= self.options.flops:
                good = middle
            else:
                bad = middle
        return self._at(good, ffns, scores)

    def _at(self, ratio: float, ffns: Sequence[FFN], scores: Sequence[Tensor]) -> list[int]:
        if self.options.spread == "even":
            return [self._rounded((1 - ratio) * f.width, f.width) for f in ffns]
        every = torch.cat(list(scores)).sort().values
        gone = int(ratio * len(every))
        bar = every[gone] if gone < len(every) else torch.tensor(torch.inf)
        return [
            self._rounded(int((score >= bar).sum()), f.width)
            for f, score in zip(ffns, scores, strict=True)
        ]

    def _rounded(self, wanted: float, width: int) -> int:
        return rounded(wanted, width, self.options.multiple)


def _inputs(found: Found, ffns: Sequence[FFN]) -> list[Input]:
    """What the first linears of networks read, where nobody else of the block reads it."""
    ups = {linear for ffn in ffns for linear in ffn.linears}
    return [entry for entry in found.inputs if entry.kind == "up" and ups.issuperset(entry.linears)]


def _cost_of_a_neuron(ffn: FFN) -> int:
    """MACs of one item that go with one neuron."""
    linears = (*ffn.linears, ffn.down)
    return sum(node_cost(linear).macs for linear in linears) // ffn.width
