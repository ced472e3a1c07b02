"""Built engine files, kept so that the same engine need not be built twice.

The key is everything that decides the files, in parts that have names, so that a build can say why nothing
was found.  An entry is a folder ``<digest of the key>`` with the files, and ``entry.json`` with the key,
what the back end told of the build, and the files' checksums.  Entries appear by one rename; what
is read is checked after it was copied.  So processes may share the folder, and a damaged entry is built anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thresher.compiler.errors import UsageError
from thresher.kernels import native
from thresher.runtime.backends import Backend
from thresher.runtime.manifest import MODEL, Manifest, digest, installed

SWITCH = "THRESHER_ENGINE_CACHE"  # "off", or the most that it may hold, such as "20GB"
USUAL_SIZE = 10 * 10**9  # bytes
ENTRY = "entry.json"
ABANDONED = 24 * 3600  # seconds after which nobody is still writing an entry
UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12}
# That decide what is built.
SOURCES = ("runtime/backends/*.py", "compiler/lowering/*.py", "kernels/*.py")
HASHED = ("model", "builder")  # parts whose values say nothing to a person
ROOT = Path(__file__).resolve().parent.parent

Key = Mapping[str, str]


@dataclass(frozen=True)
class Entry:
    """A stored build: its folder, key, what was told of it, and the checksums of its files."""

    folder: Path
    key: dict[str, str]
    built: dict[str, Any]
    files: dict[str, str]
    used: float  # seconds since the epoch, of the last use

    @property
    def bytes(self) -> int:
        return sum(file.stat().st_size for file in self.folder.iterdir())


@dataclass(frozen=True)
class EngineCache:
    """A folder of entries that hold at most ``limit`` bytes; the least recently used goes first."""

    folder: Path
    limit: int = USUAL_SIZE

    def build(
        self, key: Key, folder: Path, build: Callable[[], dict[str, Any]]
    ) -> tuple[dict[str, Any], str]:
        """The files of this key in ``folder``, copied from an entry or made by ``build``.

        Returns what the back end tells of them, and a sentence that says where they come from.
        """
        place = self.folder / _named(key)
        why = ""
        if place.is_dir():
            found = _entry(place)
            if found is not None and _copied(found, folder):
                with contextlib.suppress(OSError):
                    os.utime(place / ENTRY)
                return found.built, "taken from the cache"
            why = "what the cache held was damaged"
        why = why or self._reason(key)
        before = {file.name for file in folder.iterdir()}
        built = build()
        made = [file for file in folder.iterdir() if file.name not in before]
        return built, f"built: {why}{self._stored(key, place, built, made)}"

    def entries(self) -> list[Entry]:
        """All whole entries, the least recently used first."""
        try:
            found = [_entry(place) for place in self.folder.glob("[!.]*")]
        except OSError:
            return []
        return sorted((entry for entry in found if entry), key=lambda entry: entry.used)

    def _reason(self, key: Key) -> str:
        """Which parts of the nearest entry differ."""
        kind = key.get("target", "").partition(":")[0]
        others = [
            entry
            for entry in reversed(self.entries())
            if entry.key != key and entry.key.get("target", "").partition(":")[0] == kind
        ]
        if not others:
            return "the cache has no engine of this target"
        nearest = min((_differences(key, entry.key) for entry in others), key=len)
        return f"the nearest engine in the cache has {'; '.join(nearest)}"

    def _stored(self, key: Key, place: Path, built: dict[str, Any], files: list[Path]) -> str:
        """Keep the files; returns why they could not be, if so.  Whoever comes first stays."""
        if sum(file.stat().st_size for file in files) > self.limit:
            return f"; it is larger than the cache may be ({SWITCH})"
        partial = self.folder / f".{place.name}.{secrets.token_hex(4)}"
        try:
            partial.mkdir(parents=True)
            for file in files:
                shutil.copyfile(file, partial / file.name)
            sums = {file.name: digest(file) for file in files}
            told = {"key": dict(key), "built": built, "files": sums}
            (partial / ENTRY).write_text(json.dumps(told, indent=2) + "\n")
            shutil.rmtree(place, ignore_errors=True)  # damaged, or made meanwhile from the same key
            partial.rename(place)
            self._evict(place)
        except OSError as error:
            if not place.is_dir():
                return f"; it could not be kept ({error.strerror or error})"
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return ""

    def _evict(self, kept: Path) -> None:
        """Make room, and clear away what processes that were killed have left."""
        for left in self.folder.glob(".*"):
            if time.time() - left.stat().st_mtime > ABANDONED:
                shutil.rmtree(left, ignore_errors=True)
        entries = self.entries()
        room = self.limit - sum(entry.bytes for entry in entries)
        for entry in entries:
            if room >= 0:
                return
            if entry.folder != kept:
                room += entry.bytes
                shutil.rmtree(entry.folder, ignore_errors=True)


def engine_cache() -> EngineCache | None:
    """``$THRESHER_CACHE/engines``, by default ``~/.cache/thresher/engines``, unless it is switched off.

    Raises:
        UsageError: the switch is neither "off" nor a size.
    """
    given = os.environ.get(SWITCH, "")
    if given == "off":
        return None
    size = re.fullmatch(r"(\d+)([MGT]B)", given)
    if given and size is None:
        raise UsageError(f"{SWITCH}={given!r} is neither off nor a size such as 20GB")
    limit = int(size[1]) * UNITS[size[2]] if size else USUAL_SIZE
    return EngineCache(native.cache().parent / "engines", limit)


def build(
    maker: Backend, folder: Path, manifest: Manifest, make: Callable[[], dict[str, Any]]
) -> tuple[dict[str, Any], str]:
    """Build through the cache, where the back end has its files kept.

    Args:
        maker: the back end.
        folder: holds ``model.onnx`` and whatever lies beside it.
        manifest: without files yet.
        make: runs the back end's build in ``folder``.

    Returns:
        What the back end tells of its files, and where they come from (nothing, where none are kept).
    """
    if not maker.cached:
        return make(), ""
    cache = engine_cache()
    if cache is None:
        return make(), "built: the cache is switched off"
    return cache.build(key_of(maker, folder, manifest), folder, make)


def key_of(maker: Backend, folder: Path, manifest: Manifest) -> dict[str, str]:
    """Everything that decides the built files, by name."""
    model = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.name.startswith(MODEL):
            model.update(f"{file.name} {digest(file)}\n".encode())
    return {
        "target": maker.name,
        "precision": manifest.precision,
        **{f"sizes of {axis}": sizes for axis, sizes in _sizes(manifest).items()},
        "model": model.hexdigest(),
        "builder": _builder(),
        "onnx": installed("onnx") or "",
        **maker.fingerprint(),
    }


def _sizes(manifest: Manifest) -> dict[str, str]:
    """``"1..32@8"`` by axis: bounds, and the size that is tuned for."""
    found = {}
    for axis in sorted({*manifest.ranges, *manifest.usual}):
        low, high = manifest.ranges.get(axis, (1, None))
        usual = f"@{manifest.usual[axis]}" if axis in manifest.usual else ""
        found[axis] = f"{low}..{'' if high is None else high}{usual}"
    return found


def _builder() -> str:
    """Digest of the sources that decide what is built: versions alone would miss a changed checkout."""
    found = hashlib.sha256()
    for file in sorted(file for pattern in SOURCES for file in ROOT.glob(pattern)):
        found.update(f"{file.relative_to(ROOT).as_posix()}\n".encode() + file.read_bytes())
    return found.hexdigest()


def _named(key: Key) -> str:
    return hashlib.sha256(json.dumps(dict(key), sort_keys=True).encode()).hexdigest()[:32]


def _entry(place: Path) -> Entry | None:
    """The entry in a folder, or None where there is no whole one."""
    try:
        told = json.loads((place / ENTRY).read_text())
        used = (place / ENTRY).stat().st_mtime
        return Entry(place, dict(told["key"]), dict(told["built"]), dict(told["files"]), used)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _copied(entry: Entry, folder: Path) -> bool:
    """Copy the files of an entry and check the copies; nothing stays where one is wrong."""
    with contextlib.suppress(OSError):
        for name in entry.files:
            shutil.copyfile(entry.folder / name, folder / name)
        if all(digest(folder / name) == wanted for name, wanted in entry.files.items()):
            return True
    for name in entry.files:
        (folder / name).unlink(missing_ok=True)
    return False


def _differences(wanted: Key, found: Key) -> list[str]:
    """``"precision fp16 instead of fp32"`` for each part that differs."""
    told = []
    for part in sorted({*wanted, *found}, key=lambda name: (name in HASHED, name)):
        here, there = wanted.get(part, "none"), found.get(part, "none")
        if here != there:
            told.append(
                f"another {part}" if part in HASHED else f"{part} {there} instead of {here}"
            )
    return told
