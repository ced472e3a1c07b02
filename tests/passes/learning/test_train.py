"""Learning the counts: repeatable, resumable, on budget, and refused in one sentence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.compiler.toys import TOKENS, WIDTH, Block, Toy, traced
from thresher.compiler.analysis.cost import cost_model
from thresher.compiler.analysis.finder import find_sites
from thresher.compiler.contract import Context, silent
from thresher.compiler.errors import UsageError, VerdictError
from thresher.models.data import Dataset
from thresher.passes.tokens.learning.fit import even, fitted
from thresher.passes.tokens.learning.job import Job, Learned, LearningOptions
from thresher.passes.tokens.learning.train import _Training, learn

ITEMS = 24


def dataset(labels: bool = True) -> Dataset:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((ITEMS, TOKENS, WIDTH), np.float32)
    return Dataset(
        "noise", ITEMS, np.arange(ITEMS) % 4 if labels else None, lambda chosen: {"x": x[chosen]}
    )


def job(
    pool: str = "class",
    target: float = 0.85,
    blocks: int = 3,
    data: Dataset | None = None,
    checkpoints: Path | None = None,
    progress: Callable[[str, int, int], None] = silent,
    **options: Any,
) -> Job:
    torch.manual_seed(3)
    program = traced(Toy(*(Block() for _ in range(blocks)), pool=pool))
    program = replace(program, info=replace(program.info, labels=("a", "b", "c", "d")))
    sites = find_sites(program)
    context = Context(data=data or dataset(), batch=4, checkpoints=checkpoints, progress=progress)
    chosen = LearningOptions(**({"steps": 12, "granularity": 1} | options))
    return Job(program, sites, cost_model(program.graph, sites), target, chosen, context)


def test_the_same_seed_learns_the_same() -> None:
    first, second = learn(job()), learn(job())
    assert first == second
    other = job()
    assert learn(replace(other, context=replace(other.context, seed=1))) != first


@pytest.mark.slow
@pytest.mark.parametrize("pool", ["mean", "class"])
def test_untrained_counts_are_even_and_cost_what_was_asked(pool: str) -> None:
    given = job(pool, target=0.75, blocks=5)
    start = even(given)
    steps = [a - b for a, b in pairwise(start.counts)]
    assert start.counts[0] == given.tokens
    moving = steps[: len(given.layers)]
    assert max(moving) - min(moving) <= 1
    assert 0.6 < start.share <= 0.75
    pruned = [a - b for a, b in zip(start.counts, start.prune[1:], strict=False)]
    assert any(pruned) == given.prunes
    _, _, *first = learn(job(pool, target=0.75, blocks=5, steps=2000, patience=1)).history[0]
    assert all(abs(a - b) <= 1 for a, b in zip(first, start.counts, strict=True))


@pytest.mark.slow
def test_the_cost_stays_near_the_target() -> None:
    found = learn(job(target=0.95, steps=60))
    assert found.loss == "labels"
    assert found.share == pytest.approx(0.95, abs=0.04)


def test_the_first_site_keeps_all_and_counts_never_grow() -> None:
    found = learn(job())
    assert found.counts[0] == found.prune[0] == TOKENS + 1
    chain = [n for pair in zip(found.prune, found.counts, strict=True) for n in pair]
    assert chain == sorted(chain, reverse=True)


def test_pooled_models_merge_only_and_not_at_the_last_site() -> None:
    found = learn(job(pool="mean"))
    assert found.counts[0] == TOKENS
    assert found.prune[1] == TOKENS > found.counts[1]  # merged, not pruned
    assert found.counts[2] == found.counts[1]
    with pytest.raises(UsageError, match="too few blocks"):
        learn(job(pool="mean", blocks=2))


def test_without_labels_the_dense_model_is_the_judge() -> None:
    found = learn(job(data=dataset(labels=False)))
    assert found.loss == "dense"
    with pytest.raises(UsageError, match="noise has none"):
        learn(job(data=dataset(labels=False), loss="labels"))


def test_it_stops_when_the_counts_settle() -> None:
    done = learn(job(steps=400, patience=5, target=0.95))
    assert done.steps < 400


class Pressed:
    """A user who presses Ctrl-C after some steps."""

    def __init__(self, after: int) -> None:
        self.after = after

    def __call__(self, what: str, done: int, total: int) -> None:
        if done == self.after:
            raise KeyboardInterrupt


@pytest.mark.slow
def test_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    whole = learn(job())
    with pytest.raises(KeyboardInterrupt):
        learn(job(checkpoints=tmp_path, progress=Pressed(5)))
    seen: list[int] = []
    again = learn(job(checkpoints=tmp_path, progress=lambda what, done, total: seen.append(done)))
    assert again == whole
    assert seen == list(range(6, 13))
    assert learn(job(checkpoints=tmp_path)) == whole  # finished: nothing is left to do


def test_the_state_of_another_run_is_refused(tmp_path: Path) -> None:
    learn(job(checkpoints=tmp_path))
    with pytest.raises(UsageError, match=r"another run \(target was 0.85 and is 0.8\)"):
        learn(job(checkpoints=tmp_path, target=0.8))
    (tmp_path / "counts.pt").write_bytes(b"no checkpoint")
    with pytest.raises(UsageError, match="cannot be read as a checkpoint"):
        learn(job(checkpoints=tmp_path))


def test_a_dynamic_length_is_refused() -> None:
    program = traced(Toy(), dynamic=True)
    sites = find_sites(program)
    dynamic = replace(job(), program=program, sites=sites)
    with pytest.raises(UsageError, match="--length"):
        learn(dynamic)


@pytest.mark.parametrize("target", [0.75, 0.85, 0.95])
def test_fitted_counts_spend_what_was_asked_to_a_token(target: float) -> None:
    given = job(target=target)
    learned = Learned((10, 8, 5), (10, 6, 3), 0.0, "labels", 1, [])
    found = fitted(learned, given)
    assert found.share <= target
    gentler = (found.counts[0], found.counts[1] + 1, found.counts[2] + 1)
    assert given.cost.share(gentler) > target
    assert all(p >= m for p, m in zip(found.prune, found.counts, strict=True))


def test_what_cannot_be_met_is_a_verdict() -> None:
    learned = Learned((10, 8, 5), (10, 6, 3), 0.0, "labels", 1, [])
    with pytest.raises(VerdictError, match=r"flops=0.2 cannot be met"):
        fitted(learned, job(target=0.2))


@pytest.mark.parametrize("better", [True, False])
def test_what_was_learned_has_to_beat_even_counts(
    better: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = job(target=0.75, blocks=5)
    start = even(given)

    def judged(self: object, chain: Learned) -> float:
        return 1.0 if chain.counts == start.counts else (0.6 if better else 1.1)

    monkeypatch.setattr("thresher.passes.tokens.learning.train._Training.judged", judged)
    found = learn(given)
    assert (found.counts == start.counts) is not better
    assert found.gain == pytest.approx(0.4 if better else 0.0)
    assert found.share <= 0.75
    assert found.history


def test_whole_counts_are_judged_by_the_loss_of_the_masked_model() -> None:
    given = job(target=0.75)
    assert given.context.data is not None
    training = _Training(given, given.context.data)
    dense = Learned((given.tokens,) * 3, (given.tokens,) * 3, 1.0, "labels", 0, [])
    arrays, labels = given.context.data.take(list(range(ITEMS)))
    logits = given.program.run({"x": torch.from_numpy(arrays["x"])})["output"]
    smoothed = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
    wanted = smoothed(logits, torch.from_numpy(labels))
    assert training.judged(dense) == pytest.approx(float(wanted), rel=1e-5)
    assert training.judged(even(given)) != pytest.approx(float(wanted), rel=1e-4)
