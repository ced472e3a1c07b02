"""``optimize --recipe diffrate`` learns counts: saved, drawn, resumed, shared by two processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.cli.conftest import SOURCE, Cli, Made, listing

QUICK = ("--recipe", "diffrate", "--flops", "0.8", "--set", "granularity=1")


def recipe(folder: Path) -> dict[str, object]:
    read: dict[str, object] = yaml.safe_load((folder / "recipe.yaml").read_text())
    return read


def test_learned_counts_become_a_recipe_and_a_picture(cli: Cli, made: Made, tmp_path: Path) -> None:
    out = tmp_path / "learned"
    done = cli(
        "optimize", SOURCE, *QUICK, "--set", "steps=4", "--data", made.data, "-o", out, "--json"
    )
    assert done.code == 0, done.err
    (first, *_) = done.json["passes"]
    assert first["details"]["learning"]["loss"] == "labels"
    assert first["details"]["macs"] <= 0.8 * first["details"]["dense_macs"]
    gained = first["details"]["learning"]["gain"] > 0
    said = "do not transfer blindly" if gained else "found none with a lower loss"
    assert said in first["details"]["note"]
    assert "counts.png" in listing(out)
    assert listing(tmp_path) == ["learned"]
    saved = recipe(out)
    assert saved["learned_on"] == {"data": str(made.data), "model": SOURCE}
    again = cli("optimize", SOURCE, "--recipe", out / "recipe.yaml", "-o", tmp_path / "b", "--json")
    assert again.code == 0, again.err
    assert "were learned on" in again.err
    assert again.json["passes"][0]["details"]["tokens"] == first["details"]["tokens"]


def test_data_to_learn_from_and_data_to_judge(cli: Cli, made: Made, tmp_path: Path) -> None:
    other, out = tmp_path / "other.npz", tmp_path / "learned"
    other.write_bytes(made.data.read_bytes())
    both = ("--set", "steps=4", "--learn-data", other, "--data", made.data, "--max-drop", "100")
    done = cli("optimize", SOURCE, *QUICK, *both, "-o", out, "--json")
    assert done.code == 0, done.err
    assert recipe(out)["learned_on"] == {"data": str(other), "model": SOURCE}
    assert done.json["quality"]["quality"]["max_drop"] == 100


def test_without_data_nothing_is_learned_and_that_is_said(cli: Cli, tmp_path: Path) -> None:
    done = cli("optimize", SOURCE, *QUICK, "-o", tmp_path / "even")
    assert done.code == 0
    assert "shared out evenly, not learned: give data" in done.out


def test_labels_that_are_missing(cli: Cli, made: Made, tmp_path: Path) -> None:
    import numpy as np

    with np.load(made.data) as stored:
        np.savez(tmp_path / "bare.npz", images=stored["images"])
    demand = ("--set", "loss=labels", "--data", tmp_path / "bare.npz")
    done = cli("optimize", SOURCE, *QUICK, *demand, "-o", tmp_path / "a")
    assert (done.code, done.out) == (2, "")
    assert "has none: give loss=dense" in done.err
    assert listing(tmp_path) == ["bare.npz"]


def command(made: Made, out: Path, steps: int) -> list[str]:
    return [
        "-m", "thresher.cli.main", "optimize", SOURCE, *QUICK,
        "--set", f"steps={steps}", "--set", f"patience={steps}", "--data", str(made.data), "-o", str(out),
    ]  # fmt: skip


@pytest.mark.slow
def test_ctrl_c_keeps_the_work_and_the_same_command_goes_on(made: Made, tmp_path: Path) -> None:
    out, state = tmp_path / "a", tmp_path / "a.unfinished" / "counts.pt"
    process = subprocess.Popen(
        [sys.executable, *command(made, out, 2000)], stderr=subprocess.PIPE, text=True
    )
    until = time.monotonic() + 300
    while not state.exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert "repeat the command to go on" in said
    assert listing(tmp_path) == ["a.unfinished"]
    other = subprocess.run(
        [sys.executable, *command(made, out, 30)], capture_output=True, text=True, check=False
    )
    assert other.returncode == 2
    assert "belongs to another run (patience was 2000 and is 30)" in other.stderr


@pytest.mark.slow
def test_two_processes_of_torchrun_learn_one_schedule(made: Made, tmp_path: Path) -> None:
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *run, *command(made, tmp_path / "a", 4)],
        capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written: ") == 1
    assert listing(tmp_path) == ["a"]
    assert "learned_on" in recipe(tmp_path / "a")
