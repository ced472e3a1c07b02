"""The native kernels inside OpenVINO: hostile inputs, counts that are constants, the library, engines that use it.

That they compute what the definitions say is tested where those are (test_bodies.py, test_gate.py, ...).
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx.helper
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from tests.kernels.back_ends import (
    NATIVE_OPENVINO,
    copied,
    model,
    openvino_library,
    run,
    with_constants,
)
from tests.kernels.test_native import (
    ENERGY,
    HOSTILE,
    MERGE,
    POSITIONS,
    SCORED,
    X,
    attributes_of,
    toy,
)
from thresher.compiler.errors import MissingRequirementError
from thresher.compiler.pipeline import optimize
from thresher.compiler.recipe import load_recipe
from thresher.kernels import openvino_library as extensions
from thresher.kernels.native import KernelError, Library, wanted
from thresher.kernels.openvino_library import TAKEN, extension
from thresher.kernels.registry import OPERATORS
from thresher.runtime import Engine, export
from thresher.runtime.backends.openvino import core_with, try_kernels

pytestmark = pytest.mark.slow  # the library takes a minute to build


@pytest.fixture(autouse=True)
def _built() -> None:
    openvino_library()


@pytest.mark.parametrize(("name", "arguments", "protected", "said"), HOSTILE)
def test_hostile_input_is_an_error(
    name: str, arguments: dict[str, Any], protected: int, said: str
) -> None:
    with pytest.raises(RuntimeError, match=f"(?s){name}.*({said}|input 0 has rank)"):
        run(NATIVE_OPENVINO, name, arguments, **attributes_of(name, protected))


def test_positions_out_of_range_are_an_error() -> None:
    with pytest.raises(RuntimeError, match="GatherTokens: index has positions of tokens, not"):
        run(NATIVE_OPENVINO, "GatherTokens", {"x": X, "index": POSITIONS + 6})


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("BipartiteMerge", MERGE), ("RedundantMerge", SCORED), ("TokenEnergy", ENERGY)],
)
def test_an_empty_batch_is_no_crash(name: str, arguments: dict[str, Any]) -> None:
    empty = {n: v[:0] if v.ndim else v for n, v in arguments.items()}
    y, *_ = run(NATIVE_OPENVINO, name, empty, **attributes_of(name, 1))
    assert y.shape == ((0, 6) if name == "TokenEnergy" else (0, 5, 4))


@pytest.mark.parametrize("element", ["int64", "int32", "uint8", "bool"])
def test_tokens_of_whole_numbers(element: str) -> None:
    """Which the plugin keeps in other types than the graph says."""
    x = np.arange(12).reshape(2, 3, 2).astype(element)
    index = np.array([[2, 0], [1, 1]])
    (y,) = run(NATIVE_OPENVINO, "GatherTokens", {"x": x, "index": index})
    assert_array_equal(y, np.take_along_axis(x, index[..., None], 1))


def constant_keep(keep: int, outputs: int | None = None) -> Any:
    """A merging model whose count is a constant, read by OpenVINO."""
    made = model("BipartiteMerge", (3, 2, 4, 0), "float32", (("protected", 1),), outputs)
    with_constants(made, {"keep": np.array(keep)})
    if outputs:
        made.graph.node[-1].attribute.append(onnx.helper.make_attribute("plugin_outputs", outputs))
    return core_with(openvino_library()).read_model(made.SerializeToString())


def test_a_constant_count_is_an_axis_and_another_one_is_not() -> None:
    read = constant_keep(5)
    assert [str(port.partial_shape) for port in read.outputs] == [
        "[?,5,?]", "[?,5]", "[?,5]", "[?,?]",
    ]  # fmt: skip
    open_count = model("BipartiteMerge", (3, 2, 4, 0), "float32", (("protected", 1),))
    read = core_with(openvino_library()).read_model(open_count.SerializeToString())
    assert str(read.outputs[0].partial_shape) == "[?,?,?]"


def test_outputs_that_nobody_reads_are_not_made() -> None:
    (node,) = (n for n in constant_keep(5, 2).get_ops() if n.get_type_name() == "BipartiteMerge")
    assert node.get_output_size() == 2


@pytest.mark.parametrize("keep", [-1, 0, 7])
def test_a_hostile_constant_is_an_error(keep: int) -> None:
    import openvino as ov

    feeds = {n: v for n, v in MERGE.items() if n != "keep"}
    with pytest.raises(RuntimeError, match="keep can be reached, not"):
        ov.compile_model(constant_keep(keep), "CPU")(feeds)


def test_nodes_that_differ_in_an_attribute_stay_two() -> None:
    """OpenVINO makes one of nodes that read the same and whose attributes are equal."""
    import openvino as ov

    made = model("KeepTokens", (3, 2, 0), "float32", (("protected", 1),), 1)
    other = made.graph.node.add()
    other.CopyFrom(made.graph.node[0])
    other.output[0] = "z"
    next(a for a in other.attribute if a.name == "protected").i = 0
    result = made.graph.output.add()
    result.CopyFrom(made.graph.output[0])
    result.name = "z"
    read = core_with(openvino_library()).read_model(made.SerializeToString())
    score = np.array([[-1, 2, 3, 4]], np.float32)
    x = np.arange(4, dtype=np.float32).reshape(1, 4, 1)
    found = ov.compile_model(read, "CPU")({"x": x, "score": score, "keep": np.array(2)})
    assert found["y"].ravel().tolist() == [0, 3]
    assert found["z"].ravel().tolist() == [2, 3]


def test_a_library_belongs_to_a_release(monkeypatch: pytest.MonkeyPatch) -> None:
    here = Library(kind=extension()).digest
    monkeypatch.setattr(extensions, "version", lambda package: "1.0")
    assert Library(kind=extension()).digest != here


def test_without_openvino_or_its_headers_it_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(extensions, "find_spec", lambda package: spec)
    with pytest.raises(KernelError, match="has no headers or libraries to build against: install"):
        extension()
    monkeypatch.setattr(extensions, "find_spec", lambda package: None)
    with pytest.raises(KernelError, match="OpenVINO is not installed: pip install"):
        extension()


def test_a_file_that_is_no_library_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "lib.so").write_bytes(b"no library")
    with pytest.raises(MissingRequirementError, match=r"cannot be loaded .*--for openvino, or set"):
        try_kernels(tmp_path / "lib.so")


def test_every_operator_with_shapes_has_a_kernel() -> None:
    said = openvino_library().read_bytes()
    assert [name for name in TAKEN if name.encode() not in said] == []
    assert "SparseLinear" in OPERATORS.keys() - TAKEN.keys()


def bfloat16() -> bool:
    import openvino as ov

    return "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


SYMBOLIC: tuple[str, ...] = ()
FIXED = ("x=3x3x24x24",)
METHODS = ("tome", "evit", "pitome", "diffrate", "max-min")
ENGINES = list(product(METHODS, ("fp32", "fp16", "bf16"), (SYMBOLIC, FIXED)))


@pytest.mark.parametrize(("method", "precision", "shapes"), ENGINES)
def test_engines_take_the_kernels_and_compute_the_same(
    method: str, precision: str, shapes: tuple[str, ...], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if precision == "bf16" and not bfloat16():
        pytest.skip("this CPU has no bfloat16 arithmetic")
    program = optimize(toy(), load_recipe(method, ["flops=0.7"]))
    folder = tmp_path / "toy"
    export(program, folder, target="openvino", precision=precision, threads=1, shapes=shapes)
    x = np.random.default_rng(0).standard_normal((3, 3, 24, 24)).astype(np.float32)
    with Engine.load(folder, threads=1) as bodies:
        assert bodies.details["kernels"] == "function bodies"
        plain = bodies.run({"x": x})["output"]
    monkeypatch.delenv("THRESHER_KERNELS")
    with Engine.load(folder, threads=1) as native:
        assert native.details["kernels"] == "native"
        found = native.run({"x": x})["output"]
        if not shapes:  # a second size of batch
            assert_allclose(native.run({"x": x[:1]})["output"], found[:1], atol=0.05)
    assert_allclose(found, plain, atol=0.05 if precision == "bf16" else 1e-5)


def test_an_engine_without_our_operators_or_with_one_that_has_no_kernel_runs_bodies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("THRESHER_KERNELS")
    with export(toy(), tmp_path / "dense", target="openvino", threads=1) as dense:
        assert dense.details["kernels"] == "function bodies"
        assert dense.manifest.built == {"operators": []}
    program = optimize(toy(), load_recipe("tome", ["flops=0.7"]))
    with export(program, tmp_path / "tome", target="openvino", threads=1) as reduced:
        assert reduced.details["kernels"] == "native"
        assert reduced.manifest.built == {"operators": ["BipartiteMerge"]}
    monkeypatch.setattr(
        "thresher.kernels.openvino_library.TAKEN", TAKEN.keys() - {"BipartiteMerge"}
    )
    with Engine.load(tmp_path / "tome", threads=1) as reduced:
        assert reduced.details["kernels"] == "function bodies"


def test_a_library_that_was_changed_is_not_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = extension()
    with copied(tmp_path, monkeypatch, kind).open("ab") as file:
        file.write(b"more")
    with pytest.raises(KernelError, match="run thresher kernels build --force --for openvino"):
        wanted(kind)
