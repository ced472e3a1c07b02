"""``thresher compare`` on a toy: the rows, the folder, the demand, and what can be wrong."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.cli.conftest import SOURCE, Cli, Made, listing
from thresher.runtime import scoring
from thresher.runtime.backends import openvino

MEAN = "tests.cli.toy:pooled"
QUICK = ("--rounds", "6", "--threads", "1", "--flops", "0.8")
TOME = ("--methods", "tome", "--no-control", *QUICK)
Failed = Callable[..., str]


@pytest.fixture(scope="module")
def folder(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One comparison, written to a folder."""
    from thresher.cli.main import main

    out = tmp_path_factory.mktemp("compared") / "out"
    arguments = ["compare", MEAN, "--data", str(made.data), "--methods", "tome,evit"]
    assert (
        main([*arguments, "--flops", "0.8", "--rounds", "6", "--threads", "1", "-o", str(out)]) == 0
    )
    return out


@pytest.fixture(scope="module")
def record(folder: Path) -> Any:
    return json.loads((folder / "compare.json").read_text())


def test_the_folder_holds_table_chart_and_record(folder: Path) -> None:
    assert listing(folder) == ["compare.json", "compare.md", "compare.png"]
    assert listing(folder.parent) == ["out"]
    with Image.open(folder / "compare.png") as chart:
        assert chart.format == "PNG"
        assert min(chart.size) > 400
    page = (folder / "compare.md").read_text()
    assert f"    thresher compare {MEAN} --data" in page
    assert "--output" not in page
    assert "quality: accuracy on 12 samples" in page
    assert "1 threads of" in page
    assert sum(line.startswith("| ") for line in page.splitlines()) == 6


def test_rows_are_dense_the_methods_and_the_control(record: Any) -> None:
    assert record["schema"] == "thresher.compare/1"
    rows = record["rows"]
    assert [(r["method"], r["asked"]) for r in rows] == [
        ("dense", None), ("tome", 0.8), ("evit", 0.8), ("random", 0.8),
    ]  # fmt: skip
    for row in (rows[1], rows[3]):
        assert 0.5 < row["share"] <= 0.8
        assert row["ideal"] == pytest.approx(1 / row["share"])
        assert row["tokens"][0] == 36
        ratio = row["time"]["speedup"]
        assert ratio["low"] <= ratio["median"] <= ratio["high"]
        assert row["realised"] == pytest.approx(ratio["median"] / row["ideal"])
    assert rows[0]["time"]["latency"]["n"] == 6


def test_a_method_that_refuses_is_a_row_that_says_why(folder: Path, record: Any) -> None:
    evit = record["rows"][2]
    assert "class token" in evit["refused"]
    assert (evit["share"], evit["scores"], evit["time"]) == (None, [], None)
    page = (folder / "compare.md").read_text()
    assert f"- evit 0.8: refused, {evit['refused']}" in page
    (row,) = [line.split() for line in page.splitlines() if line.startswith("| evit")]
    assert row[3:6] == ["80/", "|", "refused"]


def test_scores_are_paired_with_dense_and_with_the_control(record: Any) -> None:
    dense, tome, control = [row["scores"][0] for row in record["rows"] if not row["refused"]]
    assert (dense["name"], dense["items"], dense["against_dense"]) == ("accuracy", 12, None)
    assert control["against_control"] is None
    change = tome["against_dense"]
    assert change["value"] == pytest.approx(tome["value"] - dense["value"])
    flips = change["worse"] + change["better"]
    spread = flips - (change["better"] - change["worse"]) ** 2 / 12
    assert change["error"] == pytest.approx(math.sqrt(max(0, spread)) / 12, abs=1e-9)
    over = tome["against_control"]
    assert over["value"] == pytest.approx(tome["value"] - control["value"])


def test_the_accuracies_are_those_of_verify(cli: Cli, made: Made, record: Any) -> None:
    told = cli("verify", MEAN, MEAN, "--data", made.data, "--json").json
    assert record["rows"][0]["scores"][0]["value"] == told["quality"]["accuracy_a"]


def test_without_labels_quality_is_agreement_with_dense(
    cli: Cli, made: Made, tmp_path: Path
) -> None:
    with np.load(made.data) as stored:
        np.savez(tmp_path / "bare.npz", images=stored["images"])
    arguments = ("--data", tmp_path / "bare.npz", "--limit", "5", *TOME)
    done = cli("compare", SOURCE, *arguments, "--json")
    assert (done.code, done.err) == (0, "")
    assert "agreement with the dense model on 5 samples" in done.json["quality"]
    assert "has no labels" in done.json["quality"]
    dense, tome = done.json["rows"]
    assert [s["name"] for s in tome["scores"]] == ["cosine", "top-1 as dense"]
    assert [s["value"] for s in dense["scores"]] == pytest.approx([1, 1])
    assert 0.5 < tome["scores"][0]["value"] < 1


