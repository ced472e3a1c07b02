"""``optimize`` with a cache and an aggregation head: trained, saved, read again, exported, drawn; and mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import SOURCE, Cli, Made, listing, refused

QUICK = ("--recipe", "clca", "--set", "steps=2", "--flops", "0.8")


@pytest.mark.slow
def test_one_command_trains_and_its_recipe_does_it_again(
    cli: Cli, made: Made, tmp_path: Path
) -> None:
    out, again, engine = (tmp_path / name for name in ("out", "again", "engine"))
    done = cli("optimize", SOURCE, *QUICK, "--learn-data", made.data, "-o", out, "--json")
    assert done.code == 0, done.err
    details = done.json["passes"][1]["details"]
    assert details["training"]["steps"] == 2
    assert listing(out) == ["clca.safetensors", "program.pt2", "program.yaml", "recipe.yaml"]

    done = cli("optimize", SOURCE, "--recipe", out / "recipe.yaml", "-o", again)
    assert done.code == 0, done.err
    for file in ("clca.safetensors", "recipe.yaml"):
        assert (again / file).read_bytes() == (out / file).read_bytes()

    assert cli("export", out, "--target", "cpu", "-o", engine).code == 0
    same = cli("verify", out, engine, "--data", made.data)
    assert same.code == 0, same.err
    picture = tmp_path / "tokens.png"
    drawn = cli("inspect", out, "--image", made.image, "-o", picture)
    assert drawn.code == 0, drawn.err
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("given", "code", "said"),
    [
        ((), 2, "pass 'clca' needs data and none was given: add --data DATA"),
        (("--set", "rate=0", "--learn-data", "DATA"), 2, "clca.rate: input should be greater than 0"),
        (("--set", "calibration=none.safetensors"), 2, "there is no calibration none.safetensors"),
    ],
)  # fmt: skip
def test_mistakes(
    cli: Cli, made: Made, tmp_path: Path, given: tuple[str, ...], code: int, said: str
) -> None:
    refused(cli, made, tmp_path / "out", QUICK, given, code, said)
    assert "out" not in listing(tmp_path)


def test_a_model_without_a_class_token(cli: Cli, made: Made, tmp_path: Path) -> None:
    arguments = ("--recipe", "clca", "--set", "steps=2", "--learn-data", made.data)
    done = cli("optimize", "tests.cli.toy:pooled", *arguments, "-o", tmp_path / "out")
    assert done.code == 3
    assert "Traceback" not in done.err
    assert listing(tmp_path) == []
