"""``thresher optimize``: the recipe, the table, what is written, and the demand on quality."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.cli.conftest import SOURCE, Cli, Made, listing


def test_tokens_and_prediction_are_told_and_the_folder_is_whole(cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "build" / "reduced"
    done = cli("optimize", SOURCE, "--recipe", "tome", "--set", "r=5", "-o", out)
    assert (done.code, done.err) == (0, "")
    assert "tokens at the input and after each block: 37 32 27 22" in done.out
    assert "an ideal speed-up of 1." in done.out
    assert listing(out) == ["program.pt2", "program.yaml", "recipe.yaml"]
    assert listing(out.parent) == ["reduced"]


def test_json_has_counts_prediction_and_recipe(cli: Cli, tmp_path: Path) -> None:
    done = cli("optimize", SOURCE, "--set", "r=5", "-o", tmp_path / "a", "--json")
    assert (done.code, done.err) == (0, "")
    found = done.json
    assert found["schema"] == "thresher.optimize/1"
    first = found["passes"][0]
    assert (first["name"], first["matched"], first["applied"]) == ("tome", 3, 3)
    assert found["prediction"]["tokens"] == [37, 32, 27, 22]
    assert found["prediction"]["ideal"] > 1
    assert found["recipe"]["passes"][0]["tome"]["r"] == 5
    assert found["quality"] is None


def test_the_saved_recipe_replays_the_run(cli: Cli, tmp_path: Path) -> None:
    first = cli("optimize", SOURCE, "--set", "r=5", "-o", tmp_path / "a", "--json").json
    replay = ("--recipe", tmp_path / "a" / "recipe.yaml", "-o", tmp_path / "b", "--json")
    second = cli("optimize", SOURCE, *replay).json
    assert second["prediction"] == first["prediction"]
    assert second["recipe"] == first["recipe"]


LEARNED = """\
name: learned
learned_on: {data: ImageNet-1k, model: deit_x}
passes: [diffrate: {prune: [37, 30, 20], counts: [37, 26, 17]}]
"""


def test_counts_learned_on_other_data_are_flagged_in_one_sentence(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "learned.yaml"
    path.write_text(LEARNED)
    arguments = (SOURCE, "--recipe", path)
    for done in (cli("plan", *arguments), cli("optimize", *arguments, "-o", tmp_path / "a")):
        assert done.code == 0
        assert "37 37 26 17" in done.out
        assert len(done.err.splitlines()) == 1
        assert "learned: its numbers were learned on ImageNet-1k for deit_x" in done.err
        assert "do not transfer blindly" in done.err
    saved = yaml.safe_load((tmp_path / "a" / "recipe.yaml").read_text())
    assert saved["learned_on"] == {"data": "ImageNet-1k", "model": "deit_x"}


def test_flops_budget_is_kept(cli: Cli, tmp_path: Path) -> None:
    arguments = ("--recipe", "evit", "--flops", "0.65", "-o", tmp_path / "a", "--json")
    found = cli("optimize", SOURCE, *arguments).json["prediction"]
    assert 0.5 < found["macs"] / found["dense_macs"] <= 0.65


def test_a_speed_up_is_the_same_budget_in_another_form(cli: Cli) -> None:
    plan = ("plan", SOURCE, "--recipe", "evit", "--json")
    by_flops = cli(*plan, "--flops", "0.75").json["prediction"]
    by_speed = cli(*plan, "--speedup", "1.3333333").json["prediction"]
    assert by_speed == by_flops
    assert by_speed["ideal"] >= 1.33


def test_dumps_show_the_graph_before_and_after_each_pass(cli: Cli, tmp_path: Path) -> None:
    dumps = tmp_path / "dumps"
    done = cli("optimize", SOURCE, "--set", "r=5", "-o", tmp_path / "a", "--dump-dir", dumps)
    assert done.code == 0
    assert any("tome" in name and "before" in name for name in listing(dumps))
    assert any("cleanup" in name and "after" in name for name in listing(dumps))


def test_quality_is_told_beside_the_prediction(cli: Cli, made: Made, tmp_path: Path) -> None:
    arguments = ("--set", "r=1", "--data", made.data, "-o", tmp_path / "a")
    done = cli("optimize", SOURCE, *arguments, "--json")
    assert (done.code, done.err) == (0, "")
    quality = done.json["quality"]["quality"]
    assert quality["n"] == 12
    assert quality["kept"] is None
    told = cli("optimize", SOURCE, *arguments, "--overwrite")
    assert "of 12 samples" in told.out


def test_a_drop_that_is_allowed_passes(cli: Cli, made: Made, tmp_path: Path) -> None:
    arguments = ("--data", made.data, "--max-drop", "100", "-o", tmp_path / "a", "--json")
    done = cli("optimize", SOURCE, "--set", "r=5", *arguments)
    assert done.code == 0
    assert done.json["quality"]["quality"]["kept"] is True


def test_a_drop_beyond_the_limit_writes_nothing(
    failed: Callable[..., str], made: Made, tmp_path: Path
) -> None:
    arguments = ("--data", made.data, "--max-drop", "-101", "-o", tmp_path / "a")
    said = failed(1, "optimize", SOURCE, "--set", "r=5", *arguments)
    assert "quality kept: no" in said
    assert "nothing was written" in said
    assert listing(tmp_path) == []


def test_a_limit_on_the_drop_needs_data(failed: Callable[..., str], tmp_path: Path) -> None:
    said = failed(2, "optimize", SOURCE, "--max-drop", "1", "-o", tmp_path / "a")
    assert "--data" in said


def test_overwrite_replaces_an_older_folder(cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "a"
    assert cli("optimize", SOURCE, "--set", "r=5", "-o", out).code == 0
    assert cli("optimize", SOURCE, "--set", "r=6", "-o", out, "--overwrite").code == 0
    recipe = yaml.safe_load((out / "recipe.yaml").read_text())
    assert recipe["passes"][0]["tome"]["r"] == 6


@pytest.mark.parametrize("recipe", ["tome", "evit", "topk-norm", "random"])
def test_every_built_in_recipe_runs_as_it_is(cli: Cli, tmp_path: Path, recipe: str) -> None:
    done = cli("optimize", SOURCE, "--recipe", recipe, "-o", tmp_path / "a", "--json")
    assert (done.code, done.err) == (0, "")
    assert done.json["passes"][0]["applied"] > 0


def test_counts_for_a_gpu_are_multiples_of_eight(cli: Cli, tmp_path: Path) -> None:
    more = ("--target", "tensorrt-rtx", "--set", "r=5")
    planned = cli("plan", SOURCE, *more, "--json").json
    assert planned["recipe"]["passes"][0]["tome"]["multiple"] == 8
    done = cli("optimize", SOURCE, *more, "-o", tmp_path / "made", "--json")
    assert (done.code, done.err) == (0, "")
    tokens = done.json["passes"][0]["details"]["tokens"]
    assert tokens[0] == 37
    assert all(count % 8 == 0 for count in tokens[1:])