def test_a_missed_demand_is_exit_code_1_and_overwrite_replaces_an_older_folder(
    cli: Cli, made: Made, tmp_path: Path
) -> None:
    out = tmp_path / "a"
    out.mkdir()
    (out / "compare.json").write_text("old")
    arguments = ("--data", made.data, *TOME, "--max-drop", "-101", "-o", out, "--overwrite")
    done = cli("compare", SOURCE, *arguments)
    assert (done.code, done.err) == (1, f"written: {out}\n")
    assert "no row loses at most -101 points; the best row found is tome 0.8 (" in done.out
    (row,) = [line.split() for line in done.out.splitlines() if line.startswith(" tome ")]
    assert row[1].startswith("80/7")
    found = json.loads((out / "compare.json").read_text())
    assert found["verdict"]["met"] is False
    assert listing(out) == ["compare.json", "compare.md", "compare.png"]
    assert listing(tmp_path) == ["a"]


def test_a_folder_that_is_taken_stays(
    failed: Failed, made: Made, folder: Path, tmp_path: Path
) -> None:
    base = ("compare", SOURCE, "--data", made.data)
    before = (folder / "compare.json").read_bytes()
    assert "--overwrite" in failed(2, *base, "-o", folder)
    assert (folder / "compare.json").read_bytes() == before
    (tmp_path / "thesis.txt").touch()
    assert "not written by thresher" in failed(2, *base, "-o", tmp_path, "--overwrite")


def test_an_interrupt_leaves_nothing(
    cli: Cli, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(scoring, "accuracy", interrupt)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    done = cli("compare", SOURCE, "--data", made.data, *TOME, "-o", tmp_path / "a")
    assert (done.code, done.out) == (130, "")
    assert listing(tmp_path) == []


@pytest.mark.slow
def test_a_method_learns_on_other_data_than_it_is_scored_on(
    cli: Cli, failed: Failed, made: Made, tmp_path: Path
) -> None:
    other = tmp_path / "other.npz"
    other.write_bytes(made.data.read_bytes())
    (tmp_path / "quick.yaml").write_text(
        "name: quick\npasses:\n  - diffrate: {flops: 0.8, granularity: 1, steps: 3}\n"
    )
    learned = ("--methods", tmp_path / "quick.yaml", "--no-control", *QUICK, "--data", made.data)
    (_, row) = cli("compare", SOURCE, *learned, "--json").json["rows"]
    assert "shared out evenly, not learned" in row["note"]
    (_, row) = cli("compare", SOURCE, *learned, "--learn-data", other, "--json").json["rows"]
    assert f"on {other} by its labels" in row["note"]
    assert "3 steps" in row["note"]
    said = failed(2, "compare", SOURCE, *learned, "--learn-data", made.data)
    assert "what was learned from cannot judge" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--flops", "0"), "shares above 0 and up to 1"),
        (("--flops", "0.5,1.5"), "shares above 0 and up to 1"),
        (("--flops", "nan"), "shares above 0 and up to 1"),
        (("--flops", "half"), "shares above 0 and up to 1"),
        (("--flops", "0.5,0.50"), "--flops has '0.50' twice"),
        (("--methods", "tome,evit,tome"), "--methods has 'tome' twice"),
        (("--methods", "tome,,evit"), "empty entry"),
        (("--methods", "evt"), "did you mean 'evit'"),
        (("--target", "openvin"), "did you mean 'openvino'"),
        (("--precision", "fp23"), "fp32"),
        (("--size", "batch"), "--size"),
    ],
)
def test_a_wrong_command_is_one_sentence(
    failed: Failed, made: Made, arguments: tuple[str, ...], said: str
) -> None:
    assert said in failed(2, "compare", SOURCE, "--data", made.data, *arguments)


def test_data_is_demanded(cli: Cli) -> None:
    done = cli("compare", SOURCE)
    assert (done.code, done.out) == (2, "")
    assert "--data" in done.err


def test_data_that_is_empty_or_not_there(failed: Failed, tmp_path: Path) -> None:
    np.savez(tmp_path / "none.npz", images=np.zeros((0, 24, 24, 3), np.uint8))
    assert "is empty" in failed(2, "compare", SOURCE, "--data", tmp_path / "none.npz")
    assert "there is no data" in failed(2, "compare", SOURCE, "--data", tmp_path / "no.npz")


def test_a_drop_needs_labels(failed: Failed, tmp_path: Path) -> None:
    np.savez(tmp_path / "bare.npz", images=np.zeros((3, 24, 24, 3), np.uint8))
    said = failed(2, "compare", SOURCE, "--data", tmp_path / "bare.npz", "--max-drop", "1")
    assert "bare.npz has no labels" in said


def test_a_target_that_is_missing(
    failed: Failed, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openvino.OpenVino, "package", "no_such_package")
    said = failed(4, "compare", SOURCE, "--data", made.data, "--target", "openvino")
    assert "pip install 'thresher[openvino]'" in said


def test_a_model_that_no_method_reduces_is_refused(failed: Failed, made: Made) -> None:
    said = failed(3, "compare", "tests.cli.toy:convolutions", "--data", made.data)
    assert "no method reduces tests.cli.toy:convolutions" in said


def test_a_model_that_was_reduced_already(failed: Failed, made: Made) -> None:
    assert "was reduced already" in failed(2, "compare", made.reduced, "--data", made.data)
