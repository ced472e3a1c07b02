"""The native kernels: every type, large and hostile inputs, the library itself, engines that use it."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal

import thresher.kernels.ops  # noqa: F401
from tests.cli.toy import ToyViT
from tests.kernels.back_ends import copied, library, model, run, through_casts
from thresher.compiler.errors import MissingRequirementError
from thresher.compiler.pipeline import optimize
from thresher.compiler.program import Program, SourceInfo
from thresher.compiler.recipe import load_recipe
from thresher.compiler.trace import trace
from thresher.kernels import native as libraries
from thresher.kernels.native import KernelError, Library
from thresher.kernels.registry import OPERATORS
from thresher.runtime import Engine, export
from thresher.runtime.backends.cpu import try_kernels
from thresher.runtime.backends.onnx_runtime import session_options
from thresher.runtime.blocks import block_profiles

ops = torch.ops.thresher
BY_SCORE = ("RedundantMerge", "SplitMerge")
TYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}


@pytest.fixture(autouse=True)
def _built() -> None:
    library()


def attributes_of(name: str, protected: int) -> dict[str, Any]:
    values = {"protected": protected, "margin": 0.5}
    return {attribute: values[attribute] for attribute in OPERATORS[name].attributes}


@pytest.mark.parametrize("name", ["BipartiteMerge", *BY_SCORE])
@pytest.mark.parametrize("element", list(TYPES))
def test_every_type_of_tokens(element: str, name: str) -> None:
    rng = np.random.default_rng(0)
    x, metric = (
        torch.from_numpy(rng.standard_normal(shape)).to(TYPES[element]).float()
        for shape in ((2, 40, 24), (2, 3, 40, 20))
    )
    size = torch.from_numpy(rng.integers(1, 9, (2, 40))).float()
    score = torch.from_numpy(rng.standard_normal((2, 40))).float()
    scored = name in BY_SCORE
    session = through_casts(name, element, protected=1)
    feeds = {"x": x, "size": size, "metric": metric, "keep": torch.tensor(27)}
    feeds |= {"score": score} if scored else {}
    y, total, kept, slot = session.run(None, {n: v.numpy() for n, v in feeds.items()})
    typed = [x.to(TYPES[element]), size, metric.to(TYPES[element])]
    expected = (
        getattr(ops, OPERATORS[name].torch_name)(*typed, score, 27, 1)
        if scored
        else ops.bipartite_merge(*typed, 27, 1, True)
    )
    assert_array_equal(slot, expected[2])
    assert_array_equal(kept, expected[3])
    assert_allclose(total, expected[1], rtol=1e-6)
    unit = torch.finfo(TYPES[element]).eps if element != "float64" else 1e-7
    assert_allclose(y, expected[0].float(), rtol=unit, atol=unit)


@pytest.mark.parametrize("element", list(TYPES))
def test_energies_of_every_type(element: str) -> None:
    """Tiles and vectors that are not full, more tokens than a block, padding."""
    rng = np.random.default_rng(0)
    drawn = rng.standard_normal((2, 3, 203, 21)) + rng.standard_normal((2, 3, 1, 21))
    metric = torch.from_numpy(drawn).to(TYPES[element]).float()
    size = torch.from_numpy(rng.integers(0, 4, (2, 203))).float()
    session = through_casts("TokenEnergy", element, margin=0.6, protected=2)
    (score,) = session.run(None, {"metric": metric.numpy(), "size": size.numpy()})
    assert_allclose(score, ops.token_energy(metric.double(), size, 0.6, 2), atol=1e-6)


def test_tokens_beyond_the_sort_of_other_back_ends() -> None:
    """More than 3840, three threads, odd counts, blocks that are not full."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((2, 4003, 5)).astype(np.float32)
    metric = rng.standard_normal((2, 2, 4003, 11)).astype(np.float32)
    size = rng.integers(1, 5, (2, 4003)).astype(np.float32)
    arguments = {"x": x, "size": size, "metric": metric, "keep": np.array(2503)}
    y, total, kept, slot = run("native", "RankedBipartiteMerge", arguments, protected=2)
    wide = [torch.from_numpy(v).double() for v in (x, size, metric)]
    expected = ops.bipartite_merge(wide[0], wide[1].float(), wide[2], 2503, 2, False)
    # Neighbours in the ranking whose cosines agree to a rounding error may change places.
    assert (slot != expected[2].numpy()).mean() < 1e-3
    same = kept == expected[3].numpy()
    assert same.mean() > 0.999
    assert_allclose(y[same], expected[0].numpy()[same], atol=1e-4)
    assert_allclose(total.sum(1), size.sum(1))


