"""The state of a search, for a person and for a log."""

from __future__ import annotations

import io
import sys

import pytest

from tests.search.toys import outcome
from thresher.cli.board import Board
from thresher.passes.tokens.search.front import Demands
from thresher.passes.tokens.search.outcome import Counts, Outcome


class Terminal(io.StringIO):
    """Takes what a person would see."""

    def isatty(self) -> bool:
        return True


def watched(known: bool) -> Board:
    earlier: dict[Counts, Outcome] = {(50, 40): outcome(0.99, 0.6)} if known else {}
    return Board(9, "flops", Demands(flops=0.8), earlier)


def test_a_terminal_gets_a_live_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with watched(known=False) as board:
        board.add(1, (30, 20), outcome(0.75, 0.5))
        board.add(2, (30, 10), outcome(0.25, 0.4))
    said = terminal.getvalue()
    assert "trial 2 of 9" in said
    assert "30 10" in said
    assert "best" in said
    assert "75.00%" in said


def test_a_log_gets_a_line_a_trial(capsys: pytest.CaptureFixture[str]) -> None:
    with watched(known=True) as board:
        board.add(2, (30, 20), outcome(0.75, 0.5))
    assert capsys.readouterr().err == (
        "trial 2 of 9: 30 20: 75.00%, 50.0%; best so far 99.00% with 50 40\n"
    )
