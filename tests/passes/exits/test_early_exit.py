"""The pass: a head behind an earlier block, a threshold that keeps its promise, and two graphs that are the whole."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.compiler.toys import TOKENS, WIDTH, Block, Toy, traced
from tests.passes.adaptive.test_acm import Pressed, context, dense, inputs, noise
from tests.passes.adaptive.test_padding import words
from thresher.compiler.analysis.cost import total_macs
from thresher.compiler.contract import Context, PassResult
from thresher.compiler.errors import RefusedError, UsageError
from thresher.compiler.exits import halves, joined
from thresher.compiler.handed import HANDED, LEAVES
from thresher.compiler.pipeline import optimize
from thresher.compiler.program import Program
from thresher.compiler.recipe import load_recipe
from thresher.passes.exits.early_exit import EarlyExit, ExitOptions
from thresher.passes.exits.train import NEVER, Judged
from thresher.runtime import profile, verify
from thresher.runtime.engine import Engine
from thresher.runtime.exporting import export
from thresher.runtime.measure import Plan
from thresher.runtime.runner import ProgramRunner

MANY = 32
WEIGHTS = ("p_norm_weight", "p_norm_bias", "p_head_weight", "p_head_bias")


def run(program: Program, given: Context | None = None, **options: Any) -> PassResult:
    return EarlyExit(ExitOptions(**({"steps": 4} | options)))(program, given or context())


@cache
def cut() -> PassResult:
    """About half of random items are surer than this."""
    return run(dense(), threshold=0.35)


def test_it_is_the_model_with_a_second_head() -> None:
    """The first block, the trained norm and head on the class token, and the largest probability decide."""
    result = cut()
    assert (result.matched, result.applied, result.refused) == (1, 1, ())
    assert result.calibration is not None
    norm, norm_bias, weight, bias = (
        result.calibration.tensors[f"head.{name}"].double() for name in WEIGHTS
    )
    torch.manual_seed(1)
    model = Toy().double()  # the weights that dense() was traced with
    x = inputs(MANY)["x"].double()
    with torch.no_grad():
        late = model(x)
        stream = model.blocks[0](torch.cat([model.cls_token.expand(MANY, -1, -1), x], 1))
        early = F.linear(F.layer_norm(stream[:, 0], (WIDTH,), norm, norm_bias), weight, bias)
    leaves = early.softmax(-1).amax(-1) >= 0.35
    assert 0 < leaves.sum() < MANY
    (found,) = result.program.run(inputs(MANY)).values()
    torch.testing.assert_close(
        found.double(), torch.where(leaves[:, None], early, late), atol=1e-5, rtol=1e-5
    )
    assert not torch.allclose(weight, model.head.weight, atol=1e-6)  # it was trained


def test_the_two_graphs_are_the_whole_and_their_costs_are_told() -> None:
    result = cut()
    both = halves(result.program)
    assert [spec.name for spec in both.first.outputs] == ["output", LEAVES, f"{HANDED}0"]
    assert [spec.name for spec in both.rest.inputs] == ["x", f"{HANDED}0"]
    given = inputs(7)  # another batch than the traced one
    first = both.first.run(given)
    stays = ~first[LEAVES]
    rest = both.rest.run({"x": given["x"][stays], f"{HANDED}0": first[f"{HANDED}0"][stays]})
    found = first["output"].clone()
    found[stays] = rest["output"]
    torch.testing.assert_close(found, result.program.run(given)["output"])
    names = {node.name for node in both.rest.graph.nodes}
    assert not any("blocks_0" in name for name in names)  # weights of the first stay there
    macs = [total_macs(half.graph) for half in (both.first, both.rest)]
    details = result.details
    assert details["macs"] == pytest.approx(macs[0] + (1 - details["share"]) * macs[1], abs=1)
    assert sum(macs) == total_macs(result.program.graph)
    assert joined(dense()) is None


def test_an_engine_decides_for_each_item(tmp_path: Path) -> None:
    made = cut().program
    given = {"x": inputs(MANY)["x"].numpy()}
    (expected,) = made.run(inputs(MANY)).values()
    with export(made, tmp_path / "e.engine") as engine:
        assert engine.manifest.graphs == ("first", "rest")
        assert engine.manifest.verified is not None
        (found,) = engine.run(given).values()
        np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)
        together = engine.left_early
        assert together is not None
        assert 0 < together.early < together.items == MANY
    with Engine.load(tmp_path / "e.engine") as engine:
        for row in range(4):  # one by one: none or all go on
            (one,) = engine.run({"x": given["x"][row : row + 1]}).values()
            np.testing.assert_allclose(one[0], expected[row].numpy(), atol=1e-5)
        compared = verify(ProgramRunner(made), engine, inputs=[given])
        assert compared.met
        assert f"e: {engine.left_early}" in compared.sentences
    (tmp_path / "e.engine" / "rest" / "model.onnx").write_bytes(b"")
    with pytest.raises(UsageError, match=r"rest/model\.onnx is not the file that was exported"):
        Engine.load(tmp_path / "e.engine")


def test_a_fixed_batch_is_filled_up(tmp_path: Path) -> None:
    made = cut().program
    shapes = [f"x={MANY}x{TOKENS}x{WIDTH}"]
    with export(made, tmp_path / "e.engine", shapes=shapes, check=False) as engine:
        (found,) = engine.run({"x": inputs(MANY)["x"].numpy()}).values()
    (expected,) = made.run(inputs(MANY)).values()
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)


def test_profile_says_how_many_left(tmp_path: Path) -> None:
    export(cut().program, tmp_path / "e.engine", check=False).close()
    found = profile([tmp_path / "e.engine"], plan=Plan(rounds=1), memory=False, threads=1)
    assert any(
        "items left early" in said and "inputs were random" in said for said in found.sentences
    )
    with pytest.raises(UsageError, match="only engines of one graph have times per block"):
        profile([tmp_path / "e.engine"], plan=Plan(rounds=1), memory=False, threads=1, blocks=True)


def test_a_second_run_is_refused() -> None:
    with pytest.raises(RefusedError, match="items leave already: start from the original model"):
        optimize(cut().program, load_recipe("early-exit"), context())


def test_what_has_no_place_for_an_exit_is_refused() -> None:
    with pytest.raises(RefusedError, match="does not answer with one vector of classes"):
        optimize(words(), load_recipe("early-exit"), context())
    with pytest.raises(RefusedError, match="has no two blocks to leave between"):
        optimize(traced(Toy(Block())), load_recipe("early-exit"), context())
    skipping = traced(Toy(Block(), Block(), skip=True))
    with pytest.raises((RefusedError, UsageError)):
        optimize(skipping, load_recipe("early-exit", ["block=7"]), context())
    with pytest.raises(UsageError, match=r"block=1 is no place .* 2 blocks, so give 0 to 0"):
        run(dense(), block=1)
    with pytest.raises(UsageError, match="give one of threshold and max_drop"):
        load_recipe("early-exit", ["threshold=0.5", "max_drop=1"])
    with pytest.raises(UsageError, match="'early-exit' needs data and none was given"):
        optimize(dense(), load_recipe("early-exit"), Context())


def test_the_threshold_keeps_its_promise() -> None:
    """It loses no more than allowed, nor does any above it, and a lower one would."""
    generator = torch.Generator().manual_seed(0)
    sure = torch.rand(400, generator=generator).mul(20).round() / 20  # many are equal
    late = torch.rand(400, generator=generator) < 0.9
    early = torch.rand(400, generator=generator) < 0.4 + 0.5 * sure
    judged = Judged(sure, early, late)
    for drop in (0.0, 0.5, 2.0, 100.0):
        threshold = judged.threshold(drop)
        lost = {}
        for level in sorted({*sure.tolist()}):
            leaves = sure >= level
            wrong = (late & ~early & leaves).sum() - (early & ~late & leaves).sum()
            lost[level] = float(wrong) / 400 * 100
        above = [loss for level, loss in lost.items() if level >= threshold]
        assert all(loss <= drop + 1e-6 for loss in above)
        below = [level for level in lost if level < threshold]
        assert not below or lost[max(below)] > drop
        if threshold != NEVER:
            share, points = judged.at(threshold)
            assert share == pytest.approx(float((sure >= threshold).double().mean()))
            assert points == pytest.approx(lost[threshold])


def test_a_promise_that_nobody_can_keep_is_a_verdict() -> None:
    hopeless = Judged(
        torch.ones(9), torch.zeros(9, dtype=torch.bool), torch.ones(9, dtype=torch.bool)
    )
    assert hopeless.threshold(0.5) == NEVER
    assert hopeless.threshold(100.0) == 1.0


def test_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    whole = run(dense(), threshold=0.3)
    with pytest.raises(KeyboardInterrupt):
        run(dense(), context(checkpoints=tmp_path, progress=Pressed(2)), threshold=0.3)
    seen: list[int] = []
    told = context(checkpoints=tmp_path, progress=lambda w, done, t: seen.append(done))
    again = run(dense(), told, threshold=0.3)
    assert seen == [3, 4]
    assert again.details == whole.details
    with pytest.raises(UsageError, match=r"another run \(rate was 0\.001 and is 0\.01\)"):
        run(dense(), context(checkpoints=tmp_path), rate=1e-2)


def test_a_saved_recipe_needs_no_data(tmp_path: Path) -> None:
    first = cut()
    assert first.calibration is not None
    assert first.options is not None
    first.calibration.write(tmp_path)
    known = {**first.options.model_dump(), "calibration": tmp_path / first.calibration.file}
    again = EarlyExit(ExitOptions(**known))(dense(), Context())
    torch.testing.assert_close(
        again.program.run(inputs()), first.program.run(inputs()), atol=0, rtol=0
    )
    assert again.details["macs"] == first.details["macs"]
    surer = {**known, "threshold": 0.6}
    with pytest.raises(UsageError, match="is measured on data: add --learn-data DATA"):
        EarlyExit(ExitOptions(**surer))(dense(), Context())
    told = EarlyExit(ExitOptions(**surer))(dense(), context()).details
    assert told["share"] <= first.details["share"]


def test_without_labels_the_dense_model_says_what_is_right() -> None:
    details = run(dense(), context(noise(labels=False)), threshold=0.3).details
    assert details["training"]["loss"] == "dense"
    assert details["training"]["right_late"] == 1.0


def test_it_survives_saving(tmp_path: Path) -> None:
    cut().program.save(tmp_path / "p")
    again = Program.load(tmp_path / "p")
    assert joined(again) is not None
    torch.testing.assert_close(again.run(inputs()), cut().program.run(inputs()))
