"""The documents do what they say: their commands and examples are run, their links lead somewhere.

Blocks marked ``sh`` and ``python`` run in order, one working folder for each document.  A comment
in the line above a block says otherwise: ``<!-- not run: reason -->``, ``<!-- exits: 3 -->`` for a
command that ends with that code, ``<!-- file: NAME -->`` for a block that is saved and not run.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
BLOCK = re.compile(
    r"^(?:<!-- (?P<mark>[^\n]*?) -->\n+)?```(?P<kind>\w*)[^\n]*\n(?P<text>.*?)^```$", re.M | re.S
)
LINK = re.compile(r"\[[^\]]*\]\((?!\w+:|#)([^)#\s]+)")
SECONDS = 300


@dataclass(frozen=True)
class Block:
    """A fenced block, where it stands, and the comment above it."""

    line: int
    kind: str
    mark: str
    text: str

    def option(self, name: str) -> str | None:
        """``"3"`` for ``option("exits")`` of a block marked ``exits: 3``."""
        key, _, value = self.mark.partition(":")
        return value.strip() if key == name else None


def blocks(document: Path) -> Iterator[Block]:
    text = document.read_text()
    for found in BLOCK.finditer(text):
        line = text.count("\n", 0, found.start("kind")) + 1
        yield Block(line, found["kind"], found["mark"] or "", found["text"])


def runnable(document: Path) -> bool:
    return any(block.kind in ("sh", "python") for block in blocks(document))


def command(block: Block) -> list[str]:
    if block.kind == "python":
        return [sys.executable, "-c", block.text]
    return ["bash", "-euo", "pipefail", "-c", block.text]


@pytest.mark.slow
@pytest.mark.parametrize("document", [d for d in DOCUMENTS if runnable(d)], ids=lambda d: d.name)
def test_commands_and_examples_run(document: Path, tmp_path: Path) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    stacks = {"PYTHONFAULTHANDLER": "1"}  # shown when a command hangs
    environment = {**os.environ, **stacks, "PATH": path, "COLUMNS": "100"}
    for block in blocks(document):
        saved = block.option("file")
        if saved is not None:
            (tmp_path / saved).write_text(block.text)
        elif block.kind in ("sh", "python") and block.option("not run") is None:
            code, out, err = ended(command(block), tmp_path, environment)
            expected = int(block.option("exits") or 0)
            assert code == expected, (
                f"{document.name}:{block.line} ended with {code}\n"
                f"{block.text}\n{out[-2000:]}\n{err[-4000:]}"
            )


def ended(command: list[str], folder: Path, environment: dict[str, str]) -> tuple[int, str, str]:
    """Exit code and output of a command; one that hangs is aborted with all that it started."""
    with subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            out, err = process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGABRT)
            out, err = process.communicate()
    return process.returncode, out, err


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_marks_are_known_and_reasons_given(document: Path) -> None:
    for block in blocks(document):
        known = [block.option(name) for name in ("not run", "exits", "file")]
        assert not block.mark or any(known), f"{document.name}:{block.line} {block.mark!r}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_links_lead_to_files(document: Path) -> None:
    missing = [
        target
        for target in LINK.findall(document.read_text())
        if not (document.parent / target).exists()
    ]
    assert missing == []


def test_blocks_are_found(tmp_path: Path) -> None:
    document = tmp_path / "page.md"
    document.write_text(
        "text\n```sh\none\n```\n<!-- exits: 3 -->\n```sh\ntwo\n```\n\n"
        "<!-- file: a.yaml -->\n\n```yaml\nname: a\n```\n"
    )
    found = list(blocks(document))
    assert [(b.line, b.kind, b.text) for b in found] == [
        (2, "sh", "one\n"),
        (6, "sh", "two\n"),
        (12, "yaml", "name: a\n"),
    ]
    assert [b.option("exits") for b in found] == [None, "3", None]
    assert found[2].option("file") == "a.yaml"
