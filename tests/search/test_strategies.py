"""Strategies against closed forms: budgets are never exceeded, known optima are found."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.compiler.toys import Block, Toy, traced
from tests.search.toys import fixed, outcome, realisable, spaces, toy
from thresher.compiler.contract import Context
from thresher.compiler.errors import VerdictError
from thresher.compiler.pipeline import run
from thresher.compiler.recipe import load_recipe
from thresher.passes.tokens import budget
from thresher.passes.tokens.budget import Limits
from thresher.passes.tokens.methods import Tome, TomeOptions
from thresher.passes.tokens.search.gsearch import GSearch
from thresher.passes.tokens.search.outcome import Counts, Outcome
from thresher.passes.tokens.search.perlayer import PerLayer
from thresher.passes.tokens.search.psigmoid import PSigmoid
from thresher.passes.tokens.search.space import Space, space_of
from thresher.passes.tokens.search.strategy import ABOVE, BELOW, Budget, Strategy
from thresher.passes.tokens.search.study import Study

PLACES = st.floats(0, 1)
SHARES = st.floats(0.01, 1)


def a_strategy(kind: type[PSigmoid] | type[PerLayer], space: Space, share: float) -> Strategy:
    return kind(space, Budget(share, share))


@settings(max_examples=200)
@given(space=spaces(), budget=SHARES, slope=PLACES, low=PLACES, high=PLACES)
def test_a_sigmoid_never_exceeds_its_budget(
    space: Space, budget: float, slope: float, low: float, high: float
) -> None:
    assume(space.share(space.harshest) <= budget)
    suggest = fixed({"slope": slope, "low": low, "high": high})
    counts = a_strategy(PSigmoid, space, budget).propose(suggest, {})
    assert counts is not None
    assert realisable(space, counts)
    assert space.share(counts) <= budget


@settings(max_examples=200)
@given(space=spaces(), budget=SHARES, places=st.lists(PLACES, min_size=24, max_size=24))
def test_free_counts_never_exceed_their_budget(
    space: Space, budget: float, places: list[float]
) -> None:
    assume(space.share(space.harshest) <= budget)
    suggest = fixed({f"weight {i}": place for i, place in enumerate(places)})
    counts = a_strategy(PerLayer, space, budget).propose(suggest, {})
    assert counts is not None
    assert realisable(space, counts)
    assert space.share(counts) <= budget


@pytest.mark.parametrize("kind", [PSigmoid, PerLayer])
@given(
    budget=st.floats(0.2, 0.95), places=st.dictionaries(st.sampled_from(["slope", "low"]), PLACES)
)
def test_the_budget_is_met_up_to_a_token_a_layer(
    kind: type[PSigmoid] | type[PerLayer], budget: float, places: dict[str, float]
) -> None:
    space = toy(200, 8)
    counts = a_strategy(kind, space, budget).propose(fixed(places), {})
    assert counts is not None
    assert space.share(counts) <= budget < space.share([n + 1 for n in counts])


@pytest.mark.parametrize("kind", [PSigmoid, PerLayer])
def test_a_budget_below_what_merging_reaches_is_refused(
    kind: type[PSigmoid] | type[PerLayer],
) -> None:
    space = toy(100, 2, Limits(0, halves=True))  # 50 and 25 of 100 tokens: a share of 0.27
    least = (0.5 * 0.5 + 0.5 * 0.25 + 0.5 * 0.25 + 0.5 * 0.0625) / 2
    with pytest.raises(VerdictError, match=f"flops=0.2 cannot be met: .* {least:.3f}"):
        a_strategy(kind, space, 0.2).propose(fixed({}), {})
    with pytest.raises(VerdictError, match="cannot be met"):
        Budget.of(space, 0.2, None)


def test_a_sigmoid_has_its_form() -> None:
    """Between the closed form's values, rounded down, for the middle that meets the budget."""
    space = toy(1001, 12)
    counts = PSigmoid(space, Budget(0.5, 0.5)).solve(0.5, 1.2, 0.2, 0.9)
    rates = [(n - 1) / 1000 for n in counts]
    # from r = lo + (hi - lo) sigma(-a (l - b)): l - b = log((hi - r) / (r - lo)) / a
    places = [math.log((0.9 - r) / (r - 0.2)) / 1.2 for r in rates if 0.25 < r < 0.85]
    assert len(places) >= 3
    steps = [b - a for a, b in pairwise(places)]
    assert steps == pytest.approx([1.0] * len(steps), abs=0.03)


