"""``optimize`` with learned token modules: trained, saved, read again, exported; and mistakes in one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import SOURCE, Cli, Made, listing

MODULES = ("sit", "patch-merger", "dynamic-vit", "dtem")


@pytest.mark.slow
@pytest.mark.parametrize("name", MODULES)
def test_one_command_trains_and_its_recipe_does_it_again(
    cli: Cli, made: Made, tmp_path: Path, name: str
) -> None:
    out = tmp_path / "out"
    quick = ("--recipe", name, "--set", "steps=2", "--flops", "0.8", "--learn-data", made.data)
    done = cli("optimize", SOURCE, *quick, "-o", out, "--json")
    assert done.code == 0, done.err
    first = done.json["passes"][0]
    assert first["applied"] > 0
    assert first["details"]["training"]["steps"] == 2
    assert first["details"]["macs"] <= 0.8 * first["details"]["dense_macs"]
    assert listing(tmp_path) == ["out"]
    assert listing(out) == sorted(
        [f"{name}.safetensors", "program.pt2", "program.yaml", "recipe.yaml"]
    )

    again = tmp_path / "again"
    done = cli("optimize", SOURCE, "--recipe", out / "recipe.yaml", "-o", again)
    assert done.code == 0, done.err
    for file in (f"{name}.safetensors", "recipe.yaml"):
        assert (again / file).read_bytes() == (out / file).read_bytes()

    engine = tmp_path / "engine"
    assert cli("export", out, "--target", "cpu", "-o", engine).code == 0
    picture = tmp_path / "tokens.png"
    assert cli("inspect", out, "--image", made.image, "-o", picture).code == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("given", "code", "said"),
    [
        ((), 2, "pass 'sit' needs data and none was given: add --data DATA"),
        (("--set", "published=none.safetensors"), 2, "there is no file none.safetensors"),
        (("--set", "calibration=a", "--set", "published=b"), 2, "give calibration or published"),
        (("--set", "rate=0", "--learn-data", "DATA"), 2, "sit.rate: input should be greater than 0"),
    ],
)  # fmt: skip
def test_mistakes(
    cli: Cli, made: Made, tmp_path: Path, given: tuple[str, ...], code: int, said: str
) -> None:
    arguments = [made.data if word == "DATA" else word for word in given]
    done = cli("optimize", SOURCE, "--recipe", "sit", *arguments, "-o", tmp_path / "out")
    assert done.code == code
    assert said in done.err
    assert "Traceback" not in done.err
    assert listing(tmp_path) == []