@pytest.mark.parametrize("name", ["BipartiteMerge", *BY_SCORE, "TokenEnergy"])
def test_threads_change_nothing(name: str) -> None:
    import onnxruntime as ort

    rng = np.random.default_rng(2)
    x, metric = rng.standard_normal((3, 301, 64)), rng.standard_normal((3, 2, 301, 32))
    feeds = {
        "x": x.astype(np.float32),
        "size": np.ones((3, 301), np.float32),
        "metric": metric.astype(np.float32),
        "keep": np.array(200),
    }
    ranks: tuple[int, ...] = (3, 2, 4, 0)
    if name in BY_SCORE:
        ranks = (3, 2, 4, 2, 0)
        feeds["score"] = rng.standard_normal((3, 301)).astype(np.float32)
    if name == "TokenEnergy":
        ranks = (4, 2)
        feeds = {n: feeds[n] for n in OPERATORS[name].inputs}
    made = model(name, ranks, "float32", tuple(attributes_of(name, 1).items()))
    results = [
        ort.InferenceSession(
            made.SerializeToString(), session_options(threads, library()),
            providers=["CPUExecutionProvider"],
        ).run(None, feeds)
        for threads in (1, 4)
    ]  # fmt: skip
    for one, other in zip(*results, strict=True):
        assert_array_equal(one, other)


X, SIZE = np.zeros((2, 6, 4), np.float32), np.ones((2, 6), np.float32)
METRIC, POSITIONS = np.zeros((2, 1, 6, 3), np.float32), np.zeros((2, 3), np.int64)
MERGE = {"x": X, "size": SIZE, "metric": METRIC, "keep": np.array(5)}
KEEP = {"x": X, "score": SIZE, "keep": np.array(5)}
PRUNE = {"x": X, "size": SIZE, "score": SIZE, "pruned": np.array(5), "keep": np.array(4)}
DIVERSE = {"x": X, "size": SIZE, "keep": np.array(5)}
SCORED = {"x": X, "size": SIZE, "metric": METRIC, "score": SIZE, "keep": np.array(5)}
ENERGY = {"metric": METRIC, "size": SIZE}
REDUCING: dict[str, dict[str, Any]] = {
    "BipartiteMerge": MERGE,
    "KeepTokens": KEEP,
    "FuseTokens": KEEP,
    "PruneMerge": PRUNE,
    "SelectDiverse": DIVERSE,
    **dict.fromkeys(BY_SCORE, SCORED),
}
SCORED_HOSTILE: Sequence[tuple[dict[str, Any], int, str]] = [
    ({"keep": np.array(3)}, 1, "keep can be reached, not"),
    ({"keep": np.array(7)}, 1, "keep can be reached, not"),
    ({"score": SIZE[:, :5]}, 1, r"score is \[B, N\], not \[2, 5\]"),
    ({"metric": METRIC[:1]}, 1, "metric is .* of the same batch"),
    ({}, 6, "protected is less than the tokens, not"),
]
HOSTILE: Sequence[tuple[str, dict[str, Any], int, str]] = [
    ("BipartiteMerge", MERGE | {"x": X[0]}, 1, r"x is \[B, N, C\], not \[6, 4\]"),
    ("BipartiteMerge", MERGE | {"keep": np.array(7)}, 1, "keep can be reached, not"),
    ("BipartiteMerge", MERGE | {"keep": np.array(-(2**63))}, 1, "keep can be reached, not"),
    ("BipartiteMerge", MERGE | {"keep": np.array([5, 5])}, 1, "a count is one number"),
    ("BipartiteMerge", MERGE, 7, "protected is a number of the tokens, not"),
    ("BipartiteMerge", MERGE, -1, "protected is a number of the tokens, not"),
    ("BipartiteMerge", MERGE | {"size": SIZE[:, :5]}, 1, r"size is \[B, N\], not \[2, 5\]"),
    ("BipartiteMerge", MERGE | {"metric": METRIC[:1]}, 1, "metric is .* of the same batch"),
    ("BipartiteMerge", MERGE | {"metric": METRIC[:, :0]}, 1, "metric has heads"),
    ("KeepTokens", KEEP | {"keep": np.array(0)}, 1, "keep can be reached, not"),
    ("KeepTokens", KEEP | {"score": SIZE[:1]}, 1, "score is"),
    ("FuseTokens", KEEP | {"keep": np.array(1)}, 1, "keep can be reached, not"),
    ("FuseTokens", KEEP, 6, "protected is a number of the tokens, not"),
    ("SelectDiverse", DIVERSE | {"keep": np.array(1)}, 1, "keep can be reached, not"),
    ("SelectDiverse", DIVERSE | {"size": SIZE[:, :5]}, 1, r"size is \[B, N\], not \[2, 5\]"),
    ("SelectDiverse", DIVERSE, 6, "protected is a number of the tokens, not"),
    *(
        (name, SCORED | changed, protected, said)
        for name in BY_SCORE
        for changed, protected, said in SCORED_HOSTILE
    ),
    (
        "TokenEnergy",
        ENERGY | {"metric": METRIC[0]},
        1,
        r"metric is \[B, H, N, d\], not \[1, 6, 3\]",
    ),
    ("TokenEnergy", ENERGY | {"metric": METRIC[:, :0]}, 1, "metric has heads"),
    ("TokenEnergy", ENERGY | {"size": SIZE[:, :5]}, 1, r"size is \[B, N\], not \[2, 5\]"),
    ("TokenEnergy", ENERGY, 7, "protected is a number of the tokens, not"),
    ("TokenEnergy", ENERGY, -1, "protected is a number of the tokens, not"),
    ("PruneMerge", PRUNE | {"pruned": np.array(3)}, 1, "pruned can be reached"),
    ("PruneMerge", PRUNE | {"keep": np.array(1)}, 1, "keep can be reached"),
]


