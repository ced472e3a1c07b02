"""Entry point: the verbs, and what becomes of errors.

Verb modules import heavy parts inside their functions, so that help and completion are quick.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import version
from typing import Annotated

import typer

from thresher.cli import (
    compare,
    demo,
    doctor,
    explain,
    export,
    inspect,
    kernels,
    optimize,
    plan,
    profile,
    recipes,
    run,
    search,
)
from thresher.cli import verify as verifying
from thresher.cli.console import be_verbose, log, say
from thresher.compiler.errors import ThresherError

BUG, INTERRUPTED = 5, 130

app = typer.Typer(
    name="thresher",
    help="Make trained transformers do less work: checkpoint in, faster engine out.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)
for verb in (
    optimize.optimize,
    search.search,
    export.export,
    profile.profile,
    verifying.verify,
    compare.compare,
    run.run,
    inspect.inspect,
    plan.plan,
    explain.explain,
    recipes.recipes,
    doctor.doctor,
    demo.demo,
):
    app.command()(verb)
app.add_typer(kernels.app, name="kernels")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"thresher {version('thresher')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Options before the verb."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code.

    0 done, 1 a verdict is negative, 2 bad command or recipe, 3 model or pass refused,
    4 environment, 5 bug in thresher, 130 interrupted.
    """
    be_verbose(False)
    try:
        app(arguments, prog_name="thresher")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        say("interrupted")
        return INTERRUPTED
    except ThresherError as error:
        if log.isEnabledFor(20):
            traceback.print_exc()
        say(f"thresher: {error}")
        return error.exit_code
    except Exception:
        traceback.print_exc()
        say("thresher: this is a bug in thresher, please report it with the lines above")
        return BUG
    return 0


if __name__ == "__main__":
    sys.exit(main())
