"""Adaptive modules behind other passes, in one recipe: costs multiply, and nothing is trained twice."""

from __future__ import annotations

from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.compiler.toys import TOKENS
from tests.passes.adaptive.test_acm import STEPS, context, dense, inputs, noise
from thresher.cli.passes import foreseen, foresight
from thresher.compiler.analysis.cost import total_macs
from thresher.compiler.contract import Context
from thresher.compiler.lowering.onnx_export import to_onnx
from thresher.compiler.pipeline import PassReport, run
from thresher.compiler.program import stored_tensors
from thresher.compiler.recipe import Recipe, parse_recipe

ACM = "acm: {budget: 0.5, " + ", ".join(f"{k}: {v}" for k, v in STEPS.items()) + "}"
BEFORE = {
    "tome": "tome: {r: 2}",
    "channels": "channels: {ratio: 0.25, items: 16}",
    "sparsity": "sparsity: {sites: [qkv], sparsity: 0.5, items: 16, allow: true}",
}


def recipe(first: str) -> Recipe:
    return parse_recipe(f"passes: [{{{BEFORE[first]}}}, {{{ACM}}}]", "test")


@pytest.mark.parametrize("first", BEFORE)
def test_costs_multiply_and_the_graph_is_made_again_without_data(
    first: str, tmp_path: Path
) -> None:
    reports: list[PassReport] = []
    made = run(dense(), recipe(first), context(), observe=reports.append)
    records = [report.record for report in reports]
    told = [record.details for record in records if "ideal" in record.details]
    found = foreseen(records)
    assert found is not None
    assert (found["dense_macs"], found["macs"]) == (
        total_macs(dense().graph),
        total_macs(made.graph),
    )
    factors = [factor for _, factor in found["by_pass"]]
    assert prod(factors) == pytest.approx(found["ideal"])
    assert factors[-1] == pytest.approx(told[-1]["ideal"])
    assert factors[0] == pytest.approx(told[0]["ideal"], rel=0.02)  # tome leaves its merges out
    names = [r.name for r in records if "ideal" in r.details]
    assert [name for name, _ in found["by_pass"]] == names
    if len(names) == 2:
        said = " x ".join(f"{factor:.2f} by {name}" for name, factor in found["by_pass"])
        assert any(line.endswith(f"({said})") for line in foresight(records))
    for report in reports:
        if report.calibration is not None:
            report.calibration.write(tmp_path)
    ran = [record.options for record in records]
    again = run(dense(), recipe(first).decided(ran, None).beside(tmp_path), Context())
    assert again.text().splitlines() == made.text().splitlines()
    ours, theirs = stored_tensors(again.exported), stored_tensors(made.exported)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    torch.testing.assert_close(again.run(inputs(4)), made.run(inputs(4)))


def test_merged_tokens_pass_the_gates() -> None:
    import onnx_ir as ir
    import onnxruntime as ort

    made = run(dense(), recipe("tome"), context(noise()))
    gated = [n for n in made.graph.nodes if n.target is torch.ops.thresher.adaptive_mlp.default]
    assert [n.meta["val"].shape[1] for n in gated] == [TOKENS + 1 - 2, TOKENS + 1 - 4]
    blob = ir.serde.serialize_model(to_onnx(made)).SerializeToString()
    session = ort.InferenceSession(blob, providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {"x": inputs(3)["x"].numpy()})
    (expected,) = made.run(inputs(3)).values()
    np.testing.assert_allclose(got, expected.numpy(), rtol=1e-4, atol=1e-5)
