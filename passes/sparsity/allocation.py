"""How much each input skips: the same share everywhere, or what costs a block least, step by step.

TEAL, "Training-Free Activation Sparsity in Large Language Models" (Liu et al., ICLR 2025), algorithm 1.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from statistics import mean
from typing import Any, TypeAlias

import torch
from torch import Tensor

from thresher.compiler.analysis.ffn import FFN
from thresher.compiler.contract import Context
from thresher.compiler.digests import program_digest
from thresher.compiler.program import Program
from thresher.passes.learning import checkpoint, saved
from thresher.passes.learning.tap import Tapped
from thresher.passes.sparsity.blocks import Block, Seen, Trial, Values, blocks
from thresher.passes.sparsity.insert import Skip
from thresher.passes.sparsity.sites import Input

STEP = 0.05  # of a matrix of mean size
TOKENS = 2048  # on which blocks are tried
FAR = 0.9  # mean share at which a table ends when nobody says how much is asked
SkipAt: TypeAlias = Callable[[Input, float], Skip]


class Even:
    """The same share of every input."""

    def __init__(self, inputs: Sequence[Input]) -> None:
        self.inputs = inputs

    def at(self, amount: float) -> dict[str, float]:
        """Shares by name of the input."""
        return {entry.name: amount for entry in self.inputs}


class Greedy:
    """Shares of the inputs of linears, by block, that skip the same mean share of the weights in each.

    From zero on, a step adds ``STEP / w_j`` to one input j, w_j being the size of the matrices that read it
    over the mean size, so that every step skips the same number of weights; of all inputs of the
    block that one is taken after which the block's output is nearest to the dense one (see
    :meth:`Trial.error`).  All matrices that read a tensor share one mask.  An input that leads to no
    feed-forward network gets the asked share.

    Args:
        program: the dense Program.
        context: with data; checkpoints are kept by block.
        ffns, inputs: what was found in it, the inputs that are to be skipped.
        skip_at: what an input skips at a share.
        until: mean share up to which steps are made, beyond which nothing can be asked.
        items: of the data, of which as many are run as give so many tokens.
        identity: what the steps answer to besides the Program.
        tokens: on which blocks are tried.
    """

    def __init__(
        self,
        program: Program,
        context: Context,
        ffns: Sequence[FFN],
        inputs: Sequence[Input],
        skip_at: SkipAt,
        until: float,
        items: Sequence[int],
        identity: Mapping[str, object],
        tokens: int = TOKENS,
    ) -> None:
        self.program, self.context = program, context
        self.items, self.tokens = items, tokens
        self.until, self.skip_at = until, skip_at
        self.blocks, self.alone = blocks(ffns, inputs)
        name = f"{saved.numbered(program, 'sparsity')}-blocks"
        path = None if context.checkpoints is None else context.checkpoints / f"{name}.pt"
        assert context.data is not None
        told = {
            **identity, "program": program_digest(program), "until": until, "tokens": tokens,
            "data": context.data.name, "items": len(items), "batch": context.batch,
            "seed": context.seed,
        }  # fmt: skip
        known = None if path is None else checkpoint.load(path, told)
        self.paths: list[Tensor] = [] if known is None else list(known["paths"])
        for number in range(len(self.paths), len(self.blocks)):
            context.progress("sharing out", number, len(self.blocks))
            self.paths.append(self._path(self.blocks[number]))
            if path is not None:
                checkpoint.save(path, told, {"paths": self.paths})

    def at(self, amount: float) -> dict[str, float]:
        """Shares by name of the input, their mean by weights being ``amount`` in every block."""
        shares = {entry.name: amount for entry in self.alone}
        for block, path in zip(self.blocks, self.paths, strict=True):
            means = path @ weights(block)
            row = min(max(int(torch.searchsorted(means, amount)), 1), len(path) - 1)
            part = float((amount - means[row - 1]) / (means[row] - means[row - 1]))
            found = path[row - 1].lerp(path[row], min(part, 1.0))
            names = [entry.name for entry in block.inputs]
            shares |= dict(zip(names, found.tolist(), strict=True))
        return shares

    @cached_property
    def _seen(self) -> list[Seen]:
        """What the blocks read in a dense run on items drawn at random, until there are enough tokens."""
        data, tapped = self.context.data, Tapped(self.program)
        assert data is not None
        batch = self.context.batch
        drawn = random.Random(self.context.seed).sample(list(self.items), len(self.items))
        nodes = dict.fromkeys(node for b in self.blocks for node in (*b.outside, b.output))
        seen, tokens = list[Seen](), 0
        for start in range(0, len(drawn), batch):
            values = Values()
            taps = {node: partial(values.__setitem__, node) for node in nodes}
            arrays, _ = data.take(sorted(drawn[start : start + batch]))
            tapped.outputs({key: torch.from_numpy(array) for key, array in arrays.items()}, taps)
            seen.append(Seen(values, tapped.alive))
            tokens += len(tapped.rows(values[self.blocks[0].output]))
            if tokens >= self.tokens:
                break
        return seen

    def told(self, amount: float) -> dict[str, Any]:
        """Shares and the mean error of the blocks, beside that of the same share everywhere."""
        shares = self.at(amount)
        if not self.blocks:
            return {"shares": shares}
        greedy, even = self.errors(shares), self.errors(dict.fromkeys(shares, amount))
        return {"shares": shares, "block error": {"greedy": mean(greedy), "even": mean(even)}}

    def errors(self, shares: Mapping[str, float]) -> list[float]:
        """The error of each block with these shares."""
        return [Trial(block, self._seen, self._skips(block, shares)).now for block in self.blocks]

    def _path(self, block: Block) -> Tensor:
        """``[steps + 1, inputs]`` float64: shares after each step, the first row all zero."""
        share = weights(block)
        steps = STEP / (share * len(block.inputs))
        now = torch.zeros_like(share)
        trial = Trial(block, self._seen, self._skips(block, {}))
        rows = [now]
        while len(rows) == 1 or float(now @ share) < self.until:
            free = [index for index in range(len(now)) if now[index] < 1]
            tried = [(self._next(trial, block, now, steps, index), index) for index in free]
            best = min(tried)[1]
            now = _raised(now, steps, best)
            entry = block.inputs[best]
            trial.set(entry.name, self.skip_at(entry, float(now[best])))
            rows.append(now)
        return torch.stack(rows)

    def _skips(self, block: Block, amounts: Mapping[str, float]) -> dict[str, Skip]:
        return {e.name: self.skip_at(e, amounts.get(e.name, 0.0)) for e in block.inputs}

    def _next(self, trial: Trial, block: Block, now: Tensor, steps: Tensor, index: int) -> float:
        """The error after one more step at one input."""
        entry, raised = block.inputs[index], _raised(now, steps, index)
        return trial.error(entry.name, self.skip_at(entry, float(raised[index])))


def weights(block: Block) -> Tensor:
    """``[inputs]`` float64: the share of the block's weights that each input is multiplied with."""
    sizes = torch.tensor([entry.weights for entry in block.inputs], dtype=torch.float64)
    return sizes / sizes.sum()


def _raised(now: Tensor, steps: Tensor, index: int) -> Tensor:
    raised = now.clone()
    raised[index] = (now[index] + steps[index]).clamp(max=1.0)
    return raised
