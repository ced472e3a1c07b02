"""The relaxed counts against their definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thresher.passes.tokens.learning import survival


@given(st.integers(1, 60), st.integers(1, 9), st.integers(0, 2**31))
def test_survival_is_the_chance_that_the_count_is_at_least_the_rank(
    patches: int, step: int, seed: int
) -> None:
    choices = survival.candidates(patches, step)
    torch.manual_seed(seed)
    logits = torch.randn(len(choices), dtype=torch.float64)
    chance = logits.softmax(-1)
    found = survival.survival(logits, choices.double(), patches)
    for rank in range(1, patches + 1):
        expected = sum(float(p) for p, c in zip(chance, choices, strict=True) if c >= rank)
        assert float(found[rank - 1]) == pytest.approx(expected, abs=1e-12)
    assert choices[0] == patches
    assert choices[-1] >= 1


def test_even_logits_keep_half_of_the_tokens() -> None:
    choices = survival.candidates(196, 1)
    assert float(survival.kept(torch.zeros(196), choices)) == 99  # ceil((196 + 1) / 2)


@given(st.integers(30, 300), st.integers(1, 8), st.floats(0.05, 0.95), st.integers(0, 2**31))
def test_the_flattest_distribution_has_the_mean_and_the_most_entropy(
    patches: int, step: int, place: float, seed: int
) -> None:
    choices = survival.candidates(patches, step)
    least, most = float(choices[-1]), float(choices[0])
    mean = torch.tensor([least + place * (most - least)], dtype=torch.float64)
    (logits,) = survival.flattest(mean, choices).double()
    chance, counts = logits.softmax(-1), choices.double()
    assert float(chance @ counts) == pytest.approx(float(mean), rel=1e-4)
    # any other distribution with this mean: move along a direction that keeps sum and mean
    torch.manual_seed(seed)
    basis = torch.stack([torch.ones_like(counts), counts], dim=1)
    move = torch.randn(len(counts), dtype=torch.float64) * chance
    move -= basis @ torch.linalg.lstsq(basis, move[:, None]).solution[:, 0]
    other = chance + 0.1 * move * (chance / move.abs().clamp(min=1e-300)).min()
    assert float(torch.special.entr(other).sum()) <= float(torch.special.entr(chance).sum()) + 1e-6


def test_a_mean_outside_the_candidates_is_met_as_far_as_can_be() -> None:
    choices = survival.candidates(9, 4)  # 9, 5, 1
    logits = survival.flattest(torch.tensor([20.0, 0.0], dtype=torch.float64), choices)
    assert survival.kept(logits, choices).tolist() == [9, 1]


def test_the_mask_is_hard_and_its_gradient_that_of_the_probability() -> None:
    choices = survival.candidates(8, 2).double()
    logits = torch.randn(4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(8, dtype=torch.float64)
    count = survival.kept(logits, choices)
    mask = survival.mask(survival.survival(logits, choices, 8), count)
    assert mask.tolist() == [1.0] * int(count) + [0.0] * (8 - int(count))
    (found,) = torch.autograd.grad((mask * weight).sum(), logits)
    (expected,) = torch.autograd.grad(
        (survival.survival(logits, choices, 8) * weight).sum(), logits
    )
    assert torch.equal(found, expected)
    assert torch.autograd.gradcheck(lambda given: survival.survival(given, choices, 8), logits)


def test_both_counts_of_a_site_learn_from_its_cost() -> None:
    pruned = torch.tensor(7.0, requires_grad=True)
    merged = torch.tensor(5.0, requires_grad=True)
    least = survival.smallest(torch.tensor(9.0), pruned, merged)
    grads = torch.autograd.grad(least, [pruned, merged])
    assert (float(least.detach()), *map(float, grads)) == (5.0, 1.0, 1.0)
