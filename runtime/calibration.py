"""Ranges of activations, observed on the user's data, for engines that compute in whole numbers."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from thresher.compiler.errors import RefusedError, UsageError
from thresher.runtime.conditions import default_threads
from thresher.runtime.feeds import Array, checked
from thresher.runtime.manifest import MODEL, Ranges, TensorInfo
from thresher.runtime.scoring import Dataset

if TYPE_CHECKING:
    import onnx_ir as ir

SAMPLES = 128  # observed by default
LEAST = 16  # samples, below which a range is chance
BATCH = 4  # samples run at once: every observed tensor is held for so many
BINS = 8192
METHOD = "least expected squared error"


@dataclass(frozen=True)
class CalibrationData:
    """The items to calibrate on: ``samples`` of ``dataset``, spread evenly over it."""

    dataset: Dataset
    samples: int = SAMPLES


def calibrate(
    model: ir.Model,
    specs: Sequence[TensorInfo],
    ranges: Ranges,
    calibration: CalibrationData,
    *,
    threads: int | None = None,
) -> dict[str, Any]:
    """Write int8 into a lowered model in place; returns what the manifest tells of it.

    Raises:
        UsageError: the data does not fit the model, is not finite, or is too little.
        RefusedError: the model has no linear layer, or a tensor in it is not finite on the data.
    """
    from thresher.compiler.lowering.quantize import prepare, quantize

    watched = [str(value.name) for value in prepare(model)]
    found = {name: Magnitudes() for name in watched}
    count = 0
    with tempfile.TemporaryDirectory(prefix="thresher-") as folder:
        observe = _Observer(model, watched, Path(folder), threads or default_threads())
        for feeds in _batches(specs, ranges, calibration):
            count += len(next(iter(feeds.values())))
            for name, values in observe(feeds).items():
                if not np.isfinite(values).all():
                    raise RefusedError(
                        f"the tensor {name!r} is not finite on {calibration.dataset.name}, so that it"
                        " has no range: export with --precision fp32"
                    )
                found[name].add(values)
    if count < LEAST:
        raise UsageError(
            f"{calibration.dataset.name} gives {count} samples to calibrate on and {LEAST} are the"
            f" least: give more, {SAMPLES} are usual"
        )
    layers = quantize(model, {name: magnitudes.limit() for name, magnitudes in found.items()})
    return {
        "data": calibration.dataset.name,
        "samples": count,
        "method": METHOD,
        "layers": layers,
    }


class Magnitudes:
    """How often each magnitude occurs, in equal bins from zero to a power of two above all seen."""

    def __init__(self) -> None:
        self.counts: NDArray[np.int64] = np.zeros(BINS, np.int64)
        self.top = 0.0  # zero until something else than zero was seen
        self.peak = 0.0

    def add(self, values: Array) -> None:
        """Count finite values of any shape; the order of the calls does not matter."""
        sizes = np.abs(values, dtype=np.float64).ravel()
        self.peak = max(self.peak, float(sizes.max(initial=0.0)))
        self._raise(2.0 ** np.frexp(self.peak)[1] if self.peak else 0.0)
        if self.top:
            sizes *= BINS / self.top
        self.counts += np.bincount(sizes.astype(np.int64), minlength=BINS)

    def _raise(self, top: float) -> None:
        """Widen the bins; neighbours are put together."""
        if self.top and top > self.top:
            joined = min(BINS, int(top / self.top))
            kept = self.counts.reshape(-1, joined).sum(axis=1)
            self.counts = np.pad(kept, (0, BINS - len(kept)))
        self.top = max(self.top, top)

    def limit(self) -> float:
        """The largest magnitude to keep: the edge of a bin with the least expected squared error.

        With steps of ``s = limit / 127`` a value below ``s / 2`` becomes zero and costs its square, a
        clipped one costs ``(x - limit)^2``, and what lies between ``s^2 / 12`` (Banner, Nahshan and
        Soudry, "Post training 4-bit quantization of convolutional networks for rapid-deployment",
        2019, with the observed distribution in place of a fitted one).  Zero where nothing but zeros
        was seen.
        """
        if not self.top:
            return 0.0
        from thresher.compiler.lowering.quantize import STEPS

        width = self.top / BINS
        edges = width * np.arange(1, BINS + 1)
        middles = edges - width / 2
        steps = edges / STEPS
        up_to = [(self.counts * middles**power).cumsum() for power in range(3)]
        number, first, second = (sums[-1] - sums for sums in up_to)
        clipped = second - 2 * edges * first + edges**2 * number
        few, lost = (np.interp(steps / 2, edges, up_to[power], left=0.0) for power in (0, 2))
        rounded = lost + (up_to[0] - few) * steps**2 / 12
        return min(float(edges[np.argmin(rounded + clipped)]), self.peak)


class _Observer:
    """Runs a model in ONNX Runtime and returns tensors inside it."""

    def __init__(self, model: ir.Model, watched: Sequence[str], folder: Path, threads: int) -> None:
        from thresher.runtime.backends.cpu import kernel_library
        from thresher.runtime.backends.onnx_runtime import open_session, session_options
        from thresher.runtime.bundle import save_model

        self.watched = watched
        given = {value.name for value in model.graph.inputs}
        self.inside = [name for name in watched if name not in given]
        values = {value.name: value for node in model.graph for value in node.outputs}
        outputs = list(model.graph.outputs)
        names = {value.name for value in outputs}
        model.graph.outputs.extend(values[name] for name in self.inside if name not in names)
        try:
            save_model(model, folder / MODEL)
        finally:
            model.graph.outputs[len(outputs) :] = []  # not del, after which they count as outputs
        self.session = open_session(folder / MODEL, session_options(threads, kernel_library()))

    def __call__(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        found = dict(zip(self.inside, self.session.run(self.inside, dict(feeds)), strict=True))
        return {name: found[name] if name in found else feeds[name] for name in self.watched}


def _batches(
    specs: Sequence[TensorInfo], ranges: Ranges, calibration: CalibrationData
) -> Iterator[dict[str, Array]]:
    """Checked inputs in batches of a size that the model takes; what fills no batch is left out."""
    axis = specs[0].shape[0] if specs[0].shape else 1
    low, high = (axis, axis) if isinstance(axis, int) else ranges.get(axis, (1, None))
    size = max(low, min(BATCH, high or BATCH))
    for index, (inputs, _) in enumerate(calibration.dataset.batches(size, calibration.samples)):
        if len(next(iter(inputs.values()))) < low:
            continue
        feeds = checked(inputs, specs, ranges)
        for name, values in feeds.items():
            if values.dtype.kind == "f" and not np.isfinite(values).all():
                raise UsageError(
                    f"{calibration.dataset.name} is not finite in the input {name!r} of the samples"
                    f" {index * size} to {index * size + len(values) - 1} that calibrate: repair it"
                )
        yield feeds
