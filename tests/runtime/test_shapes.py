"""``--shape``: how it is read, what engines make of it, and batches of other sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from tests.compiler.toys import WIDTH, Toy, traced
from tests.runtime import toys
from thresher.compiler.errors import UsageError
from thresher.runtime import ProgramRunner, export, verify
from thresher.runtime.batches import run_in_batches
from thresher.runtime.manifest import TensorInfo
from thresher.runtime.shapes import narrowed

SPECS = (
    TensorInfo(name="ids", dtype="int64", shape=("batch", "length")),
    TensorInfo(name="mask", dtype="int64", shape=("batch", "length")),
    TensorInfo(name="x", dtype="float32", shape=("batch", 3, 24)),
)
RANGES = {"batch": (1, None), "length": (2, 512)}


def test_nothing_asked_is_what_the_model_allows() -> None:
    assert narrowed([], SPECS, RANGES).ranges == RANGES


def test_sizes_ranges_and_usual_sizes() -> None:
    found = narrowed(["ids=1..32x2..128@8x64", "x=1..32x3x24"], SPECS, RANGES)
    assert found.ranges == {"batch": (1, 32), "length": (2, 128)}
    assert found.usual == {"batch": 8, "length": 64}
    fixed = narrowed(["ids=4x16..128@32"], SPECS, RANGES)
    assert fixed.ranges == {"batch": (4, 4), "length": (16, 128)}
    assert fixed.usual == {"batch": 4, "length": 32}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["x"], "write NAME=8x3x224x224"),
        (["x=8x3xa"], "write NAME=8x3x224x224"),
        (["x=8x3x24@"], "write NAME=8x3x224x224"),
        (["y=8"], "there is no input 'y'"),
        (["x=8x3"], r"x has 3 axes and not 2: float32\[batch, 3, 24\]"),
        (["x=8x4x24"], r"an axis is 3 and fixed: float32\[batch, 3, 24\]"),
        (["x=8x3..4x24"], "an axis is 3 and fixed"),
        (["x=8..4x3x24"], "8..4 is an empty range"),
        (["x=0x3x24"], "batch can be 1.., not 0..0"),
        (["ids=1x1024"], r"length can be 2..512, not 1024..1024"),
        (["ids=1..8x64@16"], "the usual size 16 is not in 1..8"),
        (["ids=1..8x64@2x64"], "1 axes have a range and 2 usual sizes are given"),
        (["ids=1..8x64", "mask=1..9x64"], "batch is 1..9 here and 1..8 before"),
    ],
)
def test_what_does_not_fit_is_refused(given: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=f"^--shape {given[-1]}: .*{said}"):
        narrowed(given, SPECS, RANGES)


def test_a_sum_of_axes_follows_from_its_parts() -> None:
    specs = (
        TensorInfo(name="ids", dtype="int64", shape=("sequence",)),
        TensorInfo(name="mask", dtype="int64", shape=("past + sequence",)),
        TensorInfo(name="key", dtype="float32", shape=("past", 8)),
    )
    ranges = {"sequence": (1, None), "past": (0, None)}
    parts = ["ids=1..4@1", "key=0..60x8@30"]
    found = narrowed(parts, specs, ranges)
    assert found.ranges == {"sequence": (1, 4), "past": (0, 60), "past + sequence": (1, 64)}
    assert found.usual["past + sequence"] == 31
    assert narrowed(["mask=1..64", *parts], specs, ranges).ranges == found.ranges
    with pytest.raises(
        UsageError, match=r"mask=1\.\.60: past \+ sequence is 1\.\.64 together, not"
    ):
        narrowed([*parts, "mask=1..60"], specs, ranges)


@pytest.mark.parametrize("target", ["cpu", "openvino"])
def test_an_engine_for_one_batch_computes_the_same(target: str, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    program = traced(Toy())
    tokens = program.inputs[0].shape[1]
    shape = f"x=3x{tokens}x{WIDTH}"
    with export(program, tmp_path / "e", target=target, threads=1, shapes=[shape]) as engine:
        assert engine.manifest.ranges["batch"] == (3, 3)
        assert engine.manifest.fixed == {"batch": 3}
        with pytest.raises(UsageError, match=r"\(batch\) is 2 and must be 3 to 3"):
            engine.run({"x": np.zeros((2, int(tokens), WIDTH), np.float32)})
        assert verify(ProgramRunner(program, threads=1), engine, batch=8).met


def test_openvino_is_compiled_for_a_fixed_batch(tmp_path: Path) -> None:
    """What makes it faster: no axis is left that shapes have to be worked out for."""
    pytest.importorskip("openvino")
    program = traced(Toy())
    shape = f"x=3x{program.inputs[0].shape[1]}x{WIDTH}"
    with export(program, tmp_path / "e", target="openvino", threads=1, shapes=[shape]) as engine:
        compiled = engine._open()._request.get_compiled_model()  # type: ignore[attr-defined]
        assert not any(port.partial_shape.is_dynamic for port in compiled.outputs)


@given(
    count=st.integers(1, 20),
    low=st.integers(1, 6),
    more=st.one_of(st.none(), st.integers(0, 6)),
)
def test_batches_of_any_size_come_out_as_one(count: int, low: int, more: int | None) -> None:
    high = None if more is None else low + more

    def double(x: Any) -> Any:
        assert low <= len(x) <= (high or len(x))
        return 2 * x

    model = toys.Fake("m", double)
    model.ranges = {"batch": (low, high)}
    x = np.arange(10.0 * count, dtype=np.float32).reshape(count, 10)
    assert_array_equal(run_in_batches(model, {"x": x})["logits"], 2 * x)


def test_what_has_no_batch_axis_is_run_as_it_is() -> None:
    model = toys.Fake("m", lambda x: x)
    model.inputs = (TensorInfo(name="x", dtype="float32", shape=(1, 10)),)
    assert_allclose(run_in_batches(model, {"x": np.ones((1, 10))})["logits"], 1)
