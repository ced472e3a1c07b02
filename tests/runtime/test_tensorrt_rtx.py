"""Engines for TensorRT-RTX, built ahead of time; none of it needs a GPU."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from tests.compiler.toys import TOKENS, WIDTH, Toy, traced
from tests.families.traced import program as family
from thresher.compiler.errors import MissingRequirementError, RefusedError, UsageError
from thresher.compiler.pipeline import optimize
from thresher.compiler.program import Program
from thresher.compiler.recipe import load_recipe
from thresher.runtime import Engine, export
from thresher.runtime.backends import backend, tensorrt_family, tensorrt_rtx
from thresher.runtime.backends.nvidia import Gpu
from thresher.runtime.backends.tensorrt_rtx import PLAN

pytest.importorskip(
    "tensorrt_rtx", reason="tensorrt-rtx is not installed: pip install 'thresher[tensorrt-rtx]'"
)
TARGET = "tensorrt-rtx"


@pytest.fixture(scope="module")
def reduced() -> Program:
    return optimize(traced(Toy()), load_recipe("tome", ["r=2"]))


def built(
    program: Program, folder: Path, batch: str, *, target: str = TARGET, precision: str = "fp32"
) -> Engine:
    sizes, at, usual = batch.partition("@")
    rest = "x".join(map(str, program.inputs[0].shape[1:]))
    shapes = [f"x={sizes}x{rest}{at}{usual}"]
    return export(program, folder, target=target, precision=precision, threads=1, shapes=shapes)


@pytest.mark.parametrize("batch", ["1..8@4", pytest.param("2", marks=pytest.mark.slow)])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_an_engine_is_built_and_its_file_checked_by_another_runtime(
    reduced: Program, tmp_path: Path, batch: str, precision: str
) -> None:
    engine = built(reduced, tmp_path / "e", batch, precision=precision)
    told = engine.manifest.built
    assert told["steps"] == "function bodies"
    assert ("half" in told["layers"]) == (precision == "fp16")
    assert told["layers"]["int64"] > 0  # positions are computed in the graph
    assert told["bytes"]["weights"] > 0
    assert engine.manifest.estimate is not None
    assert 0.8 < engine.manifest.estimate["weights"] / told["bytes"]["weights"] < 1.25
    assert (tmp_path / "e" / PLAN).stat().st_size > told["bytes"]["weights"] / 2
    assert set(engine.manifest.files) == {"model.onnx", PLAN}
    verified = engine.manifest.verified
    assert verified is not None
    assert verified["run by"] == "CPUExecutionProvider"


def test_the_gpus_are_chosen_in_the_target(reduced: Program, tmp_path: Path) -> None:
    engine = built(reduced, tmp_path / "e", "2", target=f"{TARGET}:sm86+sm120")
    assert engine.manifest.target == "tensorrt-rtx:sm86+sm120"
    assert Engine.load(tmp_path / "e").manifest == engine.manifest


def test_a_gpu_that_it_cannot_build_for_is_named_with_those_it_can(
    reduced: Program, tmp_path: Path
) -> None:
    with pytest.raises(MissingRequirementError, match=r"sm90 is none of .*sm89.*choose one"):
        built(reduced, tmp_path / "e", "2", target=f"{TARGET}:sm89+sm90")
    with pytest.raises(UsageError, match="target 'cpu' leaves nothing to choose: drop ':sm89'"):
        built(reduced, tmp_path / "e", "2", target="cpu:sm89")


def test_what_a_gpu_cannot_compute_is_refused_in_the_builders_words(
    reduced: Program, tmp_path: Path
) -> None:
    with pytest.raises(RefusedError, match=r"cannot build the model: .*FP32 GEMM is not supported"):
        built(reduced, tmp_path / "e", "2", target=f"{TARGET}:sm75")
    assert list(tmp_path.iterdir()) == []


def test_an_axis_without_a_bound_is_told_before_any_work(reduced: Program, tmp_path: Path) -> None:
    said = rf"largest size of batch: give for example --shape x=1\.\.32x{TOKENS}x{WIDTH}@8"
    with pytest.raises(UsageError, match=said):
        export(reduced, tmp_path / "e", target=TARGET)


def test_an_engine_says_why_it_is_not_run(
    reduced: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt_rtx, "no_gpu", lambda: "no NVIDIA driver (libcuda.so.1)")
    engine = built(reduced, tmp_path / "e", "2")
    with pytest.raises(MissingRequirementError, match=r"cannot be run: .*no NVIDIA driver"):
        engine.run({"x": np.zeros((2, TOKENS, WIDTH), np.float32)})


@pytest.mark.parametrize(
    ("capability", "target", "said"),
    [
        ("sm90", TARGET, "knows sm75, .* and this GPU is Card .sm90."),
        ("sm89", f"{TARGET}:sm86+sm120", "they are for sm86, sm120 and this GPU is Card .sm89."),
        ("sm86", f"{TARGET}:sm86+sm120", ""),
        ("sm89", TARGET, ""),
    ],
)
def test_which_gpus_run_an_engine(
    monkeypatch: pytest.MonkeyPatch, capability: str, target: str, said: str
) -> None:
    monkeypatch.setattr(tensorrt_rtx, "gpu", lambda: Gpu("Card", capability, "13.0"))
    for module in (tensorrt_rtx, tensorrt_family):
        monkeypatch.setattr(module, "no_gpu", lambda: "")
    monkeypatch.setattr(tensorrt_family, "no_bindings", lambda extra: "")
    found = backend(target).cannot_run()
    assert re.search(said, found) if said else found == ""


INTERRUPTED = """
import os, signal, sys
from contextlib import nullcontext
from threading import Event
import thresher.cli.export
from thresher.cli.main import main
from thresher.runtime.backends import tensorrt_build

