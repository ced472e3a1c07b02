"""The pass: it fires, refuses, computes what its modules say, keeps its budget, and is idempotent."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.compiler.toys import TOKENS, WIDTH, Block, Toy, traced
from thresher.compiler.analysis.cost import total_macs
from thresher.compiler.analysis.ffn import find
from thresher.compiler.contract import Context, silent
from thresher.compiler.errors import RefusedError, UsageError
from thresher.compiler.lowering.onnx_export import to_onnx
from thresher.compiler.pipeline import optimize
from thresher.compiler.program import PassRecord, Program
from thresher.compiler.recipe import load_recipe
from thresher.models.data import Dataset
from thresher.passes.adaptive.calibrate import CLOSE, shares
from thresher.passes.adaptive.insert import insert
from thresher.passes.adaptive.job import AcmOptions, Distilled, Job
from thresher.passes.adaptive.learners import straight_through
from thresher.passes.adaptive.sites import Site
from thresher.passes.adaptive.train import _Training, distil
from thresher.runtime.exporting import export

ITEMS, BLOCKS = 40, 2
STEPS: dict[str, Any] = {"distil_steps": 4, "gate_steps": 4, "steps": 4}
ADAPTIVE = torch.ops.thresher.adaptive_mlp.default


def noise(labels: bool = True, items: int = ITEMS) -> Dataset:
    x = np.random.default_rng(0).standard_normal((items, TOKENS, WIDTH), np.float32)
    return Dataset(
        "noise",
        items,
        np.arange(items) % 4 if labels else None,
        lambda chosen: {"x": x[list(chosen)]},
    )


@cache
def dense(model: Callable[[], nn.Module] = Toy) -> Program:
    torch.manual_seed(1)
    program = traced(model())
    return replace(program, info=replace(program.info, labels=("a", "b", "c", "d")))


def context(
    data: Dataset | None = None, checkpoints: Path | None = None,
    progress: Callable[[str, int, int], None] = silent,
) -> Context:  # fmt: skip
    return Context(data=data or noise(), batch=8, checkpoints=checkpoints, progress=progress)


def job(given: Context | None = None, **options: Any) -> Job[Site, AcmOptions]:
    program = dense()
    chosen = AcmOptions(**(STEPS | options))
    return Job(program, find(program).ffns, chosen, given or context())


def convert(program: Program, **options: Any) -> Program:
    settings = [f"{k}={v}" for k, v in (STEPS | options).items()]
    return optimize(program, load_recipe("acm", settings), context())


@cache
def converted() -> Program:
    return convert(dense(), budget=0.4)


@pytest.fixture(scope="module")
def trained() -> Distilled:
    return distil(job())


def nodes(program: Program) -> list[Any]:
    return [node for node in program.graph.nodes if node.target is ADAPTIVE]


def inputs(batch: int = 3) -> dict[str, Tensor]:
    return {"x": torch.randn(batch, TOKENS, WIDTH, generator=torch.Generator().manual_seed(7))}


def test_every_plain_network_is_converted() -> None:
    made = converted()
    assert len(nodes(made)) == BLOCKS
    record = made.history[0]
    assert (record.matched, record.applied) == (BLOCKS, BLOCKS)
    names = {node.name for node in made.graph.nodes}
    assert not any("fc1" in name or "fc2" in name for name in names)  # the old weights left
    assert set(made.run(inputs(5))) == set(
        dense().run(inputs(5))
    )  # another batch than the traced one


def test_a_second_run_finds_nothing() -> None:
    made = converted()
    with pytest.raises(RefusedError, match="no feed-forward network was found"):
        convert(made)


def _weights_of(program: Program, node: Any) -> list[np.ndarray]:
    stored = {**program.exported.constants, **program.exported.state_dict}
    specs = {s.arg.name: s.target for s in program.exported.graph_signature.input_specs}
    return [stored[specs[n.name]].double().numpy() for n in node.args[2:6]]


def test_numbers_match_loops_in_double_precision() -> None:
    made = converted()
    (first, *_), seen = nodes(made), {}

    class Watch(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            seen[n] = super().run_node(n)
            return seen[n]

    with torch.no_grad():
        watch = Watch(made.exported.graph_module, garbage_collect_values=False)
        watch.run(*made.placeholder_values(inputs()))
    by_name = {node.name: value for node, value in seen.items()}
    x, k = (by_name[n.name].numpy() for n in first.args[:2])
    w1, b1, w2, b2 = _weights_of(made, first)
    assert len(np.unique(k)) > 1
    gelu = np.vectorize(lambda v: v * (1 + math.erf(v / math.sqrt(2))) / 2)
    for b, t in np.ndindex(k.shape):
        expected = sum(
            (gelu(x[b, t].astype(np.float64) @ w1[n] + b1[n]) @ w2[n] for n in range(k[b, t])),
            b2,
        )
        np.testing.assert_allclose(by_name[first.name][b, t].numpy(), expected, atol=1e-5)


def test_all_learners_together_are_the_dense_layer() -> None:
    training = _Training(job())
    with torch.no_grad():
        for module in training.modules:
            module.gate_bias[-1] = 1e3
    exported = insert(training.job.program, training.job.sites, training.modules, [1.0, 1.0], "acm")
    whole = replace(training.job.program, exported=exported)
    expected, found = training.job.program.run(inputs()), whole.run(inputs())
    torch.testing.assert_close(found, expected)
    assert total_macs(whole.graph) > total_macs(training.job.program.graph)  # the gates


def test_the_costs_told_are_those_of_the_learners_that_run() -> None:
    made = converted()
    details = made.history[0].details
    tokens, block = TOKENS + 1, 2 * WIDTH * 2 * WIDTH
    gates = BLOCKS * tokens * WIDTH * 5
    learners = sum(details["networks"].values()) * tokens * block
    full = BLOCKS * tokens * block
    assert details["macs"] == pytest.approx(details["dense_macs"] - full + learners + gates, abs=4)
    assert details["macs"] == total_macs(made.graph)


@pytest.mark.parametrize("budget", [0.3, 1.0])
def test_the_budget_is_met(budget: float) -> None:
    """On a sample of what was trained on; the data held out are too few here to be like it."""
    training = _Training(job(budget=budget))
    found = training.run()
    again, whole = shares(training.forward, training.modules, training.batches.sample())
    tokens = len(training.batches.held) * (TOKENS + 1) * BLOCKS
    one = 1 / tokens  # what a token that leaps from none to all learners moves
    assert sum(again) / BLOCKS == pytest.approx(budget, abs=CLOSE + 2 * one)
    assert whole == pytest.approx(sum(again) / BLOCKS)
    assert found.share == pytest.approx(budget, abs=0.15)


def test_the_task_reaches_every_gate_and_every_learner() -> None:
    training = _Training(job())
    rows, labels = training.batches.at(0)
    assert labels is not None
    with torch.no_grad():
        for module in training.modules:
            module.gate_bias[-1] = 5.0  # every token runs every learner
    (logits,) = training.forward.adaptive(rows, as_it_runs).values()
    loss = nn.functional.cross_entropy(logits, labels)
    for module in training.modules:
        gate, gate_bias, w1, w2 = torch.autograd.grad(
            loss, [module.gate, module.gate_bias, module.w1, module.w2], retain_graph=True
        )
        assert (gate_bias != 0).all()
        assert gate.abs().sum() > 0
        assert all(w1[n].abs().sum() > 0 and w2[n].abs().sum() > 0 for n in range(4))


def test_straight_through_equals_what_inference_computes() -> None:
    training = _Training(job())
    with torch.no_grad():
        for module in training.modules:
            module.gate.normal_(generator=torch.Generator().manual_seed(0))
    exported = insert(training.job.program, training.job.sites, training.modules, [0.5, 0.5], "acm")
    made = replace(training.job.program, exported=exported)

    with torch.no_grad():
        found = training.forward.adaptive(inputs(), as_it_runs)
    torch.testing.assert_close(found, made.run(inputs()))


def as_it_runs(site: int, logits: Tensor) -> Tensor:
    return straight_through(logits, torch.zeros_like(logits), 0.8)


class Pressed:
    """A user who presses Ctrl-C after some steps."""

    def __init__(self, after: int) -> None:
        self.after = after

    def __call__(self, what: str, done: int, total: int) -> None:
        if done == self.after:
            raise KeyboardInterrupt


def same(a: Any, b: Any) -> bool:
    pairs = zip(a.modules, b.modules, strict=True)
    equal = all(
        torch.equal(p, q)
        for m, n in pairs
        for p, q in zip(m.parameters(), n.parameters(), strict=True)
    )
    return equal and a.history == b.history and a.shares == b.shares


@pytest.mark.parametrize(
    "after", [4, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 7, 10))]
)
def test_resumed_equals_uninterrupted(after: int, trained: Distilled, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        distil(job(context(checkpoints=tmp_path, progress=Pressed(after))))
    seen: list[int] = []
    again = distil(
        job(context(checkpoints=tmp_path, progress=lambda w, done, t: seen.append(done)))
    )
    assert same(again, trained)
    assert seen == list(range(after + 1, 13))
    with pytest.raises(UsageError, match=r"another run \(budget was 0.5 and is 0.6\)"):
        distil(job(context(checkpoints=tmp_path), budget=0.6))


def test_each_training_of_a_recipe_has_a_checkpoint_of_its_own(tmp_path: Path) -> None:
    first = job(context(checkpoints=tmp_path), steps=1)
    distil(first)
    history = (PassRecord("acm", {}, 2, 1),)
    distil(replace(first, program=replace(first.program, history=history)))
    assert {file.name for file in tmp_path.iterdir()} == {"acm.pt", "acm-2.pt"}


def test_the_same_seed_trains_the_same_and_another_does_not(trained: Distilled) -> None:
    assert same(trained, distil(job()))
    assert not same(trained, distil(job(replace(context(), seed=1))))


def test_a_phase_ends_when_its_loss_no_longer_sinks() -> None:
    found = distil(job(distil_steps=60, gate_steps=0, steps=0, patience=2))
    assert found.steps[0] < 60
    assert distil(job(gate_steps=0, steps=0)).steps == (4, 0, 0)


def test_without_labels_the_dense_model_is_the_judge() -> None:
    assert distil(job(context(noise(labels=False)))).loss == "dense"


def test_what_cannot_be_converted_is_refused() -> None:
    with pytest.raises(
        RefusedError, match="32 neurons, which 5 learners cannot share: set learners"
    ):
        convert(dense(), learners=5)

    class Tied(Block):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = super().forward(x)
            z: Tensor = y + self.fc2(nn.functional.gelu(self.fc1(y)))
            return z

    with pytest.raises(RefusedError, match="shares its weight with"):
        convert(dense(lambda: Toy(Tied(), Tied())))


def test_who_asks_for_a_size_reads_nothing() -> None:
    program = traced(Toy(Block()))
    (ffn,) = find(program).ffns
    with program.graph.inserting_after(ffn.down):
        program.graph.call_function(torch.ops.aten.sym_size.int, (ffn.down, 0))
    assert [f.down for f in find(program).ffns] == [ffn.down]


def test_no_data_is_a_mistake_of_the_command() -> None:
    with pytest.raises(UsageError, match="'acm' needs data and none was given"):
        optimize(dense(), load_recipe("acm"), Context())
    with pytest.raises(UsageError, match=r"noise has 4 items and .* needs at least 5 items"):
        distil(job(context(noise(items=4))))
    with pytest.raises(UsageError, match=r"acm\.budget: input should be less than or equal to 1"):
        load_recipe("acm", ["budget=1.5"])


@pytest.mark.slow
def test_the_lowered_model_is_the_program(tmp_path: Path) -> None:
    import onnx_ir as ir
    import onnxruntime as ort

    made = converted()
    for precision, tolerance in (("fp32", 1e-5), ("fp16", 2e-2)):
        model = to_onnx(made, precision=precision)
        ir.save(model, tmp_path / "m.onnx")
        session = ort.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
        for batch in (1, 4):
            given = inputs(batch)
            (found,) = session.run(None, {"x": given["x"].numpy()})
            (expected,) = made.run(given).values()
            np.testing.assert_allclose(found, expected.numpy(), atol=tolerance)


def test_it_survives_saving(tmp_path: Path) -> None:
    made = converted()
    made.save(tmp_path / "p")
    again = Program.load(tmp_path / "p")
    torch.testing.assert_close(again.run(inputs()), made.run(inputs()))
    assert total_macs(again.graph) == total_macs(made.graph)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_tensorrt_rtx_builds_it(precision: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    shapes = [f"x=1..8x{TOKENS}x{WIDTH}@4"]
    target = "tensorrt-rtx:sm86"
    engine = export(
        converted(), tmp_path / "e", target=target, precision=precision, shapes=shapes, check=False
    )
    assert engine.manifest.built["steps"] == "function bodies"
