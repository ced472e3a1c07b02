"""``thresher kernels``: the native kernels of the CPU, built on this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from thresher.cli import options
from thresher.cli.console import progress, show, show_json

app = typer.Typer(
    help="Native kernels for the inserted steps, which engines then find by themselves."
)


@app.callback()
def _group() -> None:
    """Native kernels for the inserted steps, which engines then find by themselves."""


@app.command()
def build(
    compiler: Annotated[
        str | None,
        typer.Option(metavar="COMMAND", help="C++17 compiler; by default $CXX or one on the path."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Build again what is there.")] = False,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Compile the CPU kernels for ONNX Runtime and try them.

    Engines with target 'cpu' use them from then on; THRESHER_KERNELS=off goes back to the function
    bodies, which compute the same.
    """
    from thresher.compiler.errors import MissingRequirementError
    from thresher.kernels.native import KernelError, Library
    from thresher.runtime.backends.cpu import try_kernels

    library = Library()
    with progress() as tell:
        try:
            found = None if force else library.find()
            if found is None:
                tell("compiling the kernels", 0, 0)
                made = library.build(compiler)
        except KernelError as error:
            raise MissingRequirementError(str(error)) from error
        file = found or made
        try_kernels(file)
    if json:
        show_json("kernels", {"library": str(file), "digest": library.digest, "built": not found})
    else:
        show(f"{'already built' if found else 'written'}: {file}")
