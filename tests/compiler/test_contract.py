"""The pass contract against authors who break it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pydantic
import pytest

from tests.compiler.broken import PROGRAM, Idle, Negate, NegateOptions, broken, rewritten
from thresher.compiler.contract import Context, ContractError, Options, Pass, PassResult
from thresher.compiler.errors import UsageError
from thresher.compiler.program import PassRecord, Program, Refusal


def test_a_pass_that_keeps_the_contract() -> None:
    result = Negate()(PROGRAM, Context())
    assert (result.matched, result.applied) == (1, 1)
    assert result.program.exported is not PROGRAM.exported


def test_options_are_typed_frozen_and_closed() -> None:
    assert Negate().options == NegateOptions(times=1)
    with pytest.raises(pydantic.ValidationError):
        NegateOptions(tims=2)  # type: ignore[call-arg]
    with pytest.raises(pydantic.ValidationError):
        NegateOptions().times = 3
    with pytest.raises(ContractError, match="'negate' takes NegateOptions, not Options"):
        Negate(Options())  # type: ignore[arg-type]


def _edited_in_place(program: Program, context: Context) -> PassResult:
    last = list(program.graph.nodes)[-2]
    last.args = tuple(reversed(last.args))
    return PassResult(program, 1, 0)


LIES: dict[str, tuple[Callable[[Program, Context], Any], str]] = {
    "type": (lambda p, c: p, "returned Program instead of PassResult"),
    "no program": (lambda p, c: PassResult(None, 1, 1), "NoneType instead of a Program"),  # type: ignore[arg-type]
    "same program": (lambda p, c: PassResult(p, 1, 1), "applied 1 times and returned the same"),
    "same graph": (lambda p, c: PassResult(dataclasses.replace(p), 1, 1), "the same graph"),
    "silent change": (lambda p, c: PassResult(rewritten(p), 1, 0), "applied 0 times and returned"),
    "negative": (lambda p, c: PassResult(p, -1, 0), "counts matched=-1"),
    "not a number": (lambda p, c: PassResult(p, 1, True), "counts applied=True"),
    "no reason": (lambda p, c: PassResult(p, 1, 0, (Refusal("x", ""),)), "without a reason"),
    "details": (
        lambda p, c: PassResult(p, 0, 0, details={"a": [np.float32(1)]}),
        r"details\['a'\]\[0\] of type float32",
    ),
    "history": (
        lambda p, c: PassResult(
            dataclasses.replace(rewritten(p), history=(PassRecord("x", {}, 0, 0),)), 1, 1
        ),
        "changed the history",
    ),
    "in place": (_edited_in_place, "changed the Program that it was given"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_broken_pass_is_named(lie: str) -> None:
    body, message = LIES[lie]
    with pytest.raises(ContractError, match=message) as caught:
        broken(body)(rewritten(PROGRAM), Context())
    assert "pass 'broken'" in str(caught.value)


class WithReservedWord(Options):
    allow_zero: int = 0


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("name", "TwoWords", "must be kebab-case text, not 'TwoWords'"),
        ("summary", "", "must be one sentence"),
        ("Options", dict, "must be a subclass of thresher's Options"),
        ("Options", WithReservedWord, "declares 'allow_zero'"),
        ("after", {"tome"}, "must be a frozenset"),
    ],
)
def test_a_wrong_declaration_names_class_and_attribute(
    attribute: str, value: Any, message: str
) -> None:
    with pytest.raises(ContractError, match=message) as caught:
        broken(lambda p, c: None, **{attribute: value})
    assert f"Broken.{attribute}" in str(caught.value)


def test_a_pass_that_needs_data_says_so() -> None:
    one = broken(lambda p, c: PassResult(p, 0, 0), needs_data=True)
    with pytest.raises(UsageError, match="'broken' needs data and none was given: add --data"):
        one(PROGRAM, Context())
    (refusal,) = one.explain(PROGRAM, Context()).refused
    assert "needs data" in refusal.reason


def test_explain_counts_and_leaves_the_program() -> None:
    result = Negate().explain(PROGRAM, Context())
    assert (result.program, result.applied) == (PROGRAM, 1)
    assert Idle().explain(PROGRAM, Context()).refused[0] == Refusal("linear_0", "too narrow")


def test_explain_turns_a_users_mistake_into_a_refusal() -> None:
    def body(program: Program, context: Context) -> PassResult:
        raise UsageError("layers=9 does not exist")

    (refusal,) = broken(body).explain(PROGRAM, Context()).refused
    assert refusal == Refusal("", "layers=9 does not exist")


def test_a_pass_that_trains_must_not_train_to_explain() -> None:
    one = broken(lambda p, c: pytest.fail("it ran"), trains=True)
    (refusal,) = one.explain(PROGRAM, Context()).refused
    assert "trains" in refusal.reason


def test_match_must_not_change_the_program() -> None:
    class Eager(Negate):
        def match(self, program: Program, context: Context) -> PassResult:
            return self.run(program, context)

    with pytest.raises(ContractError, match="'negate' returned another Program from match"):
        Eager().explain(PROGRAM, Context())


def test_passes_are_abstract() -> None:
    with pytest.raises(TypeError, match="abstract"):
        Pass()  # type: ignore[abstract]
