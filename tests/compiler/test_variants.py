"""Methods at budgets: what is made once, what has a control, and what a refusal leaves behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.compiler.toys import Toy, traced
from thresher.compiler.contract import Context
from thresher.compiler.errors import UsageError
from thresher.compiler.program import Program
from thresher.compiler.variants import CONTROL, UNCHANGED, reduced, variants


@pytest.fixture(scope="module")
def program() -> Program:
    return traced(Toy(), 16)


def test_every_method_is_made_at_every_share_beside_its_control(program: Program) -> None:
    made = variants(program, ["tome", "evit"], [0.8, 0.9])
    assert [variant.name for variant in made] == [
        "tome 0.9", "evit 0.9", "random 0.9", "tome 0.8", "evit 0.8", "random 0.8",
    ]  # fmt: skip
    for variant in made:
        assert variant.program is not None
        assert variant.share is not None
        assert variant.asked is not None
        assert 0.5 < variant.share <= variant.asked
        assert variant.tokens[0] == 17
        details = variant.program.history[-2 if len(variant.program.history) > 1 else -1].details
        assert variant.share == details["macs"] / details["dense_macs"]


def test_a_control_that_was_named_is_not_made_twice(program: Program) -> None:
    names = [variant.method for variant in variants(program, ["random", "tome"], [0.8])]
    assert names == ["random", "tome"]
    assert [v.method for v in variants(program, ["tome"], [0.8], control=False)] == ["tome"]


@pytest.mark.parametrize("budget", ["r: 2", "flops: 0.85"])
def test_a_recipe_with_its_own_budget_is_one_row_with_a_control_of_the_same_cost(
    program: Program, tmp_path: Path, budget: str
) -> None:
    recipe = tmp_path / "own.yaml"
    recipe.write_text(f"name: own\npasses:\n  - tome: {{{budget}}}\n")
    made = variants(program, [str(recipe), "tome"], [0.7, 0.9])
    (own,) = [variant for variant in made if variant.method == "own"]
    assert own.asked is None
    assert own.share is not None
    controls = [variant for variant in made if variant.method == CONTROL]
    assert {control.asked for control in controls} == {0.7, 0.9, own.share}
    for control in controls:
        assert control.share is not None
        assert control.asked is not None
        assert control.share <= control.asked


def test_recipe_files_of_one_name_keep_their_paths(program: Program, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a/one.yaml", "b/one.yaml", "a/two.yaml")]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        file.write_text("passes:\n  - tome: {r: 2}\n")
    made = variants(program, list(map(str, files)), [0.7], control=False)
    assert {variant.name for variant in made} == {str(files[0]), str(files[1]), "two"}


def test_a_method_that_refuses_says_why_and_the_others_go_on() -> None:
    mean = traced(Toy(pool="mean"), 16)
    evit, tome = variants(mean, ["evit", "tome"], [0.8], control=False)
    assert evit.program is None
    assert "class token" in str(evit.refused)
    assert tome.program is not None


def test_a_budget_that_cannot_be_met_or_asks_for_nothing_is_a_reason(program: Program) -> None:
    assert "cannot be met" in str(reduced(program, "tome", 0.05).refused)
    assert reduced(program, "tome", 1.0).refused == UNCHANGED


def test_a_pass_that_is_no_token_reduction_removes_none(program: Program) -> None:
    (made,) = variants(program, ["cleanup"], [0.8], control=False)
    assert (made.asked, made.program) == (None, None)
    assert "no tokens" in str(made.refused)


def test_overrides_and_the_seed_reach_the_passes(program: Program) -> None:
    made = reduced(program, "tome", 0.8, ["restore=false", "prop_attn=false"]).program
    assert made is not None
    assert made.history[0].options["prop_attn"] is False
    assert made.history[0].options["restore"] is False
    (drawn,) = variants(program, ["random"], [0.8], Context(seed=3))
    assert drawn.program is not None
    assert drawn.program.history[0].options["seed"] == 3


def test_an_unknown_method_is_found_before_anything_is_reduced(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("thresher.compiler.pipeline.run", lambda *_: pytest.fail("it ran"))
    with pytest.raises(UsageError, match=r"no recipe 'tomee'.*did you mean 'tome'"):
        variants(program, ["evit", "tomee"], [0.8])
