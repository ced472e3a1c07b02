"""``thresher kernels``, and what doctor says of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Cli
from tests.kernels.back_ends import copied, openvino_library
from thresher.kernels.native import CHECKSUM, Library, isa
from thresher.kernels.openvino_library import extension


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache in which nothing is built yet, and kernels that are not switched off."""
    monkeypatch.setenv("THRESHER_CACHE", str(tmp_path))
    monkeypatch.delenv("THRESHER_KERNELS")
    return tmp_path


@pytest.fixture
def built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The library in a cache of the test's own."""
    return copied(tmp_path, monkeypatch)


def test_what_is_built_is_found_and_tried(cli: Cli, built: Path) -> None:
    done = cli("kernels", "build", "--json")
    assert (done.code, done.err) == (0, "")
    assert done.json == {
        "schema": "thresher.kernels/1",
        "library": str(built),
        "digest": built.parent.name,
        "built": False,
    }
    state = f"built, run with {isa(built)}"
    assert cli("doctor", "--json").json["kernels"]["cpu"] == {
        "ok": True, "state": state, "remedy": "",
    }  # fmt: skip


def test_a_damaged_library_is_told_with_the_remedy(
    cli: Cli, failed: Callable[..., str], built: Path
) -> None:
    built.write_bytes(b"")
    assert "run thresher kernels build --force" in failed(4, "kernels", "build")
    found = cli("doctor", "--json").json["kernels"]["cpu"]
    assert not found["ok"]
    assert found["remedy"] == "thresher kernels build --force"


def test_a_library_of_another_machine_is_told(cli: Cli, built: Path) -> None:
    built.write_bytes(b"of another machine")
    checksum = hashlib.sha256(built.read_bytes()).hexdigest()
    built.with_name(CHECKSUM).write_text(checksum)
    found = cli("doctor", "--json").json["kernels"]["cpu"]
    assert not found["ok"]
    assert f"{built} cannot be loaded here" in found["state"]
    assert found["remedy"] == "thresher kernels build --force"


@pytest.mark.slow
def test_kernels_for_openvino_are_found_and_tried(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    openvino_library()
    kind = extension()
    place = copied(tmp_path, monkeypatch, kind)
    done = cli("kernels", "build", "--for", "openvino")
    assert (done.code, done.err, done.out) == (0, "", f"already built: {place}\n")
    found = cli("doctor", "--json").json["kernels"]
    assert found["openvino"] == {"ok": True, "state": "built", "remedy": ""}
    assert not found["cpu"]["ok"]


def test_without_openvino_there_is_nothing_to_build_for(
    cli: Cli, failed: Callable[..., str], empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("thresher.kernels.openvino_library.find_spec", lambda package: None)
    assert "OpenVINO is not installed" in failed(4, "kernels", "build", "--for", "openvino")
    assert "not installed" in cli("doctor", "--json").json["kernels"]["openvino"]["state"]


def test_cuda_kernels_need_nvcc(failed: Callable[..., str], empty: Path) -> None:
    said = failed(4, "kernels", "build", "--for", "cuda", "--compiler", "no-such-nvcc")
    assert "no-such-nvcc was not found: install NVIDIA's CUDA toolkit" in said


def test_what_is_missing_is_told_with_the_command(
    cli: Cli, failed: Callable[..., str], empty: Path
) -> None:
    said = failed(4, "kernels", "build", "--compiler", "no-such-compiler")
    assert "no-such-compiler was not found: install g++ 11" in said
    found = cli("doctor", "--json").json["kernels"]["cpu"]
    assert found["state"].startswith("not built")
    assert found["remedy"] == "thresher kernels build"
    assert "thresher kernels build" in cli("doctor").out


def test_kernels_may_be_switched_off(
    cli: Cli, built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("THRESHER_KERNELS", "off")
    assert cli("doctor", "--json").json["kernels"]["cpu"]["state"] == "switched off"


@pytest.mark.slow
def test_built_from_nothing(cli: Cli, empty: Path) -> None:
    done = cli("kernels", "build")
    assert (done.code, done.err) == (0, "")
    assert done.out == f"written: {Library().file}\n"
    assert sorted(file.name for file in Library().file.parent.iterdir()) == [
        "libthresher_cpu.so",
        "sha256",
    ]
