"""What a feed-forward network computes is read from its values, however its activation is written."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.compiler.toys import Block, Toy, traced
from tests.passes.sparsity.toys import toy
from thresher.compiler.analysis.ffn import find
from thresher.compiler.analysis.linears import operand


class Spelled(Block):
    """A block whose activation is any function."""

    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.fc2(self.act(self.fc1(self.norm2(x))))
        return y


SPELLINGS: dict[str, list[Callable[[Tensor], Tensor]]] = {
    "gelu": [F.gelu, lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))],
    "gelu_tanh": [
        lambda x: F.gelu(x, approximate="tanh"),
        lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    ],
    "quick_gelu": [lambda x: x * torch.sigmoid(1.702 * x)],
    "relu": [F.relu, lambda x: x.clamp(min=0)],
    "silu": [F.silu, lambda x: torch.sigmoid(x) * x],
}


@pytest.mark.parametrize(
    ("name", "act"), [(name, act) for name, acts in SPELLINGS.items() for act in acts]
)
def test_an_activation_is_known_by_its_values(name: str, act: Callable[[Tensor], Tensor]) -> None:
    (ffn,) = find(traced(Toy(Spelled(act)))).ffns
    assert ffn.form is not None
    assert (ffn.form.activation, ffn.form.factor) == (name, None)
    assert ffn.x is not None
    assert ffn.x.target is torch.ops.aten.layer_norm.default
    assert len(ffn.weights) == 4


@pytest.mark.parametrize("act", [torch.tanh, lambda x: F.relu(x) ** 2, lambda x: F.gelu(x) + x])
def test_another_has_no_name(act: Callable[[Tensor], Tensor]) -> None:
    (ffn,) = find(traced(Toy(Spelled(act)))).ffns
    assert ffn.form is None


@pytest.mark.parametrize("kind", ["gated", "fused"])
def test_a_gated_network_names_its_gate(kind: str) -> None:
    (ffn,) = find(toy(kind)).ffns
    form = ffn.form
    assert form is not None
    assert form.factor is not None
    assert form.activation == "silu"
    weight = operand(form.bent.linear, 1).name
    assert ("gate" in weight) or (form.bent.start, form.factor.start) == (0, ffn.width)
