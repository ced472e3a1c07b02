"""A reduction whose counts are taken from data: each site is measured behind the steps of the sites before it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx

from thresher.compiler.analysis.sites import Site, Sites
from thresher.compiler.contract import Dataset
from thresher.compiler.program import Program
from thresher.passes.tokens.budget import Count, Schedule
from thresher.passes.tokens.reduce import Reduction
from thresher.passes.tokens.step import Step

Decide: TypeAlias = Callable[[Site, Sequence[tuple[Tensor, Tensor]]], Count | None]
"""A site, and the metric ``[B, H, N, d]`` and sizes ``[B, N]`` there of every batch, to what becomes of its tokens."""


class Measured(Reduction):
    """A Reduction that asks for the count of a site once its graph up to there has run on data.

    So every site is measured on tokens that the steps before it left, in one run over the data.

    Args:
        schedule: None at sites to leave alone; the other counts are not read.
        values: of the graph on the data.
        decide: the count of a site.
    """

    def __init__(
        self, program: Program, sites: Sites, step: Step, schedule: Schedule, name: str,
        proportional: bool, values: Values, decide: Decide,
    ) -> None:  # fmt: skip
        super().__init__(program, sites, step, schedule, name, proportional)
        self.values, self.decide = values, decide
        self.found: list[Count | None] = []

    def _reduce(self, stream: fx.Node, site: Site, count: Count | None) -> None:
        if count is not None:
            self.rewriter.at(stream, site=site.layer, path=site.path)
            x, current = self.rewriter.map[stream], self.versions[self._version(stream)]
            view = self._site_view(site, current, x, 0)
            assert view.size is not None
            seen = self.values.of(self.rewriter.graph, (view.k, view.size, x))
            count = self.decide(site, [(k, size) for k, size, _ in seen])
        self.found.append(count)
        super()._reduce(stream, site, count)


class Values:
    """What nodes of a graph that is still growing are on some data, batch by batch.

    Between two questions the nodes that were asked for are kept, and what has one number for each token
    (sizes, maps).  Whatever else a later node reads is computed again.
    """

    def __init__(self, program: Program, inputs: Iterable[Mapping[str, Tensor]]) -> None:
        names = [node.name for node in program.graph.nodes if node.op == "placeholder"]
        self.given = [
            dict(zip(names, program.placeholder_values(batch), strict=True)) for batch in inputs
        ]
        self.kept: list[dict[fx.Node, Any]] = [{} for _ in self.given]

    def again(self) -> Values:
        """The same data, for another graph of the same Program."""
        fresh = copy(self)
        fresh.kept = [{} for _ in self.given]
        return fresh

    def of(self, graph: fx.Graph, wanted: Sequence[fx.Node]) -> list[tuple[Tensor, ...]]:
        """The values of some nodes, for every batch."""
        with torch.inference_mode():
            return [self._of_batch(number, graph, wanted) for number in range(len(self.given))]

    def _of_batch(
        self, number: int, graph: fx.Graph, wanted: Sequence[fx.Node]
    ) -> tuple[Tensor, ...]:
        given, values = self.given[number], self.kept[number]
        order = _missing(graph, wanted, values)
        last = {read: node for node in order for read in node.all_input_nodes}
        for node in order:
            if node.op == "placeholder":
                values[node] = given[node.name]
                continue
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
            for read in node.all_input_nodes:
                if last[read] is node and read not in wanted and not _small(values[read]):
                    del values[read]
        self.kept[number] = {n: v for n, v in values.items() if n in wanted or _small(v)}
        return tuple(values[node] for node in wanted)


def _missing(
    graph: fx.Graph, wanted: Sequence[fx.Node], known: Mapping[fx.Node, Any]
) -> list[fx.Node]:
    """What has to be computed for some nodes, in order."""
    todo, needed = list(wanted), set[fx.Node]()
    while todo:
        node = todo.pop()
        if node not in known and node not in needed:
            needed.add(node)
            todo += node.all_input_nodes
    return [node for node in graph.nodes if node in needed]


def _small(value: object) -> bool:
    return isinstance(value, Tensor) and value.dim() <= 2


def batches(data: Dataset, items: Sequence[int], size: int) -> Iterable[Mapping[str, Tensor]]:
    """The inputs of some items."""
    for start in range(0, len(items), size):
        arrays, _ = data.take(items[start : start + size])
        yield {name: torch.from_numpy(array) for name, array in arrays.items()}
