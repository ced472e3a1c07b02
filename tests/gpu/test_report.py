"""The script for GPU machines, on a machine without one."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from tests.gpu import report
from tests.gpu.correctness import verdict
from tests.gpu.report import SECTIONS, Section, main, run_all, within
from tests.gpu.rows import Row, Setting


def test_a_dry_run_ends_with_one_table_and_its_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole models, in this process; the slow test runs all sections in theirs."""
    eager = SECTIONS["eager"].load()
    monkeypatch.setattr(report, "run_all", lambda *_: list(eager(Setting("cpu", dry=True))))
    file = tmp_path / "report.json"
    assert main(["--dry", "--only", "eager", "--json", str(file)]) == 0
    said = capsys.readouterr().out
    assert "passed: kernels and references differ by 0.0e+00" in said
    record = json.loads(file.read_text())
    agreement, timing, _ = record["rows"]
    assert agreement["passed"]
    assert timing["case"] == "toy tome flops=0.6: launch by launch"
    assert timing["low"] <= timing["ratio"] <= timing["high"]
    assert timing["ideal"] > 1
    assert record["hardware"]["device"] == "cpu"


@pytest.mark.slow
def test_all_sections_dry(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    assert main(["--dry", "--seconds", "5000", "--json", str(file)]) == 0
    rows = [Row(**row) for row in json.loads(file.read_text())["rows"]]
    assert {row.section for row in rows} == set(SECTIONS)
    assert [row for row in rows if row.case in ("not begun", "not to its end")] == []
    assert {row.section for row in rows if row.passed} == {"correctness", "eager", "engines"}
    assert {row.section for row in rows if row.ratio} == set(SECTIONS) - {"correctness"}
    assert any("there is no target 'unknown'" in row.note for row in rows)


def test_a_section_that_breaks_costs_its_own_rows_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SECTIONS, "operators", Section(100, "nowhere:none", check=True))
    found = [Row("engines", "fine")]
    real = report.within
    monkeypatch.setattr(
        report, "within", lambda name, *rest: found if name == "engines" else real(name, *rest)
    )
    monkeypatch.setattr("sys.executable", "false")  # a child that fails at once
    rows = run_all(["operators", "engines"], 100, ["--dry"])
    assert rows[-1] is found[0]
    assert (rows[0].case, rows[0].passed) == ("not to its end", False)
    assert rows[0].note == "failed: no reason"


def test_a_section_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    (row,) = within("correctness", SECTIONS["correctness"], 0.01, ["--dry"])
    assert (row.passed, row.note) == (False, "ended after its 0 s")
    assert run_all(["engines"], 0, [])[0].note == "no time was left"


def test_a_failed_check_is_the_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    for passed, code in ((True, 0), (None, 0), (False, 1)):
        rows = [Row("correctness", "one", passed=passed, note="a | b\nc")]
        monkeypatch.setattr(report, "run_all", lambda *_, rows=rows: rows)
        assert main(["--dry"]) == code
    assert "FAILED: a / b c" in report.table(rows)


def test_what_tests_say_becomes_a_verdict() -> None:
    text = """<testsuites><testsuite tests="3" skipped="1"><testcase name="a"/><testcase name="b">{}</testcase>
    <testcase name="c"><skipped/></testcase></testsuite></testsuites>"""
    good = verdict("x", ET.fromstring(text.format("")))
    assert (good.passed, good.note) == (True, "2 of 2 tests passed, 1 skipped")
    bad = verdict("x", ET.fromstring(text.format("<failure/>")))
    assert (bad.passed, bad.note) == (False, "1 of 2 tests passed, 1 skipped; failed: b")
    nothing = (
        '<testsuite tests="1" skipped="1"><testcase name="c"><skipped/></testcase></testsuite>'
    )
    assert verdict("x", ET.fromstring(nothing)).passed is False


def test_a_machine_without_a_device_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 2
    assert "there is no CUDA device here" in capsys.readouterr().err
