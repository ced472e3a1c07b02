"""The CUDA kernels: emulated on the CPU, where numbers are at stake, and compiled by nvcc.

That they equal the definitions in all small cases is tested in ``test_bodies``.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal

import thresher.kernels.ops  # noqa: F401
from tests.kernels.back_ends import SWITCHED_ON
from tests.kernels.cuda_back_end import run
from tests.kernels.emulated import EMULATED, EMULATOR, call, kernels, results
from tests.kernels.test_native import (
    BY_SCORE,
    DIVERSE,
    ENERGY,
    HOSTILE,
    KEEP,
    MERGE,
    METRIC,
    POSITIONS,
    PRUNE,
    REDUCING,
    SCORED,
    X,
    attributes_of,
)
from thresher.kernels.cuda_library import CUDA, ELEMENTS, Call, Kernels, Tensor
from thresher.kernels.native import HERE, SANITIZED, KernelError, Library
from thresher.kernels.registry import OPERATORS, WITH_CUDA
from thresher.runtime.backends.jetson import plugin_sources

ops = torch.ops.thresher
EXTRA = SANITIZED if SWITCHED_ON else ()
USUAL = {n: a for n, a in (*REDUCING.items(), ("TokenEnergy", ENERGY)) if n in WITH_CUDA}
TOKENS = 301  # more than two blocks of a ranking, ten tiles of a matching, none of them full


def arrays(seed: int, heads: int = 2) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(seed)
    made = {
        "x": rng.standard_normal((2, TOKENS, 40)),
        "metric": rng.standard_normal((2, heads, TOKENS, 20)),
        "size": rng.integers(0, 4, (2, TOKENS)),
        "score": rng.standard_normal((2, TOKENS)),
    }
    return {name: torch.from_numpy(value).float() for name, value in made.items()}


def equal(found: Sequence[Any], expected: Sequence[torch.Tensor]) -> None:
    """Numbers to a few roundings, positions exactly."""
    for one, other in zip(found, expected, strict=True):
        if other.is_floating_point():
            assert_allclose(one, other, rtol=1e-5, atol=1e-5)
        else:
            assert_array_equal(one, other)


@pytest.mark.parametrize("by_index", [True, False])
def test_merging_over_many_tiles(by_index: bool) -> None:
    given = arrays(1)
    name = "BipartiteMerge" if by_index else "RankedBipartiteMerge"
    arguments = {n: given[n].numpy() for n in ("x", "size", "metric")} | {"keep": np.array(200)}
    y, size, kept, slot = run(name, arguments, EXTRA, protected=2)
    wide = ops.bipartite_merge(*(given[n] for n in ("x", "size", "metric")), 200, 2, by_index)
    equal((y, size, slot, kept), wide)


def test_pruning_and_merging_over_many_tiles() -> None:
    given = arrays(2)
    counts = {"pruned": np.array(260), "keep": np.array(150)}
    arguments = {n: given[n].numpy() for n in ("x", "size", "score")} | counts
    y, size, kept, slot = run("PruneMerge", arguments, EXTRA, protected=1)
    wide = ops.prune_merge(*(given[n] for n in ("x", "size", "score")), 260, 150, 1)
    equal((y, size, slot, kept), wide)


@pytest.mark.parametrize("keep", [301, 290, 152])
@pytest.mark.parametrize("name", BY_SCORE)
def test_merging_by_score_over_many_tiles(name: str, keep: int) -> None:
    given = arrays(7)
    arguments = {n: given[n].numpy() for n in SCORED if n != "keep"} | {"keep": np.array(keep)}
    y, size, kept, slot = run(name, arguments, EXTRA, protected=2)
    operator = getattr(ops, OPERATORS[name].torch_name)
    equal((y, size, slot, kept), operator(*(given[n] for n in SCORED if n != "keep"), keep, 2))


def test_choosing_over_many_tiles() -> None:
    given = arrays(5)
    arguments = {n: given[n].numpy() for n in ("x", "size")} | {"keep": np.array(120)}
    y, kept, slot = run("SelectDiverse", arguments, EXTRA, protected=2)
    equal((y, slot, kept), ops.select_diverse(given["x"], given["size"], 120, 2))


def test_energies_over_many_tiles() -> None:
    given = arrays(6)
    arguments = {n: given[n].numpy() for n in ("metric", "size")}
    for margin, protected in ((0.25, 2), (0.0, TOKENS)):
        (score,) = run("TokenEnergy", arguments, EXTRA, margin=margin, protected=protected)
        wide = ops.token_energy(given["metric"].double(), given["size"], margin, protected)
        assert_allclose(score, wide, rtol=1e-5, atol=1e-6)


def test_fusing_over_many_blocks() -> None:
    given = arrays(3)
    arguments = {n: given[n].numpy() for n in ("x", "score")} | {"keep": np.array(140)}
    y, kept, slot = run("FuseTokens", arguments, EXTRA, protected=1)
    equal((y, slot, kept), ops.keep_tokens(given["x"], given["score"], 140, 1, True))


def test_attention_over_many_keys() -> None:
    rng = np.random.default_rng(4)
    q, k = (rng.standard_normal((2, 3, n, 37)).astype(np.float32) for n in (2, 300))
    bias = rng.standard_normal((1, 3, 1, 300)).astype(np.float32)
    (score,) = run("ClassAttention", {"q": q, "k": k, "bias": bias}, EXTRA, scale=0.2, row=1)
    expected = ops.class_attention(*map(torch.from_numpy, (q, k, bias)), 0.2, 1)
    assert_allclose(score, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["BipartiteMerge", "SelectDiverse", *BY_SCORE])
def test_bfloat16_rounds_once(name: str) -> None:
    """numpy has no such type, so the call is made by hand."""
    rng = torch.manual_seed(0)
    given = {
        "x": torch.randn(2, 40, 24, generator=rng).bfloat16(),
        "size": torch.ones(2, 40),
        "metric": torch.randn(2, 1, 40, 8, generator=rng).bfloat16(),
        "score": torch.randn(2, 40, generator=rng),
    }
    inputs = [given[one] for one in OPERATORS[name].inputs if one != "keep"]
    by_index = [True] if name == "BipartiteMerge" else []
    expected = getattr(ops, OPERATORS[name].torch_name)(*inputs, 30, 1, *by_index)
    found = [torch.zeros_like(one) for one in expected]
    ordered = [*found[:-2], found[-1], found[-2]]  # slot comes last
    _launch(name, inputs, ordered, {"keep": 30, "protected": 1})
    assert torch.equal(found[-2], expected[-2])
    assert_allclose(found[0].float(), expected[0].float(), rtol=2**-8, atol=2**-8)


def test_tokens_of_bfloat16_are_gathered_and_keys_of_it_felt() -> None:
    x, index = torch.randn(2, 40, 24).bfloat16(), torch.randint(0, 40, (2, 9))
    y = torch.zeros(2, 9, 24).bfloat16()
    _launch("GatherTokens", [x, index], [y], {})
    assert torch.equal(y, ops.gather_tokens(x, index))
    metric, size, score = x[:, None].contiguous(), torch.ones(2, 40), torch.zeros(2, 40)
    _launch("TokenEnergy", [metric, size], [score], {"margin": 0.5, "protected": 1})
    assert_allclose(score, ops.token_energy(metric, size, 0.5, 1), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.int32, torch.float64])
@pytest.mark.parametrize("width", [1, 3, 8])
def test_tokens_of_any_type_are_gathered(dtype: torch.dtype, width: int) -> None:
    x, index = torch.randint(0, 2, (2, 5, width)).to(dtype), torch.randint(-5, 5, (2, 7))
    y = torch.zeros(2, 7, width, dtype=dtype)
    _launch("GatherTokens", [x, index], [y], {})
    assert torch.equal(y, ops.gather_tokens(x, index % 5))


def test_positions_out_of_range_read_nothing() -> None:
    far = np.array([[0, 6, -7], [2**62, -(2**63), 5]])
    (y,) = run("GatherTokens", {"x": X + 1, "index": far}, EXTRA)
    assert_array_equal(y[..., 0], [[1, 0, 0], [0, 0, 1]])
    arguments = {"x": X + 1, "slot": far, "aside": X[:, :3] + 2}
    (y,) = run("RestoreTokens", arguments, EXTRA)
    assert_array_equal(y[..., 0], [[1, 0, 2], [0, 2, 1]])


@pytest.mark.parametrize(
    ("name", "arguments", "protected"),
    # The count "pruned" is read on the device, where nothing can be refused.
    [(n, a, p) for n, a, p, said in HOSTILE if n in WITH_CUDA
     and "pruned" not in said and a.get("keep", KEEP["keep"]).ndim == 0
     and not (n == "PruneMerge" and a["keep"] == 1)],
)  # fmt: skip
def test_hostile_input_is_an_error(name: str, arguments: dict[str, Any], protected: int) -> None:
    library, operator = kernels(EXTRA), OPERATORS[name]
    arguments = {one: np.array(value, order="C") for one, value in arguments.items()}
    made = call(name, arguments, results(name, USUAL[name]), protected=protected)
    room = np.zeros(1 << 16, np.uint8)
    made.workspace, made.workspace_bytes = room.ctypes.data, room.size
    with pytest.raises(KernelError, match=f"{name}: (the shapes|keep, protected or row)"):
        library.launch(operator, made)
    assert not room.any()


@pytest.mark.parametrize(("pruned", "joins"), [(-(2**63), 0), (3, 0), (5, 1), (2**63 - 1, 2)])
def test_a_pruned_count_out_of_reach_is_bounded(pruned: int, joins: int) -> None:
    *_, slot = run("PruneMerge", PRUNE | {"pruned": np.array(pruned)}, EXTRA, protected=1)
    assert (slot < 0).sum() == 2 * (2 - joins)


def test_other_nonsense_is_an_error() -> None:
    library, operator = kernels(EXTRA), OPERATORS["BipartiteMerge"]
    outputs = results("BipartiteMerge", MERGE)
    made = call("BipartiteMerge", MERGE, outputs, protected=1)
    with pytest.raises(KernelError, match="the workspace is missing or too small"):
        library.launch(operator, made)
    wrong = call("BipartiteMerge", MERGE | {"size": POSITIONS}, outputs, protected=1)
    with pytest.raises(KernelError, match="the shapes of the tensors do not fit"):
        library.workspace(operator, wrong)
    made.inputs[0].dims[0] = -1
    with pytest.raises(KernelError, match="the shapes of the tensors do not fit"):
        library.workspace(operator, made)
    made.inputs[0].dims[0] = made.inputs[1].dims[0] = made.inputs[2].dims[0] = 2**40
    with pytest.raises(KernelError, match="the shapes of the tensors do not fit"):
        library.workspace(operator, made)
    half = call("BipartiteMerge", MERGE | {"x": X.astype(np.float64)}, outputs, protected=1)
    with pytest.raises(KernelError, match="a type that the operator does not take"):
        library.workspace(operator, half)


def test_more_pairs_than_can_be_counted_are_an_error() -> None:
    made = call("SelectDiverse", DIVERSE, results("SelectDiverse", DIVERSE), protected=1)
    made.inputs[0].dims[1] = made.inputs[1].dims[1] = 2**31 - 1
    with pytest.raises(KernelError, match="more tokens than a grid has blocks"):
        kernels(EXTRA).workspace(OPERATORS["SelectDiverse"], made)


def test_outputs_that_nobody_reads_may_be_missing() -> None:
    outputs = results("BipartiteMerge", MERGE)
    y, *others = outputs.values()
    _launch_call("BipartiteMerge", call("BipartiteMerge", MERGE, {"y": y}, protected=1))
    assert (y != 77).all()
    assert all((one == 77).all() for one in others)


def test_nan_is_no_crash() -> None:
    """What is chosen is of no meaning, but positions stay positions."""
    nan = np.float32("nan")
    for name in WITH_CUDA.keys() & REDUCING:
        arguments = REDUCING[name].items()
        spoilt = {n: v * nan if v.dtype == np.float32 else v for n, v in arguments}
        *_, kept, slot = run(name, spoilt, EXTRA, protected=1)
        assert ((kept >= 0) & (kept < 6)).all()
        assert (slot < 6).all()


def test_nothing_to_do_is_no_crash() -> None:
    for name, arguments in USUAL.items():
        empty = {n: v[:0] if v.ndim else v for n, v in arguments.items()}
        assert all(len(one) == 0 for one in run(name, empty, EXTRA, **attributes_of(name, 1)))
    none = {"x": X, "size": X[..., 0], "score": X[..., 0], "pruned": np.array(6)}
    y, *_, slot = run("PruneMerge", none | {"keep": np.array(0)}, EXTRA, protected=0)
    assert y.shape == (2, 0, 4)
    assert (slot == -1).all()
    (score,) = run(
        "ClassAttention",
        {"q": METRIC, "k": METRIC[:, :, :0], "bias": np.zeros((), np.float32)}, EXTRA, scale=1.0,
        row=0,
    )  # fmt: skip
    assert score.shape == (2, 0)


ALIKE = """
#include <cuda_runtime.h>
__global__ void turn(int* at) {
  __shared__ int shared[64];
  shared[threadIdx.x] = at[threadIdx.x];
  BARRIER
  at[threadIdx.x] = shared[63 - threadIdx.x];
}
extern "C" __attribute__((visibility("default"))) void start(int* at) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(1);
  config.blockDim = dim3(64);
  cudaLaunchKernelEx(&config, turn, at);
}
int main() { int at[64] = {}; start(at); }
"""


def test_the_emulator_tells_a_missing_and_a_divergent_barrier(tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    for barrier, alike in (("__syncthreads();", True), (";", False)):
        file, made = tmp_path / "turn.cu", tmp_path / f"{alike}.so"
        file.write_text(ALIKE.replace("BARRIER", barrier))
        command = [compiler, "-std=c++17", "-fPIC", "-shared", f"-I{EMULATOR}", "-xc++", str(file)]
        subprocess.run([*command, "-o", str(made)], check=True)
        library = ctypes.CDLL(str(made))
        found = []
        for falling in (0, 1):
            library.thresher_emulator_falling(falling)
            at = np.arange(64, dtype=np.int32)
            library.start(ctypes.c_void_p(at.ctypes.data))
            found.append(at)
        assert (found[0] == found[1]).all() == alike
    file.write_text(ALIKE.replace("BARRIER", "if (threadIdx.x) __syncthreads();"))
    command = [compiler, "-std=c++17", f"-I{EMULATOR}", "-xc++", str(file)]
    subprocess.run([*command, "-o", str(tmp_path / "divergent")], check=True)
    done = subprocess.run([tmp_path / "divergent"], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "a barrier was not met by all threads" in done.stderr


def test_the_plugin_in_cpp_computes_shapes_and_runs_the_kernels(tmp_path: Path) -> None:
    """Against a stub of TensorRT's header, and with the emulated kernels behind it."""
    kernels()
    emulated = Library(kind=EMULATED).file
    stub, program = EMULATOR.parent / "tensorrt_stub", tmp_path / "driver"
    sources = [HERE / "tensorrt" / "plugins.cpp", stub / "driver.cpp"]
    command = ["g++", "-std=c++17", "-Wall", "-Wextra", "-Werror", f"-I{HERE}", f"-I{stub}"]
    linked = [str(emulated), f"-Wl,-rpath,{emulated.parent}", "-o", str(program)]
    subprocess.run([*command, *map(str, sources), *linked], check=True)
    rng = np.random.default_rng(5)
    x, metric = rng.standard_normal((2, 1, 9, 4)).astype(np.float32)
    size = rng.integers(1, 5, (1, 9)).astype(np.float32)
    numbers = [9, 4, 6, *x.ravel(), *size.ravel(), *metric.ravel()]
    text = " ".join(f"{number:.9g}" for number in numbers)
    done = subprocess.run([program], input=text, capture_output=True, text=True, check=True)
    names, said = done.stdout.split()[: len(WITH_CUDA)], done.stdout.split()[len(WITH_CUDA) :]
    assert names == list(WITH_CUDA)
    assert said[:5] == ["1", "6", "4", "1", "6"]
    arguments = {"x": x, "size": size, "metric": metric[:, None], "keep": np.array(6)}
    y, total, *_ = run("BipartiteMerge", arguments, protected=1)
    assert_array_equal(np.array(said[5:], np.float32), np.concatenate([y.ravel(), total.ravel()]))


