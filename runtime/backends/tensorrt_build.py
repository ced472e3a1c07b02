"""Building with TensorRT or TensorRT-RTX: two packages of one interface, handed in as ``trt``."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

from thresher.compiler.errors import RefusedError
from thresher.runtime.backends.base import Tell
from thresher.runtime.manifest import Manifest

MEMORY = {  # lines of the builder's log, in bytes
    "weights": re.compile(r"Total Weights Memory: (\d+) bytes"),
    "activations": re.compile(r"Total Activation Memory: (\d+) bytes"),
    "scratch": re.compile(r"Max Scratch Memory: (\d+) bytes"),
}


def parsed(trt: Any, builder: Any, model: Path, log: Any, title: str) -> Any:
    """The network of an ONNX file, strongly typed: its types are those of the file.

    Raises:
        RefusedError: the parser does not take it.
    """
    flags = trt.NetworkDefinitionCreationFlag
    typed = 1 << int(flags.STRONGLY_TYPED) if hasattr(flags, "STRONGLY_TYPED") else 0
    network = builder.create_network(typed)
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(model)):
        reasons = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        raise RefusedError(f"{title} does not take the model: {(reasons or [log.reason])[0]}")
    return network


def add_profile(builder: Any, config: Any, manifest: Manifest) -> None:
    """Least, usual and largest sizes of all inputs, where an axis is symbolic."""
    if not any(isinstance(axis, str) for spec in manifest.inputs for axis in spec.shape):
        return
    profile = builder.create_optimization_profile()
    for spec in manifest.inputs:
        profile.set_shape(spec.name, *bounds(spec.shape, manifest))
    config.add_optimization_profile(profile)


def serialized(
    trt: Any, builder: Any, network: Any, config: Any, log: Any, title: str, tell: Tell
) -> Any:
    """Build the engine; returns a buffer with its file.

    The build runs beside the main thread, which alone hears Ctrl-C; it then waits for the builder
    to end at its next step.

    Raises:
        RefusedError: the builder gives up; its reason is passed on.
        KeyboardInterrupt: the user stopped it.
    """
    stop = Event()
    config.progress_monitor = monitor(trt, title, tell, stop)
    with ThreadPoolExecutor(1) as pool:
        building = pool.submit(builder.build_serialized_network, network, config)
        try:
            made = building.result()
        except BaseException:
            stop.set()
            raise
    if made is None:
        raise RefusedError(f"{title} cannot build the model: {log.reason}")
    return made


def layers(network: Any) -> dict[str, int]:
    """How many layers of the parsed network compute in each type."""
    counts: dict[str, int] = {}
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.num_outputs:
            kind = str(layer.get_output(0).dtype).rpartition(".")[2].lower()
            counts[kind] = counts.get(kind, 0) + 1
    return counts


def steps(trt: Any, network: Any) -> dict[str, Any]:
    """What computes our operators: the function bodies, or plugins, by name and version with their number."""
    counts: dict[str, int] = {}
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.PLUGIN_V3:
            layer.__class__ = trt.IPluginV3Layer
            plugin = layer.plugin
            name = f"{plugin.plugin_namespace}::{plugin.plugin_name} {plugin.plugin_version}"
            counts[name] = counts.get(name, 0) + 1
    if not counts:
        return {"steps": "function bodies"}
    return {"steps": f"plugins {', '.join(counts)}", "plugins": counts}


def logger(trt: Any) -> Any:
    """A logger that keeps what is said about errors and memory."""

    class Log(trt.ILogger):  # type: ignore[misc]  # the packages have no types
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []
            self.kept: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                self.errors.append(message)
            elif " Memory: " in message:
                self.kept.append(message)

        @property
        def reason(self) -> str:
            said = self.errors[0] if self.errors else "its log gives no reason"
            return re.sub(r"^.*?Error Code \d+: ", "", said).splitlines()[0]

        def memory(self) -> dict[str, int]:
            text = "\n".join(self.kept)
            found = {name: pattern.search(text) for name, pattern in MEMORY.items()}
            return {name: int(match[1]) for name, match in found.items() if match}

    return Log()


def monitor(trt: Any, title: str, tell: Tell, stop: Event) -> Any:
    """Tells each step of a build, and ends it at the next one when ``stop`` is set."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = num_steps
            tell(f"{title}: {phase_name}", 0, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            tell(f"{title}: {phase_name}", step + 1, self.steps[phase_name])
            return not stop.is_set()

        def phase_finish(self, phase_name: str) -> None:
            self.steps.pop(phase_name, None)

    return Monitor()


def bounds(
    shape: tuple[int | str, ...], manifest: Manifest
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Least, usual and largest shape of an input; without a usual size the largest is tuned for."""
    axes: list[tuple[int, int, int]] = []
    for axis in shape:
        if isinstance(axis, int):
            axes.append((axis, axis, axis))
        else:
            low, high = manifest.ranges[axis]
            assert high is not None
            axes.append((low, manifest.usual.get(axis, high), high))
    least, usual, largest = (tuple(sizes[i] for sizes in axes) for i in range(3))
    return least, usual, largest
