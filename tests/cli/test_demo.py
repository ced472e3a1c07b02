"""``thresher demo``: the main job on the model and the images that are shipped."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Cli
from thresher.runtime import Engine


@pytest.mark.slow
def test_demo_shows_a_gain_at_a_stated_quality(cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "demo"
    done = cli("demo", "-o", out, "--limit", "1000", "--json")
    assert done.code == 0
    quality = done.json["quality"]["quality"]
    assert quality["accuracy_a"] > 0.90
    assert quality["difference"] > -1.0
    reduced = [t for t in done.json["profile"]["timings"] if t["speedup"]]
    assert all(t["ideal"] > 1.9 for t in reduced)
    assert reduced[-1]["batch"] == 8
    assert reduced[-1]["speedup"]["median"] > 1
    for name in ("kept.png", "report.html", "reduced/recipe.yaml"):
        assert (out / name).stat().st_size > 0
        assert name.split("/")[0] in done.err or name == "reduced/recipe.yaml"
    with Engine.load(out / "reduced.engine") as engine:
        assert engine.reduced


@pytest.mark.slow
def test_demo_prints_one_table_and_can_be_repeated(cli: Cli, tmp_path: Path) -> None:
    for _ in range(2):
        done = cli("demo", "-o", tmp_path / "demo", "--limit", "100")
        assert done.code in (0, 1)  # a hundred images may lose a point by chance
        assert done.out.count("accuracy   ms, batch 1") == 1
        assert "predicted" in done.out
        assert "realised, batch 8" in done.out
