"""Numbered dumps: the text of a Program before and after each pass.

``NN-pass-name.before.txt`` is written before the pass starts and ``NN-pass-name.after.txt`` before
its result is verified, so that a pass that fails leaves something to read.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from thresher.compiler.contract import Pass
from thresher.compiler.errors import UsageError
from thresher.compiler.files import atomic_file
from thresher.compiler.program import PassRecord, Program
from thresher.compiler.text import options_text, record_line

OURS = re.compile(r"\d{2,}-[a-z0-9-]+\.(before|after)\.txt")


class Dumps:
    """A folder of dumps; those of an earlier run are removed.

    Raises:
        UsageError: the folder holds other files, or cannot be written.
    """

    def __init__(self, folder: Path, total: int) -> None:
        self.folder, self.total = folder, total
        try:
            folder.mkdir(parents=True, exist_ok=True)
            present = sorted(folder.iterdir())
            foreign = [entry.name for entry in present if not OURS.fullmatch(entry.name)]
            if foreign:
                raise UsageError(
                    f"{folder} holds {foreign[0]!r}, which is no dump: give an empty folder"
                )
            for entry in present:
                entry.unlink()
        except OSError as error:
            raise UsageError(
                f"cannot write dumps to {folder}: {error.strerror or error}"
            ) from error

    def before(self, number: int, one: Pass[Any], program: Program) -> None:
        """Write what the pass is about to get."""
        options = options_text(one.options.model_dump(mode="json"))
        self._write(number, one.name, "before", f"{one.name}({options})", program)

    def after(self, number: int, record: PassRecord, program: Program) -> None:
        """Write what the pass made of it."""
        head = f"{record_line(record)}, {record.seconds:.2f} s"
        self._write(number, record.name, "after", head, program)

    def _write(self, number: int, name: str, when: str, head: str, program: Program) -> None:
        text = f"# {when} pass {number} of {self.total}: {head}\n{program.text()}"
        with atomic_file(self.folder / f"{number:02d}-{name}.{when}.txt") as path:
            path.write_text(text, encoding="utf-8")
