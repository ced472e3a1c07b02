"""The recipe files that ship with the passes, by name."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import files
from importlib.resources.abc import Traversable

_PACKAGE, _FOLDER, _SUFFIX = "thresher.passes", "recipes", ".yaml"


def names() -> list[str]:
    """All names, each with the folders that its file lies in: ``"diffrate/deit-s@2.9g"``."""

    def below(folder: Traversable, before: str) -> Iterator[str]:
        for entry in folder.iterdir():
            if entry.is_dir():
                yield from below(entry, f"{before}{entry.name}/")
            elif entry.name.endswith(_SUFFIX):
                yield before + entry.name.removesuffix(_SUFFIX)

    return sorted(below(files(_PACKAGE) / _FOLDER, ""))


def text(name: str) -> str:
    """The text of one of them."""
    return (files(_PACKAGE) / _FOLDER / f"{name}{_SUFFIX}").read_text(encoding="utf-8")
