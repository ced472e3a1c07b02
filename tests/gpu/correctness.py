"""Section ``correctness``: the kernels' tests on the device, as the pytest of a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

from tests.gpu.rows import Row, Setting

ROOT = Path(__file__).parents[2]
# Compiling for other GPUs needs none; what is left runs here.
SUITES = {
    "Triton kernels, large and hostile input": [
        "tests/gpu/test_device.py", "tests/kernels/test_triton.py", "-k", "not compile"],
    "Triton kernels against the float64 oracles": [
        "tests/kernels/test_bodies.py", "tests/kernels/test_sparse.py",
        "tests/kernels/test_sparse_ffn.py", "tests/kernels/test_adaptive.py",
        "tests/kernels/test_experts.py", "tests/kernels/test_learners.py", "-k", "triton"],
    "CUDA kernels": [
        "tests/kernels/test_bodies.py", "tests/kernels/test_cuda.py",
        "-k", "cuda and not nvcc and not cmake and not emulator", "-n0"],  # one builds them
}  # fmt: skip
PROCESSES = min(os.cpu_count() or 1, 8)  # that compile kernels beside each other
DRY = {"a few": ["tests/kernels/test_triton.py", "-k", "nothing_to_do"]}


def correctness(setting: Setting) -> Iterator[Row]:
    """One row for each suite."""
    for name, chosen in (DRY if setting.dry else SUITES).items():
        yield run(name, chosen)


def run(name: str, chosen: list[str]) -> Row:
    """Passed if tests ran and none failed."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "results.xml"
        options = ["-q", "-p", "no:cacheprovider", f"--junitxml={file}", f"-n{PROCESSES}"]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *options, *chosen],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        sys.stderr.write(done.stdout)
        if not file.is_file():
            said = (done.stderr or done.stdout).strip().splitlines() or ["no reason"]
            return Row("correctness", name, passed=False, note=said[-1])
        return verdict(name, ET.parse(file).getroot())


def verdict(name: str, results: ET.Element) -> Row:
    """The row of a JUnit file."""
    suites = list(results.iter("testsuite"))
    total, skipped = (sum(int(s.get(key, 0)) for s in suites) for key in ("tests", "skipped"))
    bad = [
        case.get("name", "?")
        for case in results.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    ran = total - skipped
    note = f"{ran - len(bad)} of {ran} tests passed" + f", {skipped} skipped" * bool(skipped)
    note += f"; failed: {', '.join(bad[:3])}" if bad else ""
    return Row("correctness", name, passed=ran > 0 and not bad, note=note)
