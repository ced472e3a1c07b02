"""Writing artefacts whole or not at all: a temporary sibling first, then one rename."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from thresher.compiler.errors import UsageError

SERVING = "serving.json"  # beside the configuration of a model server
OURS = (
    "manifest.json",
    "program.yaml",
    "compare.json",
    SERVING,
)  # a folder with one of these was written by thresher
NEARLY_FULL = 1 << 20  # bytes: a failure with less room than this is blamed on the disk


@contextmanager
def atomic_folder(path: Path | str, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder to fill; it takes the name ``path`` when the block ends well.

    When the block fails or is interrupted, nothing appears under ``path`` (an older folder stays
    as it was) and the temporary folder is removed.  An empty folder at ``path`` is replaced.

    Raises:
        UsageError: ``path`` is taken, or is not ours to overwrite, or cannot be written.
    """
    final = Path(path).resolve()
    check_free(final, overwrite=overwrite)
    partial = _sibling(final, "partial")
    try:
        with _told(final, partial):
            final.parent.mkdir(parents=True, exist_ok=True)
            partial.mkdir()
            yield partial
            _swap(partial, final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def atomic_file(path: Path | str, *, overwrite: bool = True) -> Iterator[Path]:
    """Yield a path to write one file to; it takes the name ``path`` when the block ends well.

    Raises:
        UsageError: ``path`` is a folder, is taken, or cannot be written.
    """
    final = Path(path).resolve()
    if final.is_dir():
        raise UsageError(f"{final} is a folder, not a file: give a file name")
    if final.exists() and not overwrite:
        raise UsageError(f"{final} exists already: give another name or allow overwriting")
    partial = _sibling(final, "partial")
    try:
        with _told(final, partial):
            final.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            partial.replace(final)
    finally:
        partial.unlink(missing_ok=True)


def check_free(path: Path | str, *, overwrite: bool = False) -> None:
    """Refuse an output folder that cannot be written, so that long work need not start.

    Raises:
        UsageError: something is there that must not be replaced.
    """
    path = Path(path)
    if not path.exists():
        return
    if not path.is_dir():
        raise UsageError(f"{path} is a file, not a folder: give another output folder")
    names = {entry.name for entry in path.iterdir()}
    if not names:
        return
    if not overwrite:
        raise UsageError(f"{path} exists already: give another output folder or --overwrite")
    if names.isdisjoint(OURS):
        raise UsageError(
            f"{path} was not written by thresher (it has none of {', '.join(OURS)}), so it is not"
            " overwritten: give another output folder"
        )


def _sibling(path: Path, kind: str) -> Path:
    """A hidden name beside ``path``: the same file system, so that renaming is atomic."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.{kind}")


def _swap(partial: Path, final: Path) -> None:
    """Give ``partial`` the final name, bringing an older folder back if that fails."""
    if not final.exists():
        partial.rename(final)
        return
    old = _sibling(final, "old")
    final.rename(old)
    try:
        partial.rename(final)
    except BaseException:
        old.rename(final)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _told(final: Path, partial: Path) -> Iterator[None]:
    """Turn a failure to write into one sentence; failures to read other files pass through."""
    try:
        yield
    except OSError as error:
        named = error.filename
        elsewhere = named is not None and not _inside(named, partial, final)
        if elsewhere:
            raise
        raise UsageError(f"cannot write {final}: {error.strerror or error}") from error
    except RuntimeError as error:  # torch reports a full disk this way
        if shutil.disk_usage(final.parent).free > NEARLY_FULL:
            raise
        raise UsageError(f"cannot write {final}: no space left on the disk") from error


def _inside(name: str | bytes | int, partial: Path, final: Path) -> bool:
    path = os.path.abspath(os.fsdecode(name)) if isinstance(name, str | bytes) else ""
    return path.startswith(str(partial)) or path in map(str, (final, *final.parents))
