"""Plain and gated networks, of several activations, in one model."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import torch
from torch import nn

from tests.compiler.toys import WIDTH, Block, Toy, traced
from tests.passes.adaptive.test_acm import STEPS, context, inputs
from tests.passes.sparsity.toys import HIDDEN, Gated
from thresher.compiler.analysis.cost import total_macs
from thresher.compiler.lowering.onnx_export import to_onnx
from thresher.compiler.program import Program
from thresher.passes.adaptive.insert import insert
from thresher.passes.adaptive.job import AcmOptions, Job
from thresher.passes.adaptive.sites import Site, adaptable
from thresher.passes.adaptive.train import _Training

KINDS = {"AdaptiveMLP_4_gelu": 1, "AdaptiveMLP_4_relu": 1, "AdaptiveGatedMLP": 2}


class Rectified(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = x + self.fc2(nn.functional.relu(self.fc1(self.norm2(x))))
        return y


@cache
def training() -> _Training:
    """Of four kinds of networks, with gates that choose differently."""
    torch.manual_seed(1)
    program = traced(Toy(Block(), Gated(), Gated(fused=True), Rectified()))
    program = replace(program, info=replace(program.info, labels=("a", "b", "c", "d")))
    job: Job[Site, AcmOptions] = Job(
        program, adaptable(program, 4).ffns, AcmOptions(**STEPS), context()
    )
    return _Training(job)


def made(gate: float | None = None) -> Program:
    """With every learner (``gate`` large) or whatever random gates choose."""
    trained = training()
    with torch.no_grad():
        for module in trained.modules:
            module.gate.normal_(generator=torch.Generator().manual_seed(0))
            module.gate_bias.zero_()
            module.gate_bias[-1] = gate or 0.0
    shares = [1.0] * len(trained.modules)
    exported = insert(trained.job.program, trained.job.sites, trained.modules, shares, "acm")
    return replace(trained.job.program, exported=exported)


def test_all_learners_together_are_every_kind_of_dense_network() -> None:
    dense, whole = training().job.program, made(1e3)
    torch.testing.assert_close(whole.run(inputs()), dense.run(inputs()), rtol=1e-4, atol=1e-5)
    gates = len(KINDS) + 1
    assert total_macs(whole.graph) - total_macs(dense.graph) == gates * 10 * WIDTH * 5


def test_a_gated_neuron_is_ranked_by_what_it_adds() -> None:
    """Learner by learner the summed mean contribution of the neurons falls."""
    trained = training()
    seen = trained.forward.watched(trained.batches.at(0)[0])
    for index, (x, _) in seen.items():
        module = trained.modules[index]
        size = (module.hidden(x).abs().mean(0) * module.w2.norm(dim=2)).sum(1)
        assert size[0] > size[-1]
        assert module.w1.shape == (4, WIDTH, HIDDEN // 4)


def test_the_task_reaches_both_factors() -> None:
    trained = training()
    made(5.0)
    rows, _ = trained.batches.at(0)
    every = lambda site, logits: nn.functional.one_hot(logits.argmax(-1), 5).to(logits.dtype)  # noqa: E731
    (logits,) = trained.forward.adaptive(rows, every).values()
    for module in (m for m in trained.modules if m.gated):
        grads = torch.autograd.grad(
            logits.square().sum(), [*module.trained().values()], retain_graph=True
        )
        assert all(grad.abs().sum() > 0 for grad in grads)


def test_every_kind_is_lowered_with_a_body_of_its_own() -> None:
    import onnx_ir as ir
    import onnxruntime as ort

    program = made()
    model = to_onnx(program)
    found = [node.op_type for node in model.graph if node.domain == "thresher"]
    kinds = KINDS | {"AdaptiveGate": sum(KINDS.values())}
    assert {kind: found.count(kind) for kind in set(found)} == kinds
    assert {name for _, name, _ in model.functions} == set(kinds)
    blob = ir.serde.serialize_model(model).SerializeToString()
    session = ort.InferenceSession(blob, providers=["CPUExecutionProvider"])
    given = inputs(3)
    (got,) = session.run(None, {"x": given["x"].numpy()})
    (expected,) = program.run(given).values()
    np.testing.assert_allclose(got, expected.numpy(), rtol=1e-4, atol=1e-5)