GPUS = ("75", "80", "86", "87", "89", "90", "100", "110", "120", "121")


@pytest.mark.slow
def test_nvcc_compiles_them_for_every_gpu_and_a_launch_without_one_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which(os.environ.get("NVCC", "nvcc")) is None:
        pytest.skip("nvcc is not installed")
    monkeypatch.setenv("THRESHER_CACHE", str(tmp_path))
    more = tuple(f"-gencode=arch=compute_{one},code=sm_{one}" for one in GPUS)
    more = tuple(one for one in more if one not in CUDA.flags)
    built = Kernels(Library((*more, "-Werror=all-warnings"), CUDA).build())
    made = call("KeepTokens", KEEP, results("KeepTokens", KEEP), protected=1)
    assert built.workspace(OPERATORS["KeepTokens"], made) > 0
    if torch.cuda.is_available():
        return
    room = np.zeros(built.workspace(OPERATORS["KeepTokens"], made), np.uint8)
    made.workspace, made.workspace_bytes = room.ctypes.data, room.size
    with pytest.raises(KernelError, match=r"KeepTokens: .*(driver|device)"):
        built.launch(OPERATORS["KeepTokens"], made)


def _launch(
    name: str, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor], numbers: Any
) -> None:
    sides = [
        [Tensor.of(t.data_ptr(), str(t.dtype).removeprefix("torch."), t.shape) for t in side]
        for side in (inputs, outputs)
    ]
    assert all(tensor.element in ELEMENTS.values() for side in sides for tensor in side)
    _launch_call(name, Call.of(sides[0], sides[1], numbers))


def _launch_call(name: str, made: Call) -> None:
    library, operator = kernels(EXTRA), OPERATORS[name]
    room = np.zeros(library.workspace(operator, made), np.uint8)
    made.workspace, made.workspace_bytes = room.ctypes.data, room.size
    library.launch(operator, made)


@pytest.mark.slow
def test_cmake_builds_the_plugins_of_a_jetson_folder(tmp_path: Path) -> None:
    """With the stub of TensorRT's header."""
    if shutil.which("cmake") is None or shutil.which("nvcc") is None:
        pytest.skip("cmake or nvcc is not installed")
    for file in plugin_sources():
        place = tmp_path / file.relative_to(HERE.parent)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, place)
    stub = EMULATOR.parent / "tensorrt_stub"
    source, place = tmp_path / "kernels" / "tensorrt", tmp_path / "build"
    configure = ["cmake", "-S", str(source), "-B", str(place)]
    chosen = [f"-DTENSORRT_ROOT={stub}", "-DCMAKE_CUDA_ARCHITECTURES=87"]
    subprocess.run([*configure, *chosen], check=True, capture_output=True)
    subprocess.run(["cmake", "--build", str(place)], check=True, capture_output=True)
    assert (place / "libthresher_tensorrt.so").is_file()
