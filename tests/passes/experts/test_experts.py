"""The pass: it fires, refuses, computes what its routers say, keeps its budget, and is idempotent."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from torch import Tensor

from tests.compiler.toys import TOKENS, WIDTH
from tests.passes.adaptive.test_acm import Pressed, context, dense, inputs, noise
from tests.passes.adaptive.test_padding import padded, words
from tests.passes.sparsity.toys import toy
from thresher.compiler.analysis.cost import total_macs
from thresher.compiler.analysis.ffn import find
from thresher.compiler.contract import Context, PassResult
from thresher.compiler.errors import RefusedError, UsageError, VerdictError
from thresher.compiler.lowering.onnx_export import to_onnx
from thresher.compiler.pipeline import optimize
from thresher.compiler.program import Program, stored_tensors
from thresher.compiler.recipe import load_recipe
from thresher.passes.adaptive.forward import NetworkForward
from thresher.passes.adaptive.job import Job
from thresher.passes.experts.calibrate import Runner, seen_at, work_of
from thresher.passes.experts.clusters import balanced
from thresher.passes.experts.experts import TAU, Experts
from thresher.passes.experts.job import ExpertsOptions
from thresher.passes.experts.train import RouterTraining, cut, orders

BLOCKS, COUNT, HIDDEN, ROUTER = 2, 4, 2 * WIDTH, 5
QUICK: dict[str, Any] = {"experts": COUNT, "router": ROUTER, "steps": 4}
LAYER = torch.ops.thresher.expert_mlp.default


def run(program: Program, given: Context | None = None, **options: Any) -> PassResult:
    return Experts(ExpertsOptions(**(QUICK | options)))(program, given or context())


@cache
def cut_at(tau: float) -> Program:
    return run(dense(), tau=tau, steps=40).program


def layers(program: Program) -> list[Any]:
    return [node for node in program.graph.nodes if node.target is LAYER]


def values(program: Program, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """What every node gives."""
    seen: dict[str, Tensor] = {}

    class Watch(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            seen[n.name] = super().run_node(n)
            return seen[n.name]

    with torch.no_grad():
        Watch(program.exported.graph_module).run(*program.placeholder_values(given))
    return seen


def test_every_plain_network_is_cut() -> None:
    result = run(dense(), tau=0.2)
    assert (result.matched, result.applied, result.refused) == (BLOCKS, BLOCKS, ())
    assert len(layers(result.program)) == BLOCKS
    names = {node.name for node in result.program.graph.nodes}
    assert not any("fc1" in name or "fc2" in name for name in names)  # the old weights left
    assert set(result.program.run(inputs(5))) == set(dense().run(inputs(5)))  # not the traced batch


def test_a_second_run_finds_nothing() -> None:
    with pytest.raises(RefusedError, match=r"blocks\.0\.fc2 does not return to a residual stream"):
        optimize(cut_at(0.3), load_recipe("experts", ["experts=4", "steps=0"]), context())


def test_gated_and_uneven_networks_are_refused() -> None:
    result = run(toy("gated", "plain"))
    assert (result.matched, result.applied) == (2, 1)
    assert "is gated, and experts are cut from plain networks only" in result.refused[0].reason
    with pytest.raises(RefusedError, match="32 neurons, which 5 experts cannot share: set experts"):
        optimize(dense(), load_recipe("experts", ["experts=5"]), context())


def test_all_experts_together_are_the_dense_layer() -> None:
    whole = cut_at(1.0)
    torch.testing.assert_close(whole.run(inputs()), dense().run(inputs()))
    routers = BLOCKS * (TOKENS + 1) * ROUTER * (WIDTH + COUNT)
    assert total_macs(whole.graph) == total_macs(dense().graph) + routers


def test_numbers_match_loops_in_double_precision() -> None:
    """Router, rule and experts of the first network, from the dense weights and the neurons' groups."""
    tau = 0.3
    made = cut_at(tau)
    (first, *_), seen = layers(made), values(made, inputs())
    stored = {n: t.detach().double().numpy() for n, t in made.exported.constants.items()}
    inner, inner_bias, outer, outer_bias = (
        next(t for n, t in sorted(stored.items()) if n.startswith(f"{name}_of"))
        for name in ("inner", "inner_bias", "outer", "outer_bias")
    )
    ffn = find(dense()).ffns[0]
    job = Job(dense(), [ffn], ExpertsOptions(**QUICK), context())
    groups = orders(job)[0].reshape(COUNT, -1).numpy()
    weights = {n: t.detach().double().numpy() for n, t in stored_tensors(dense().exported).items()}
    up, down = weights["blocks.0.fc1.weight"], weights["blocks.0.fc2.weight"]
    bias, x = weights["blocks.0.fc1.bias"], seen[first.args[0].name].double().numpy()
    expected, kinds = np.zeros(x.shape) + weights["blocks.0.fc2.bias"], set()
    for b, t in np.ndindex(x.shape[:2]):
        told = np.abs(outer @ np.maximum(inner @ x[b, t] + inner_bias, 0) + outer_bias)
        running = [e for e in range(COUNT) if told[e] >= (1 - tau) * told.max()]
        kinds.add(tuple(running))
        for h in (h for e in running for h in groups[e]):
            value = up[h] @ x[b, t] + bias[h]
            expected[b, t] += down[:, h] * value * (1 + math.erf(value / math.sqrt(2))) / 2
    assert len(kinds) > 1
    assert_allclose(seen[first.name].numpy(), expected, atol=1e-5)


