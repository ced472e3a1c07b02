"""``optimize --recipe early-exit``, and the verbs on the engine of two graphs that is made of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import SOURCE, Cli, Made, listing, refused

QUICK = ("--recipe", "early-exit", "--set", "steps=3")


@pytest.mark.slow
def test_from_a_source_to_answers(cli: Cli, made: Made, tmp_path: Path) -> None:
    out, engine = tmp_path / "early", tmp_path / "early.engine"
    settings = (*QUICK, "--set", "threshold=0.3", "--learn-data", made.data)
    done = cli("optimize", SOURCE, *settings, "-o", out, "--json")
    assert done.code == 0, done.err
    details = done.json["passes"][0]["details"]
    assert done.json["prediction"]["macs"] == details["macs"]
    assert listing(out) == ["early-exit.safetensors", "program.pt2", "program.yaml", "recipe.yaml"]
    assert (
        cli("optimize", SOURCE, "--recipe", out / "recipe.yaml", "-o", tmp_path / "again").code == 0
    )
    assert (tmp_path / "again" / "recipe.yaml").read_bytes() == (out / "recipe.yaml").read_bytes()

    assert cli("export", out, "-o", engine).code == 0
    assert listing(engine) == ["first", "manifest.json", "rest"]
    same = cli("verify", out, engine, "--data", made.data)
    assert same.code == 0, same.err
    assert "items left early" in same.out
    ran = cli("run", engine, "--input", made.image, "--json")
    assert ran.code == 0, ran.err
    assert ran.json["left"]["items"] == 1
    timed = cli("profile", out, engine, "--rounds", "1")
    assert "items left early" in timed.out, timed.err
    served = cli("export", engine, "--serve", "triton", "-o", tmp_path / "served")
    assert served.code == 3
    assert "cannot be served" in served.err


@pytest.mark.parametrize(
    ("given", "code", "said"),
    [
        (("--set", "threshold=0.5", "--set", "max_drop=1"), 2, "give one of threshold and max_drop"),
        ((), 2, "pass 'early-exit' needs data and none was given: add --data DATA"),
        (("--set", "block=2", "--learn-data", "DATA"), 2, "the model has 3 blocks, so give 0 to 1"),
    ],
)  # fmt: skip
def test_mistakes(
    cli: Cli, made: Made, tmp_path: Path, given: tuple[str, ...], code: int, said: str
) -> None:
    refused(cli, made, tmp_path / "out", QUICK, given, code, said)
    assert "out" not in listing(tmp_path)
