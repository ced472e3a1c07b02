"""Engine folders: the files, the manifest, and a check before the folder gets its name."""

from __future__ import annotations

import dataclasses
import logging
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thresher.compiler.errors import RefusedError, UsageError, nearest
from thresher.compiler.files import atomic_folder, check_free
from thresher.runtime import engine_cache
from thresher.runtime.backends import Backend, backend
from thresher.runtime.backends.base import Tell, silent
from thresher.runtime.conditions import PACKAGES, default_threads
from thresher.runtime.engine import Engine
from thresher.runtime.feeds import ANY
from thresher.runtime.footprint import Footprint, footprint, largest
from thresher.runtime.manifest import (
    CALIBRATED,
    MODEL,
    Manifest,
    Prediction,
    TensorInfo,
    digest,
    installed,
)

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

log = logging.getLogger("thresher")
EXTERNAL_ABOVE = 1_500_000_000  # bytes; protobuf ends at 2 GiB


@dataclass(frozen=True)
class Facts:
    """What the manifest tells about the model beyond the ONNX file."""

    source: dict[str, Any] = field(default_factory=dict)
    ranges: dict[str, tuple[int, int | None]] = field(default_factory=dict)
    usual: dict[str, int] = field(default_factory=dict)
    recipe: dict[str, Any] | None = None
    passes: tuple[dict[str, Any], ...] = ()
    sites: int = 0
    tokens: tuple[int | str, ...] | None = None
    prediction: Prediction | None = None
    calibration: dict[str, Any] | None = None
    preprocessing: dict[str, Any] | None = None
    labels: tuple[str, ...] | None = None


def package(
    model: onnx.ModelProto | ir.Model,
    folder: Path | str,
    *,
    facts: Facts | None = None,
    target: str = "cpu",
    precision: str = "fp32",
    threads: int | None = None,
    overwrite: bool = False,
    check: Callable[[Engine], dict[str, Any]] | None = None,
    tell: Tell = silent,
) -> Engine:
    """Make an engine folder of an ONNX model and return the loaded engine.

    ``check`` gets the engine before the folder has its final name; what it returns is kept in the
    manifest as ``verified``, and what it raises leaves no folder behind.  ``tell`` hears of each step of
    the build; an interrupt leaves no folder behind either.

    Raises:
        UsageError: unknown target or precision, or the folder is taken.
        MissingRequirementError: the back end is not installed.
        RefusedError: the back end does not take the model.
    """
    facts = facts or Facts()
    calibrated = facts.calibration is not None
    maker = ready(target, precision, folder, overwrite=overwrite, calibrated=calibrated)
    with atomic_folder(folder, overwrite=overwrite) as partial:
        proto = save_model(model, partial / MODEL)
        maker.refuse_problems(proto)
        facts = _carry_tokenizer(facts, partial)
        manifest = _manifest(proto, facts, maker, precision)
        tell(f"building for {maker.name}", 0, 0)
        built, cache = engine_cache.build(
            maker, partial, manifest, lambda: maker.build(partial, manifest, tell)
        )
        paths = sorted(path for path in partial.rglob("*") if path.is_file())
        files = {path.relative_to(partial).as_posix(): digest(path) for path in paths}
        manifest = manifest.model_copy(update={"files": files, "built": built, "cache": cache})
        manifest.write(partial)
        if check is not None:
            with _checkable(partial, manifest, maker, threads) as engine:
                verified = check(engine)
            manifest.model_copy(update={"verified": verified}).write(partial)
    return Engine.load(folder, threads=threads)


def join(
    folder: Path | str,
    graphs: Mapping[str, Callable[[Path], Engine]],
    inputs: Sequence[TensorInfo],
    outputs: Sequence[TensorInfo],
    *,
    facts: Facts,
    target: str,
    precision: str,
    threads: int | None = None,
    overwrite: bool = False,
    check: Callable[[Engine], dict[str, Any]] | None = None,
) -> Engine:
    """Make one engine folder of several graphs, each an engine in a folder of its own, and load it.

    ``graphs`` make them, by the names of their folders.  ``check`` is as in :func:`package`.

    Raises:
        UsageError: the folder is taken.
        RefusedError: there is a check, and the target cannot run here.
    """
    maker = ready(target, precision, folder, overwrite=overwrite)
    if check is not None and (reason := maker.cannot_run()):
        raise RefusedError(
            f"an engine of several graphs is checked by running it, and {target} cannot run here ({reason}):"
            " export where it can"
        )
    with atomic_folder(folder, overwrite=overwrite) as partial:
        parts = []
        for name, make in graphs.items():
            with make(partial / name) as engine:
                parts.append(engine.manifest)
        paths = sorted(path for path in partial.rglob("*") if path.is_file())
        manifest = parts[0].model_copy(
            update={
                **{entry.name: getattr(facts, entry.name) for entry in dataclasses.fields(facts)},
                "inputs": tuple(inputs),
                "outputs": tuple(outputs),
                "files": {path.relative_to(partial).as_posix(): digest(path) for path in paths},
                "requires": {k: v for part in parts for k, v in part.requires.items()},
                "estimate": None,
                "cache": "",
                "graphs": tuple(graphs),
            }
        )
        manifest.write(partial)
        if check is not None:
            with Engine.load(partial, threads=threads) as engine:
                verified = check(engine)
            manifest.model_copy(update={"verified": verified}).write(partial)
    return Engine.load(folder, threads=threads)