def test_the_costs_told_are_those_of_the_experts_that_run() -> None:
    result = run(dense(), budget=0.6)
    details, tokens = result.details, TOKENS + 1
    full = BLOCKS * tokens * 2 * WIDTH * HIDDEN
    routers = BLOCKS * tokens * ROUTER * (WIDTH + COUNT)
    expected = details["dense_macs"] - full * (1 - details["share"]) + routers
    assert details["macs"] == pytest.approx(expected, abs=4)
    assert details["macs"] == total_macs(result.program.graph)


@pytest.mark.parametrize("asked", [{"budget": 0.4}, {"budget": 1.0}, {"flops": 0.8}])
def test_the_budget_is_met(asked: dict[str, Any]) -> None:
    """On a sample of what routers are trained on; the data held out are too few here to be like it."""
    options = ExpertsOptions(**QUICK, **asked)
    job = Job(dense(), find(dense()).ffns, options, context())
    result = Experts(options)(dense(), context())
    training = RouterTraining(job, cut(job, orders(job)))
    training.run()
    runner = Runner(training.forward, training.mixtures, work_of(job.sites))
    seen = seen_at(result.details["tau"], runner, training.batches.sample())
    if "budget" in asked:
        assert seen.share == pytest.approx(asked["budget"], rel=0.02)
        return
    full, dense_macs = sum(work_of(job.sites)), total_macs(dense().graph)
    routers = BLOCKS * (TOKENS + 1) * ROUTER * (WIDTH + COUNT)
    spent = dense_macs - full * (1 - seen.share) + routers
    assert spent / dense_macs == pytest.approx(0.8, rel=0.02)


def test_the_forward_of_the_calibration_is_the_graph() -> None:
    result = run(dense(), tau=0.1, steps=40)
    job = Job(dense(), find(dense()).ffns, ExpertsOptions(**QUICK, tau=0.1), context())
    training = RouterTraining(job, cut(job, orders(job)))
    for name, tensor in training.training.groups[0].items():
        kind, place = name.split(".")
        assert result.calibration is not None
        tensor.data.copy_(result.calibration.tensors[f"{kind}.{place}"])
    made = values(result.program, inputs())
    forward = NetworkForward(dense(), job.sites)
    seen = seen_at(0.1, Runner(forward, training.mixtures, [1, 1]), [(inputs(), None)])
    shares = [float(made[node.args[1].name].double().mean()) for node in layers(result.program)]
    assert seen.shares == pytest.approx(shares)
    assert all(
        float(curve[10]) == pytest.approx(s) for curve, s in zip(seen.curves(), shares, strict=True)
    )
    assert all(float(curve[100]) == 1.0 for curve in seen.curves())


def test_a_budget_below_one_expert_is_a_verdict() -> None:
    with pytest.raises(
        VerdictError, match=r"budget=0\.2 cannot be met: .* one of 4 experts, 0\.250 of"
    ):
        run(dense(), budget=0.2)
    with pytest.raises(UsageError, match="give one of tau, budget and flops"):
        load_recipe("experts", ["tau=0.1", "budget=0.5"])


def test_routers_learn() -> None:
    found = run(dense(), steps=150).details
    losses = found["training"]["history"]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert min(found["routers_explain"].values()) > 0


def test_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    whole = run(dense(), steps=6)
    with pytest.raises(KeyboardInterrupt):
        run(dense(), context(checkpoints=tmp_path, progress=Pressed(3)), steps=6)
    seen: list[int] = []
    told = context(checkpoints=tmp_path, progress=lambda w, done, t: seen.append(done))
    again = run(dense(), told, steps=6, budget=0.7)  # the budget is no part of the training
    assert seen == [4, 5, 6]
    assert again.details["training"] == whole.details["training"]
    assert again.calibration is not None
    assert whole.calibration is not None
    for name, tensor in whole.calibration.tensors.items():
        if name.split(".")[0] not in ("tau", "share", "curve"):
            assert torch.equal(tensor, again.calibration.tensors[name]), name
    with pytest.raises(UsageError, match=r"another run \(router was 5 and is 6\)"):
        run(dense(), context(checkpoints=tmp_path), router=6)


