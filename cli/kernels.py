"""``thresher kernels``: native kernels, built on this machine."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from thresher.cli import options
from thresher.cli.console import progress, show, show_json

if TYPE_CHECKING:
    from thresher.kernels.native import Kind

app = typer.Typer(
    help="Native kernels for the inserted steps, which engines then find by themselves."
)


@app.callback()
def _group() -> None:
    """Native kernels for the inserted steps, which engines then find by themselves."""


class Processor(StrEnum):
    """What kernels are built for."""

    cpu = "cpu"
    openvino = "openvino"
    cuda = "cuda"


@app.command()
def build(
    processor: Annotated[
        Processor,
        typer.Option(
            "--for",
            help="cpu: for ONNX Runtime on the CPU; openvino: for OpenVINO; cuda: for the plugins of"
            " TensorRT, needs nvcc.",
        ),
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

    Engines with target 'cpu', and with --for openvino those with target 'openvino', use them from then on;
    THRESHER_KERNELS=off goes back to the function bodies, which compute the same.  Those for CUDA are
    taken by 'export --target tensorrt-rtx:plugins'.
    """
    from thresher.compiler.errors import MissingRequirementError
    from thresher.kernels.native import KernelError, Library

    with progress() as tell:
        try:
            kind, attempt = _ways(processor)
            library = Library(kind=kind)
            found = None if force else library.find()
            if found is None:
                tell("compiling the kernels", 0, 0)
                made = library.build(compiler)
            file = found or made
            attempt(file)
        except KernelError as error:
            raise MissingRequirementError(str(error)) from error
    if json:
        show_json("kernels", {"library": str(file), "digest": library.digest, "built": not found})
    else:
        show(f"{'already built' if found else 'written'}: {file}")


def _ways(processor: Processor) -> tuple[Kind, Callable[[Path], object]]:
    """What is built for a processor, and what tries it.

    Raises:
        KernelError: what the kernels are for is not installed.
    """
    from thresher.kernels import cuda_library, native, openvino_library
    from thresher.runtime.backends import cpu, openvino

    if processor is Processor.cuda:
        return cuda_library.CUDA, cuda_library.Kernels
    if processor is Processor.openvino:
        return openvino_library.extension(), openvino.try_kernels
    return native.CPU, cpu.try_kernels
