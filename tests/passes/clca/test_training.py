"""The head begins at a fit to the dense model, learns beside a frozen model, and is kept beside the recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.compiler.toys import WIDTH, Toy, traced
from tests.passes.clca import oracle
from tests.passes.clca.cases import CLASSES, Biased, arbitrary, dense, place, plain, reduced
from tests.passes.modules.cases import context
from thresher.compiler.contract import Context, PassResult
from thresher.compiler.errors import RefusedError, UsageError
from thresher.compiler.pipeline import optimize, run_passes
from thresher.compiler.program import Program, stored_tensors
from thresher.compiler.recipe import parse_recipe
from thresher.passes.tokens.clca import head
from thresher.passes.tokens.clca.clca import Clca
from thresher.passes.tokens.clca.train import ClcaOptions, HeadTraining

HOST = "evit: {keep: 0.6, layers: [0, 1]}"
OPTIONS: dict[str, Any] = {"steps": 20, "rate": 3e-3}


def host(seed: int = 3) -> Program:
    return reduced(dense(seed, 9, torch.float32), HOST)


def run(program: Program, given: Context, **options: Any) -> PassResult:
    return Clca(ClcaOptions(**OPTIONS | options))(program, given)


def weights(result: PassResult) -> dict[str, torch.Tensor]:
    assert result.calibration is not None
    return dict(result.calibration.tensors)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(tokens=st.integers(1, 6), seed=st.integers(0, 99))
def test_folding_changes_nothing(tokens: int, seed: int) -> None:
    raw, stats, _ = arbitrary(tokens, seed)
    stacked = torch.randn(WIDTH, tokens, dtype=torch.float64)
    w = head.folded(raw, stats)
    mixed = torch.conv1d(stacked[None], w["kernel"], w["bias"], groups=WIDTH)[0, :, 0]
    found = w["read"] @ F.gelu(mixed) + w["read_bias"]
    want = oracle.head(stacked.numpy(), plain(raw), plain(stats))
    np.testing.assert_allclose(found.numpy(), want, rtol=1e-10, atol=1e-10)


def test_it_begins_as_the_best_linear_reader_of_the_last_class_token() -> None:
    """Ridge regression from the last class token to the dense model's logits, whatever the others are."""
    generator = torch.Generator().manual_seed(0)
    stacked = torch.randn(64, WIDTH, 3, generator=generator, dtype=torch.float64) * 4 + 1
    logits = torch.randn(64, CLASSES, generator=generator, dtype=torch.float64)
    raw, stats = head.initial(stacked, logits)
    last = stacked[:, :, -1].numpy()
    z = (last - last.mean(0)) / last.std(0)
    y = logits.numpy()
    linear = np.linalg.inv(z.T @ z + 64 * head.RIDGE * np.eye(WIDTH)) @ z.T @ (y - y.mean(0))
    for item, row in zip(stacked, z @ linear + y.mean(0), strict=True):
        found = oracle.head(item.numpy(), plain(raw), plain(stats))
        np.testing.assert_allclose(found, row, atol=1e-4)


@pytest.mark.parametrize("cached", [True, False])
def test_gradients_reach_head_and_token_and_nothing_else(cached: bool) -> None:
    program = host()
    found = place(program, cached=cached)
    training = HeadTraining(found, ClcaOptions(cache=cached), context())
    learned = {**training.head, **training.token}
    assert set(learned) == {*head.learned(WIDTH, 3, CLASSES), *(["token"] if cached else [])}
    for tensor in learned.values():
        tensor.requires_grad_()
    total, _ = training._loss(0)
    total.backward()  # type: ignore[no-untyped-call]
    assert all(t.grad is not None and t.grad.abs().sum() > 0 for t in learned.values())
    assert all(t.grad is None for t in stored_tensors(found.inserted.exported).values())


