"""``atm``: counted once on data, made again from what was saved; mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import SOURCE, Cli, Made, listing
from thresher.compiler.recipe import load_recipe


def test_pairs_are_counted_and_the_saved_recipe_needs_no_data(
    cli: Cli, made: Made, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    asked = ("optimize", SOURCE, "--recipe", "atm", "--set", "alpha=0.95")
    done = cli(*asked, "--learn-data", made.data, "-o", first, "--json")
    assert done.code == 0, done.err
    details = done.json["passes"][0]["details"]
    assert details["macs"] < details["dense_macs"]
    assert details["thresholds"] == sorted(details["thresholds"], reverse=True)
    saved = load_recipe(str(first / "recipe.yaml")).passes[0].options
    assert [37, *saved.model_dump()["counts"]] == details["tokens"]
    again = cli("optimize", SOURCE, "--recipe", first / "recipe.yaml", "-o", second, "--json")
    assert again.code == 0, again.err
    assert again.json["passes"][0]["details"]["tokens"] == details["tokens"]
    graphs = [cli("inspect", folder, "--graph").out for folder in (first, second)]
    assert graphs[0] == graphs[1]


@pytest.mark.parametrize(
    ("given", "code", "said"),
    [
        ((), 2, "pass 'atm' needs data and none was given: add --data DATA"),
        (("--flops", "0.5", "--set", "alpha=0.9"), 2, "one budget only, not alpha and flops"),
        (("--set", "alpha=1.5", "--set", "beta=0", "--learn-data", "DATA"), 3,
            "no pair of tokens has a cosine above 1.5: lower alpha"),
    ],
)  # fmt: skip
def test_mistakes(
    cli: Cli, made: Made, tmp_path: Path, given: tuple[str, ...], code: int, said: str
) -> None:
    arguments = [made.data if word == "DATA" else word for word in given]
    done = cli("optimize", SOURCE, "--recipe", "atm", *arguments, "-o", tmp_path / "out")
    assert (done.code, said in done.err) == (code, True), done.err
    assert listing(tmp_path) == []


@pytest.mark.slow
def test_it_is_compared_at_budgets(cli: Cli, made: Made, tmp_path: Path) -> None:
    other = tmp_path / "other.npz"
    other.write_bytes(made.data.read_bytes())
    done = cli("compare", SOURCE, "--data", made.data, "--learn-data", other, "--methods", "tome,atm",
        "--flops", "0.7", "--no-control", "--rounds", "1", "--json")  # fmt: skip
    assert done.code == 0, done.err
    rows = {row["method"]: row for row in done.json["rows"]}
    assert all(0.6 < rows[method]["share"] <= 0.7 for method in ("tome", "atm"))
    assert "counts are the pairs above a cosine" in rows["atm"]["note"]