def _checkable(folder: Path, manifest: Manifest, maker: Backend, threads: int | None) -> Engine:
    """The engine, or where it cannot run here its ``model.onnx`` in ONNX Runtime on the CPU.

    bfloat16, which the CPU has no kernels for, is computed in float32 and rounded.
    """
    if not maker.cannot_run():
        return Engine.load(folder, threads=threads)
    cpu, count = backend("cpu"), threads or default_threads()
    if manifest.precision in cpu.precisions:
        return Engine(folder, manifest, cpu.open(folder, manifest, count), count)
    import onnx_ir as ir

    from thresher.compiler.lowering.widen import widen

    model = ir.load(folder / MODEL)
    widen(model)
    with tempfile.TemporaryDirectory() as place:
        save_model(model, Path(place) / MODEL)
        return Engine(folder, manifest, cpu.open(Path(place), manifest, count), count)


def ready(
    target: str, precision: str, folder: Path | str, *, overwrite: bool, calibrated: bool = False
) -> Backend:
    """The back end, after all checks that need no model, so that long work need not start."""
    maker = demand_target(target, precision, calibrated=calibrated)
    check_free(folder, overwrite=overwrite)
    return maker


def demand_target(target: str, precision: str, *, calibrated: bool = False) -> Backend:
    """The back end of a target, if it is installed here and has this precision.

    ``calibrated`` says that there is data for precisions that need some.
    """
    maker = backend(target)
    if precision not in maker.precisions:
        raise UsageError(
            f"target {target!r} has no precision {precision!r}"
            f"{nearest(precision, maker.precisions)}"
        )
    if precision in CALIBRATED and not calibrated:
        raise UsageError(
            f"precision {precision!r} is calibrated on data, which only 'thresher export --data DATA'"
            " does: give it some, or name an engine that it wrote"
        )
    maker.demand()
    return maker


def save_model(model: onnx.ModelProto | ir.Model, path: Path) -> onnx.ModelProto:
    """Write an ONNX file; above 1.5 GB the weights go to ``<path>.data`` beside it.

    Returns the model without the weights that lie beside it.
    """
    import onnx
    import onnx_ir as ir

    graph = model if isinstance(model, ir.Model) else ir.from_proto(model)
    size = sum(
        value.const_value.nbytes
        for value in graph.graph.initializers.values()
        if value.const_value is not None
    )
    ir.save(graph, path, external_data=f"{path.name}.data" if size > EXTERNAL_ABOVE else None)
    return onnx.load(path, load_external_data=False)


def _manifest(model: onnx.ModelProto, facts: Facts, maker: Backend, precision: str) -> Manifest:
    """All but the files, which the back end is still to build."""
    names = [name for name in (*PACKAGES, "onnx") if installed(name)]
    inputs = _specs(model.graph.input)
    room = footprint(model, largest(inputs, facts.ranges, facts.usual))
    if room is not None:
        check_room(room, maker)
    return Manifest(
        thresher=installed("thresher") or "unknown",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        target=maker.name,
        precision=precision,  # type: ignore[arg-type]  # checked by ready()
        inputs=inputs,
        outputs=_specs(model.graph.output),
        versions={name: installed(name) or "" for name in names},
        requires=maker.requires(model),
        estimate=dataclasses.asdict(room) if room is not None else None,
        **{entry.name: getattr(facts, entry.name) for entry in dataclasses.fields(facts)},
    )


def check_room(room: Footprint, maker: Backend) -> None:
    """Warn where an engine will hardly fit, before it is built."""
    free = maker.free_memory()
    if free is not None and room.total > free:
        log.warning(
            "the engine will need about %s, and %.1f MB are free for target %r here: give smaller sizes"
            " with --shape",
            room,
            free / 1e6,
            maker.name,
        )


def _specs(values: Sequence[Any]) -> tuple[TensorInfo, ...]:
    """Specs of ONNX graph inputs or outputs; unnamed axes are ``ANY``."""
    import onnx

    found = []
    for value in values:
        tensor = value.type.tensor_type
        shape = tuple(
            axis.dim_value if axis.HasField("dim_value") else axis.dim_param or ANY
            for axis in tensor.shape.dim
        )
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
        found.append(TensorInfo(name=value.name, dtype=dtype, shape=shape))
    return tuple(found)


def _carry_tokenizer(facts: Facts, folder: Path) -> Facts:
    """Copy a tokenizer file into the engine, so that the folder can be moved."""
    named = (facts.preprocessing or {}).get("tokenizer")
    if not named or not Path(named).is_file():
        return facts
    shutil.copyfile(named, folder / Path(named).name)
    moved = {**(facts.preprocessing or {}), "tokenizer": Path(named).name}
    return dataclasses.replace(facts, preprocessing=moved)
