"""What counts as a residual sum: an add of two tensors, and nothing else."""

from __future__ import annotations

import torch
from torch import fx

from thresher.compiler.analysis.residual import summands

aten = torch.ops.aten


def test_two_tensors_are_summed_and_numbers_are_not() -> None:
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    assert summands(graph.call_function(aten.add.Tensor, (x, y))) == [x, y]
    assert summands(graph.call_function(aten.add_.Tensor, (y, x))) == [y, x]
    assert summands(graph.call_function(aten.add.Tensor, (x, 1.0))) == []
    assert summands(graph.call_function(aten.mul.Tensor, (x, y))) == []
    assert summands(x) == []
