"""``drop-blocks`` and ``skip-tokens``: measured once, made again from what was saved; mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import SOURCE, Cli, Made, listing


def test_blocks_go_and_the_saved_recipe_needs_no_data(cli: Cli, made: Made, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    asked = ("optimize", SOURCE, "--recipe", "drop-blocks", "--learn-data", made.data)
    done = cli(*asked, "--flops", "0.7", "-o", first, "--json")
    assert done.code == 0, done.err
    details = done.json["passes"][0]["details"]
    assert details["macs"] <= 0.7 * details["dense_macs"]
    assert len(details["influence"]) == 3
    again = cli("optimize", SOURCE, "--recipe", first / "recipe.yaml", "-o", second, "--json")
    assert again.code == 0, again.err
    assert again.json["passes"][0]["details"]["dropped"] == details["dropped"]
    named = cli("optimize", SOURCE, "--recipe", "drop-blocks", "--set", "drop=0,1.ffn",
        "-o", tmp_path / "named", "--json")  # fmt: skip
    assert named.json["passes"][0]["details"]["dropped"] == ["0", "1.ffn"]


@pytest.mark.parametrize(
    ("given", "code", "said"),
    [
        ((), 2, "pass 'drop-blocks' needs data and none was given: add --data DATA"),
        (("--set", "count=3", "--learn-data", "DATA"), 2, "count=3 leaves nothing of the model"),
        (("--set", "drop=9"), 2, "drop=9 does not exist in this model"),
        (("--flops", "0.1", "--learn-data", "DATA"), 1, "flops=0.1 cannot be met"),
        (("--flops", "0.5", "--set", "count=1"), 2, "one budget only, not count and flops"),
    ],
)  # fmt: skip
def test_mistakes(
    cli: Cli, made: Made, tmp_path: Path, given: tuple[str, ...], code: int, said: str
) -> None:
    arguments = [made.data if word == "DATA" else word for word in given]
    done = cli("optimize", SOURCE, "--recipe", "drop-blocks", *arguments, "-o", tmp_path / "out")
    assert (done.code, said in done.err) == (code, True), done.err
    assert listing(tmp_path) == []


@pytest.mark.slow
def test_tokens_skip_blocks_and_the_saved_fit_needs_no_data(
    cli: Cli, made: Made, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    asked = ("optimize", SOURCE, "--recipe", "skip-tokens", "--set", "layers=1,2")
    done = cli(*asked, "--learn-data", made.data, "--flops", "0.8", "-o", first, "--json")
    assert done.code == 0, done.err
    assert 0.7 < 1 / done.json["prediction"]["ideal"] <= 0.8
    assert listing(first) == [
        "program.pt2",
        "program.yaml",
        "recipe.yaml",
        "skip-tokens.safetensors",
    ]
    again = cli("optimize", SOURCE, "--recipe", first / "recipe.yaml", "-o", second, "--json")
    assert again.code == 0, again.err
    graphs = [cli("inspect", folder, "--graph").out for folder in (first, second)]
    assert graphs[0] == graphs[1]
    assert cli("export", second, "-o", tmp_path / "engine").code == 0


@pytest.mark.slow
def test_routers_are_trained_and_the_saved_ones_need_no_data(
    cli: Cli, made: Made, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    asked = ("optimize", SOURCE, "--recipe", "skip-tokens", "--set", "router=trained")
    done = cli(*asked, "--set", "steps=2", "--learn-data", made.data, "-o", first, "--json")
    assert done.code == 0, done.err
    told = done.json["passes"][0]["details"]["training"]
    assert (told["steps"], told["loss"], len(told["held_out"])) == (2, "labels", 2)
    again = cli("optimize", SOURCE, "--recipe", first / "recipe.yaml", "-o", second, "--json")
    assert again.code == 0, again.err
    assert (first / "recipe.yaml").read_bytes() == (second / "recipe.yaml").read_bytes()
    graphs = [cli("inspect", folder, "--graph").out for folder in (first, second)]
    assert graphs[0] == graphs[1]
    assert cli("export", second, "-o", tmp_path / "engine").code == 0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((), "pass 'skip-tokens' needs data and none was given: add --data DATA"),
        (("--set", "loss=hinge"), "loss"),
        (("--set", "rate=0"), "rate"),
        (("--set", "layers=7", "--learn-data", "DATA"), "the model has 3 blocks, 0 to 2"),
    ],
)
def test_mistakes_of_a_training(
    cli: Cli, made: Made, tmp_path: Path, given: tuple[str, ...], said: str
) -> None:
    arguments = [made.data if word == "DATA" else word for word in given]
    done = cli("optimize", SOURCE, "--recipe", "skip-tokens", "--set", "router=trained",
        *arguments, "-o", tmp_path / "out")  # fmt: skip
    assert (done.code, said in done.err) == (2, True), done.err
    assert "Traceback" not in done.err
    assert listing(tmp_path) == []
