"""What ``profile`` measures: engines as they are, Programs exported for the target first."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard, cast

from thresher.compiler.errors import UsageError
from thresher.runtime.backends import backend
from thresher.runtime.engine import Engine
from thresher.runtime.memory import Memory
from thresher.runtime.runner import Runnable

if TYPE_CHECKING:
    from thresher.compiler.program import Program


@dataclass(frozen=True)
class Candidate:
    """A measured thing.  Sizes and memory in bytes; ``macs`` of one sample, if predicted."""

    name: str
    target: str
    precision: str
    threads: int | None
    reduced: bool
    weights: str = "unknown"
    tokens: tuple[int | str, ...] | None = None
    macs: int | None = None
    dense_macs: int | None = None
    size: int | None = None
    memory: Memory | None = None
    load_seconds: float | None = None
    details: dict[str, str] = field(default_factory=dict)


def opened(
    given: Sequence[Runnable | Program | Path | str],
    stack: ExitStack,
    *,
    target: str,
    precision: str,
    threads: int,
) -> list[Runnable]:
    """Everything loaded once, under names of its own; ``stack`` closes what was opened here.

    Raises:
        UsageError: an engine was loaded with another number of threads.
    """
    ready: list[Runnable] = []
    for thing in given:
        run: Runnable
        if isinstance(thing, Path | str):
            run = stack.enter_context(Engine.load(thing, threads=threads))
        elif _is_program(thing):
            run = stack.enter_context(_exported(thing, stack, target, precision, threads))
        else:
            run = cast("Runnable", thing)
        found = getattr(run, "threads", threads)
        if found != threads:
            raise UsageError(
                f"{run.name} was loaded with {found} threads and {threads} are measured:"
                f" load it with threads={threads}"
            )
        ready.append(run)
    return ready


def unique_names(runnables: Sequence[Runnable]) -> list[str]:
    """Names, with a number behind the second of a kind."""
    seen: dict[str, int] = {}
    names = []
    for runnable in runnables:
        seen[runnable.name] = count = seen.get(runnable.name, 0) + 1
        names.append(runnable.name if count == 1 else f"{runnable.name} #{count}")
    return names


def describe(runnable: Runnable, name: str, memory: Memory | None) -> Candidate:
    """What is known about a candidate beside its times."""
    if isinstance(runnable, Engine):
        return _describe_engine(runnable, name, memory)
    return Candidate(
        name=name,
        target="eager torch" if hasattr(runnable, "program") else "custom",
        precision=runnable.precision,
        threads=getattr(runnable, "threads", None),
        reduced=runnable.reduced,
    )


def _describe_engine(engine: Engine, name: str, memory: Memory | None) -> Candidate:
    manifest = engine.manifest
    prediction = manifest.prediction
    return Candidate(
        name=name,
        target=manifest.target,
        precision=manifest.precision,
        threads=engine.threads,
        reduced=engine.reduced,
        weights=str(manifest.source.get("weights", "unknown")),
        tokens=manifest.tokens,
        macs=prediction.macs if prediction else None,
        dense_macs=prediction.dense_macs if prediction else None,
        size=disk_size(engine),
        memory=memory,
        load_seconds=engine.load_seconds,
        details=engine.details,
    )


def disk_size(engine: Engine) -> int:
    """Bytes of the files that the back end loads."""
    prefix = backend(engine.manifest.target).prefix
    names = (name for name in engine.manifest.files if Path(name).name.startswith(prefix))
    return sum((engine.folder / name).stat().st_size for name in names)


def _is_program(thing: object) -> TypeGuard[Program]:
    """By shape, as importing the class would import torch."""
    return hasattr(thing, "exported") and hasattr(thing, "ledger")


def _exported(
    program: Program, stack: ExitStack, target: str, precision: str, threads: int
) -> Engine:
    """A Program as an engine in a temporary folder, so that like is compared with like."""
    from thresher.runtime.exporting import export

    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="thresher-")))
    name = " + ".join((program.info.source, *(record.name for record in program.history)))
    engine = export(program, folder / "engine", target=target, precision=precision, threads=threads)
    engine.name = name
    return engine
