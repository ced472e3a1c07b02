"""Running an engine: right numbers, clear words for wrong inputs, no torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.reference
import pytest
from numpy.typing import NDArray

from tests.runtime import toys
from thresher.compiler.errors import UsageError
from thresher.runtime.engine import Engine
from thresher.runtime.feeds import checked
from thresher.runtime.manifest import TensorInfo
from thresher.runtime.sample import random_inputs


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return toys.engine(tmp_path_factory.mktemp("engines") / "toy.engine", keep=5)


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_the_numbers_are_those_of_the_model(engine: Engine, batch: int) -> None:
    feeds = toys.feeds(batch)
    expected = onnx.reference.ReferenceEvaluator(toys.transformer(5)).run(None, feeds)
    assert isinstance(expected, list)
    found = engine.run(feeds)
    assert list(found) == ["logits"]
    np.testing.assert_allclose(found["logits"], expected[0], rtol=1e-5, atol=1e-5)


def test_what_an_engine_says_of_itself(engine: Engine) -> None:
    assert engine.name == "toy"
    assert engine.threads == 1
    assert engine.reduced
    assert engine.details == {
        "provider": "CPUExecutionProvider",
        "threads": "1",
        "kernels": "function bodies",
    }
    assert engine.load_seconds > 0


def test_a_closed_engine_says_so(tmp_path: Path) -> None:
    with toys.engine(tmp_path / "toy") as engine:
        pass
    engine.close()
    with pytest.raises(UsageError, match="is closed"):
        engine.run(toys.feeds())


def test_threads_must_be_positive(engine: Engine) -> None:
    with pytest.raises(UsageError, match="threads must be at least 1, not 0"):
        Engine.load(engine.folder, threads=0)


def array(*shape: int, dtype: Any = np.float32) -> NDArray[Any]:
    return np.zeros(shape, dtype)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"pixels": array(2, 8, 16)}, r"there is no input 'pixels'; known: x"),
        ({"x": array(2, 8, 16), "x1": array(1)}, r"there is no input 'x1'; did you mean 'x'"),
        ({}, r"the input 'x' float32\[batch, 8, 16\] is missing"),
        ({"x": array(8, 16)}, r"has 2 axes \[8, 16\] and needs 3: float32\[batch, 8, 16\]"),
        ({"x": array(2, 9, 16)}, r"axis 1 of the input 'x' is 9 and must be 8"),
        ({"x": array(0, 8, 16)}, r"axis 0 of the input 'x' \(batch\) is 0 and must be at least 1"),
        ({"x": array(2, 8, 16, dtype=np.uint8)}, r"is uint8 and must be float32: convert it"),
    ],
)
def test_wrong_inputs(engine: Engine, given: dict[str, NDArray[Any]], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        engine.run(given)


def test_floats_are_cast_and_made_contiguous(engine: Engine) -> None:
    feeds = toys.feeds(3)
    wide = {"x": np.asfortranarray(feeds["x"].astype(np.float64))}
    np.testing.assert_array_equal(engine.run(feeds)["logits"], engine.run(wide)["logits"])


IDS = TensorInfo(name="ids", dtype="int32", shape=("batch", "words"))
MASK = TensorInfo(name="mask", dtype="int64", shape=("batch", "words"))


def test_integers_are_cast_when_they_fit() -> None:
    found = checked(
        {"ids": array(1, 4, dtype=np.int64), "mask": array(1, 4, dtype=bool)}, (IDS, MASK)
    )
    assert found["ids"].dtype == np.int32
    assert found["mask"].dtype == np.int64
    big = np.full((1, 4), 2**40)
    with pytest.raises(UsageError, match="is int64 and must be int32"):
        checked({"ids": big, "mask": big}, (IDS, MASK))


def test_one_symbol_is_one_size() -> None:
    given = {"ids": array(2, 4, dtype=np.int32), "mask": array(2, 5, dtype=np.int64)}
    with pytest.raises(
        UsageError,
        match=r"axis 1 of the input 'mask' \(words\) is 5 and axis 1 of the input 'ids', .* is 4",
    ):
        checked(given, (IDS, MASK))


def test_the_allowed_range_is_named() -> None:
    given = {"ids": array(2, 600, dtype=np.int32)}
    with pytest.raises(UsageError, match=r"\(words\) is 600 and must be 1 to 512"):
        checked(given, (IDS,), {"words": (1, 512)})


def test_unnamed_axes_are_unrelated() -> None:
    free = TensorInfo(name="x", dtype="float32", shape=("?", "?"))
    assert checked({"x": array(2, 3)}, (free,))["x"].shape == (2, 3)


def test_random_inputs_suit_the_inputs() -> None:
    specs = (IDS, MASK, TensorInfo(name="x", dtype="float32", shape=("batch", 3)))
    made = random_inputs(specs, batch=2, sizes={"words": 5}, seed=3)
    assert [value.shape for value in made.values()] == [(2, 5), (2, 5), (2, 3)]
    assert (made["mask"] == 1).all()
    again = random_inputs(specs, batch=2, sizes={"words": 5}, seed=3)
    np.testing.assert_array_equal(made["ids"], again["ids"])
    assert random_inputs(specs, ranges={"words": (1, 12)})["ids"].shape == (1, 12)


PROGRAM = """
import sys
import numpy as np
from thresher.runtime import Engine
with Engine.load(sys.argv[1], threads=1) as engine:
    engine.run({"x": np.zeros((1, 8, 16), np.float32)})
heavy = {"torch", "onnx", "onnxscript", "openvino", "matplotlib", "transformers"} & set(sys.modules)
sys.exit(f"imported {heavy}" if heavy else 0)
"""


def test_running_an_engine_imports_no_torch(engine: Engine) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(engine.folder)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
