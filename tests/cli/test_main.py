"""The entry point: start-up, exit codes, and which stream gets what."""

from __future__ import annotations

import resource
import subprocess
import sys
from importlib.metadata import version
from typing import get_args

import pytest

from tests.cli.conftest import Cli
from thresher.cli import doctor, main
from thresher.cli.options import LearnData
from thresher.compiler import registry
from thresher.compiler.errors import (
    MissingRequirementError,
    RefusedError,
    ThresherError,
    UsageError,
    VerdictError,
)

VERBS = (
    "optimize", "search", "export", "profile", "verify", "compare", "run",
    "inspect", "plan", "explain", "recipes", "doctor", "demo",
)  # fmt: skip
HEAVY = ("torch", "onnx", "onnxruntime", "numpy", "matplotlib", "networkx", "PIL", "yaml", "optuna")


def test_help_lists_every_verb_with_a_sentence(cli: Cli) -> None:
    done = cli("--help")
    assert (done.code, done.err) == (0, "")
    lines = {
        line.split()[1]: line.split()[2:] for line in done.out.splitlines() if len(line.split()) > 3
    }
    assert [verb for verb in VERBS if not lines.get(verb)] == []


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_json_and_verbose(cli: Cli, verb: str) -> None:
    done = cli(verb, "--help")
    assert (done.code, done.err) == (0, "")
    for flag in ("--json", "--verbose", "-v", "--help"):
        assert flag in done.out


@pytest.mark.parametrize("arguments", [["--help"], ["optimize", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys; from thresher.cli.main import main\n"
        f"assert main({arguments!r}) == 0\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "[]\n"


def test_help_starts_in_half_a_second() -> None:
    """Processor time, not time on the clock: other work may run beside the tests."""
    command = [sys.executable, "-c", "from thresher.cli.main import main; main(['--help'])"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = (after.ru_utime - before.ru_utime) + (after.ru_stime - before.ru_stime)
    assert seconds < 0.5


def test_version(cli: Cli) -> None:
    done = cli("--version")
    assert (done.code, done.out, done.err) == (0, f"thresher {version('thresher')}\n", "")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["frobnicate"], "frobnicate"),
        (["optimise", "x", "-o", "y"], "optimize"),
        (["doctor", "--no-such-flag"], "--no-such-flag"),
        (["export"], "SOURCE"),
        (["profile", "x", "--rounds", "many"], "--rounds"),
    ],
)
def test_a_wrong_command_line_is_told_on_standard_error(
    cli: Cli, arguments: list[str], said: str
) -> None:
    done = cli(*arguments)
    assert (done.code, done.out) == (2, "")
    assert said in done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize(
    ("kind", "code"),
    [(VerdictError, 1), (UsageError, 2), (RefusedError, 3), (MissingRequirementError, 4)],
)
def test_the_users_troubles_are_one_sentence_with_a_code_each(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, kind: type[ThresherError], code: int
) -> None:
    def fail() -> None:
        raise kind("the sky is down: hold it up")

    monkeypatch.setattr(doctor, "packages", fail)
    done = cli("doctor")
    assert (done.code, done.out, done.err) == (code, "", "thresher: the sky is down: hold it up\n")


def test_verbose_adds_the_cause(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise UsageError("no") from ValueError("the cause")

    monkeypatch.setattr(doctor, "packages", fail)
    done = cli("doctor", "-v")
    assert done.code == 2
    assert "ValueError: the cause" in done.err


def test_a_bug_shows_its_traceback_and_asks_for_a_report(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "packages", lambda: 1 / 0)
    done = cli("doctor", "--json")
    assert (done.code, done.out) == (5, "")
    assert "ZeroDivisionError" in done.err
    assert "this is a bug in thresher, please report" in done.err


def test_an_interrupt_ends_with_130(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "packages", interrupt)
    done = cli("doctor")
    assert (done.code, done.out) == (main.INTERRUPTED, "")
    assert "Traceback" not in done.err


def test_completion_names_the_verbs() -> None:
    code = "from thresher.cli.main import main; raise SystemExit(main())"
    asked = {"_THRESHER_COMPLETE": "complete_bash", "COMP_WORDS": "thresher exp", "COMP_CWORD": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=asked, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["export", "explain"]


def test_the_help_of_learn_data_names_every_pass_that_takes_data() -> None:
    said = get_args(LearnData)[1].help
    assert [n for n in registry.names() if registry.load(n).needs_data and n not in said] == []
