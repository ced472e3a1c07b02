"""The search forward equals a loop in float64, and its gradients equal finite differences."""

from __future__ import annotations

import pytest
import torch

from tests.compiler.toys import TOKENS, WIDTH, Block, Toy, traced
from tests.passes.learning import oracle
from thresher.compiler.analysis.finder import find_sites
from thresher.compiler.program import Program, SourceInfo
from thresher.compiler.trace import trace
from thresher.passes.tokens.learning.masked import MaskedForward, Policy

POLICIES = [
    {1: (7, 5)},
    {0: (8, 8), 1: (6, 6)},  # prunes only
    {0: (9, 6), 1: (9, 4), 2: (3, 1)},  # merges most
    {1: (4, 2), 2: (9, 9)},  # a later site that asks for more than there is
    {0: (1, 1), 2: (1, 1)},
]


def double(pool: str) -> tuple[Toy, Program]:
    torch.manual_seed(1)
    model = Toy(Block(), Block(), Block(), pool=pool).double()
    example = {"x": torch.randn(2, TOKENS, WIDTH, dtype=torch.float64)}
    program = trace(model, example, dynamic={"x": {0: "batch"}}, info=SourceInfo("toy"))
    return model, program


def policy(counts: tuple[int, int]) -> Policy:
    mask = [1.0 if rank < min(counts) else 0.0 for rank in range(TOKENS)]
    return Policy(*counts, torch.tensor(mask, dtype=torch.float64))


@pytest.mark.parametrize("pool", ["class", "mean", "sequence"])
@pytest.mark.parametrize("counts", POLICIES)
def test_equals_the_oracle(pool: str, counts: dict[int, tuple[int, int]]) -> None:
    model, program = double(pool)
    sites = find_sites(program)
    x = torch.randn(3, TOKENS, WIDTH, dtype=torch.float64)
    policies = {layer: policy(pair) for layer, pair in counts.items()}
    found = MaskedForward(program, sites).outputs({"x": x}, policies)["output"]
    told = {n: (*pair, policies[n].mask.tolist()) for n, pair in counts.items()}
    with torch.no_grad():
        expected = oracle.logits(model, x, told, sites.protected)
    assert torch.allclose(found, expected, rtol=0, atol=1e-9)


def test_no_policy_is_the_dense_model() -> None:
    program = traced(Toy())
    x = {"x": torch.randn(2, TOKENS, WIDTH)}
    found = MaskedForward(program, find_sites(program)).outputs(x, {})
    assert torch.equal(found["output"], program.run(x)["output"])


@pytest.mark.parametrize("pool", ["class", "mean"])
def test_gradients_of_the_masks_equal_finite_differences(pool: str) -> None:
    _, program = double(pool)
    forward = MaskedForward(program, find_sites(program))
    x = {"x": torch.randn(2, TOKENS, WIDTH, dtype=torch.float64)}
    masks = [torch.full((TOKENS,), 0.7, dtype=torch.float64, requires_grad=True) for _ in range(2)]

    def loss(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        policies = {0: Policy(8, 6, first), 1: Policy(7, 5, second)}
        return forward.outputs(x, policies)["output"].square().sum()

    assert torch.autograd.gradcheck(loss, masks, eps=1e-6, atol=1e-6)


def test_the_weights_are_frozen() -> None:
    _, program = double("class")
    mask = torch.ones(TOKENS, dtype=torch.float64, requires_grad=True)
    x = {"x": torch.randn(2, TOKENS, WIDTH, dtype=torch.float64)}
    found = MaskedForward(program, find_sites(program)).outputs(x, {0: Policy(9, 9, mask)})
    (gradient,) = torch.autograd.grad(found["output"].sum(), mask)
    assert gradient.abs().sum() > 0
    assert all(p.grad is None for p in program.exported.parameters())