def test_a_saved_recipe_needs_no_data_for_any_tau(tmp_path: Path) -> None:
    first = run(dense(), budget=0.5, steps=40)
    assert isinstance(first.options, ExpertsOptions)
    assert (first.options.budget, first.options.tau) == (None, first.details["tau"])
    assert first.calibration is not None
    first.calibration.write(tmp_path)
    known = {**first.options.model_dump(), "calibration": tmp_path / "experts.safetensors"}
    again = Experts(ExpertsOptions(**known))(dense(), Context())
    torch.testing.assert_close(
        again.program.run(inputs()), first.program.run(inputs()), atol=0, rtol=0
    )
    assert total_macs(again.program.graph) == total_macs(first.program.graph)
    more = Experts(ExpertsOptions(**known | {"tau": 0.9}))(dense(), Context())
    assert total_macs(more.program.graph) > total_macs(first.program.graph)
    measured = Experts(ExpertsOptions(**known | {"tau": 0.9}))(dense(), context())
    assert more.details["share"] == pytest.approx(measured.details["share"], abs=0.1)
    with pytest.raises(
        UsageError, match=r"tau that meets a budget is found on data: add --learn-data"
    ):
        Experts(ExpertsOptions(**known | {"tau": None, "budget": 0.3}))(dense(), Context())


def test_no_data_is_a_mistake_of_the_command() -> None:
    with pytest.raises(UsageError, match="'experts' needs data and none was given"):
        optimize(dense(), load_recipe("experts"), Context())
    with pytest.raises(UsageError, match=r"noise has 4 items and .* needs at least 5 items"):
        run(dense(), context(noise(items=4)))


def test_tau_is_a_knob_of_the_lowered_model(tmp_path: Path) -> None:
    """One initialiser, which ONNX Runtime takes another value for when a session opens."""
    import onnx_ir as ir
    import onnxruntime as ort

    ir.save(to_onnx(cut_at(0.1)), tmp_path / "m.onnx")

    def on_onnxruntime(tau: float | None, file: str = "m.onnx") -> Any:
        options = ort.SessionOptions()
        if tau is not None:
            value = ort.OrtValue.ortvalue_from_numpy(np.array(tau, np.float32))
            options.add_initializer(TAU, value)
        session = ort.InferenceSession(tmp_path / file, options, providers=["CPUExecutionProvider"])
        return session.run(None, {"x": inputs()["x"].numpy()})[0]

    for tau, found in ((0.1, on_onnxruntime(None)), (0.3, on_onnxruntime(0.3))):
        (expected,) = cut_at(0.1).run(inputs()).values() if tau == 0.1 else at(tau).values()
        assert_allclose(found, expected.numpy(), atol=1e-5)
    (whole,) = dense().run(inputs()).values()
    assert_allclose(on_onnxruntime(1.0), whole.numpy(), atol=1e-5)
    ir.save(to_onnx(cut_at(1.0), precision="fp16"), tmp_path / "half.onnx")
    assert_allclose(on_onnxruntime(None, "half.onnx"), whole.numpy(), atol=2e-2)


def at(tau: float) -> dict[str, Tensor]:
    """The outputs of the Program with another number for its constant."""
    made = cut_at(0.1)
    kept = made.exported.constants[TAU].clone()
    try:
        made.exported.constants[TAU].fill_(tau)
        return made.run(inputs())
    finally:
        made.exported.constants[TAU].copy_(kept)


def test_groups_have_one_size_and_find_what_is_alike() -> None:
    random = np.random.default_rng(0)
    centres = np.linalg.qr(random.standard_normal((6, 6)))[0][:4]
    kind = random.permutation(np.repeat(np.arange(4), 8))
    rows = (centres[kind] + 0.1 * random.standard_normal((32, 6))) * random.uniform(0.1, 9, (32, 1))
    groups = balanced(rows, 4, seed=3)
    assert groups.shape == (4, 8)
    assert sorted(groups.flatten()) == list(range(32))
    assert all(len(set(kind[group])) == 1 for group in groups)
    assert (balanced(rows, 4, seed=3) == groups).all()
    assert (np.sort(balanced(rows * 0, 4, seed=0).flatten()) == np.arange(32)).all()
    with pytest.raises(ValueError, match="32 rows make no 5 groups"):
        balanced(rows, 5, 0)


def test_it_survives_saving(tmp_path: Path) -> None:
    made = cut_at(0.1)
    made.save(tmp_path / "p")
    again = Program.load(tmp_path / "p")
    torch.testing.assert_close(again.run(inputs()), made.run(inputs()))
    assert total_macs(again.graph) == total_macs(made.graph)


def test_what_stands_in_padding_changes_nothing() -> None:
    program = words()
    ours, theirs = (
        run(program, replace(context(padded(filler)), batch=4), budget=0.5) for filler in (0.0, 7.0)
    )
    assert ours.details == theirs.details
    assert ours.calibration is not None
    assert theirs.calibration is not None
    torch.testing.assert_close(ours.calibration.tensors, theirs.calibration.tensors, atol=0, rtol=0)
