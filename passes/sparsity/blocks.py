"""Blocks of a transformer around the inputs of linears, and how far skipping moves what a block writes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx

from thresher.compiler.analysis.ffn import FFN, sum_behind
from thresher.compiler.analysis.linears import operand
from thresher.passes.learning.tap import real_rows
from thresher.passes.sparsity.insert import Skip
from thresher.passes.sparsity.sites import Input

aten = torch.ops.aten
Values: TypeAlias = dict[fx.Node, Any]


@dataclass(frozen=True)
class Block:
    """Inputs of linears up to a feed-forward network, and what lies between them and its end.

    Attributes:
        inputs: in program order.
        output: ``[..., C]``, the sum by which the network returns to the residual stream.
        nodes: what depends on one of the linears and leads to ``output``, in program order.
    """

    inputs: tuple[Input, ...]
    output: fx.Node
    nodes: tuple[fx.Node, ...]

    @property
    def outside(self) -> tuple[fx.Node, ...]:
        """What the nodes read that is none of them: weights, the stream, masks."""
        inside = set(self.nodes)
        read = (n for node in self.nodes for n in node.all_input_nodes)
        return tuple(dict.fromkeys(n for n in read if n not in inside))

    def behind(self, entry: Input) -> tuple[fx.Node, ...]:
        """The nodes that depend on what the linears of one input read."""
        return _dependent(self.nodes, entry.linears)


def blocks(ffns: Sequence[FFN], inputs: Sequence[Input]) -> tuple[list[Block], list[Input]]:
    """Blocks in program order, and the inputs that lead to no feed-forward network.

    An input belongs to the first network that its linears lead to: to attention the network behind it.
    """
    found, left = list[Block](), list(inputs)
    for ffn in ffns:
        output = sum_behind(ffn.down)
        assert output is not None  # every network that is found has it
        leading = _leading_to(output)
        own = tuple(entry for entry in left if entry.linears[0] in leading)
        if own:
            left = [entry for entry in left if entry not in own]
            order = [node for node in output.graph.nodes if node in leading]
            linears = [linear for entry in own for linear in entry.linears]
            found.append(Block(own, output, _dependent(order, linears)))
    return found, left


def _leading_to(node: fx.Node) -> set[fx.Node]:
    seen, stack = {node}, [node]
    while stack:
        for near in stack.pop().all_input_nodes:
            if near not in seen:
                seen.add(near)
                stack.append(near)
    return seen


def _dependent(order: Iterable[fx.Node], starts: Sequence[fx.Node]) -> tuple[fx.Node, ...]:
    found = set(starts)
    for node in order:
        if not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return tuple(node for node in order if node in found)


@dataclass(frozen=True)
class Seen:
    """One batch of a dense run: values of the nodes that blocks read, and which tokens are no padding."""

    values: Values
    alive: Tensor | None


class Trial:
    """A block on batches of dense values while inputs of its linears are skipped, one after another.

    What each input skips is kept (``set``) or only tried (``error``); either way just the nodes behind
    it are computed, from the values that were kept.

    Args:
        block: the block.
        batches: values of ``block.outside`` and ``block.output`` of the dense run.
        skips: by name of the input, to begin with.
    """

    def __init__(self, block: Block, batches: Sequence[Seen], skips: Mapping[str, Skip]) -> None:
        self.block, self.batches, self.skips = block, batches, dict(skips)
        self._behind = {entry.name: block.behind(entry) for entry in block.inputs}
        self._of = {linear: entry for entry in block.inputs for linear in entry.linears}
        self._want = [real_rows(seen.values[block.output], seen.alive) for seen in batches]
        self._kept: list[Values] = [{} for _ in batches]
        for number in range(len(batches)):
            self._kept[number] = self._run(number, block.nodes, self.skips)

    @property
    def now(self) -> float:
        """The error with what is kept."""
        return self._error(self._kept)

    def error(self, name: str, skip: Skip) -> float:
        """Mean over tokens of ``|y' - y| / |y|`` with another skip at one input, y the dense output.

        Relative to each token, as in CETT: the first tokens of a text are often a thousand times
        as long as the others and would decide alone.
        """
        return self._error(
            self._run(number, self._behind[name], self.skips | {name: skip})
            for number in range(len(self.batches))
        )

    def set(self, name: str, skip: Skip) -> None:
        """Keep another skip at one input."""
        self.skips[name] = skip
        for number in range(len(self.batches)):
            self._kept[number] |= self._run(number, self._behind[name], self.skips)

    def _run(self, number: int, nodes: Sequence[fx.Node], skips: Mapping[str, Skip]) -> Values:
        """Values of some nodes of one batch, computed anew."""
        values = {**self.batches[number].values, **self._kept[number]}
        masked, made = dict[str, Tensor](), Values()
        with torch.inference_mode():
            for node in nodes:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
                entry = self._of.get(node)
                if entry is not None:
                    if entry.name not in masked:
                        x = values[operand(node, 0)]
                        masked[entry.name] = skipped(x, skips[entry.name])
                    args = (masked[entry.name], *args[1:])
                values[node] = made[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return made

    def _error(self, runs: Iterable[Values]) -> float:
        total, count = 0.0, 0
        with torch.inference_mode():
            for seen, want, values in zip(self.batches, self._want, runs, strict=True):
                rows = real_rows(values[self.block.output], seen.alive)
                size = want.norm(dim=1).clamp(min=1e-30)
                total += float(((rows - want).norm(dim=1) / size).double().sum())
                count += len(rows)
        return total / max(count, 1)


def skipped(x: Tensor, skip: Skip) -> Tensor:
    """``[..., I]`` with the shift in place of what lies within the threshold of it."""
    away = x - skip.shift if skip.shift else x
    kept = away * (away.abs() > skip.threshold).to(x.dtype)  # faster than a fill by a mask
    return kept + skip.shift if skip.shift else kept
