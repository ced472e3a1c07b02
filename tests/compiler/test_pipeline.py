"""The pipeline: order is checked first, every pass is verified, and whoever breaks it is named."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx

from tests.compiler.broken import PROGRAM, Idle, Negate, aten, broken, negated, node, rewritten
from tests.compiler.toys import TOKENS, WIDTH
from thresher.compiler import optimize
from thresher.compiler.contract import Context, ContractError, Options, Pass, PassResult
from thresher.compiler.errors import RefusedError, UsageError, VerdictError
from thresher.compiler.pipeline import PassReport, check_order, explain, run_passes
from thresher.compiler.program import PassRecord, Program, Refusal
from thresher.compiler.recipe import load_recipe, parse_recipe
from thresher.compiler.spec import SpecError
from thresher.compiler.surgery import Rewriter


def patient(one: Pass[Any]) -> Pass[Any]:
    one.allow_zero = True
    return one


def declared(title: str, **attributes: Any) -> Pass[Any]:
    """A pass that must not run, with the given ordering."""
    return broken(lambda p, c: pytest.fail("it ran"), name=title, **attributes)


# --- what it does ---------------------------------------------------------------------------------


def test_history_holds_options_counts_and_time() -> None:
    program = run_passes(PROGRAM, [Negate(), patient(Idle())])
    first, second = program.history
    assert (first.name, first.options, first.matched, first.applied) == (
        "negate",
        {"times": 1},
        1,
        1,
    )
    assert first.seconds > 0
    assert (second.name, second.applied, len(second.refused)) == ("idle", 0, 3)
    assert program.stage == "optimised"
    assert PROGRAM.history == ()


def test_reports_show_operators() -> None:
    seen: list[PassReport] = []
    told: list[tuple[str, int, int]] = []
    context = Context(progress=lambda *step: told.append(step))
    last = run_passes(PROGRAM, [Negate(), patient(Idle())], context, observe=seen.append)
    assert [(r.number, r.total, r.record.name) for r in seen] == [(1, 2, "negate"), (2, 2, "idle")]
    assert (seen[0].ops["aten.neg"], seen[1].ops) == (1, {})
    assert seen[1].program is last
    assert told == [("pass negate", 0, 2), ("pass idle", 1, 2), ("passes", 2, 2)]


def test_a_recipe_by_name_and_by_file(tmp_path: Path) -> None:
    program = optimize(PROGRAM, load_recipe("tome", ["r=3"]))
    assert [record.name for record in program.history] == ["tome", "cleanup"]
    (tmp_path / "mine.yaml").write_text(load_recipe("tome", ["r=3"]).to_yaml())
    assert optimize(PROGRAM, tmp_path / "mine.yaml").text() == program.text()
    program.save(tmp_path / "small")
    again = Program.load(tmp_path / "small")
    twice = run_passes(again, [Negate()])
    assert [record.name for record in twice.history] == ["tome", "cleanup", "negate"]
    x = {"x": torch.randn(3, TOKENS, WIDTH)}
    assert torch.equal(twice.run(x)["output"], -program.run(x)["output"])


def test_explain_asks_every_pass_and_changes_nothing() -> None:
    before = PROGRAM.text()
    tome, cleanup = explain(PROGRAM, load_recipe("tome", ["r=3"]))
    assert (tome.name, tome.matched, tome.applied, tome.details["tokens"]) == (
        "tome",
        1,
        1,
        [10, 7],
    )
    assert cleanup.name == "cleanup"
    (refused,) = explain(PROGRAM, parse_recipe("passes: [tome: {layers: [7], r: 1}]", "x"))
    assert refused.refused[0].reason.startswith("layers=7 does not exist")
    assert PROGRAM.text() == before


# --- order ----------------------------------------------------------------------------------------

ORDERS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"after": frozenset({"two"})}, {}, "pass 'one' must come after 'two': move it down"),
    ({}, {"before": frozenset({"one"})}, "pass 'two' must come before 'one': move it up"),
    (
        {"requires": frozenset({"small"})},
        {"ensures": frozenset({"small"})},
        "pass 'one' needs a program that is 'small': put 'two' before it",
    ),
    (
        {"requires": frozenset({"small"})},
        {},
        "pass 'one' needs a program that is 'small': put a pass before it",
    ),
]


@pytest.mark.parametrize(("first", "second", "said"), ORDERS)
def test_a_wrong_order_is_told_before_anything_runs(
    first: dict[str, Any], second: dict[str, Any], said: str
) -> None:
    passes = [declared("one", **first), declared("two", **second)]
    with pytest.raises(UsageError) as caught:
        run_passes(PROGRAM, passes)
    assert str(caught.value).startswith(said)
    if "ensures" in second or "after" in first or "before" in second:
        check_order(passes[::-1], PROGRAM)


def test_the_history_counts_as_passes_that_came_first() -> None:
    done = dataclasses.replace(PROGRAM, history=(PassRecord("tome", {}, 1, 1),))
    with pytest.raises(UsageError, match="must come before 'tome', which was applied already"):
        check_order([declared("one", before=frozenset({"tome"}))], done)
    needs = declared("one", requires=frozenset({"imported", "tokens-reduced"}))
    check_order([needs], done)
    with pytest.raises(UsageError, match="needs a program that is 'tokens-reduced'"):
        check_order([needs], PROGRAM)


def test_missing_data_is_told_before_anything_runs() -> None:
    with pytest.raises(UsageError, match="pass 'two' needs data"):
        run_passes(PROGRAM, [declared("one"), declared("two", needs_data=True)])


# --- nothing to do --------------------------------------------------------------------------------


def test_a_pass_that_applies_nowhere_is_refused_with_reasons_and_nodes() -> None:
    with pytest.raises(RefusedError) as caught:
        run_passes(PROGRAM, [Idle()])
    assert str(caught.value) == (
        "pass 'idle' applied nowhere in toy: too narrow (node 'linear_0' and 1 more);"
        " too late (node 'linear_2'); choose another pass or other options,"
        " or say allow_zero: true for it in the recipe"
    )


@pytest.mark.parametrize(
    ("matched", "said"),
    [(3, "3 places would do, but its options ask for no change"), (0, "it found no place")],
)
def test_without_refusals_the_counts_say_why(matched: int, said: str) -> None:
    with pytest.raises(RefusedError, match=said):
        run_passes(PROGRAM, [broken(lambda p, c: PassResult(p, matched, 0))])


def test_a_long_list_of_reasons_is_cut() -> None:
    refused = tuple(Refusal("", f"reason {i}") for i in range(9))
    with pytest.raises(RefusedError, match="reason 0; reason 1; reason 2; and 6 other reasons;"):
        run_passes(PROGRAM, [broken(lambda p, c: PassResult(p, 9, 0, refused))])


# --- broken passes --------------------------------------------------------------------------------


def _metadata(program: Program, context: Context) -> PassResult:
    program = rewritten(program)
    del node(program, "gelu").meta["val"]
    return PassResult(program, 1, 1)


def _contract(program: Program, context: Context) -> PassResult:
    def cut(rewriter: Rewriter, outputs: list[fx.Node]) -> list[fx.Node]:
        return [rewriter.emit(aten.slice.Tensor, n, 1, 0, 2) for n in outputs]

    return PassResult(rewritten(program, cut), 1, 1)


def _forbidden(program: Program, context: Context) -> PassResult:
    def add(rewriter: Rewriter, outputs: list[fx.Node]) -> list[fx.Node]:
        (n,) = outputs
        return [rewriter.inline(lambda x: x.scatter_add(1, torch.zeros_like(x).long(), x), n)]

    return PassResult(rewritten(program, add), 1, 1)


BREAKS = {
    "metadata": (_metadata, "node 'gelu' has no shape and dtype"),
    "outputs": (_contract, r"shape \('batch', 2\) instead of \('batch', 4\)"),
    "operator": (_forbidden, "scatter_add"),
}


@pytest.mark.parametrize("what", BREAKS)
def test_the_pass_that_broke_the_program_is_named(what: str) -> None:
    body, said = BREAKS[what]
    with pytest.raises(ContractError, match=said) as caught:
        run_passes(PROGRAM, [Negate(), broken(body)])
    assert str(caught.value).startswith("pass 'broken' broke it: ")
    assert str(caught.value).endswith("(passes that ran before: negate)")
    assert isinstance(caught.value.__cause__, SpecError)


def test_a_pass_may_change_outputs_where_the_user_wants_it() -> None:
    class Cut(Negate):
        name = "cut"

        @property
        def keeps_outputs(self) -> bool:
            return False

        def run(self, program: Program, context: Context) -> PassResult:
            return _contract(program, context)

    program = run_passes(PROGRAM, [Cut(), Negate()])
    assert program.outputs[0].shape == ("batch", 2)


def test_a_broken_promise_tells_what_ran_before() -> None:
    with pytest.raises(ContractError, match=r"returned the same graph \(passes that .*: negate\)"):
        run_passes(PROGRAM, [Negate(), broken(lambda p, c: PassResult(p, 1, 1))])


def test_a_crash_is_a_bug_with_its_cause() -> None:
    with pytest.raises(ContractError, match="'broken' failed with ZeroDivisionError") as caught:
        run_passes(PROGRAM, [broken(lambda p, c: 1 / 0)])
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert "no pass ran before" in str(caught.value)


@pytest.mark.parametrize("error", [UsageError, RefusedError, VerdictError])
def test_a_users_mistake_stays_one_and_gets_the_name(error: type[Exception]) -> None:
    def body(program: Program, context: Context) -> PassResult:
        raise error("no such layer")

    with pytest.raises(error, match=r"^pass 'broken': no such layer$"):
        run_passes(PROGRAM, [broken(body)])


def test_an_interruption_passes_through() -> None:
    def body(program: Program, context: Context) -> PassResult:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_passes(PROGRAM, [broken(body)])


def test_a_program_that_was_broken_before_is_not_blamed_on_a_pass() -> None:
    program = rewritten(PROGRAM)
    del node(program, "gelu").meta["val"]
    with pytest.raises(SpecError, match="the imported program is not legal: node 'gelu'"):
        run_passes(program, [Negate()])


# --- dumps ----------------------------------------------------------------------------------------


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_dumps_are_numbered_headed_and_complete(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "dumps"
    run_passes(PROGRAM, [Negate(), patient(Idle())], Context(dump_dir=folder))
    assert names(folder) == [
        "01-negate.after.txt",
        "01-negate.before.txt",
        "02-idle.after.txt",
        "02-idle.before.txt",
    ]
    before = (folder / "01-negate.before.txt").read_text()
    after = (folder / "01-negate.after.txt").read_text()
    assert before.startswith("# before pass 1 of 2: negate(times=1)\n# imported program of toy")
    assert after.startswith(
        "# after pass 1 of 2: negate(times=1): matched 1, applied 1, refused 0, "
    )
    assert "neg = aten.neg(linear_4)" in after
    assert before.partition("\n")[2] == PROGRAM.text()


def test_a_failing_pass_leaves_its_dumps(tmp_path: Path) -> None:
    with pytest.raises(ContractError):
        run_passes(PROGRAM, [broken(_metadata)], Context(dump_dir=tmp_path))
    assert "gelu = aten.gelu(linear_2) : ?" in (tmp_path / "01-broken.after.txt").read_text()
    with pytest.raises(ContractError):
        run_passes(PROGRAM, [broken(lambda p, c: 1 / 0)], Context(dump_dir=tmp_path))
    assert names(tmp_path) == ["01-broken.before.txt"]


def test_foreign_files_are_never_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(UsageError, match=r"holds 'thesis.txt', which is no dump"):
        run_passes(PROGRAM, [declared("one")], Context(dump_dir=tmp_path))
    with pytest.raises(UsageError, match="cannot write dumps to"):
        run_passes(PROGRAM, [declared("one")], Context(dump_dir=tmp_path / "thesis.txt"))
    assert names(tmp_path) == ["thesis.txt"]


def test_two_runs_differ_in_time_alone(tmp_path: Path) -> None:
    texts = []
    for _ in range(2):
        run_passes(PROGRAM, [Negate()], Context(dump_dir=tmp_path))
        texts.append((tmp_path / "01-negate.after.txt").read_text().partition("\n")[2])
    assert texts[0] == texts[1]


def test_passes_without_options_use_the_base_class() -> None:
    assert Idle().options == Options()
    assert run_passes(rewritten(PROGRAM, negated), [Negate()]).history[0].options == {"times": 1}
