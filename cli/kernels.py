"""``thresher kernels``: native kernels, built on this machine."""

from __future__ import annotations

from enum import StrEnum
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


class Processor(StrEnum):
    """What kernels are built for."""

    cpu = "cpu"
    cuda = "cuda"


@app.command()
def build(
    processor: Annotated[
        Processor, typer.Option("--for", help="cuda: for the plugins of TensorRT; needs nvcc.")
    ] = Processor.cpu,
    compiler: Annotated[
        str | None,
        typer.Option(
            metavar="COMMAND",
            help="C++17 compiler, or nvcc; by default $CXX ($NVCC) or one on the path.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Build again what is there.")] = False,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Compile the kernels and try whether they load.

    Engines with target 'cpu' use those for the CPU from then on; THRESHER_KERNELS=off goes back to the
    function bodies, which compute the same.  Those for CUDA are taken by 'export --target
    tensorrt-rtx:plugins'.
    """
    from thresher.compiler.errors import MissingRequirementError
    from thresher.kernels.cuda_library import CUDA, Kernels
    from thresher.kernels.native import CPU, KernelError, Library
    from thresher.runtime.backends.cpu import try_kernels

    library = Library(kind=CUDA if processor is Processor.cuda else CPU)
    with progress() as tell:
        try:
            found = None if force else library.find()
            if found is None:
                tell("compiling the kernels", 0, 0)
                made = library.build(compiler)
            file = found or made
            if processor is Processor.cuda:
                Kernels(file)
            else:
                try_kernels(file)
        except KernelError as error:
            raise MissingRequirementError(str(error)) from error
    if json:
        show_json("kernels", {"library": str(file), "digest": library.digest, "built": not found})
    else:
        show(f"{'already built' if found else 'written'}: {file}")