@pytest.mark.parametrize(("name", "arguments", "protected", "said"), HOSTILE)
def test_hostile_input_is_an_error(
    name: str, arguments: dict[str, Any], protected: int, said: str
) -> None:
    with pytest.raises(Exception, match=f"{name}: {said}"):
        run("native", name, arguments, **attributes_of(name, protected))


def test_positions_out_of_range_are_an_error() -> None:
    with pytest.raises(Exception, match="GatherTokens: index has positions of tokens, not"):
        run("native", "GatherTokens", {"x": X, "index": POSITIONS + 6})
    arguments: dict[str, Any] = {"x": X, "slot": POSITIONS + 6, "aside": X[:, :3]}
    with pytest.raises(Exception, match="RestoreTokens: slot has positions in x, not"):
        run("native", "RestoreTokens", arguments)
    q, bias = METRIC, np.zeros((), np.float32)
    with pytest.raises(Exception, match="ClassAttention: row is a query, not"):
        run("native", "ClassAttention", {"q": q, "k": q, "bias": bias}, scale=1.0, row=6)


def test_nan_is_no_crash() -> None:
    """What is chosen is of no meaning, but positions stay positions."""
    nan = np.float32("nan")
    for name, arguments in REDUCING.items():
        spoilt = {n: v * nan if v.dtype == np.float32 else v for n, v in arguments.items()}
        *_, kept, slot = run("native", name, spoilt, protected=1)
        assert ((kept >= 0) & (kept < 6)).all()
        assert (slot < 6).all()


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("BipartiteMerge", MERGE), *((name, SCORED) for name in BY_SCORE), ("TokenEnergy", ENERGY)],
)
def test_an_empty_batch_is_no_crash(name: str, arguments: dict[str, Any]) -> None:
    empty = {n: v[:0] if v.ndim else v for n, v in arguments.items()}
    y, *_ = run("native", name, empty, **attributes_of(name, 1))
    assert y.shape == ((0, 6) if name == "TokenEnergy" else (0, 5, 4))


def test_the_library_is_found_by_its_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("THRESHER_KERNELS")
    assert libraries.wanted() == Library().file == library()
    assert Library(("-g",)).find() is None
    monkeypatch.setenv("THRESHER_KERNELS", "off")
    assert libraries.wanted() is None


def test_a_library_that_was_changed_is_not_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with copied(tmp_path, monkeypatch).open("ab") as file:
        file.write(b"more")
    with pytest.raises(KernelError, match="is not what was built there: run thresher kernels"):
        libraries.wanted()


def test_a_file_that_is_no_library_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "lib.so").write_bytes(b"no library")
    with pytest.raises(MissingRequirementError, match=r"lib.so cannot be loaded \(.*set THRESHER"):
        try_kernels(tmp_path / "lib.so")