def test_a_demanded_speed_leaves_the_share_to_the_search() -> None:
    budget = Budget.of(toy(100, 6), None, 2.0)
    assert (budget.low, budget.high) == (BELOW / 2, ABOVE / 2)
    assert budget.pick(fixed({"share": 0.0})) == BELOW / 2
    assert budget.pick(fixed({"share": 1.0})) == ABOVE / 2
    merging = toy(100, 1, Limits(0, halves=True))
    least = 0.5 * 0.5 + 0.5 * 0.25
    assert Budget.of(merging, None, 100.0) == Budget(least, least)


@settings(max_examples=100)
@given(space=spaces(), floors=st.lists(st.integers(0, 300), min_size=24, max_size=24))
def test_g_search_finds_the_least_counts_that_keep_the_quality(
    space: Space, floors: list[int]
) -> None:
    """Quality is kept where every layer has at least its floor; the greedy answer by linear scan."""

    def score(counts: Counts) -> Outcome:
        return outcome(float(all(n >= f for n, f in zip(counts, floors, strict=False))))

    floors = [min(floor, space.tokens) for floor in floors]
    expected: list[int] = []
    tokens = space.tokens
    for site in range(space.sites):
        rest = floors[site : space.sites]
        good = [n for n in range(space.limits.least(tokens), tokens) if n >= max(rest)]
        tokens = min(good, default=tokens)
        expected.append(tokens)
    strategy = GSearch(space, lambda found: found.quality.drop <= 0)
    known: dict[Counts, Outcome] = {}
    while (counts := strategy.propose(fixed({}), known)) is not None:
        assert counts not in known
        assert strategy.unfinished(known)
        assert realisable(space, counts)
        known[counts] = score(counts)
    assert not strategy.unfinished(known)
    assert list(strategy.chosen(known)) == expected
    assert len(known) <= strategy.most


@pytest.mark.parametrize("kind", [PSigmoid, PerLayer])
def test_a_known_optimum_is_approached(
    kind: type[PSigmoid] | type[PerLayer], tmp_path: Path
) -> None:
    """Quality falls with the distance to one schedule of the budget, late and steep."""
    space, budget = toy(200, 6), 0.6
    aim = PSigmoid(space, Budget(budget, budget)).solve(budget, 2.0, 0.1, 0.95)
    constant = space.kept([space.gentlest(lambda c: space.kept([c] * 6), budget, 1, 0)] * 6)

    def far(counts: Counts) -> float:
        return sum(abs(a - b) for a, b in zip(counts, aim, strict=True)) / (200 * 6)

    study = Study(str(tmp_path / "s.journal"), "s", {})
    known = study.run(
        a_strategy(kind, space, budget), lambda c: outcome(1 - far(c)), 40, lambda *_: None
    )
    nearest = min(map(far, known))
    assert len(known) > 20
    assert nearest < far(constant) / 3


@given(spaces(), st.data())
def test_a_dynamic_length_asks_by_shares_for_the_same_counts(
    space: Space, data: st.DataObject
) -> None:
    assume(not (space.limits.halves and space.limits.extra))  # no method does both
    wanted = data.draw(
        st.lists(st.integers(0, space.tokens), min_size=space.sites, max_size=space.sites)
    )
    counts = space.clamp(wanted)
    name, _, shares = replace(space, dynamic=True).option(counts).partition("=")
    asked = tuple(budget.share(value) if value < 1 else None for value in json.loads(shares))
    assert name == "keep"
    assert tuple(budget.resolve(asked, space.tokens, space.limits)) == counts


def test_a_dynamic_model_is_reduced_as_its_vector_says() -> None:
    program = traced(Toy(Block(), Block(), Block()), dynamic=True)
    space = space_of(program, Tome(TomeOptions()))
    counts = space.clamp([9, 9, 6])
    recipe = load_recipe("tome", [space.option(counts)])
    details = run(program, recipe, Context()).history[-2].details
    assert details["tokens"] == [space.tokens, *counts]
    assert details["macs"] / details["dense_macs"] == pytest.approx(space.share(counts))
