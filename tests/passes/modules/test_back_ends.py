"""Graphs with modules compute the same in ONNX Runtime and OpenVINO, at every length where that is dynamic."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir
import pytest
import torch

from tests.compiler.toys import TOKENS, WIDTH, Toy, traced
from tests.families.test_matrix import onnxruntime_of, openvino_of
from tests.passes.modules.cases import arbitrary
from thresher.compiler.lowering import to_onnx
from thresher.passes.tokens.modules.embedding import Dtem
from thresher.passes.tokens.modules.merger import PatchMerger
from thresher.passes.tokens.modules.method import LearnedReduction, ModuleOptions
from thresher.passes.tokens.modules.prediction import DynamicVit
from thresher.passes.tokens.modules.slimming import Sit

METHODS: dict[str, LearnedReduction[Any]] = {
    "sit": Sit(ModuleOptions(keep=0.6, layers=(0,))),
    "patch-merger": PatchMerger(ModuleOptions(keep=0.6)),
    "dynamic-vit": DynamicVit(ModuleOptions(keep=0.6, layers=(0,))),
    "dtem": Dtem(ModuleOptions(r=2)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_back_ends_agree(name: str) -> None:
    made, dynamic = METHODS[name], not METHODS[name].module.counted
    program = traced(Toy(), dynamic=dynamic)
    result, _ = made.reduced(program, made.plan(program), arbitrary(made, program))
    model = onnx_ir.to_proto(to_onnx(result.program))
    for run in (onnxruntime_of(model), openvino_of(model)):
        for batch, tokens in ((1, TOKENS), (3, 14 if dynamic else TOKENS)):
            x = torch.randn(batch, tokens, WIDTH)
            (want,), (found,) = (
                result.program.run({"x": x}).values(),
                run({"x": x.numpy()}).values(),
            )
            np.testing.assert_allclose(found, want.numpy(), rtol=0, atol=1e-5)
