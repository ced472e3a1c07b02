"""The runner of TensorRT engines follows the protocol.  It was not run on a GPU: what answers here is
``fake_tensorrt``, which checks every call."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.runtime.fake_tensorrt import PLAN, Cuda, TensorRt
from thresher.compiler.errors import MissingRequirementError, RefusedError
from thresher.runtime.backends import cuda_memory
from thresher.runtime.backends.cuda_memory import CudaMemory, no_bindings
from thresher.runtime.backends.tensorrt_run import TensorRtSession


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    made = Cuda()
    monkeypatch.setattr("importlib.import_module", lambda name: made)
    return made


@pytest.fixture
def session(cuda: Cuda, tmp_path: Path) -> Iterator[TensorRtSession]:
    made = opened(TensorRt(cuda), tmp_path, PLAN)
    yield made
    made.close()


def opened(trt: Any, folder: Path, plan: bytes) -> TensorRtSession:
    (folder / "plan").write_bytes(plan)
    return TensorRtSession(trt, CudaMemory(), folder / "plan", "TensorRT", {"provider": "TensorRT"})


def batch(rows: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(rows).standard_normal((rows, 3)).astype(np.float32)


def test_results_are_those_of_the_engine_at_every_size(
    session: TensorRtSession, cuda: Cuda
) -> None:
    kept = {}
    for rows in (2, 4, 1, 3):  # grows, then has room
        x = batch(rows)
        kept[rows] = session.run({"x": x})
        assert len(cuda.buffers) == 3
        np.testing.assert_array_equal(kept[rows]["y"], 2 * x)
        np.testing.assert_allclose(kept[rows]["s"], x.sum(axis=1), rtol=1e-6)
    np.testing.assert_array_equal(kept[2]["y"], 2 * batch(2))  # no result is overwritten later


def test_an_input_of_another_layout_and_width_is_brought_to_the_engines(
    session: TensorRtSession,
) -> None:
    x = np.asfortranarray(batch(4).astype(np.float64))
    np.testing.assert_array_equal(session.run({"x": x})["y"], 2 * batch(4))


def test_everything_is_freed_once(cuda: Cuda, tmp_path: Path) -> None:
    trt = TensorRt(cuda)
    session = opened(trt, tmp_path, PLAN)
    session.run({"x": batch(2)})
    assert sorted(trt.alive) == ["Context", "Engine", "Runtime"]
    session.close()
    session.close()
    gc.collect()
    assert (cuda.buffers, cuda.streams, trt.alive) == ({}, {}, [])
    with pytest.raises(AssertionError, match="closed"):
        session.run({"x": batch(2)})


def test_a_size_outside_the_profile_is_told_and_the_session_goes_on(
    session: TensorRtSession,
) -> None:
    with pytest.raises(RefusedError, match=r"takes no \[5, 3\] for x: not in the profile"):
        session.run({"x": batch(5)})
    np.testing.assert_array_equal(session.run({"x": batch(2)})["y"], 2 * batch(2))


def test_a_plan_that_is_not_for_this_library_leaves_nothing(cuda: Cuda, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=r"cannot load .*plan: the version of the plan is anot"):
        opened(TensorRt(cuda), tmp_path, b"another")
    assert cuda.streams == {}


def test_a_gpu_without_room_says_so_and_leaks_nothing(session: TensorRtSession, cuda: Cuda) -> None:
    session.run({"x": batch(1)})
    cuda.room = 13
    with pytest.raises(MissingRequirementError, match=r"cudaMalloc: out of memory.*smaller batch"):
        session.run({"x": batch(4)})
    cuda.room = 1 << 20
    np.testing.assert_array_equal(session.run({"x": batch(4)})["y"], 2 * batch(4))
    session.close()
    assert cuda.buffers == {}


def test_bindings_that_are_missing_come_with_their_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_memory, "BINDINGS", "no_such_bindings")
    said = no_bindings("tensorrt-rtx")
    assert "No module named 'no_such_bindings'" in said
    assert said.endswith("pip install 'thresher[tensorrt-rtx]'")
