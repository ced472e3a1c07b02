"""The native CPU kernels: one shared library of all operators, built where it runs, and optional.

ONNX Runtime loads it as a library of custom operators; without it the function bodies run.  A library
is cached under a digest of its sources and how they are compiled, so another version of thresher
never finds it, and beside it lies its own checksum.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
NAME = "libthresher_cpu.so"
CHECKSUM = "sha256"
SWITCH = "THRESHER_KERNELS"  # "off" leaves the library out, anything else is no setting
CACHE = "THRESHER_CACHE"
COMPILERS = ("c++", "g++", "clang++")
FLAGS = (
    "-std=c++17", "-O3", "-fPIC", "-shared", "-fvisibility=hidden",
    "-Wall", "-Wextra", "-Wno-psabi",  # vectors never cross the border of the library
)  # fmt: skip
SANITIZED = ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all",
             "-DTHRESHER_SANITIZED")  # fmt: skip


class KernelError(RuntimeError):
    """The library cannot be built or must not be loaded; the message is one sentence."""


@dataclass(frozen=True)
class Library:
    """Where the library of these sources and flags belongs; ``extra`` flags make another one."""

    extra: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """Of everything that decides what is built, the compiler's version excepted."""
        found = hashlib.sha256(f"{platform.machine()} {FLAGS} {self.extra}".encode())
        for file in (*sources(), *headers()):
            found.update(f"{file.relative_to(HERE).as_posix()}\n".encode() + file.read_bytes())
        return found.hexdigest()[:16]

    @property
    def file(self) -> Path:
        return cache() / self.digest / NAME

    def find(self) -> Path | None:
        """The built library, or None.

        Raises:
            KernelError: it is not the file that was built.
        """
        if not self.file.is_file():
            return None
        kept = self.file.with_name(CHECKSUM)
        if not kept.is_file() or kept.read_text().strip() != _checksum(self.file):
            raise KernelError(
                f"{self.file} is not what was built there: run thresher kernels build --force"
            )
        return self.file

    def build(self, compiler: str | None = None) -> Path:
        """Compile, and put the library in its place at once, an older one replaced.

        Args:
            compiler: a C++17 compiler; by default ``$CXX`` or the first known one on the path.

        Raises:
            KernelError: there is no compiler, or it fails.
        """
        found = compiler or os.environ.get("CXX") or next(filter(shutil.which, COMPILERS), None)
        if found is None or shutil.which(found) is None:
            wanted = found or "a C++ compiler"
            raise KernelError(
                f"{wanted} was not found: install g++ 11 or newer, or name a compiler with --compiler"
            )
        place = self.file.parent
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent, prefix="partial-") as folder:
            made = Path(folder) / NAME
            command = [
                found, *FLAGS, *self.extra, f"-I{HERE}", "-o", str(made), *map(str, sources()),
            ]  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                reason = next(
                    (line for line in done.stderr.splitlines() if "error" in line.lower()),
                    f"exit code {done.returncode}",
                )
                raise KernelError(f"{found} could not compile the kernels: {reason}")
            place.mkdir(exist_ok=True)
            Path(folder, CHECKSUM).write_text(_checksum(made) + "\n")
            Path(folder, CHECKSUM).replace(place / CHECKSUM)
            made.replace(self.file)
        return self.file


def wanted() -> Path | None:
    """The library that engines load: the built one, unless it is switched off.

    Raises:
        KernelError: it is not the file that was built.
    """
    return None if os.environ.get(SWITCH) == "off" else Library().find()


def sources() -> list[Path]:
    """All C++ files, in a fixed order."""
    return sorted(HERE.glob("*/*.cc"))


def headers() -> list[Path]:
    return sorted(HERE.glob("*/*.h"))


def cache() -> Path:
    """``$THRESHER_CACHE/kernels``, by default ``~/.cache/thresher/kernels``."""
    given = os.environ.get(CACHE)
    return (Path(given) if given else Path.home() / ".cache" / "thresher") / "kernels"


def _checksum(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
