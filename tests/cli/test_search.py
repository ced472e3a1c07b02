"""``thresher search``: front, plot and recipes; stopping, joining, and everything that is refused."""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tests.cli.conftest import SOURCE, Cli, listing
from thresher.cli import searching
from thresher.passes.tokens.search import study
from thresher.runtime.energy import counters

QUICK = ("--cost", "flops", "--threads", "1")  # nothing is lowered or timed
MAIN = "import sys; from thresher.cli.main import main; sys.exit(main(sys.argv[1:]))"
TOGETHER = """
import os, pathlib, sys, time
from thresher.cli import search
from thresher.cli.main import main
place, price = pathlib.Path(sys.argv[1]), search.price

def wait_for_the_other(*arguments):
    price(*arguments)
    (place / str(os.getpid())).touch()
    end = time.monotonic() + 120
    while len(list(place.iterdir())) < 2:
        assert time.monotonic() < end, "the other never came"
        time.sleep(0.01)

search.price = wait_for_the_other
sys.exit(main(sys.argv[2:]))
"""


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen images without labels: quality is agreement with the dense model."""
    file = tmp_path_factory.mktemp("search") / "images.npz"
    np.savez(file, images=np.random.default_rng(0).integers(0, 256, (16, 24, 24, 3), np.uint8))
    return file


@pytest.fixture
def command(images: Path) -> Callable[..., tuple[str, ...]]:
    """A search of the toy that measures no time."""

    def build(out: Path, *more: object) -> tuple[str, ...]:
        fixed = ("search", SOURCE, "--data", images, "-o", out, *QUICK)
        return tuple(map(str, (*fixed, *more)))

    return build


Command = Callable[..., tuple[str, ...]]
BY_SIGMOID = ("--strategy", "p-sigmoid", "--flops", "0.7")


def read(folder: Path) -> Any:
    return json.loads((folder / "front.json").read_text())


def test_a_search_ends_with_front_plot_and_recipes(
    cli: Cli, command: Command, tmp_path: Path
) -> None:
    out = tmp_path / "found"
    done = cli(*command(out, "--strategy", "g-search", "--trials", "3", "--json"))
    assert done.code == 0, done.err
    found = done.json
    assert found == read(out)
    assert found["schema"] == "thresher.search/1"
    assert (found["measure"], found["met"], found["finished"]) == ("agreement", True, False)
    assert len(found["trials"]) == 3
    names = [point["name"] for point in found["front"]]
    assert listing(out) == sorted(
        ["best.yaml", "front.json", "front.png", "study.db", *(f"{name}.yaml" for name in names)]
    )
    assert (out / "front.png").read_bytes().startswith(b"\x89PNG")
    for point in found["front"]:
        assert point["searched"]["n"] == point["held_out"]["n"] == 8
    lines = done.err.splitlines()
    assert lines[0].startswith("g-search: at most 3 trials of about ")
    assert [line.split(":")[0] for line in lines[1:]] == [f"trial {i} of 3" for i in range(1, 4)]


@pytest.mark.slow
def test_the_points_are_recipes_that_optimize_takes(
    cli: Cli, command: Command, images: Path, tmp_path: Path
) -> None:
    out = tmp_path / "found"
    found = cli(*command(out, *BY_SIGMOID, "--trials", "2", "--json")).json
    for point in found["front"]:
        recipe = out / f"{point['name']}.yaml"
        again = cli(
            "optimize", SOURCE, "--recipe", recipe, "-o", tmp_path / point["name"], "--json"
        )
        assert again.code == 0, again.err
        prediction = again.json["prediction"]
        assert prediction["tokens"][1:] == point["counts"]
        assert prediction["macs"] / prediction["dense_macs"] == pytest.approx(point["share"])
    best = yaml.safe_load((out / "best.yaml").read_text())
    assert best == yaml.safe_load((out / f"{found['best']}.yaml").read_text())
    assert str(images) in best["summary"]
    assert "8 items searched, 8 held out" in best["summary"]


@pytest.mark.slow
def test_a_budget_is_kept_and_a_search_goes_on(cli: Cli, command: Command, tmp_path: Path) -> None:
    out = tmp_path / "found"
    first = cli(*command(out, *BY_SIGMOID, "--trials", "2", "--json")).json["trials"]
    done = cli(*command(out, *BY_SIGMOID, "--trials", "4"))
    assert done.code == 0, done.err
    assert "2 trials (2 of 4 are done)" in done.err
    assert "all demands are met by point-0" in done.out
    assert "the held-out half chose nothing" in done.out
    whole = read(out)["trials"]
    assert whole[: len(first)] == first
    assert all(trial["share"] <= 0.7 for trial in whole)
    straight = cli(*command(tmp_path / "other", *BY_SIGMOID, "--trials", "4", "--json")).json
    assert straight["trials"] == whole


def test_a_demand_that_is_missed_is_a_verdict_and_everything_is_written(
    cli: Cli, command: Command, tmp_path: Path
) -> None:
    out = tmp_path / "found"
    done = cli(*command(out, *BY_SIGMOID, "--trials", "1", "--max-drop", "-101"))
    assert done.code == 1
    assert (
        "not met: at most -101 points lost on the held-out half; the best point found" in done.out
    )
    assert {"best.yaml", "front.json", "front.png", "point-01.yaml"} <= set(listing(out))
    assert read(out)["met"] is False


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["p-sigmoid", "per-layer", "g-search"])
def test_a_measured_speed_up_is_demanded(
    cli: Cli, images: Path, tmp_path: Path, strategy: str
) -> None:
    """Fifty times as fast is out of reach; what was reached is measured and told."""
    out = tmp_path / "found"
    fixed = ("search", SOURCE, "--data", images, "-o", out, "--strategy", strategy)
    done = cli(*fixed, "--speedup", "50", "--trials", "2", "--rounds", "6", "--threads", "1")
    assert done.code == 1, done.err
    assert "not met: a measured speed-up of 50; the best point found" in done.out
    found = read(out)
    for point in found["front"]:
        assert 0 < point["timing"]["low"] <= point["timing"]["speedup"] <= point["timing"]["high"]
    assert found["target"] == "cpu fp32, batch 8"


def test_a_budget_out_of_reach_is_refused_before_anything_is_tried(
    failed: Callable[..., str], command: Command, tmp_path: Path
) -> None:
    said = failed(1, *command(tmp_path / "found", "--flops", "0.05"))
    assert "flops=0.05 cannot be met: the least this method reaches" in said
    assert listing(tmp_path) == []


@pytest.mark.slow
def test_a_study_of_another_search_is_refused(
    cli: Cli, failed: Callable[..., str], command: Command, tmp_path: Path
) -> None:
    out = tmp_path / "found"
    assert cli(*command(out, *BY_SIGMOID, "--trials", "1")).code == 0
    said = failed(2, *command(out, *BY_SIGMOID, "--method", "topk-norm"))
    assert "its method is 'tome' and not 'topk-norm'" in said
    said = failed(2, *command(out, "--flops", "0.8"))
    assert "its demand is 'flops 0.7' and not 'flops 0.8'" in said


def test_a_locked_study_is_refused(
    failed: Callable[..., str],
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(study, "PATIENCE", 0.05)
    file = tmp_path / "shared.db"
    with sqlite3.connect(file, isolation_level=None) as other:
        other.execute("CREATE TABLE t (x)")
        other.execute("BEGIN EXCLUSIVE")
        said = failed(4, *command(tmp_path / "found", "--storage", f"sqlite:///{file}"))
    assert "is not locked" not in said.partition("(")[0]
    assert "database is locked" in said


def test_energy_that_cannot_be_read_is_said(
    failed: Callable[..., str],
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(searching, "counters", lambda: counters(tmp_path))
    said = failed(4, *command(tmp_path / "found"), "--cost", "energy")
    assert "energy cannot be read" in said


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--strategy", "p-sigmod"), "did you mean 'p-sigmoid'?"),
        (("--flops", "0.7", "--speedup", "1.2"), "give one of them"),
        (("--speedup", "1.2"), "--cost flops leaves out"),
        (("--method", "tom"), "did you mean 'tome'?"),
    ],
)
def test_a_wrong_command_is_refused(
    failed: Callable[..., str], command: Command, tmp_path: Path, more: tuple[str, ...], said: str
) -> None:
    assert said in failed(2, *command(tmp_path / "found", *more))
    assert listing(tmp_path) == []


def test_a_folder_of_other_things_is_left_alone(
    failed: Callable[..., str], command: Command, tmp_path: Path
) -> None:
    (tmp_path / "diary.txt").write_text("mine")
    assert "holds other files" in failed(2, *command(tmp_path))
    assert listing(tmp_path) == ["diary.txt"]


@pytest.mark.slow
def test_an_interrupt_keeps_the_work_and_says_how_to_go_on(
    cli: Cli, command: Command, tmp_path: Path
) -> None:
    out = tmp_path / "found"
    arguments = command(out, *BY_SIGMOID, "--trials", "60")
    with subprocess.Popen(
        [sys.executable, "-c", MAIN, *arguments], stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        before = []
        for line in process.stderr:
            before.append(line)
            if line.startswith("trial 3 of 60"):
                process.send_signal(signal.SIGINT)
                break
        after = process.stderr.read()
    assert process.returncode == 130, after
    assert "Traceback" not in after
    assert "are kept in sqlite:///" in after
    assert "run the same command again to go on" in after
    done = cli(*command(out, *BY_SIGMOID, "--trials", "4", "--json"))
    assert done.code == 0, done.err
    straight = cli(*command(tmp_path / "other", *BY_SIGMOID, "--trials", "4", "--json")).json
    assert done.json["trials"][:4] == straight["trials"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["study.db", "study.journal"])
def test_two_processes_share_one_study(command: Command, tmp_path: Path, name: str) -> None:
    meeting, trials = tmp_path / "meeting", 10
    meeting.mkdir()
    url = f"sqlite:///{tmp_path / name}" if name.endswith("db") else str(tmp_path / name)
    more = (*BY_SIGMOID, "--trials", trials, "--storage", url)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TOGETHER, str(meeting), *command(tmp_path / worker, *more)],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for worker in ("a", "b")
    ]
    said = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    done = [sum(line.startswith("trial ") for line in text.splitlines()) for text in said]
    assert sum(done) == trials
    assert min(done) >= 1
    assert read(tmp_path / "a")["trials"] == read(tmp_path / "b")["trials"]
