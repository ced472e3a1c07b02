"""Engines for TensorRT-RTX with our plugins in place of the function bodies; none of it needs a GPU.

The plugins call the emulated kernels, of which building needs the sizes of the workspace only.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tests.compiler.toys import Toy, traced
from tests.families.traced import program as family
from tests.kernels.emulated import EMULATED, kernels
from tests.runtime.test_tensorrt_rtx import CASES, built, sizes
from thresher.compiler.errors import MissingRequirementError
from thresher.compiler.pipeline import optimize
from thresher.compiler.recipe import load_recipe
from thresher.kernels.native import Library
from thresher.kernels.operator import DOMAIN
from thresher.kernels.registry import WITH_CUDA
from thresher.runtime import export
from thresher.runtime.backends import tensorrt_family
from thresher.runtime.backends.tensorrt_rtx import PLAN
from thresher.runtime.manifest import digest

pytest.importorskip(
    "tensorrt_rtx", reason="tensorrt-rtx is not installed: pip install 'thresher[tensorrt-rtx]'"
)
TARGET = "tensorrt-rtx:plugins"
HERE = Path(tensorrt_family.__file__).parents[2]


@pytest.fixture
def _emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels()
    monkeypatch.setattr(tensorrt_family, "CUDA", EMULATED)


METHODS = {
    "tome": (["r=2"], ("BipartiteMerge",)),
    "max-min": (["keep=0.5"], ("SelectDiverse",)),
    "pitome": (["r=2"], ("TokenEnergy", "RedundantMerge")),
    "atm": (["r=2", "by_size=0"], ("SplitMerge",)),
}


@pytest.mark.usefixtures("_emulated")
@pytest.mark.parametrize("method", METHODS)
def test_plugins_are_built_in_place_of_bodies(method: str, tmp_path: Path) -> None:
    options, steps = METHODS[method]
    program = optimize(traced(Toy()), load_recipe(method, options))
    engine = built(program, tmp_path / "e", "1..8@4", target=TARGET, precision="fp16")
    told = engine.manifest.built
    names = [f"{DOMAIN}::{step} 1" for step in steps]
    assert told["steps"] == f"plugins {', '.join(names)}"
    assert told["plugins"] == dict.fromkeys(names, len(program.ledger))
    library = Library(kind=EMULATED).file
    assert told["plugin library"] == digest(library)
    plan = (tmp_path / "e" / PLAN).read_bytes()
    assert all(step.encode() in plan for step in steps)


@pytest.mark.usefixtures("_emulated")
def test_no_plugin_stays_registered(tmp_path: Path) -> None:
    program = optimize(traced(Toy()), load_recipe("tome", ["r=2"]))
    built(program, tmp_path / "e", "2", target=TARGET)
    plain = built(program, tmp_path / "plain", "2")
    assert plain.manifest.built["steps"] == "function bodies"
    assert b"BipartiteMerge\x00" not in (tmp_path / "plain" / PLAN).read_bytes()


def test_kernels_that_are_not_built_are_named_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("THRESHER_CACHE", str(tmp_path / "cache"))
    program = traced(Toy())
    with pytest.raises(MissingRequirementError, match=r"not built\): thresher kernels build --for"):
        built(program, tmp_path / "e", "2", target=TARGET)


def test_the_plugins_in_cpp_are_the_registered_operators() -> None:
    source = (HERE / "kernels" / "tensorrt" / "plugins.cpp").read_text()
    table = re.findall(r'^    \{"(\w+)",\s+"([^"]*)",\s+"([^"]*)",\s+"([^"]*)"\}', source, re.M)
    kinds = {"T": "T", "tensor(float)": "float", "tensor(int64)": "int64"}
    expected = [
        (
            name,
            " ".join(f"{n}:{kinds[t]}" for n, t in operator.inputs.items()),
            ", ".join(f"{kinds[t]} {operator.shapes[n]}" for n, t in operator.outputs.items()),
            " ".join(f"{n}:{kind.__name__}" for n, kind in operator.attributes.items()),
        )
        for name, operator in WITH_CUDA.items()
    ]
    assert table == expected


@pytest.mark.slow
@pytest.mark.usefixtures("_emulated")
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize(
    ("name", "method"),
    [
        *CASES,
        *(("timm:vit_base_patch16_clip_224", method) for method in ("tome", "evit", "diffrate")),
    ],
)
def test_every_family_builds_with_plugins_and_a_range_of_sizes(
    name: str, method: str, precision: str, tmp_path: Path
) -> None:
    dense = family(name, torch.float32)
    program = optimize(dense, load_recipe(method, ["r=3" if method != "evit" else "keep=0.75"]))
    engine = export(
        program, tmp_path / "e", target=TARGET, precision=precision, threads=1,
        shapes=sizes(program), check=False,  # networks this small and random decide by rounding errors
    )  # fmt: skip
    import onnx

    model = onnx.load(tmp_path / "e" / "model.onnx")
    ours = [node.op_type for node in model.graph.node if node.domain == DOMAIN]
    expected = {f"{DOMAIN}::{one} 1": ours.count(one) for one in ours}
    assert engine.manifest.built["plugins"] == expected
    assert len(ours) >= len(program.ledger) > 0
