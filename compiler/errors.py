"""The four kinds of trouble a user can meet, each with its exit code.

A message is one sentence that says what is wrong, where, and what to do.  The command line prints
it without a traceback.  Anything else that escapes is a bug in thresher (exit code 5).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ThresherError(Exception):
    """Base of everything that is the user's to mend."""

    exit_code = 2


class VerdictError(ThresherError):
    """The work was done and the answer is no: numbers differ, a budget or speed-up is missed."""

    exit_code = 1


class UsageError(ThresherError):
    """The command, recipe or input file is wrong."""

    exit_code = 2


class RefusedError(ThresherError):
    """The model or a pass was refused; the message names the node and the reason."""

    exit_code = 3


class MissingRequirementError(ThresherError):
    """A package, provider, device or network is missing; the message says how to get it."""

    exit_code = 4


def nearest(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the closest known name, or the list of all, or nothing."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(names)}" if names else ""


def missing_extra(package: str, extra: str, need: str) -> MissingRequirementError:
    """The one sentence for an optional package that is not installed."""
    return MissingRequirementError(
        f"{need} needs the package {package!r}, which is not installed: run pip install 'thresher[{extra}]'"
    )
