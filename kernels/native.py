"""Native kernels: shared libraries of the operators, built where they run, and optional.

ONNX Runtime loads the one for CPUs as a library of custom operators, OpenVINO one of the same sources as
an extension; without them the function bodies run.  A library is cached under a digest of its sources
and how they are compiled, so another version of thresher never finds it, and beside it lies its own
checksum.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
CHECKSUM = "sha256"
SWITCH = "THRESHER_KERNELS"  # "off" leaves the library out, anything else is no setting
CACHE = "THRESHER_CACHE"


class KernelError(RuntimeError):
    """The library cannot be built or must not be loaded; the message is one sentence."""


@dataclass(frozen=True)
class Kind:
    """One sort of native kernels: which files they are, and what compiles them."""

    processor: str
    sources: tuple[str, ...]  # patterns in this folder
    headers: tuple[str, ...]
    compilers: tuple[str, ...]  # the first that is found
    variable: str  # of the environment; names another compiler
    needs: str  # to be installed
    flags: tuple[str, ...]
    apart: bool = False  # whether files are compiled one by one, side by side
    links: tuple[str, ...] = ()  # flags behind the files
    written: tuple[tuple[str, str], ...] = ()  # headers that are made for a build: names and texts

    @property
    def name(self) -> str:
        return f"libthresher_{self.processor}.so"

    def files(self) -> list[Path]:
        """All files to compile, in a fixed order."""
        return sorted(file for pattern in self.sources for file in HERE.glob(pattern))

    def read(self) -> list[Path]:
        """All files that they include, in a fixed order."""
        return sorted(file for pattern in self.headers for file in HERE.glob(pattern))


CPU = Kind(
    processor="cpu",
    sources=("cpu/*.cc", "*/cpu.cc", "onnxruntime/*.cc", "*/onnxruntime.cc"),
    headers=("cpu/*.h", "onnxruntime/*.h"),
    compilers=("c++", "g++", "clang++"),
    variable="CXX",
    needs="g++ 11 or newer",
    flags=(
        "-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden",
        "-Wall", "-Wextra", "-Wno-psabi",  # vectors never cross the border of the library
    ),
    apart=True,
    links=("-shared",),
)  # fmt: skip
SANITIZED = ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


@dataclass(frozen=True)
class Library:
    """Where the library of these sources and flags belongs; ``extra`` flags make another one."""

    extra: tuple[str, ...] = ()
    kind: Kind = CPU

    @property
    def digest(self) -> str:
        """Of everything that decides what is built, the compiler's version excepted."""
        kind = self.kind
        told = (platform.machine(), kind.flags, self.extra, kind.links, kind.written)
        found = hashlib.sha256(repr(told).encode())
        for file in (*kind.files(), *kind.read()):
            found.update(f"{os.path.relpath(file, HERE)}\n".encode() + file.read_bytes())
        return found.hexdigest()[:16]

    @property
    def file(self) -> Path:
        return cache() / self.digest / self.kind.name

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
                + (f" --for {self.kind.processor}" if self.kind != CPU else "")
            )
        return self.file

    def build(self, compiler: str | None = None) -> Path:
        """Compile, and put the library in its place at once, an older one replaced.

        Args:
            compiler: by default the one in the kind's environment variable (``$CXX`` for CPUs), or
                the first known one on the path.

        Raises:
            KernelError: there is no compiler, or it fails.
        """
        kind = self.kind
        known = next(filter(shutil.which, kind.compilers), None)
        found = compiler or os.environ.get(kind.variable) or known
        if found is None or shutil.which(found) is None:
            raise KernelError(
                f"{found or kind.compilers[0]} was not found: install {kind.needs}, or name a"
                " compiler with --compiler"
            )
        place = self.file.parent
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent, prefix="partial-") as folder:
            made = Path(folder) / kind.name
            for name, text in kind.written:
                Path(folder, name).write_text(text)
            command = [found, *kind.flags, *self.extra, f"-I{HERE}", f"-I{folder}"]
            parts = kind.files()
            if kind.apart:
                parts = [Path(folder, f"{i}.o") for i in range(len(parts))]
                with ThreadPoolExecutor(os.cpu_count()) as pool:
                    compiling = partial(_compile, [*command, "-c"])
                    list(pool.map(compiling, parts, [[file] for file in kind.files()]))
            _compile(command, made, parts, kind.links)
            place.mkdir(exist_ok=True)
            Path(folder, CHECKSUM).write_text(_checksum(made) + "\n")
            Path(folder, CHECKSUM).replace(place / CHECKSUM)
            made.replace(self.file)
        return self.file


def _compile(
    command: Sequence[str], made: Path, files: Sequence[Path], links: Sequence[str] = ()
) -> None:
    """Make one file of others.

    Raises:
        KernelError: the compiler fails.
    """
    done = subprocess.run(
        [*command, "-o", str(made), *map(str, files), *links],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        reason = next(
            (line for line in done.stderr.splitlines() if "error" in line.lower()),
            f"exit code {done.returncode}",
        )
        raise KernelError(f"{command[0]} could not compile the kernels: {reason}")


def wanted(kind: Kind = CPU) -> Path | None:
    """The library that engines load: the built one, unless it is switched off.

    Raises:
        KernelError: it is not the file that was built.
    """
    return None if os.environ.get(SWITCH) == "off" else Library(kind=kind).find()


def isa(library: Path) -> str:
    """Which instruction set the kernels of a library for CPUs run with here.

    Kernels use no better one than ``$THRESHER_ISA``, ``sse2`` or ``avx2``; anything else is no setting.

    Raises:
        KernelError: it cannot be loaded, as where a cache is shared with a machine of another kind.
    """
    try:
        told = ctypes.CDLL(str(library)).thresher_isa
    except (OSError, AttributeError) as error:
        raise KernelError(f"{library} cannot be loaded here: {error}") from error
    told.restype = ctypes.c_char_p
    return str(told().decode())


def cache() -> Path:
    """``$THRESHER_CACHE/kernels``, by default ``~/.cache/thresher/kernels``."""
    given = os.environ.get(CACHE)
    return (Path(given) if given else Path.home() / ".cache" / "thresher") / "kernels"


def _checksum(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
