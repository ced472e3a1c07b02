"""The conditions of a measurement: machine, load, versions.  A number without them is hearsay."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

from thresher.runtime.backends import cpu, openvino
from thresher.runtime.host import processors
from thresher.runtime.manifest import installed

MODEST = 8  # more threads than this rarely help one transformer on a CPU
PACKAGES = ("thresher", "onnxruntime", "openvino", "numpy", "torch")


@dataclass(frozen=True)
class Conditions:
    """What a measurement ran on.  ``load_before`` and ``load_after`` are 1-minute load averages."""

    cpu: str
    cores: int
    usable: int
    threads: int
    governor: str | None
    load_before: float | None
    load_after: float | None
    system: str
    python: str
    versions: dict[str, str]

    @property
    def busy(self) -> str | None:
        """A warning when other work ran on the cores that were measured."""
        if self.load_before is None or self.load_before <= self.usable - self.threads + 0.5:
            return None
        return (
            f"the machine was busy before the measurement (load {self.load_before:.1f} on"
            f" {self.usable} usable cores): expect noise"
        )


def conditions(threads: int, load_before: float | None) -> Conditions:
    """Read the machine; ``load_before`` was taken by the caller before it measured."""
    found = {name: installed(name) for name in PACKAGES}
    for name, maker in (("native kernels", cpu), ("OpenVINO's native kernels", openvino)):
        kernels = maker.kernel_library()
        found[name] = kernels.parent.name if kernels else None
    return Conditions(
        cpu=cpu_model(),
        cores=physical_cores(),
        usable=usable_cores(),
        threads=threads,
        governor=_read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        load_before=load_before,
        load_after=load_average(),
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        versions={name: version for name, version in found.items() if version},
    )


def default_threads() -> int:
    """Physical cores that this process may use, at most 8."""
    return max(1, min(physical_cores(), usable_cores(), MODEST))


def usable_cores() -> int:
    """Logical cores that the scheduler and the control group leave to this process."""
    try:
        allowed = len(os.sched_getaffinity(0))
    except AttributeError:  # not on this system
        allowed = os.cpu_count() or 1
    quota = _quota()
    return max(1, min(allowed, quota)) if quota else allowed


def physical_cores() -> int:
    """Cores without counting hyper-threads; the logical count where it cannot be read."""
    pairs: set[tuple[str, str]] = set()
    package = ""
    for key, value in processors():
        if key == "physical id":
            package = value
        elif key == "core id":
            pairs.add((package, value))
    return len(pairs) or os.cpu_count() or 1


def cpu_model() -> str:
    """Marketing name of the CPU."""
    for key, value in processors():
        if key in ("model name", "Model"):
            return value
    return platform.processor() or platform.machine()


def load_average() -> float | None:
    """1-minute load average, where the system has one."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None


def _quota() -> int | None:
    """Whole cores of the control group's CPU quota, rounded up."""
    text = _read("/sys/fs/cgroup/cpu.max")
    if not text or text.startswith("max"):
        return None
    allowed, period = text.split()[:2]
    return -(-int(allowed) // int(period))


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None
