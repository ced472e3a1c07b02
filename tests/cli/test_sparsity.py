"""Activation sparsity on the command line: the report, channels cut and cut again, thresholds refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.cli.conftest import SOURCE, Cli, Made, listing
from tests.cli.toy import vit

REPORT = ("inspect", SOURCE, "--sparsity", "--data")


def test_the_report(cli: Cli, made: Made, tmp_path: Path) -> None:
    picture, data = tmp_path / "sparsity.png", tmp_path / "images.npz"
    pixels = np.random.default_rng(1).integers(0, 256, (24, 24, 24, 3), np.uint8)
    np.savez(data, images=pixels, labels=np.arange(24) % 4)
    done = cli(*REPORT, data, "-o", picture)
    assert (done.code, done.err) == (0, "")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "on 12 items" in done.out
    assert f"written: {picture}" in done.out.replace("\n", "")
    assert "cpu, 37 tokens at once: does not pay" in done.out
    assert "calibration needs at least 16" in cli(*REPORT, made.data).err


def test_demands_go_together(failed: Callable[..., str], made: Made) -> None:
    assert "go together" in failed(2, "inspect", SOURCE, "--sparsity")
    assert "a report of its own" in failed(2, *REPORT, made.data, "--graph")
    for name in ("--limit", "--seed"):
        assert f"{name} is for --sparsity" in failed(2, "inspect", SOURCE, name, "3")


@pytest.mark.slow
def test_channels_are_cut_and_cut_again_without_data(cli: Cli, made: Made, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    asked = ("optimize", SOURCE, "--recipe", "channels", "--set", "ratio=0.25", "--learn-data")
    assert cli(*asked, made.data, "-o", first).code == 0
    files = ["channels.safetensors", "program.pt2", "program.yaml", "recipe.yaml"]
    assert listing(first) == files
    assert "learned_on" in (first / "recipe.yaml").read_text()
    done = cli("optimize", SOURCE, "--recipe", first / "recipe.yaml", "-o", second, "--json")
    assert done.code == 0
    assert done.json["prediction"]["ideal"] > 1.05
    for name in ("channels.safetensors", "recipe.yaml"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    graphs = [cli("inspect", folder, "--graph").out for folder in (first, second)]
    assert graphs[0] == graphs[1]
    assert cli("export", second, "-o", tmp_path / "engine").code == 0
    wrong = ("tests.cli.toy:reseeded", "--recipe", first / "recipe.yaml", "-o", tmp_path / "third")
    done = cli("optimize", *wrong)
    warning, sentence = done.err.splitlines()
    assert (done.code, "do not transfer blindly" in warning) == (2, True)
    assert "was made on other weights than these" in sentence
    assert not (tmp_path / "third").exists()


def test_thresholds_of_another_checkpoint_and_weights_that_are_no_numbers(
    cli: Cli, made: Made, tmp_path: Path
) -> None:
    first, poisoned = tmp_path / "first", tmp_path / "poisoned.safetensors"
    asked = ["--recipe", "sparsity", "--learn-data", made.data]
    asked += ["--set", "allow=true", "--set", "sites=[down]"]
    assert cli("optimize", SOURCE, *asked, "-o", first).code == 0
    saved = ("--recipe", first / "recipe.yaml", "-o", tmp_path / "second")
    done = cli("optimize", "tests.cli.toy:reseeded", *saved)
    assert (done.code, done.out) == (2, "")
    assert "was made on other weights than these: use the checkpoint" in done.err.splitlines()[-1]
    weights = vit().state_dict()
    weights["encoder.blocks.1.fc1.weight"][3, 2] = torch.nan
    save_file(weights, poisoned)
    done = cli("optimize", SOURCE, "--weights", poisoned, *asked, "-o", tmp_path / "second")
    warning, sentence = done.err.splitlines()
    assert (done.code, "has NaN or infinite values" in warning) == (2, True)
    assert sentence.startswith(f"thresher: pass 'sparsity': calibration on {made.data}: gelu_1 ")
    assert "has values that are no finite numbers" in sentence
    assert listing(tmp_path) == ["first", "poisoned.safetensors"]


def test_what_is_refused(failed: Callable[..., str], made: Made, tmp_path: Path) -> None:
    asked = ("optimize", SOURCE, "-o", tmp_path / "x", "--recipe")
    assert "needs data and none was given" in failed(2, *asked, "channels")
    assert "cannot pay" in failed(3, *asked, "sparsity", "--learn-data", made.data)
    none = ("optimize", "tests.cli.toy:convolutions", "-o", tmp_path / "x", "--recipe")
    for recipe in ("channels", "sparsity"):
        assert "no feed-forward network" in failed(3, *none, recipe, "--learn-data", made.data)
    few = ("--learn-data", made.data, "--set", "rise=1")
    assert "12 items and calibration needs at least 16" in failed(2, *asked, "sparsity", *few)
    assert listing(tmp_path) == []
