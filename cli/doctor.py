"""``thresher doctor``: what is installed, what fits, what to install."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import requires, version
from typing import TYPE_CHECKING, Any

import typer

from thresher.cli import options
from thresher.cli.console import progress, show, show_json, table

if TYPE_CHECKING:
    from packaging.requirements import Requirement

    from thresher.kernels.native import Kind

ENVIRONMENT = 4
CORE = "core"
MEANT_FOR_USERS = (
    CORE,
    "timm",
    "hf",
    "openvino",
    "gpu",
    "tensorrt",
    "tensorrt-rtx",
    "search",
    "train",
)


@dataclass(frozen=True)
class Package:
    """A requirement and what was found; ``remedy`` is empty when nothing need be done."""

    name: str
    extra: str
    wanted: str
    installed: str | None
    fits: bool
    remedy: str


@dataclass(frozen=True)
class TargetState:
    """A back end and whether it can run here."""

    target: str
    summary: str
    ok: bool
    version: str | None
    reason: str
    remedy: str


@dataclass(frozen=True)
class Kernels:
    """The native kernels of a target, which are optional; ``state`` says what engines run."""

    ok: bool
    state: str
    remedy: str


def doctor(json: options.Json = False, verbose: options.Verbose = False) -> None:
    """Report what is installed, what fits and what to install.

    Exit code 4 when a core package or the default back end is missing or too old.
    """
    with progress() as tell:
        tell("looking at the installation", 0, 0)
        found = list(packages())
        able = list(targets())
        native = kernels()
    ok = all(p.fits for p in found if p.extra == CORE) and any(t.ok for t in able)
    if json:
        states = {
            "packages": [asdict(p) for p in found],
            "targets": [asdict(t) for t in able],
            "kernels": {target: asdict(k) for target, k in native.items()},
        }
        show_json("doctor", {"ok": ok, "machine": machine(), **states})
    else:
        _show(found, able, native, ok)
    if not ok:
        raise typer.Exit(ENVIRONMENT)


def packages() -> Iterator[Package]:
    """Every package that thresher or one of its extras asks for on this platform."""
    from packaging.requirements import Requirement

    asked = [Requirement(text) for text in requires("thresher") or ()]
    for extra in MEANT_FOR_USERS:
        for requirement in asked:
            wanted = _asked_by(requirement, extra)
            if wanted:
                yield _examine(requirement, extra)


def _asked_by(requirement: Requirement, extra: str) -> bool:
    marker = requirement.marker
    if extra == CORE:
        return marker is None or marker.evaluate({"extra": ""})
    in_core = marker is None or marker.evaluate({"extra": ""})
    return not in_core and marker is not None and marker.evaluate({"extra": extra})


def _examine(requirement: Requirement, extra: str) -> Package:
    from thresher.runtime.manifest import installed

    found = installed(requirement.name)
    fits = found is not None and requirement.specifier.contains(found, prereleases=True)
    name = (
        f"'{requirement.name}{requirement.specifier}'" if extra == CORE else f"'thresher[{extra}]'"
    )
    remedy = "" if fits else f"pip install {name}"
    wanted = str(requirement.specifier)
    return Package(requirement.name, extra, wanted, found, fits, remedy)


def targets() -> Iterator[TargetState]:
    """Every back end, loaded to see whether it can run."""
    from thresher.runtime import TARGETS, backend

    for target in TARGETS:
        maker = backend(target)
        state = maker.available()
        told = state.version, state.reason, state.install
        yield TargetState(target, maker.summary, state.ok, *told)


def kernels() -> dict[str, Kernels]:
    """Whether the native kernels are built here and undamaged, by target."""
    from thresher.kernels.native import CPU, KernelError
    from thresher.kernels.openvino_library import PROCESSOR, extension

    command = "thresher kernels build"
    found = {CPU.processor: _state(CPU, command)}
    try:
        found[PROCESSOR] = _state(extension(), f"{command} --for {PROCESSOR}")
    except KernelError as error:
        found[PROCESSOR] = Kernels(False, str(error), "")
    return found


def _state(kind: Kind, command: str) -> Kernels:
    from thresher.kernels.native import CPU, KernelError, Library, isa, wanted

    try:
        found = wanted(kind)
        if found is not None:
            return Kernels(True, f"built, run with {isa(found)}" if kind == CPU else "built", "")
        if Library(kind=kind).find() is not None:
            return Kernels(False, "switched off", "")
    except KernelError as error:
        return Kernels(False, str(error), f"{command} --force")
    return Kernels(False, "not built: the function bodies run", command)


def machine() -> dict[str, Any]:
    """Python, system, processor, usable cores and memory (bytes)."""
    from thresher.runtime.conditions import cpu_model, physical_cores, usable_cores

    return {
        "thresher": version("thresher"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_model(),
        "cores": physical_cores(),
        "usable": usable_cores(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }


def _show(
    found: list[Package], able: list[TargetState], native: dict[str, Kernels], ok: bool
) -> None:
    facts = machine()
    facts["memory"] = f"{facts['memory'] / 2**30:.1f} GiB"
    show(table("Machine", ("", ""), facts.items()))
    rows = [(p.name, p.extra, p.wanted, p.installed or "-", _mark(p.fits)) for p in found]
    show(table("Packages", ("package", "for", "wanted", "installed", ""), rows))
    states = [(t.target, t.summary, t.version or "-", _mark(t.ok), t.reason) for t in able]
    show(table("Back ends", ("target", "", "version", "", "reason"), states))
    show(
        table(
            "Native kernels",
            ("for", "", ""),
            [(target, _mark(k.ok), k.state) for target, k in native.items()],
        )
    )
    remedies = dict.fromkeys([p.remedy for p in found] + [t.remedy for t in able])
    remedies |= dict.fromkeys(k.remedy for k in native.values())
    remedies.pop("", None)
    if remedies:
        show(table("What to do, where wanted", ("",), [(remedy,) for remedy in remedies]))
    show("everything that thresher needs is installed" if ok else "thresher cannot work here yet")


def _mark(good: bool) -> str:
    return "yes" if good else "no"
