"""int8 engines by the command line: calibrated, told, verified, and what goes wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.cli.conftest import SOURCE, Cli, Made, listing
from thresher.runtime import Engine

FASHION = "thresher.models.fashion:vit"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty images without labels."""
    path = tmp_path_factory.mktemp("data") / "unlabelled.npz"
    np.savez(path, images=np.random.default_rng(1).integers(0, 256, (20, 24, 24, 3), np.uint8))
    return path


def test_an_engine_is_calibrated_and_verified_on_unlabelled_images(
    cli: Cli, made: Made, images: Path, tmp_path: Path
) -> None:
    engine = tmp_path / "e"
    done = cli(
        "export", made.reduced, "--precision", "int8", "--data", images, "-o", engine, "--json"
    )
    assert done.code == 0, done.err
    told = done.json
    assert (told["precision"], told["verified"].get("quality")) == ("int8", None)
    assert (told["calibration"]["samples"], told["calibration"]["layers"]) == (20, 13)
    assert told["verified"]["outputs"]["logits"]["samples"] == 20
    assert told["bytes"] < made.engine.joinpath("model.onnx").stat().st_size + 40_000
    found = cli("verify", made.reduced, engine, "--data", images)
    assert found.code == 0, found.out
    assert "16 roundings of int8 (eps 0.0079), or the same answer); " in found.out
    assert "of 20 samples disagree, 10% may" in found.out


def test_what_was_calibrated_is_in_the_table(cli: Cli, made: Made, tmp_path: Path) -> None:
    data = tmp_path / "labelled.npz"
    pixels = np.random.default_rng(2).integers(0, 256, (17, 24, 24, 3), np.uint8)
    np.savez(data, images=pixels, labels=np.arange(17) % 4)
    done = cli("export", SOURCE, "--precision", "int8", "--data", data, "-o", tmp_path / "e")
    assert done.code == 0, done.err
    assert "13 linear layers on 17 samples of" in done.out
    assert "of 17 samples" in done.out
    assert "points (standard error" in done.out
    assert "MB of weights" in done.out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "'int8' is calibrated on data, which only 'thresher export --data DATA' does"),
        (("--data", "nothing.npz"), "there is no data 'nothing.npz'"),
        (("--data", "TOY"), "gives 12 samples to calibrate on and 16 are the least"),
    ],
)
def test_data_that_is_missing_or_too_little(
    failed: Callable[..., str],
    made: Made,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [str(made.data) if word == "TOY" else word for word in arguments]
    assert said in failed(2, "export", SOURCE, "--precision", "int8", *given, "-o", "e")
    assert listing(tmp_path) == []


def test_other_verbs_and_a_drop_without_data_are_told_at_once(
    failed: Callable[..., str], made: Made, tmp_path: Path
) -> None:
    said = failed(2, "compare", SOURCE, "--data", made.data, "--precision", "int8")
    assert "name an engine that it wrote" in said
    said = failed(2, "export", SOURCE, "--max-drop", "1", "-o", tmp_path / "e")
    assert "--max-drop needs labelled data" in said


@pytest.mark.slow
@pytest.mark.parametrize("target", ["cpu", "openvino"])
@pytest.mark.parametrize("recipe", ["dense", "tome"])
def test_the_shipped_model_stays_within_a_point(
    cli: Cli, tmp_path: Path, target: str, recipe: str
) -> None:
    source: object = FASHION
    if recipe != "dense":
        source = tmp_path / "reduced"
        assert cli("optimize", FASHION, "--recipe", recipe, "--flops", 0.5, "-o", source).code == 0
    engine = tmp_path / "e"
    shared = ("--data", "fashion-mnist")
    done = cli("export", source, "--target", target, "--precision", "int8", *shared, "-o", engine)
    assert done.code == 0, done.err
    done = cli("verify", source, engine, *shared, "--limit", 1000, "--max-drop", 1, "--json")
    assert done.code == 0, done.out
    quality = done.json["quality"]
    assert quality["n"] == 1000
    assert abs(quality["difference"]) <= 1
    assert quality["agreement"] >= 0.98
    with Engine.load(engine) as loaded:
        assert loaded.manifest.calibration is not None
        assert loaded.manifest.calibration["layers"] == 25
