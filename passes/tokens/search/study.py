"""One search shared by any number of processes, through an Optuna study on a storage URL.

Every evaluation is a trial.  What a strategy proposes depends on the finished trials, the seed and
the trial's rank among them only, so a search can be stopped, continued and joined at any time.
"""

from __future__ import annotations

import os
import socket
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from thresher.compiler.errors import MissingRequirementError, UsageError, missing_extra
from thresher.passes.tokens.search.outcome import Counts, Objective, Outcome, Quality, Timing
from thresher.passes.tokens.search.strategy import Strategy

FINGERPRINT, COUNTS, OUTCOME, WORKER = "fingerprint", "counts", "outcome", "worker"
LOST = 3600.0  # seconds after which a trial of another machine is begun again
POLL = 0.2  # seconds between looks at what other processes do
PATIENCE = 30.0  # seconds that SQLite waits for a lock
OPENINGS = 10  # attempts at a new storage, whose tables several processes may be creating at once

Observe = Callable[[int, Counts, Outcome], None]
Violation = Callable[[Outcome], float]


class Study:
    """The trials of one search.

    Args:
        url: an SQLAlchemy URL (``sqlite:///FILE``), or a path that ends in ``.journal``.
        name: of the study in the storage.
        fingerprint: everything that decides a result; a study with another one is refused.
        seed: of the sampler.
        violation: by how much an outcome misses a demand; at most 0 is met.

    Raises:
        MissingRequirementError: Optuna is missing, or the storage is locked or unreadable.
        UsageError: the study in the storage is another search.
    """

    def __init__(
        self,
        url: str,
        name: str,
        fingerprint: Mapping[str, str],
        *,
        seed: int = 0,
        violation: Violation = lambda outcome: 0.0,
    ) -> None:
        try:
            import optuna
        except ImportError as error:
            raise missing_extra("optuna", "search", "a search") from error
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.url, self.name, self.seed, self.violation = url, name, seed, violation
        self._optuna = optuna
        self._failed = optuna.trial.TrialState.FAIL
        self._host = socket.gethostname()
        with self._reachable(opening=True):
            self._study = self._opened()
            self._claim_study(dict(fingerprint))

    def known(self) -> dict[Counts, Outcome]:
        """Every vector evaluated so far, by any process."""
        with self._reachable():
            return {_counts(t): _outcome(t) for t in self._trials() if _finished(t)}

    def durations(self) -> list[float]:
        """Seconds of the finished trials."""
        with self._reachable():
            return [t.duration.total_seconds() for t in self._trials() if _finished(t)]

    def run(
        self, strategy: Strategy, objective: Objective, trials: int, observe: Observe
    ) -> dict[Counts, Outcome]:
        """Work until ``trials`` trials are finished or the strategy has nothing more to ask.

        ``observe`` is told the number of finished trials and the result of each trial made here.

        Raises:
            MissingRequirementError: the storage cannot be used any more.
        """
        while True:
            with self._reachable():
                trial = self._claim(trials)
            if trial is None:
                return self.known()
            try:
                told = self._work(trial, strategy, objective)
            except BaseException:  # an interrupt too: the trial is free again for whoever goes on
                with self._reachable():
                    self._study.tell(trial, state=self._failed, skip_if_finished=True)
                raise
            if told is None:
                return self.known()
            observe(len(self.durations()), *told)

    def _work(
        self, trial: Any, strategy: Strategy, objective: Objective
    ) -> tuple[Counts, Outcome] | None:
        """Evaluate what the strategy proposes in a claimed trial; None when it is at its end."""
        while True:
            known = self.known()
            with self._reachable():
                counts = strategy.propose(trial.suggest_float, known)
                if counts is None:
                    self._study.tell(trial, state=self._failed)
                    return None
                trial.set_user_attr(COUNTS, list(counts))
                busy = self._evaluated_elsewhere(trial.number, counts)
            if not busy:
                break
            time.sleep(POLL)
        outcome = known[counts] if counts in known else objective(counts)
        with self._reachable():
            trial.set_user_attr(OUTCOME, asdict(outcome))
            self._study.tell(trial, outcome.quality.score)
        return counts, outcome

    def _claim(self, trials: int) -> Any:
        """A trial of our own, or None when there are enough.

        Numbers are given out by the storage in order: a trial goes ahead if fewer than ``trials``
        earlier ones are finished or under way.  Waits for those under way when no more are needed.
        """
        while True:
            if sum(map(self._counts_in, self._trials())) < trials:
                trial = self._study.ask()
                trial.set_user_attr(WORKER, [self._host, os.getpid(), time.time()])
                earlier = [t for t in self._trials() if t.number < trial.number]
                rank = sum(map(self._counts_in, earlier))
                if rank < trials:
                    self._study.sampler = self._sampler(rank)
                    return trial
                self._study.tell(trial, state=self._failed)
            if sum(map(_finished, self._trials())) >= trials:
                return None
            time.sleep(POLL)

    def _evaluated_elsewhere(self, number: int, counts: Counts) -> bool:
        """Whether an earlier trial is at work on the same vector."""
        return any(
            t.number < number and self._alive(t) and t.user_attrs.get(COUNTS) == list(counts)
            for t in self._trials()
        )

    def _counts_in(self, trial: Any) -> bool:
        return _finished(trial) or self._alive(trial)

    def _alive(self, trial: Any) -> bool:
        """Whether a trial is under way in a process that can still be at work."""
        if trial.state != self._optuna.trial.TrialState.RUNNING:
            return False
        unsigned = ("", 0, trial.datetime_start.timestamp())  # its process may have died at once
        host, process, begun = trial.user_attrs.get(WORKER, unsigned)
        return _exists(process) if host == self._host else time.time() - begun < LOST

    def _trials(self) -> list[Any]:
        found: list[Any] = self._study.get_trials(deepcopy=False)
        return found

    def _sampler(self, rank: int) -> Any:
        """Seeded by a trial's rank, so that processes differ and a resumed search does not."""

        def constraints(trial: Any) -> tuple[float]:
            return (self.violation(_outcome(trial)),)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # constant_liar and constraints are "experimental"
            return self._optuna.samplers.TPESampler(
                seed=1000 * self.seed + rank,
                multivariate=False,  # a joint sample would be drawn before the rank is known
                constant_liar=True,
                constraints_func=constraints,
            )

    def _opened(self) -> Any:
        """The study of the storage; whoever loses the race to create a table tries again."""
        from sqlalchemy.exc import DatabaseError

        left = OPENINGS
        while True:
            left -= 1
            try:
                return self._optuna.create_study(
                    storage=_storage(self._optuna, self.url),
                    study_name=self.name,
                    sampler=self._sampler(0),
                    direction="maximize",
                    load_if_exists=True,
                )
            except (DatabaseError, self._optuna.exceptions.StorageInternalError):
                if not left:
                    raise
                time.sleep(POLL)

    def _claim_study(self, fingerprint: dict[str, str]) -> None:
        if FINGERPRINT not in self._study.user_attrs and not self._trials():
            self._study.set_user_attr(FINGERPRINT, fingerprint)
        found = self._study.user_attrs.get(FINGERPRINT)  # of whoever came first
        for key, value in fingerprint.items():
            other = (found or {}).get(key)
            if other != value:
                raise UsageError(
                    f"the study {self.name!r} in {self.url} is another search: its {key} is"
                    f" {other!r} and not {value!r}; give another --study, --storage or output folder"
                )

    @contextmanager
    def _reachable(self, *, opening: bool = False) -> Iterator[None]:
        """Turn a storage's failure into one sentence."""
        from optuna.exceptions import OptunaError
        from sqlalchemy.exc import SQLAlchemyError

        causes: tuple[type[Exception], ...] = (SQLAlchemyError, OptunaError, OSError)
        if opening:  # a damaged file or a missing driver
            causes = (*causes, ImportError, ValueError, KeyError, RuntimeError)
        try:
            yield
        except causes as error:
            reason = (str(error.__cause__ or error).splitlines() or [type(error).__name__])[0]
            raise MissingRequirementError(
                f"the study storage {self.url} cannot be used ({reason}): see that it exists, is"
                " not locked by another program and may be written, or give another --storage"
            ) from error


def _storage(optuna: Any, url: str) -> Any:
    if url.endswith(".journal"):
        backend = optuna.storages.journal.JournalFileBackend(url)
        return optuna.storages.JournalStorage(backend)
    arguments = {"connect_args": {"timeout": PATIENCE}} if url.startswith("sqlite:") else {}
    return optuna.storages.RDBStorage(url, engine_kwargs=arguments)


def _finished(trial: Any) -> bool:
    # Not by its values: SQLite reads them behind the trial, so one under way may have some already.
    return trial.state.name == "COMPLETE" and OUTCOME in trial.user_attrs


def _counts(trial: Any) -> Counts:
    return tuple(trial.user_attrs[COUNTS])


def _outcome(trial: Any) -> Outcome:
    found = dict(trial.user_attrs[OUTCOME])
    found["quality"] = Quality(**found["quality"])
    found["timing"] = found["timing"] and Timing(**found["timing"])
    return Outcome(**found)


def _exists(process: int) -> bool:
    """Whether a process of this machine is alive."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
