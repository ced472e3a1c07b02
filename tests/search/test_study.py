"""A shared study: stopped and continued, joined by others, refused when it is another search."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from threading import Barrier

import pytest

from tests.search.toys import outcome, toy
from thresher.compiler.errors import MissingRequirementError, UsageError
from thresher.passes.tokens.search import study as studies
from thresher.passes.tokens.search.gsearch import GSearch
from thresher.passes.tokens.search.outcome import Counts, Outcome
from thresher.passes.tokens.search.psigmoid import PSigmoid
from thresher.passes.tokens.search.strategy import Budget, Strategy
from thresher.passes.tokens.search.study import COUNTS, LOST, OUTCOME, WORKER, Study

SPACE = toy(60, 4)
FLOORS = (40, 33, 20, 20)
IDENTITY = {"source": "a model", "data": "some data"}


def sigmoid() -> Strategy:
    return PSigmoid(SPACE, Budget(0.6, 0.6))


def greedy() -> Strategy:
    return GSearch(SPACE, lambda found: found.quality.drop <= 0)


def objective(counts: Counts) -> Outcome:
    """Tokens that are missing below the floors."""
    lacking = sum(max(0, f - n) for n, f in zip(counts, FLOORS, strict=True))
    return outcome(1 - lacking / 200, SPACE.share(counts))


def quiet(done: int, counts: Counts, found: Outcome) -> None:
    """Nobody watches."""


def an_url(folder: Path, name: str = "study.db") -> str:
    return f"sqlite:///{folder / name}"


def interrupted_after(calls: int) -> Callable[[Counts], Outcome]:
    """An objective in whose last call the user presses Ctrl-C."""
    left = [calls]

    def evaluate(counts: Counts) -> Outcome:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return objective(counts)

    return evaluate


@pytest.mark.parametrize(("make", "trials"), [(sigmoid, 14), (greedy, 100)])
def test_a_search_that_was_stopped_ends_as_one_that_was_not(
    make: Callable[[], Strategy], trials: int, tmp_path: Path
) -> None:
    whole = Study(str(tmp_path / "a.journal"), "s", IDENTITY).run(make(), objective, trials, quiet)
    url = str(tmp_path / "b.journal")
    with pytest.raises(KeyboardInterrupt):
        Study(url, "s", IDENTITY).run(make(), interrupted_after(6), trials, quiet)
    kept = Study(url, "s", IDENTITY).known()
    assert 1 < len(kept) <= 6
    rest = Study(url, "s", IDENTITY).run(make(), objective, trials, quiet)
    assert list(kept.items()) == list(whole.items())[: len(kept)]
    assert list(rest.items()) == list(whole.items())


def test_the_same_seed_proposes_the_same(tmp_path: Path) -> None:
    runs = [
        Study(str(tmp_path / f"{i}.journal"), "s", IDENTITY, seed=seed).run(
            sigmoid(), objective, 12, quiet
        )
        for i, seed in enumerate((3, 3, 4))
    ]
    assert list(runs[0]) == list(runs[1])
    assert list(runs[0]) != list(runs[2])


@pytest.mark.parametrize("name", ["study.db", "study.journal"])
def test_the_number_of_trials_is_that_of_the_study(name: str, tmp_path: Path) -> None:
    url = an_url(tmp_path) if name.endswith("db") else str(tmp_path / name)
    told: list[int] = []
    for trials in (3, 5, 5):
        Study(url, "s", IDENTITY).run(sigmoid(), objective, trials, lambda n, *_: told.append(n))
    assert told == [1, 2, 3, 4, 5]
    assert len(Study(url, "s", IDENTITY).durations()) == 5


def test_nothing_is_evaluated_twice(tmp_path: Path) -> None:
    """A second strategy of the same vectors takes the results from the study."""
    url = an_url(tmp_path)
    first = Study(url, "s", IDENTITY).run(greedy(), objective, 100, quiet)

    def fail(counts: Counts) -> Outcome:
        raise AssertionError(counts)

    again = Study(url, "s", IDENTITY).run(greedy(), fail, 100, quiet)
    assert again == first
    assert GSearch(SPACE, lambda f: f.quality.drop <= 0).chosen(first) == (40, 33, 20, 20)


@pytest.mark.parametrize("name", ["study.db", "study.journal"])
def test_a_new_storage_may_be_opened_by_several_at_once(name: str, tmp_path: Path) -> None:
    url = an_url(tmp_path) if name.endswith("db") else str(tmp_path / name)
    together = Barrier(4)

    def opened(_: int) -> Study:
        together.wait()
        return Study(url, "s", IDENTITY)

    with ThreadPoolExecutor(4) as pool:
        studies_of_one = list(pool.map(opened, range(4)))
    studies_of_one[0].run(sigmoid(), objective, 2, quiet)
    assert [len(study.known()) for study in studies_of_one] == [2] * 4


def test_another_search_is_refused_by_what_differs(tmp_path: Path) -> None:
    url = an_url(tmp_path)
    Study(url, "s", IDENTITY)
    with pytest.raises(UsageError, match="its source is 'a model' and not 'another'"):
        Study(url, "s", {**IDENTITY, "source": "another"})
    Study(url, "t", {**IDENTITY, "source": "another"})


def test_a_study_of_other_tools_is_refused(tmp_path: Path) -> None:
    import optuna

    url = an_url(tmp_path)
    optuna.create_study(storage=url, study_name="s").optimize(lambda trial: 0.0, n_trials=1)
    with pytest.raises(UsageError, match="is another search"):
        Study(url, "s", IDENTITY)


def test_a_locked_storage_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(studies, "PATIENCE", 0.05)
    url = an_url(tmp_path)
    Study(url, "s", IDENTITY)
    with sqlite3.connect(tmp_path / "study.db", isolation_level=None) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(MissingRequirementError, match=r"cannot be used \(.*locked\)"):
            Study(url, "s", IDENTITY)


def test_a_storage_that_is_locked_on_the_way_is_one_sentence_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(studies, "PATIENCE", 0.05)
    study = Study(an_url(tmp_path), "s", IDENTITY)
    with sqlite3.connect(tmp_path / "study.db", isolation_level=None) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(MissingRequirementError, match="locked"):
            study.run(sigmoid(), objective, 3, quiet)


@pytest.mark.parametrize(
    ("name", "content"),
    [("study.db", b"no data base at all" * 99), ("study.journal", b"{nonsense\n")],
)
def test_an_unreadable_storage_is_one_sentence(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    url = an_url(tmp_path) if name.endswith("db") else str(tmp_path / name)
    with pytest.raises(MissingRequirementError, match="cannot be used"):
        Study(url, "s", IDENTITY)


@pytest.mark.parametrize("url", ["nonsense", "sqlite:////no/such/folder/study.db"])
def test_a_storage_that_is_not_there_is_one_sentence(url: str) -> None:
    with pytest.raises(MissingRequirementError, match=f"storage {url} cannot be used"):
        Study(url, "s", IDENTITY)


def test_a_missing_optuna_is_named_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MissingRequirementError, match=r"pip install 'thresher\[search\]'"):
        Study(an_url(tmp_path), "s", IDENTITY)


def test_a_trial_of_a_dead_process_is_done_again(tmp_path: Path) -> None:
    """Its process, here a real one that has ended, left it under way."""
    study = Study(an_url(tmp_path), "s", IDENTITY)
    with subprocess.Popen([sys.executable, "-c", ""]) as dead:
        dead.wait()
    study._study.ask().set_user_attr(WORKER, [study._host, dead.pid, time.time()])
    study._study.ask().set_user_attr(WORKER, ["elsewhere", dead.pid, time.time() - 2 * LOST])
    found: list[int] = []
    study.run(sigmoid(), objective, 3, lambda n, *_: found.append(n))
    assert found == [1, 2, 3]


def test_a_trial_whose_process_died_before_it_signed_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = Study(an_url(tmp_path), "s", IDENTITY)
    study._study.ask()
    monkeypatch.setattr("thresher.passes.tokens.search.study.LOST", 0.0)
    found: list[int] = []
    study.run(sigmoid(), objective, 2, lambda n, *_: found.append(n))
    assert found == [1, 2]


def test_a_trial_under_way_is_not_finished_by_its_value(tmp_path: Path) -> None:
    """What a reader sees whose look falls between another's commit and its own second statement."""
    study = Study(an_url(tmp_path), "s", IDENTITY)
    trial = study._study.ask()
    trial.set_user_attr(COUNTS, list(FLOORS))
    trial.set_user_attr(OUTCOME, asdict(objective(FLOORS)))
    with sqlite3.connect(tmp_path / "study.db") as storage:
        storage.execute(
            "INSERT INTO trial_values VALUES (NULL, ?, 0, 1.0, 'FINITE')", (trial._trial_id,)
        )
    (seen,) = study._trials()
    assert seen.values == [1.0]
    assert study.durations() == []
    assert study.known() == {}


def test_a_trial_under_way_elsewhere_counts(tmp_path: Path) -> None:
    """Of three wanted trials another, living process has one: two are left, and it is waited for."""
    study = Study(an_url(tmp_path), "s", IDENTITY)
    other = study._study.ask()
    other.set_user_attr(WORKER, ["elsewhere", 0, time.time()])
    told: list[int] = []

    def evaluate(counts: Counts) -> Outcome:
        if len(told) == 1:  # before the second is finished, the other one gives up
            study._study.tell(other, state=study._optuna.trial.TrialState.FAIL)
        return objective(counts)

    study.run(sigmoid(), evaluate, 3, lambda n, *_: told.append(n))
    assert told == [1, 2, 3]
