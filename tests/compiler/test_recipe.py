"""Recipes: every mistake is told with its place and what was meant; what is printed reads back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from thresher.compiler import marked
from thresher.compiler.errors import UsageError
from thresher.compiler.recipe import (
    LearnedOn,
    Recipe,
    RecipePass,
    built_in,
    load_recipe,
    parse_recipe,
)
from thresher.passes.cleanup import CleanupOptions
from thresher.passes.tokens.diffrate import DiffRateOptions
from thresher.passes.tokens.methods import EvitOptions, RandomOptions, TomeOptions
from thresher.passes.tokens.options import TokenOptions

GOOD = """\
name: mine
summary: half the tokens
passes:
  - tome: {r: 13, inflect: 1}
  - cleanup:
      allow_zero: true
  - evit
"""


def test_a_recipe_is_read() -> None:
    recipe = parse_recipe(GOOD, "mine.yaml")
    assert (recipe.name, recipe.summary, recipe.origin) == ("mine", "half the tokens", "mine.yaml")
    assert recipe.passes == (
        RecipePass("tome", TomeOptions(r=13, inflect=1.0)),
        RecipePass("cleanup", CleanupOptions(), allow_zero=True),
        RecipePass("evit", EvitOptions()),
    )
    assert [one.name for one in recipe.build()] == ["tome", "cleanup", "evit"]
    assert [one.allow_zero for one in recipe.build()] == [False, True, False]


MISTAKES = {
    "unknown key": (
        "nam: x\npasses: [tome]",
        "1:1: a recipe has no key 'nam'; did you mean 'name'?",
    ),
    "learned on": (
        "learned_on: CIFAR\npasses: [tome]",
        "1:13: 'learned_on' is written as {data: ..., model: ...}, not 'CIFAR'",
    ),
    "learned on what": (
        "learned_on: {data: x, modle: y}\npasses: [tome]",
        "1:23: learned_on has no key 'modle'; did you mean 'model'?",
    ),
    "half learned on": (
        "learned_on: {data: x}\npasses: [tome]",
        "1:13: learned_on has no 'model': give data and model",
    ),
    "learned on a number": (
        "learned_on: {data: x, model: 3}\npasses: [tome]",
        "1:30: this must be text, not 3",
    ),
    "no passes": ("name: x", "1:1: the recipe has no 'passes'"),
    "empty": ("", "1:1: a recipe is a mapping"),
    "not a mapping": ("- tome", "1:1: a recipe is a mapping"),
    "no list": ("passes: tome", "1:9: 'passes' is a list of at least one pass"),
    "empty list": ("passes: []", "1:9: 'passes' is a list of at least one pass"),
    "name": ("name: 3\npasses: [tome]", "1:7: this must be text, not 3"),
    "unknown pass": (
        "passes:\n  - tomee: {r: 3}",
        "2:5: there is no pass 'tomee'; did you mean 'tome'?",
    ),
    "two in one": ("passes:\n  - tome: {}\n    evit: {}", "2:5: a pass is written as its name"),
    "number": ("passes: [13]", "1:10: a pass is written as its name"),
    "options": ("passes:\n - tome: 13", "2:10: options of pass 'tome' are written as {option:"),
    "unknown option": (
        "passes:\n - tome: {r: 3, inflekt: 1}",
        "2:17: pass 'tome' has no option 'inflekt'; did you mean 'inflect'?",
    ),
    "wrong type": (
        "passes:\n - tome:\n     r: many",
        "3:9: tome.r: input should be a valid integer, not 'many'",
    ),
    "no conversion": (
        "passes:\n - tome: {r: '3'}",
        "2:14: tome.r: input should be a valid integer",
    ),
    "whole float": ("passes:\n - tome: {r: 3.0}", "2:14: tome.r: input should be a valid integer"),
    "flag as number": ("passes: [tome: {r: true}]", "1:20: tome.r: input should be a valid int"),
    "inside a list": (
        "passes:\n - tome:\n     counts: [9,\n       x]",
        "4:8: tome.counts[1]: input should be a valid integer, not 'x'",
    ),
    "range": ("passes: [tome: {flops: 2}]", "1:24: tome.flops: input should be less than or equal"),
    "together": (
        "passes:\n - cleanup\n - tome: {r: 1, keep: 0.5}",
        "3:4: pass 'tome': give one budget only, not r and keep",
    ),
    "allow_zero": (
        "passes: [tome: {allow_zero: 1}]",
        "1:29: tome.allow_zero is true or false, not 1",
    ),
    "twice": (
        "passes: [tome: {r: 1, r: 2}]",
        "1:23: the key 'r' is given twice, first at r.yaml:1:17",
    ),
    "key": ("3: x", "1:1: keys must be text"),
    "syntax": ("passes: [tome\nname: x", "2:5: not valid YAML"),
    "tab": ("passes:\n\t- tome", "2:1: not valid YAML: found character '\\t'"),
    "two documents": ("passes: [tome]\n---\nx: 1", "2:1: not valid YAML"),
    "alias": ("passes: [&a tome, *a]", "1:10: not valid YAML: anchors and aliases are not allowed"),
    "tag": ("passes: !!python/tuple [tome]", "1:9: the YAML tag"),
    "false tag": ("passes: [tome: {r: !!int x}]", "1:20: 'x' is not of type int"),
    "control character": ("name: \x00", ": not valid YAML: "),
    "deep": ("[" * 5000, ": not valid here: nested too deeply"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_with_its_place(mistake: str) -> None:
    text, said = MISTAKES[mistake]
    with pytest.raises(UsageError) as caught:
        parse_recipe(text, "r.yaml")
    place = said if said.startswith(":") else f":{said}"
    assert str(caught.value).startswith(f"r.yaml{place}")
    assert "\n" not in str(caught.value)


def test_the_core_schema() -> None:
    text = "[1e-3, .5, 010, on, yes, ~, , true, 2026-01-01, '3', -.inf, 1_0]"
    assert marked.read(text.replace(", ,", ", null,"), "x").plain() == [
        1e-3, 0.5, 10, "on", "yes", None, None, True, "2026-01-01", "3", float("-inf"), "1_0",
    ]  # fmt: skip


OVERRIDES: list[tuple[str, str, Any]] = [
    ("r=13", "r", 13),
    ("tome.r=13", "r", 13),
    ("flops=5e-1", "flops", 0.5),
    ("counts=197,180,160", "counts", (197, 180, 160)),
    ("counts=[197, 180]", "counts", (197, 180)),
    ("layers=3", "layers", (3,)),
    ("keep=0.7", "keep", 0.7),
    ("keep=[0.7]", "keep", (0.7,)),
    ("keep=0.9,0.7", "keep", (0.9, 0.7)),
    ("restore=false", "restore", False),
    ("r=", "r", None),
    ("r=null", "r", None),
]


@pytest.mark.parametrize(("override", "option", "value"), OVERRIDES)
def test_override(override: str, option: str, value: object) -> None:
    recipe = load_recipe("tome", [override])
    assert getattr(recipe.passes[0].options, option) == value


def test_counts_are_rounded_where_the_recipe_leaves_that_open() -> None:
    def multiples(name: str, *overrides: str) -> list[int]:
        found = load_recipe(name, overrides).rounding(8)
        return [getattr(entry.options, "multiple", 0) for entry in found.passes]

    assert multiples("tome", "r=13") == [8, 0]
    assert multiples("tome", "r=13", "multiple=4") == [4, 0]
    assert multiples("diffrate/deit-s@2.9g") == [1, 0]  # its counts are what was published
    recipe = load_recipe("tome", ["r=13", "inflect=0.5"])
    assert recipe.rounding(1) is recipe
    assert recipe.rounding(8).passes[0].options == TomeOptions(r=13, inflect=0.5, multiple=8)


def test_the_last_override_counts() -> None:
    recipe = load_recipe("tome", ["r=1", "r=2", "cleanup.allow_zero=false"])
    assert recipe.passes[0].options == TomeOptions(r=2)
    assert [entry.allow_zero for entry in recipe.passes] == [False, False]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("r", "write option=value or pass.option=value"),
        ("=3", "write option=value or pass.option=value"),
        ("rr=3", "no pass of the recipe has an option 'rr'; did you mean 'r'?"),
        ("tom.r=3", "the recipe has no pass 'tom'; did you mean 'tome'?"),
        ("keep=0.5", "2 passes of the recipe have this option: write evit.keep or tome.keep"),
        ("tome.r=x", "tome.r: input should be a valid integer, not 'x'"),
        ("tome.counts=9,x", "tome.counts[1]: input should be a valid integer, not 'x'"),
        ("tome.r=[1", "not valid YAML"),
    ],
)
def test_a_wrong_override_is_told_as_it_was_written(override: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_recipe(GOOD, "mine.yaml", [override])
    assert str(caught.value).startswith(f"--set {override}: {said}")


def test_a_pass_that_occurs_twice_cannot_be_overridden() -> None:
    with pytest.raises(UsageError, match=r"2 passes .* have this option: write a recipe file"):
        parse_recipe("passes: [tome, tome]", "r.yaml", ["tome.r=1"])


def test_built_in_recipes_are_a_method_then_cleanup() -> None:
    plain = {name for name in built_in() if "/" not in name}
    token_methods = {"tome", "evit", "topk-norm", "random", "diffrate", "max-min", "pitome", "ats"}
    token_methods |= {"zero-tprune", "patch-merger", "sit", "dynamic-vit", "dtem", "tomesd"}
    token_methods |= {"tail-slice", "atm"}
    behind = {"clca": ["evit"]}  # what needs a reduction before it
    others = {
        "acm",
        "channels",
        "core-neurons",
        "drop-blocks",
        "early-exit",
        "experts",
        "relufy",
        "skip-tokens",
        "sparsity",
    }
    assert plain == token_methods | others | behind.keys()
    for name, summary in built_in().items():
        recipe = load_recipe(name)
        assert (recipe.name, recipe.summary) == (name, summary)
        method, _, schedule = name.partition("/")
        assert [entry.name for entry in recipe.passes] == [
            *behind.get(method, ()),
            method,
            "cleanup",
        ]
        assert (recipe.learned_on is not None) == bool(schedule)
        assert recipe.origin == f"built-in recipe {name}"


def test_a_file_is_loaded_by_path(tmp_path: Path) -> None:
    path = tmp_path / "half.yaml"
    path.write_text("passes: [tome: {keep: 0.5}]")
    recipe = load_recipe(str(path))
    assert (recipe.name, recipe.origin) == ("half", str(path))
    path.write_bytes(b"name: \xff")
    with pytest.raises(UsageError, match="is not UTF-8 text"):
        load_recipe(path)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("tomee", "there is no recipe 'tomee', neither built in nor a file; did you mean 'tome'?"),
        (
            "diffrate/deit-s@2.9",
            "there is no recipe 'diffrate/deit-s@2.9', neither built in nor a file;"
            " did you mean 'diffrate/deit-s@2.9g'?",
        ),
        ("missing.yaml", "cannot read the recipe missing.yaml: No such file"),
        (".", "cannot read the recipe .: Is a directory"),
    ],
)
def test_no_such_recipe(source: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_recipe(source)
    assert str(caught.value).startswith(said)


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
SHARE = st.floats(0, 1, exclude_min=True)
BUDGETS: st.SearchStrategy[dict[str, Any]] = st.one_of(
    st.builds(dict, r=st.integers(0, 10**6), inflect=st.floats(-1, 1)),
    st.builds(dict, keep=SHARE),
    st.builds(dict, counts=st.lists(st.integers()).map(tuple)),
    st.builds(dict, flops=SHARE, layers=st.lists(st.integers()).map(tuple)),
    st.builds(dict, restore=st.booleans(), multiple=st.integers(1, 64)),
)


def passes(name: str, kind: type[TokenOptions]) -> st.SearchStrategy[RecipePass]:
    options = BUDGETS.map(lambda given: kind(**given))
    return st.builds(RecipePass, st.just(name), options, st.booleans())


PASSES = st.one_of(
    passes("tome", TomeOptions),
    passes("evit", EvitOptions),
    passes("diffrate", DiffRateOptions),
    passes("random", RandomOptions),
    st.builds(RecipePass, st.just("cleanup"), st.just(CleanupOptions()), st.booleans()),
)
LEARNED = st.none() | st.builds(LearnedOn, TEXT, TEXT)
RECIPES = st.builds(
    Recipe, TEXT, st.lists(PASSES, min_size=1, max_size=4).map(tuple), TEXT, LEARNED
)


@given(RECIPES)
@example(Recipe("\x85", (RecipePass("evit", EvitOptions()),), "\u2028\ufeff\r\n- on: 1e-3"))
@settings(max_examples=150, deadline=None)
def test_a_resolved_recipe_reads_back_to_itself(recipe: Recipe) -> None:
    text = recipe.to_yaml()
    assert parse_recipe(text, "r.yaml") == recipe
    assert parse_recipe(text, "r.yaml").to_yaml() == text
    assert yaml.safe_load(text)["passes"] == recipe.plain()["passes"]


def test_who_judges_is_not_who_was_learned_from(tmp_path: Path) -> None:
    """A calibration that lies elsewhere is the same one: the pass names it without its folder."""
    text = "learned_on: {data: theirs, model: m}\npasses: [channels: {calibration: c.safetensors}]"
    read = parse_recipe(text, "f").beside(tmp_path)
    ran = [{"calibration": "c.safetensors"}]
    kept = read.decided(ran, LearnedOn("judge", "m"))
    assert kept.learned_on == LearnedOn("theirs", "m")
    assert kept.plain()["passes"] == parse_recipe(text, "f").plain()["passes"]
    anew = read.decided([{"calibration": "other.safetensors"}], LearnedOn("judge", "m"))
    assert anew.learned_on == LearnedOn("judge", "m")
