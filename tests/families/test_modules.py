"""Learned token modules on every family: the graph with modules runs, and back ends compute the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir
import pytest
import torch

from tests.families.test_matrix import FLOAT32, onnxruntime_of, openvino_of
from tests.families.traced import cast, program
from tests.families.zoo import BY_NAME, REDUCIBLE
from tests.passes.modules.cases import arbitrary
from thresher.compiler.lowering import to_onnx
from thresher.passes.tokens.modules.embedding import Dtem
from thresher.passes.tokens.modules.merger import PatchMerger
from thresher.passes.tokens.modules.method import LearnedReduction, ModuleOptions
from thresher.passes.tokens.modules.prediction import DynamicVit
from thresher.passes.tokens.modules.slimming import Sit

METHODS: dict[str, LearnedReduction[Any]] = {
    "sit": Sit(ModuleOptions(keep=0.7, layers=(0, 1))),
    "patch-merger": PatchMerger(ModuleOptions(keep=0.3)),
    "dynamic-vit": DynamicVit(ModuleOptions(keep=0.7, layers=(0, 1))),
    "dtem": Dtem(ModuleOptions(r=3)),
}


# Two of the methods on each family, in turns: CI has a limit.
CASES = [
    (entry.name, method)
    for i, entry in enumerate(REDUCIBLE)
    for j, method in enumerate(METHODS)
    if (i + j) % 2 == 0
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "method"), CASES)
def test_every_family_takes_modules(name: str, method: str) -> None:
    entry, made = BY_NAME[name], METHODS[method]
    dense = program(name, torch.float32, fixed=True)
    plan = made.plan(dense)
    assert plan.applied
    result, _ = made.reduced(dense, plan, arbitrary(made, dense))
    model = onnx_ir.to_proto(to_onnx(result.program))
    inputs = cast(entry.inputs(3), torch.float32)
    eager = result.program.run(inputs)
    real = entry.real(entry.build()[0], inputs) if entry.real else None
    for run in (onnxruntime_of(model), openvino_of(model)):
        for key, value in run({k: v.numpy() for k, v in inputs.items()}).items():
            want = eager[key].numpy()
            if key in entry.dense and real is not None:
                value, want = value[real.numpy()], want[real.numpy()]
            assert np.isfinite(want).all()
            assert np.abs(value - want).max() < FLOAT32 * np.abs(want).max()
