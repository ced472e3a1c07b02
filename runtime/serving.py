"""Engines in a model repository of NVIDIA's Triton Inference Server.

A repository holds a folder for each model, whose name is the model's: ``config.pbtxt``, the names of the
classes, and a folder for each version.  Here the version *is* the engine's folder, manifest and all, so
that what is served can still be verified, profiled and run.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thresher.compiler.errors import MissingRequirementError, RefusedError, UsageError, nearest
from thresher.compiler.files import SERVING, atomic_folder
from thresher.runtime.feeds import ANY
from thresher.runtime.manifest import MANIFEST, MODEL, Manifest, TensorInfo, check_files, read
from thresher.runtime.pbtxt import Name, text
from thresher.runtime.sample import batch_symbol

SERVERS = ("triton",)
VERSION = "1"
CONFIGURATION = "config.pbtxt"
LABELS = "labels.txt"
USUAL_LIMIT = 32  # samples of a batch, where the engine names no largest
TYPES = {
    "bool": "BOOL",
    **{
        f"{sign}int{bits}": f"{sign}int{bits}".upper()
        for sign in ("", "u")
        for bits in (8, 16, 32, 64)
    },
    "float16": "FP16",
    "float32": "FP32",
    "float64": "FP64",
    "bfloat16": "BF16",
}


@dataclass(frozen=True)
class Server:
    """How Triton runs the engines of one target."""

    backend: str
    file: str  # pattern of the file that it loads
    kind: str  # of device
    threads: str = ""  # the parameter that bounds them
    fills: bool = False  # runs one size of batch only, and fills smaller ones up


RUN_BY = {
    "cpu": Server("onnxruntime", re.escape(MODEL), "KIND_CPU", threads="intra_op_thread_count"),
    "cuda": Server("onnxruntime", re.escape(MODEL), "KIND_GPU"),
    "openvino": Server(
        "openvino", r".*\.xml", "KIND_CPU", threads="INFERENCE_NUM_THREADS", fills=True
    ),
    "tensorrt": Server("tensorrt", r".*\.(engine|plan)", "KIND_GPU"),
}


@dataclass(frozen=True)
class Wishes:
    """What is asked of the server.

    Attributes:
        threads: CPU threads of an operator; by default the server decides.
        kernels: path at which the *server* finds the library of native CPU kernels; by default the
            function bodies run.
    """

    threads: int | None = None
    kernels: str | None = None


@dataclass(frozen=True)
class Batching:
    """Samples that the server may put together; ``most`` 0 leaves requests as they come, and says why."""

    most: int
    preferred: tuple[int, ...] = ()
    note: str = ""


@contextmanager
def served(
    folder: Path | str, server: str, target: str, wishes: Wishes, *, overwrite: bool = False
) -> Iterator[Path]:
    """Yield where the engine's folder is to be made; the rest of the model's folder is written after it.

    ``folder`` is the model's folder in the repository.  When the block fails nothing appears there.

    Raises:
        UsageError: no such server, or the folder is taken.
        RefusedError: the server does not run engines of this target.
        MissingRequirementError: native kernels are asked for and not built.
    """
    demand(server, target)
    library = _library(target, wishes)
    with atomic_folder(folder, overwrite=overwrite) as partial:
        version = partial / VERSION
        yield version
        manifest = read(version)
        labelled = _labelled(manifest)
        if labelled and manifest.labels:
            lines = (" ".join(label.split()) for label in manifest.labels)
            (partial / LABELS).write_text("".join(f"{line}\n" for line in lines))
        if library is not None:
            shutil.copyfile(library, partial / library.name)
        (partial / CONFIGURATION).write_text(text(configuration(manifest, wishes)))
        told = {"server": server, **start(manifest, Path(folder))}
        (partial / SERVING).write_text(json.dumps(told, indent=2) + "\n")


def copy_engine(source: Path, folder: Path) -> Manifest:
    """Copy an intact engine, without loading it; files that are not its own stay behind.

    Raises:
        UsageError: not an engine, or a file has changed.
    """
    manifest = read(source)
    check_files(manifest, source)
    folder.mkdir(parents=True)
    for name in (*manifest.files, MANIFEST):
        if not (folder / name).resolve().is_relative_to(folder.resolve()):
            raise UsageError(f"{source} lists {name}, which is not in it: export it again")
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, folder / name)
    return manifest


def demand(server: str, target: str) -> Server:
    """How the server runs a target.

    Raises:
        UsageError: no such server.
        RefusedError: it does not run engines of this target.
    """
    if server not in SERVERS:
        raise UsageError(f"there is no server {server!r}{nearest(server, SERVERS)}")
    kind, _, choice = target.partition(":")
    if kind not in RUN_BY:
        raise RefusedError(
            f"Triton has no back end for engines of target {target!r}: export for one of"
            f" {', '.join(RUN_BY)}"
        )
    if "plugins" in choice.lower().split("+"):
        raise RefusedError(
            f"Triton does not find the plugins of target {target!r}: export for {kind!r}"
        )
    return RUN_BY[kind]


def configuration(manifest: Manifest, wishes: Wishes) -> dict[str, Any]:
    """Triton's ``ModelConfig`` of an engine, to be written as text.

    Raises:
        RefusedError: the engine lacks the file that the server loads.
    """
    server = demand(SERVERS[0], manifest.target)
    batches = batching(manifest)
    file = next((name for name in manifest.files if re.fullmatch(server.file, name)), None)
    if file is None:
        raise RefusedError(
            f"an engine of target {manifest.target!r} without a file like {server.file} cannot be"
            f" served: it has {', '.join(manifest.files)}"
        )
    labelled = _labelled(manifest)
    found: dict[str, Any] = {
        "backend": server.backend,
        "default_model_filename": file,
        "max_batch_size": batches.most,
        "input": [_tensor(spec, batches) for spec in manifest.inputs],
        "output": [
            {
                **_tensor(spec, batches),
                **({"label_filename": LABELS} if spec.name == labelled else {}),
            }
            for spec in manifest.outputs
        ],
        "instance_group": [{"count": 1, "kind": Name(server.kind)}],
    }
    if batches.most > 1:
        preferred = list(batches.preferred)
        found["dynamic_batching"] = {"preferred_batch_size": preferred} if preferred else {}
    found["parameters"] = [
        {"key": key, "value": {"string_value": value}}
        for key, value in _parameters(server, manifest, batches, wishes).items()
    ]
    if wishes.kernels:
        found["model_operations"] = {"op_library_filename": [wishes.kernels]}
    return found


def batching(manifest: Manifest) -> Batching:
    """How large batches may become.  Triton puts requests together along the first axis of every tensor,
    beginning with single samples."""
    server = demand(SERVERS[0], manifest.target)
    axis = batch_symbol(manifest.inputs)
    specs = (*manifest.inputs, *manifest.outputs)
    odd = [spec.name for spec in specs if axis == ANY or spec.shape[:1] != (axis,)]
    if axis is None or odd:
        return Batching(
            0, note=f"requests are not put together: {odd[0]} does not begin with the batch"
        )
    low, high = manifest.ranges.get(axis, (1, None))
    usual = manifest.usual.get(axis)
    if server.fills:
        if low == high:
            return Batching(low, (low,))
        reason = "Triton's OpenVINO back end fills every batch up to the largest"
        return Batching(
            0, note=f"requests are not put together: {reason}; --shape with one batch does it"
        )
    if low > 1:
        return Batching(
            0, note=f"requests are not put together: each has to bring {low} or more samples"
        )
    most = USUAL_LIMIT if high is None else high
    note = "" if high else f"{most} is the largest batch, as the engine names none: --shape does"
    return Batching(most, (usual,) if usual and usual <= most else (), note)


def start(manifest: Manifest, folder: Path) -> dict[str, Any]:
    """The command that starts a server on this repository, and what has to be known about the model."""
    repository = folder.resolve().parent
    command = ["tritonserver", f"--model-repository={repository}"]
    notes = [batching(manifest).note]
    if manifest.target == "openvino" and manifest.precision == "fp32":
        notes.append(
            "Triton cannot ask OpenVINO for float32: on processors with bfloat16 it computes in that"
        )
    if manifest.target == "cpu" and manifest.precision == "int8":
        notes.append(
            "Triton passes no session.x64quantprecision to ONNX Runtime: on x86 processors without VNNI sums"
            " of int8 overflow"
        )
    return {"command": command, "notes": [note for note in notes if note]}


def _parameters(
    server: Server, manifest: Manifest, batches: Batching, wishes: Wishes
) -> Mapping[str, str]:
    found: dict[str, str] = {}
    if server.threads and wishes.threads:
        found[server.threads] = str(wishes.threads)
    if server.fills:
        if manifest.precision == "bf16":
            found["HINT_BF16"] = "YES"
        if batches.most:
            found["ENABLE_BATCH_PADDING"] = "YES"
    return found


def _tensor(spec: TensorInfo, batches: Batching) -> dict[str, Any]:
    """Name, type and sizes; a tensor without axes of its own is sent as one value and reshaped."""
    if spec.dtype not in TYPES:
        raise RefusedError(f"Triton has no type for {spec.name!r}, which is {spec.dtype}")
    shape = spec.shape[1:] if batches.most else spec.shape
    sizes = [axis if isinstance(axis, int) else -1 for axis in shape]
    found = {
        "name": spec.name,
        "data_type": Name(f"TYPE_{TYPES[spec.dtype]}"),
        "dims": sizes or [1],
    }
    return found if sizes else {**found, "reshape": {}}


def _labelled(manifest: Manifest) -> str | None:
    """The output that holds a score for each class, where the classes have names."""
    classes = len(manifest.labels or ())
    scores = [s.name for s in manifest.outputs if len(s.shape) == 2 and s.shape[1] == classes]
    return scores[0] if len(scores) == 1 else None


def _library(target: str, wishes: Wishes) -> Path | None:
    """The native kernels, if they are wanted."""
    if not wishes.kernels:
        return None
    if target != "cpu":
        raise UsageError(
            f"native kernels are for target 'cpu', not for {target!r}: leave --kernels out"
        )
    from thresher.runtime.backends.cpu import kernel_library

    found = kernel_library()
    if found is None:
        raise MissingRequirementError(
            "there are no native kernels to serve with: run thresher kernels build, or leave --kernels out"
        )
    return found
