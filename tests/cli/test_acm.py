"""``optimize --recipe acm``: trained, saved, read again; and mistakes in one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import SOURCE, Cli, Made, listing, refused

QUICK = (
    "--recipe", "acm", "--set", "distil_steps=2", "--set", "gate_steps=2", "--set", "steps=2",
)  # fmt: skip


@pytest.mark.slow
def test_one_command_converts_and_trains(cli: Cli, made: Made, tmp_path: Path) -> None:
    out = tmp_path / "adaptive"
    done = cli("optimize", SOURCE, *QUICK, "--learn-data", made.data, "-o", out, "--json")
    assert done.code == 0, done.err
    (first, _) = done.json["passes"]
    assert first["applied"] == len(first["details"]["networks"]) > 0
    assert first["details"]["macs"] < first["details"]["dense_macs"]
    assert done.json["prediction"]["macs"] == first["details"]["macs"]
    assert listing(tmp_path) == ["adaptive"]
    assert listing(out) == ["acm.safetensors", "program.pt2", "program.yaml", "recipe.yaml"]

    picture = tmp_path / "learners.png"
    shown = cli("inspect", out, "--image", made.image, "-o", picture, "--json")
    assert shown.code == 0, shown.err
    assert picture.read_bytes().startswith(b"\x89PNG")
    told = shown.json["learners"]
    assert [row["network"] for row in told] == list(first["details"]["networks"])
    assert all(sum(row["tokens"]) == 37 for row in told)
    run = [n * count for row in told for n, count in enumerate(row["tokens"])]
    assert sum(row["share"] for row in told) == pytest.approx(sum(run) / 37 / 4)

    recipe = ("optimize", SOURCE, "--recipe", out / "recipe.yaml", "-o")
    assert cli(*recipe, tmp_path / "again").code == 0
    for name in ("acm.safetensors", "recipe.yaml"):
        assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes()
    less = (*recipe, tmp_path / "less", "--budget", "0.25")
    assert "budget=0.5, and for 0.25 they must be tilted on data" in cli(*less).err
    done = cli(*less, "--learn-data", made.data, "--json")
    assert done.code == 0, done.err
    assert done.json["passes"][0]["details"]["macs"] < first["details"]["macs"]
    assert cli("inspect", SOURCE, "--text", "a b").code == 2


@pytest.mark.slow
def test_linears_of_attention_too(cli: Cli, made: Made, tmp_path: Path) -> None:
    out = tmp_path / "adaptive"
    chosen = ("--set", "sites=[ffn,qkv,out]", "--learn-data", made.data)
    done = cli("optimize", SOURCE, *QUICK, *chosen, "-o", out, "--json")
    assert done.code == 0, done.err
    details = done.json["passes"][0]["details"]
    ranks = details["projections"]
    assert len(details["networks"]) == 5 * len(ranks) // 4 > 0
    assert all(told["rank"] * 2 == told["of"] for told in ranks.values())
    assert "keep rank" in details["note"]
    shown = cli("inspect", out, "--image", made.image, "-o", tmp_path / "learners.png", "--json")
    assert sorted(r["network"] for r in shown.json["learners"]) == sorted(details["networks"])

    recipe = ("optimize", SOURCE, "--recipe", out / "recipe.yaml", "-o")
    assert cli(*recipe, tmp_path / "again").code == 0
    for name in ("acm.safetensors", "recipe.yaml"):
        assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes()
    less = cli(*recipe, tmp_path / "less", "--set", "sites=[ffn]")
    assert less.code == 2
    assert "was made with sites=ffn,qkv,out and not sites=ffn" in less.err
    assert not (tmp_path / "less").exists()


@pytest.mark.parametrize(
    ("given", "code", "said"),
    [
        (("--set", "budget=0", "--learn-data", "DATA"), 2, "acm.budget: input should be greater than 0"),
        (("--set", "budget=1.01", "--learn-data", "DATA"), 2, "less than or equal to 1"),
        (("--budget", "0", "--learn-data", "DATA"), 2, "acm.budget: input should be greater than 0"),
        (("--budget", "1.5", "--learn-data", "DATA"), 2, "'--budget': Input should be less than or equal to 1"),
        ((), 2, "pass 'acm' needs data and none was given: add --data DATA"),
        (("--set", "learners=7", "--learn-data", "DATA"), 3, "7 learners cannot share"),
        (("--set", "sites=[attention]", "--learn-data", "DATA"), 2, "input should be 'ffn', 'qkv' or 'out'"),
        (("--set", "rank=1.5", "--learn-data", "DATA"), 2, "acm.rank: input should be less than or equal to 1"),
        (("--set", "sites=[out]", "--set", "rank=0.01", "--learn-data", "DATA"), 3, "set a larger rank or fewer"),
    ],
)  # fmt: skip
def test_mistakes(
    cli: Cli, made: Made, tmp_path: Path, given: tuple[str, ...], code: int, said: str
) -> None:
    refused(cli, made, tmp_path / "out", QUICK, given, code, said)
    assert listing(tmp_path) == []
