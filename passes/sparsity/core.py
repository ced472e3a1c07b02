"""Core neurons: a prompt picks one set of neurons for each network, and what follows it runs on these alone."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Annotated, Literal

from pydantic import Field

from thresher.compiler.analysis.cost import total_macs
from thresher.compiler.analysis.ffn import FFN, find
from thresher.compiler.contract import Context, Options, Pass, PassResult
from thresher.compiler.program import Program, Refusal
from thresher.passes.sparsity.core_graphs import prompt_graph, step_graph, widths
from thresher.passes.sparsity.core_sets import STATISTICS
from thresher.passes.sparsity.criterion import is_causal


class CoreOptions(Options):
    """Which of the two graphs, how many neurons, and what they are picked by."""

    graph: Annotated[
        Literal["prompt", "steps"],
        Field(description="the graph that reads a prompt and picks, or the one that makes steps"),
    ] = "steps"
    keep: Annotated[float, Field(gt=0, le=1, description="share of the neurons that stay")] = 0.5
    statistic: Annotated[
        Literal["griffin", "coreinfer"],
        Field(
            description="a neuron's length over the tokens of the prompt, each scaled to length one,"
            " or in how many of them it is among the largest"
        ),
    ] = "griffin"
    token_share: Annotated[
        float, Field(gt=0, le=1, description="coreinfer: share of a token's neurons in its core")
    ] = 0.4
    multiple: Annotated[
        int, Field(ge=1, description="round the number that stays up to a multiple")
    ] = 8


class CoreNeurons(Pass[CoreOptions]):
    """Decoding with the neurons that the prompt needed, as smaller dense products.

    GRIFFIN (Dong et al., 2024) and CoreInfer (Wang et al., 2024).  The model becomes two graphs, made by
    one run of this pass each with otherwise the same options: ``prompt`` is the dense model that
    also gives the weights of the chosen neurons, ``steps`` takes them as inputs.  The runtime hands
    them on once for each prompt; a batch has one set.  Training-free, without data.
    """

    name = "core-neurons"
    summary = (
        "decode with the neurons that the prompt needed, in smaller products: one of two graphs"
    )
    Options = CoreOptions

    @property
    def keeps_interface(self) -> bool:
        return False

    def run(self, program: Program, context: Context) -> PassResult:
        found = find(program)
        refused = [*found.refusals]
        ffns = list[FFN]()
        for ffn in found.ffns:
            if why := self._objection(program, ffn):
                refused.append(Refusal(ffn.down.name, f"{ffn.path} {why}"))
            else:
                ffns.append(ffn)
        matched = len(ffns) + len(refused)
        if not ffns:
            return PassResult(program, matched, 0, tuple(refused))
        kept = widths(ffns, self.options.keep, self.options.multiple)
        names = tuple(spec.name for spec in program.outputs)
        inputs = tuple(name for name, _ in program.named_inputs())
        if self.options.graph == "prompt":
            statistic = STATISTICS[self.options.statistic]
            made = prompt_graph(
                program, kept, partial(statistic, share=self.options.token_share), self.name
            )
            names = (*names, *made.names)
        else:
            made = step_graph(program, kept, self.name)
            inputs = (*inputs, *made.names)
        result = dataclasses.replace(
            program, exported=made.exported, output_names=names, input_names=inputs
        )
        dense, macs = total_macs(program.graph), total_macs(result.graph)
        neurons = {ffn.path: [ffn.width, keep] for ffn, keep in kept.items()}
        details = {"neurons": neurons, "dense_macs": dense, "macs": macs, "ideal": dense / macs}
        return PassResult(result, matched, len(ffns), tuple(refused), details)

    def _objection(self, program: Program, ffn: FFN) -> str | None:
        """Why a network stays dense, or None."""
        if not is_causal(program) or not any(
            o.name.startswith("present.") for o in program.outputs
        ):
            return "is in no causal language model with a cache, so that no prompt comes before it"
        if ffn.hidden.meta["val"].dim() != 3:
            return "has hidden values that are not [batch, tokens, neurons]"
        if len(ffn.linears) != len(ffn.sources):
            return "makes gate and values with one linear, which is not cut here"
        return None
