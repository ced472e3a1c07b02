"""``optimize --recipe experts``: trained, saved, read again at another tau; and mistakes in one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import SOURCE, Cli, Made, listing, refused

QUICK = ("--recipe", "experts", "--set", "experts=4", "--set", "steps=3")


@pytest.mark.slow
def test_one_command_cuts_and_trains(cli: Cli, made: Made, tmp_path: Path) -> None:
    out, engine = tmp_path / "experts", tmp_path / "e.engine"
    done = cli(
        "optimize",
        SOURCE,
        *QUICK,
        "--set",
        "budget=0.6",
        "--learn-data",
        made.data,
        "-o",
        out,
        "--json",
    )
    assert done.code == 0, done.err
    (first, _) = done.json["passes"]
    assert first["applied"] == len(first["details"]["networks"]) > 0
    assert first["details"]["share"] == pytest.approx(0.6, abs=0.1)  # on few items held out
    assert done.json["prediction"]["macs"] == first["details"]["macs"]
    assert listing(out) == ["experts.safetensors", "program.pt2", "program.yaml", "recipe.yaml"]
    recipe = ("optimize", SOURCE, "--recipe", out / "recipe.yaml", "-o")
    assert cli(*recipe, tmp_path / "again").code == 0
    for name in ("experts.safetensors", "recipe.yaml"):
        assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes()
    assert cli(*recipe, tmp_path / "whole", "--set", "tau=1").code == 0
    assert cli("export", tmp_path / "whole", "-o", engine).code == 0
    same = cli("verify", SOURCE, engine, "--json")
    assert same.code == 0, same.err


@pytest.mark.parametrize(
    ("given", "code", "said"),
    [
        (("--set", "tau=1.5", "--learn-data", "DATA"), 2, "experts.tau: input should be less than or equal to 1"),
        (("--set", "tau=0.5", "--flops", "0.5"), 2, "give one of tau, budget and flops"),
        ((), 2, "pass 'experts' needs data and none was given: add --data DATA"),
        (("--set", "experts=7", "--learn-data", "DATA"), 3, "7 experts cannot share"),
        (("--flops", "0.1", "--learn-data", "DATA"), 1, "flops=0.1 cannot be met: when each token runs one of 4"),
    ],
)  # fmt: skip
def test_mistakes(
    cli: Cli, made: Made, tmp_path: Path, given: tuple[str, ...], code: int, said: str
) -> None:
    refused(cli, made, tmp_path / "out", QUICK, given, code, said)
    assert "out" not in listing(tmp_path)