steps, interrupted = [], Event()

def told(what, done, total):
    if what.startswith("TensorRT-RTX: "):
        steps.append(what)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGINT)
            interrupted.wait(10)

# The main thread sets the flag that ends the build; the step under way waits for that.
tensorrt_build.Event = lambda: interrupted
thresher.cli.export.progress = lambda: nullcontext(told)
code = main(["export", "tests.cli.toy:vit", *sys.argv[1:]])
print(code, len(steps))
"""


def test_an_interrupted_build_stops_and_leaves_nothing(tmp_path: Path) -> None:
    """Ctrl-C comes at the third step that the builder tells; it hears no later step than the next.

    In a process of its own, which the signal is for.
    """
    given = ["--target", TARGET, "--shape", "x=2x3x24x24", "-o", str(tmp_path / "e")]
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, *given],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.split() == ["130", "3"], done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_operators_that_only_a_trial_would_refuse_are_known() -> None:
    maker = backend(TARGET)
    scatter = onnx.helper.make_node("ScatterND", ["x", "i", "u"], ["y"], reduction="add")
    assert "reduction 'add'" in str(maker.can_take(scatter, 20))
    assert maker.can_take(onnx.helper.make_node("NonZero", ["x"], ["y"]), 20) is not None
    assert maker.can_take(onnx.helper.make_node("TopK", ["x", "k"], ["v", "i"]), 20) is None


FAMILIES = (
    "timm:deit_small_patch16_224",
    "timm:vit_small_patch14_reg4_dinov2",
    "timm:eva02_tiny_patch14_224",
    "hf:bert",
    "hf:whisper-encoder",
)

CASES = [
    (name, method)
    for name in FAMILIES
    for method in ("tome", "evit", "diffrate")
    if method != "evit" or name.startswith("timm:")  # the others read out no class token
]


def sizes(program: Program) -> list[str]:
    """A range for each symbolic axis."""
    shapes = []
    for spec in program.inputs:
        axes = [size if isinstance(size, int) else None for size in spec.shape]
        body = "x".join(
            f"{size}" if size else "2..4" if i == 0 else "16..48" for i, size in enumerate(axes)
        )
        usual = "x".join("3" if i == 0 else "32" for i, size in enumerate(axes) if size is None)
        shapes.append(f"{spec.name}={body}@{usual}")
    return shapes


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "method"), [("fp32", None), ("fp16", "tome")])
def test_the_estimate_is_near_what_the_builder_says(
    tmp_path: Path, precision: str, method: str | None
) -> None:
    """DeiT-S at batch 32; what was measured is 0.85 to 1.57 of the builder's activations."""
    from thresher.models.options import SourceOptions
    from thresher.models.sources import load_source

    pytest.importorskip("timm")
    program = load_source("timm:deit_small_patch16_224", SourceOptions(weights="random"))
    if method:
        program = optimize(program, load_recipe(method, ["r=13"]))
    shape = ["x=1..32x3x224x224"]
    options: Any = {"precision": precision, "shapes": shape, "check": False}
    engine = export(program, tmp_path / "e", target=TARGET, **options)
    told, said = engine.manifest.built["bytes"], engine.manifest.estimate
    assert said is not None
    assert 0.95 < said["weights"] / told["weights"] < 1.05
    assert 0.5 < said["activations"] / told["activations"] < 2


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize(("name", "method"), CASES)
def test_every_family_builds_with_a_range_of_sizes(
    name: str, method: str, precision: str, tmp_path: Path
) -> None:
    dense = family(name, torch.float32)
    budget = "r=3" if method != "evit" else "keep=0.75"
    program = optimize(dense, load_recipe(method, [budget]))
    engine = export(
        program,
        tmp_path / "e",
        target=TARGET,
        precision=precision,
        threads=1,
        shapes=sizes(program),
        check=False,  # networks this small and random decide by rounding errors in float16
    )
    layers = engine.manifest.built["layers"]
    assert layers.get("half", 0) > 0 if precision == "fp16" else "half" not in layers
