"""The Triton kernels compiled for GPUs that are not there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.triton_back_end import device

STREAMING = {
    "_attend", "_closeness", "_copy_rows", "_energy", "_fuse", "_hidden", "_merge_rows", "_nearest",
    "_products_of_rows", "_sum_of_rows", "_summed", "_unit_vectors",
}  # fmt: skip
CAPABILITIES = ("75", "80", "86", "87", "89", "90", "100", "103", "110", "120", "121")


@pytest.fixture(autouse=True)
def _runs() -> None:
    device()


def compiled(*capabilities: str) -> list[str]:
    """Lines of triton_compile.py, which needs a Triton that does not interpret."""
    command = [sys.executable, "-m", "tests.kernels.triton_compile", *capabilities]
    done = subprocess.run(
        command,
        env=os.environ | {"TRITON_INTERPRET": "0"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


def check_compiled(lines: list[str], kernels: str, capabilities: tuple[str, ...]) -> None:
    """These kernels for these GPUs, and within the shared memory that these have."""
    rows = [line.split() for line in lines]
    assert {row[0] for row in rows} == set(kernels.split())
    assert {row[2] for row in rows} == {f"sm_{one}" for one in capabilities}
    assert all(int(row[3]) > 0 for row in rows)
    assert all(int(row[4]) <= (64 if row[2] == "sm_75" else 99) * 1024 for row in rows)
    # A mask at a width that is not known to be a multiple of 16 would make every access a single value.
    assert {row[0] for row in rows if row[5] == "16"} >= {row[0] for row in rows} & STREAMING


def test_the_kernels_of_merging_compile_for_a_gpu() -> None:
    lines = compiled("80", "--types", "fp16", "--operators", "bipartite_merge")
    check_compiled(lines, "_best_of _merge_rows _nearest _place _rank _unit_vectors", ("80",))


def test_the_kernels_of_skipping_compile_for_a_gpu() -> None:
    lines = compiled("90", "--types", "bf16", "--operators", "sparse_gated_ffn")
    check_compiled(lines, "_add_up _products_of_rows _sum_of_rows", ("90",))


@pytest.mark.slow
def test_every_kernel_compiles_for_every_gpu() -> None:
    kernels = (
        "_add_up _attend _best_of _choose _closeness _copy_rows _counted _energy _fuse _hidden _merge_rows"
        " _nearest _place _products_of_rows _rank _select _settle _sorted _sum_of_rows _summed _unit_vectors"
    )
    check_compiled(compiled(*CAPABILITIES, "--types", "fp16"), kernels, CAPABILITIES)


@pytest.mark.slow
def test_every_kernel_compiles_for_every_type() -> None:
    types = ("fp16", "bf16", "fp32")
    assert {line.split()[1] for line in compiled("90", "--types", *types)} == set(types)
