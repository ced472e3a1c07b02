"""Built files are taken from the cache when nothing that decides them has changed, and only then."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.runtime import toys
from thresher.compiler.errors import RefusedError, UsageError
from thresher.runtime import Engine, engine_cache
from thresher.runtime.backends import TARGETS
from thresher.runtime.backends.base import Tell, silent
from thresher.runtime.backends.cpu import OnnxRuntimeCpu
from thresher.runtime.bundle import Facts, package
from thresher.runtime.engine_cache import ENTRY, SWITCH, EngineCache
from thresher.runtime.manifest import Manifest

SIZE = 1000  # bytes of a built file


class Compiler(OnnxRuntimeCpu):
    """Stands for a back end that compiles: its file says what it was built from, and how often."""

    target, prefix, choices, cached = "compiler", "compiled.", True, True
    builds = 0
    gpu = "A"

    def fingerprint(self) -> dict[str, str]:
        return {**super().fingerprint(), "GPU": type(self).gpu}

    def build(self, folder: Path, manifest: Manifest, tell: Tell = silent) -> dict[str, Any]:
        type(self).builds += 1
        (folder / "compiled.bin").write_text(f"{manifest.precision} {self.name}".ljust(SIZE))
        return {"number": type(self).builds}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("THRESHER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv(SWITCH, "1GB")
    monkeypatch.setitem(TARGETS, "compiler", f"{__name__}:Compiler")
    monkeypatch.setattr(Compiler, "builds", 0)
    return tmp_path / "cache" / "engines"


def made(folder: Path, keep: int | None = None, **options: Any) -> Engine:
    return toys.engine(folder, keep, **{"target": "compiler", "overwrite": True, **options})


def test_the_second_engine_is_not_built(tmp_path: Path, place: Path) -> None:
    first, second = made(tmp_path / "a").manifest, made(tmp_path / "b").manifest
    assert Compiler.builds == 1
    assert first.cache == "built: the cache has no engine of this target"
    assert second.cache == "taken from the cache"
    assert (first.built, first.files) == (second.built, second.files)
    assert [path.name[0] for path in place.iterdir() if path.name.startswith(".")] == []


def test_every_part_decides_and_the_nearest_entry_says_which(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(tmp_path / "a")
    said = [
        made(tmp_path / "a", precision="fp16").manifest.cache,
        made(tmp_path / "a", keep=5).manifest.cache,
        made(tmp_path / "a", target="compiler:x").manifest.cache,
    ]
    sized = package(
        toys.transformer(),
        tmp_path / "s",
        facts=Facts(usual={"batch": 8}),
        target="compiler",
        threads=1,
    )
    said.append(sized.manifest.cache)
    monkeypatch.setattr(Compiler, "gpu", "B")
    said.append(made(tmp_path / "a").manifest.cache)
    monkeypatch.setattr(engine_cache, "_builder", lambda: "changed")
    said.append(made(tmp_path / "a").manifest.cache)
    has = "built: the nearest engine in the cache has "
    assert said == [
        f"{has}precision fp32 instead of fp16",
        f"{has}another model",
        f"{has}target compiler instead of compiler:x",
        f"{has}sizes of batch none instead of 1..@8",
        f"{has}GPU A instead of B",
        f"{has}another builder",
    ]
    assert Compiler.builds == 7


@pytest.mark.parametrize("damage", ["changed", "missing", "no entry"])
def test_a_damaged_entry_is_built_anew_and_that_is_said(
    tmp_path: Path, place: Path, damage: str
) -> None:
    whole = made(tmp_path / "a").manifest.files
    (entry,) = place.iterdir()
    if damage == "changed":
        (entry / "compiled.bin").write_text("something else")
    else:
        (entry / ("compiled.bin" if damage == "missing" else ENTRY)).unlink()
    again = made(tmp_path / "b").manifest
    assert again.cache == "built: what the cache held was damaged"
    assert again.files == whole
    assert made(tmp_path / "c").manifest.cache == "taken from the cache"
    assert Compiler.builds == 2


def test_the_least_recently_used_goes_first(
    tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, keep in enumerate((3, 4, 5)):
        made(tmp_path / "a", keep)
        newest = max(place.iterdir(), key=lambda path: path.stat().st_mtime_ns)
        os.utime(newest / ENTRY, (number, number))
    made(tmp_path / "a", 3)  # used again, so 4 is now the oldest
    sizes = sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
    monkeypatch.setattr(engine_cache, "engine_cache", lambda: EngineCache(place, sizes + SIZE // 2))
    made(tmp_path / "a", 6)
    assert len(list(place.iterdir())) == 3
    cached = [made(tmp_path / "a", keep).manifest.cache.startswith("taken") for keep in (3, 5, 6)]
    assert cached == [True, True, True]
    assert not made(tmp_path / "a", 4).manifest.cache.startswith("taken")


def test_what_is_larger_than_the_cache_is_not_kept(tmp_path: Path, place: Path) -> None:
    key, small = {"model": "m"}, EngineCache(place, SIZE - 1)

    def build() -> dict[str, Any]:
        (tmp_path / "f/big").write_bytes(bytes(SIZE))
        return {}

    (tmp_path / "f").mkdir()
    _, said = small.build(key, tmp_path / "f", build)
    assert "larger than the cache may be" in said
    assert not place.exists()


def test_many_at_once_leave_one_whole_entry(tmp_path: Path, place: Path) -> None:
    cache, barrier, failures = EngineCache(place), threading.Barrier(8), []

    def work(number: int) -> None:
        folder = tmp_path / str(number)
        folder.mkdir()
        barrier.wait()
        for _ in range(20):
            (folder / "f").unlink(missing_ok=True)
            built, _ = cache.build({"model": "m"}, folder, lambda: make(folder))
            if built != {"n": 1} or (folder / "f").read_text() != "whole" * SIZE:
                failures.append(number)

    def make(folder: Path) -> dict[str, Any]:
        (folder / "f").write_text("whole" * SIZE)
        return {"n": 1}

    workers = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert failures == []
    assert [set(os.listdir(entry)) for entry in place.iterdir()] == [{"f", ENTRY}]


def test_a_cache_that_cannot_be_written_stops_nobody(tmp_path: Path, place: Path) -> None:
    place.parent.mkdir()
    place.write_text("a file in its place")
    said = made(tmp_path / "a").manifest.cache
    assert said.startswith("built: the cache has no engine of this target; it could not be kept (")


def test_a_build_that_fails_leaves_no_entry(
    tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Compiler, folder: Path, manifest: Manifest, tell: Tell) -> dict[str, Any]:
        raise RefusedError("no")

    monkeypatch.setattr(Compiler, "build", refuse)
    with pytest.raises(RefusedError):
        made(tmp_path / "a")
    assert not place.exists()


def test_the_switch(tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "off")
    assert made(tmp_path / "a").manifest.cache == "built: the cache is switched off"
    assert not place.exists()
    assert toys.engine(tmp_path / "b").manifest.cache == ""  # nothing is built for 'cpu'
    monkeypatch.setenv(SWITCH, "much")
    with pytest.raises(UsageError, match="'much' is neither off nor a size such as 20GB"):
        made(tmp_path / "c")


def test_openvino_takes_its_files_from_the_cache(tmp_path: Path, place: Path) -> None:
    pytest.importorskip("openvino")
    first = made(tmp_path / "a", 5, target="openvino")
    second = made(tmp_path / "b", 5, target="openvino")
    assert second.manifest.cache == "taken from the cache"
    assert first.manifest.files == second.manifest.files
    assert (first.run(toys.feeds())["logits"] == second.run(toys.feeds())["logits"]).all()
    told = json.loads(next(place.glob(f"*/{ENTRY}")).read_text())
    assert set(told["files"]) == {"openvino.xml", "openvino.bin"}
    assert told["key"]["openvino"]
