"""The manifest of an engine folder: what it is, what it needs, and whether it is still intact.

Everything here is checked before a back end is asked to load anything.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from thresher.compiler.errors import MissingRequirementError, UsageError

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
MODEL = "model.onnx"
FLAVOURS = {  # other packages that bring the same module
    "onnxruntime": ("onnxruntime-gpu",),
    "tensorrt": ("tensorrt-cu13", "tensorrt-cu12"),
}

Precision = Literal["fp32", "fp16", "bf16", "int8"]
CALIBRATED = ("int8",)  # precisions whose ranges are observed on data


Ranges = Mapping[str, tuple[int, int | None]]  # least and largest sizes of symbolic axes


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TensorInfo(_Record):
    """Name, numpy dtype name and shape of an input or output; a string is a symbolic axis."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


class Prediction(_Record):
    """Multiply-accumulates of one sample, dense and after reduction; ``ideal`` is their ratio."""

    dense_macs: int
    macs: int
    ideal: float


class Manifest(_Record):
    """Contents of ``manifest.json``."""

    schema_version: int = SCHEMA_VERSION
    thresher: str
    created: str  # UTC, ISO 8601
    target: str
    precision: Precision
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    ranges: dict[str, tuple[int, int | None]] = Field(default_factory=dict)  # of symbolic axes
    usual: dict[str, int] = Field(default_factory=dict)  # sizes of symbolic axes to tune for
    files: dict[str, str] = Field(default_factory=dict)  # file name -> sha256
    versions: dict[str, str] = Field(default_factory=dict)  # packages that made the engine
    requires: dict[str, str] = Field(default_factory=dict)  # package -> ">=1.18" or "==1.18"
    source: dict[str, Any] = Field(default_factory=dict)
    recipe: dict[str, Any] | None = None
    passes: tuple[dict[str, Any], ...] = ()
    sites: int = 0  # places where tokens are dropped or merged
    tokens: tuple[int | str, ...] | None = None  # after each block, the count at the input first
    prediction: Prediction | None = None
    preprocessing: dict[str, Any] | None = None
    labels: tuple[str, ...] | None = None
    estimate: dict[str, Any] | None = None  # bytes, told from the graph before it was built
    calibration: dict[str, Any] | None = None  # what ranges were observed on
    built: dict[str, Any] = Field(default_factory=dict)  # what the back end tells of its files
    cache: str = ""  # where the built files come from, and if they were built why
    graphs: tuple[str, ...] = ()  # folders of engines that a host runs in turn, see two_graphs.py
    verified: dict[str, Any] | None = None  # comparison with the eager program when exported

    @property
    def fixed(self) -> dict[str, int]:
        """Symbolic axes that have one size only."""
        return {axis: low for axis, (low, high) in self.ranges.items() if low == high}

    @property
    def source_name(self) -> str:
        return str(self.source.get("source", "SOURCE"))

    def rebuild(self, folder: Path) -> str:
        """The command that makes this engine anew."""
        source = (
            "DIR (the folder that 'thresher optimize' wrote)" if self.passes else self.source_name
        )
        return _rebuild(folder, source, self.target, self.precision, self._shapes())

    def _shapes(self) -> str:
        """What ``--shape`` has to say again: an input of which no axis is open."""
        told = ""
        for spec in self.inputs:
            axes = [axis for axis in spec.shape if isinstance(axis, str)]
            bounds = {axis: self.ranges.get(axis, (1, None)) for axis in axes}
            if not axes or any(high is None for _, high in bounds.values()):
                continue
            texts = {
                a: f"{low}..{high}" if low != high else f"{low}"
                for a, (low, high) in bounds.items()
            }
            sizes = "x".join(texts.get(str(axis), str(axis)) for axis in spec.shape)
            wide = [axis for axis in axes if bounds[axis][0] != bounds[axis][1]]
            usual = "x".join(str(self.usual[axis]) for axis in wide if axis in self.usual)
            best = f"@{usual}" if wide and all(axis in self.usual for axis in wide) else ""
            told += f" --shape {spec.name}={sizes}{best}"
        return told

    def write(self, folder: Path) -> None:
        (folder / MANIFEST).write_text(self.model_dump_json(indent=2) + "\n")


def read(folder: Path) -> Manifest:
    """Read ``folder/manifest.json`` and check its schema, without touching the other files.

    Raises:
        UsageError: no engine there, or one that another version of thresher wrote.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise UsageError(
            f"{folder} is not an engine: {MANIFEST} is missing;"
            " make one with 'thresher export SOURCE -o DIR'"
        )
    try:
        data = json.loads(path.read_text())
        found = data["schema_version"]
    except (ValueError, TypeError, KeyError) as error:
        raise UsageError(
            f"{path} cannot be read ({error}): rebuild with {_rebuild(folder)}"
        ) from error
    if found != SCHEMA_VERSION:
        raise UsageError(
            f"{path} has schema version {found} and this thresher reads {SCHEMA_VERSION}:"
            f" rebuild with {_rebuild(folder, target=data.get('target'))}"
        )
    try:
        return Manifest.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UsageError(
            f"{path} is wrong at {where!r} ({first['msg']}): rebuild with {_rebuild(folder)}"
        ) from error


def check_files(manifest: Manifest, folder: Path) -> None:
    """Compare every file with its recorded digest.

    Raises:
        UsageError: a file is missing or has changed since the engine was made; it is named.
    """
    for name, expected in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise UsageError(f"{path} is missing: rebuild with {manifest.rebuild(folder)}")
        if digest(path) != expected:
            raise UsageError(
                f"{path} is not the file that was exported (its sha256 differs from {MANIFEST}):"
                f" rebuild with {manifest.rebuild(folder)}"
            )


def check_versions(manifest: Manifest, folder: Path) -> None:
    """Compare installed packages with what the engine requires.

    Raises:
        MissingRequirementError: a package is missing, too old, or not the pinned version.
    """
    for package, wanted in manifest.requires.items():
        relation, bound = wanted[:2], wanted[2:]
        found = installed(package)
        if found is None or not _satisfies(found, relation, bound):
            raise MissingRequirementError(
                f"{folder} needs {package} {wanted} and {found or 'none'} is installed:"
                f" pip install '{package}{wanted}', or rebuild with {manifest.rebuild(folder)}"
            )


def installed(package: str) -> str | None:
    """Version of an installed package or of a flavour that takes its place, or None."""
    for name in (package, *FLAVOURS.get(package, ())):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def digest(path: Path) -> str:
    """sha256 of a file, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _satisfies(found: str, relation: str, bound: str) -> bool:
    have, want = _numbers(found), _numbers(bound)
    return have >= want if relation == ">=" else have[: len(want)] == want


def _numbers(text: str) -> tuple[int, ...]:
    """Leading numeric parts of a version: ``"1.32.0rc1"`` gives ``(1, 32)``."""
    parts: list[int] = []
    for part in text.split("."):
        if not part.isdigit():
            break
        parts.append(int(part))
    return tuple(parts)


def _rebuild(
    folder: Path,
    source: str = "SOURCE",
    target: object = None,
    precision: str = "fp32",
    shapes: str = "",
) -> str:
    options = f" --target {target}" if target else ""
    options += f" --precision {precision}" if precision != "fp32" else ""
    options += " --data DATA" if precision in CALIBRATED else ""
    options += shapes
    return f"'thresher export {source} -o {folder}{options} --overwrite'"