def test_a_compiler_that_is_missing_or_fails_is_one_sentence_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("THRESHER_CACHE", str(tmp_path))
    with pytest.raises(KernelError, match="no-such-compiler was not found: install"):
        Library().build("no-such-compiler")
    with pytest.raises(KernelError, match="false could not compile the kernels: exit code 1"):
        Library().build("false")
    assert list((tmp_path / "kernels").iterdir()) == []


def toy() -> Program:
    torch.manual_seed(0)
    return trace(
        ToyViT().eval(),
        {"x": torch.zeros(2, 3, 24, 24)},
        dynamic={"x": {0: "batch"}},
        info=SourceInfo("toy", "random"),
    )


@pytest.mark.parametrize(
    "method",
    [
        "tome",
        "max-min",
        "pitome",
        *(pytest.param(m, marks=pytest.mark.slow) for m in ("diffrate", "evit", "topk-norm")),
    ],
)
def test_engines_take_the_kernels_and_compute_the_same(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = optimize(toy(), load_recipe(method, ["flops=0.7"]))
    export(program, tmp_path / "toy", threads=1)
    x = np.random.default_rng(0).standard_normal((3, 3, 24, 24)).astype(np.float32)
    with Engine.load(tmp_path / "toy", threads=1) as bodies:
        plain = bodies.run({"x": x})
        assert bodies.details["kernels"] == "function bodies"
    monkeypatch.delenv("THRESHER_KERNELS")
    with Engine.load(tmp_path / "toy", threads=1) as native:
        assert native.details["kernels"] == "native"
        for name, value in native.run({"x": x}).items():
            assert_allclose(value, plain[name], atol=1e-5)
    (profile,) = block_profiles([tmp_path / "toy"], {"x": x}, threads=1, runs=2)
    operators = {n for n in profile.inserted if n in OPERATORS}
    assert operators


# Tests of numbers in each file; not those about the ordinary library and programs of their own.
OF_NUMBERS = [
    (("bodies", "native"), "native and not library_is_found"),
    (("sparse",), "native or hostile or every_size"),
    (
        ("gate", "learners"),
        "(size or everybody or no_tokens or hostile or every_type or packed) and not triton",
    ),
]


def run_again(names: Sequence[str], chosen: str, **environment: str) -> None:
    """Tests of these files in a process of their own."""
    tests = [f"tests/kernels/test_{name}.py" for name in names]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-m", "not slow", *tests, "-k", chosen],
        env={**os.environ, **environment},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " passed" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("names", "chosen"), OF_NUMBERS)
def test_no_access_out_of_bounds_and_no_undefined_behaviour(
    names: tuple[str, ...], chosen: str
) -> None:
    """The parity and hostile tests again, under AddressSanitizer and UndefinedBehaviorSanitizer."""
    compiler = next(filter(shutil.which, libraries.CPU.compilers))
    preload = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")  # it has to see how exceptions are thrown
    ]
    if not all(Path(file).is_absolute() for file in preload):
        pytest.skip(f"{compiler} has no AddressSanitizer")
    sanitized = Library(libraries.SANITIZED)
    sanitized.find() or sanitized.build(compiler)
    run_again(
        names,
        chosen,
        LD_PRELOAD=" ".join(preload),
        ASAN_OPTIONS="detect_leaks=0:detect_odr_violation=0",
        THRESHER_TEST_SANITIZED="1",
    )


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="NEON is part of every aarch64")
@pytest.mark.parametrize("isa", ["sse2", "avx2"])
@pytest.mark.parametrize(("names", "chosen"), OF_NUMBERS)
def test_instruction_sets_that_are_not_the_best_here(
    names: tuple[str, ...], chosen: str, isa: str
) -> None:
    """The same tests with what processors have that lack the best one."""
    run_again(names, chosen, THRESHER_ISA=isa)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("clang++"), reason="clang++ is not installed")
def test_clang_compiles_the_same_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(libraries.CACHE, str(tmp_path))
    made = Library(("-Werror",)).build("clang++")
    try_kernels(made)
    assert libraries.isa(made) == libraries.isa(library())


@pytest.mark.skipif(platform.machine() != "x86_64", reason="NEON is part of every aarch64")
def test_an_instruction_set_can_be_the_most_that_is_used() -> None:
    ask = "import sys; from pathlib import Path; from thresher.kernels.native import isa; print(isa(Path(sys.argv[1])))"
    told = subprocess.run(
        [sys.executable, "-c", ask, str(library())],
        env={**os.environ, "THRESHER_ISA": "sse2"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout.strip() == "sse2"
    assert libraries.isa(library()) in ("sse2", "avx2", "avx512")