def test_training_learns_and_leaves_the_model_alone() -> None:
    program = host()
    result = run(program, context(), loss="dense", steps=40, rate=1e-2)
    history = result.details["training"]["history"]
    assert sum(history[-5:]) < 0.9 * sum(history[:5])
    before, after = (stored_tensors(p.exported) for p in (program, result.program))
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    assert len(after) == len(before) + len(weights(result)) == len(before) + 5
    assert result.details["appended"] == {-1: 1, 1: 2}
    assert result.details["blocks_read"] == [0, 1, 2]
    assert result.details["macs"] > result.details["dense_macs"]


def test_the_same_graph_again_without_data(tmp_path: Path) -> None:
    program = host()
    first = run(program, context(), steps=2)
    assert first.calibration is not None
    first.calibration.write(tmp_path)
    kept = tmp_path / first.calibration.file
    again = run(program, Context(), calibration=kept)
    assert again.program.text() == first.program.text()
    ours, theirs = (stored_tensors(r.program.exported) for r in (again, first))
    assert all(torch.equal(ours[key], tensor) for key, tensor in theirs.items())
    with pytest.raises(UsageError, match="was made with cache=True and not cache=False"):
        run(program, Context(), calibration=kept, cache=False)
    with pytest.raises(UsageError, match="was made on other weights"):
        run(reduced(dense(4, 9, torch.float32), HOST), Context(), calibration=kept)


def test_a_stopped_training_goes_on_where_it_was(tmp_path: Path) -> None:
    program = host()
    whole = run(program, context(), steps=4)

    def stop(what: str, done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(program, context(tmp_path, progress=stop), steps=4)
    resumed = run(program, context(tmp_path), steps=4)
    assert all(torch.equal(weights(resumed)[k], t) for k, t in weights(whole).items())
    with pytest.raises(UsageError, match=r"belongs to another run \(steps was 4 and is 5\)"):
        run(program, context(tmp_path), steps=5)


def refusal(program: Program) -> str:
    result = run(program, context())
    assert (result.matched, result.applied, result.program) == (1, 0, program)
    (found,) = result.refused
    assert Clca(ClcaOptions()).explain(program, context()).refused == (found,)
    return f"{found.node}: {found.reason}"


def test_refusals_name_the_node_and_the_reason() -> None:
    assert "no tokens were taken from this model" in refusal(dense(3, 9, torch.float32))
    pooled = reduced(traced(Toy(pool="mean")), "tome: {r: 1}")
    assert "reads out more of its tokens than a class token" in refusal(pooled)
    grid = reduced(traced(Toy(pool="dense")), "tome: {r: 1}")
    assert "does not answer with one vector of classes" in refusal(grid)
    free = reduced(traced(Toy(), dynamic=True), "tome: {r: 1}")
    assert "the number of tokens is not fixed" in refusal(free)
    full = reduced(dense(3, 9, torch.float32), "tome: {r: 2}")
    assert "blocks.2 cannot take 8 tokens: bipartite_merge cannot leave 4 of 8" in refusal(full)
    twice = run_passes(host(), [Clca(ClcaOptions(steps=0))], context())
    assert "has a cache and a head of that kind already" in refusal(twice)


def test_an_appended_token_has_no_position() -> None:
    said = "places of tokens are read behind the reduction"
    assert said in refusal(reduced(traced(Biased()), "evit: {keep: 0.7, layers: [0]}"))
    said = "reads p_bias, which has an entry for each token"
    assert said in refusal(reduced(traced(Biased()), "evit: {keep: 0.7, layers: [1]}"))


def test_it_comes_behind_a_reduction() -> None:
    recipe = parse_recipe("passes: [clca, evit]", "test")
    with pytest.raises(UsageError, match="needs a program that is 'tokens-reduced': put 'evit'"):
        optimize(dense(3, 9, torch.float32), recipe, context())
    with pytest.raises(UsageError, match="needs data and none was given"):
        optimize(dense(3, 9, torch.float32), parse_recipe(f"passes: [{HOST}, clca]", "test"))


def test_what_is_asked_for_and_refused_is_an_error() -> None:
    recipe = parse_recipe("passes: ['tome: {r: 1}', clca]".replace("'", ""), "test")
    with pytest.raises(RefusedError, match="applied nowhere"):
        optimize(traced(Toy(pool="mean")), recipe, context())
