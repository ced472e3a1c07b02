"""Time per block of the model, and what inserted modules cost beside what they saved.

ONNX Runtime names fused nodes after their kind and inlined ones after nothing, so its own profile
cannot be mapped back.  Here it optimises the graph once, every node of the result gets a name of
ours, and that graph is run with the optimiser off: the same kernels, under known names.  Taking
the time of a node costs some microseconds, which would count against the many small nodes of an
inserted module; runs without the profiler, in turn with the others, tell how much to take off.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thresher.runtime.backends.cpu import kernel_library
from thresher.runtime.backends.onnx_runtime import open_session, session_options
from thresher.runtime.feeds import Array
from thresher.runtime.manifest import MODEL
from thresher.runtime.provenance import OUTSIDE, Origin, block_names, nodes_of, origins, traced
from thresher.runtime.stats import milliseconds

if TYPE_CHECKING:
    import onnxruntime

WARM_UP, RUNS = 5, 20
SUFFIX = "_kernel_time"


@dataclass(frozen=True)
class BlockTime:
    """Seconds in one block: its own nodes, and the modules that a pass inserted there."""

    block: str
    own: float
    inserted: float

    @property
    def total(self) -> float:
        return self.own + self.inserted


@dataclass(frozen=True)
class BlockProfile:
    """Blocks in the order in which they run.  Seconds are medians over the runs, added up."""

    name: str
    batch: int
    threads: int
    runs: int
    blocks: tuple[BlockTime, ...]
    inserted: dict[str, float]

    @property
    def total(self) -> float:
        return sum(block.total for block in self.blocks)


@dataclass(frozen=True)
class BlockChange:
    """Dense against reduced, in seconds: what the blocks saved and what the insertions cost."""

    dense: str
    reduced: str
    saved: float
    cost: float
    sentence: str


def block_profiles(
    folders: Sequence[Path],
    feeds: Mapping[str, Array],
    *,
    threads: int,
    names: Sequence[str] | None = None,
    runs: int = RUNS,
) -> tuple[BlockProfile, ...]:
    """Time the blocks of engines, run in turn on the same inputs.

    Times come from ONNX Runtime on ``model.onnx``, whatever the engines' own target is.

    Args:
        folders: engine folders.
        feeds: one batch of inputs.
        threads: CPU threads.
        names: how to call the engines; by default their folders' names.
        runs: timed runs of each.

    Raises:
        RefusedError: ONNX Runtime does not take a model.
    """
    labels = names or [folder.name for folder in folders]
    batch = len(next(iter(feeds.values())))
    walls: list[list[float]] = [[] for _ in folders]
    with ExitStack() as stack:
        named = [_named(folder / MODEL, stack, threads) for folder in folders]
        for _ in range(WARM_UP + runs):
            for model, wall in zip(named, walls, strict=True):
                model.profiled.run(None, dict(feeds))
                start = time.perf_counter()
                model.plain.run(None, dict(feeds))
                wall.append(time.perf_counter() - start)
        times = [_node_times(Path(model.profiled.end_profiling())) for model in named]
    found = []
    for label, model, seconds, wall in zip(labels, named, times, walls, strict=True):
        rows, kinds = _summed(model.where, without_overhead(seconds, _median(wall)))
        found.append(BlockProfile(label, batch, threads, runs, rows, kinds))
    return tuple(found)


def without_overhead(times: Mapping[int, float], wall: float) -> dict[int, float]:
    """Take the same amount off every node, down to zero, so that the sum is at most ``wall``."""
    left, surplus = len(times), sum(times.values()) - wall
    overhead = 0.0
    for seconds in sorted(times.values()):
        overhead = max(0.0, surplus) / left
        if seconds >= overhead:
            break
        left, surplus = left - 1, surplus - seconds
    return {index: max(0.0, seconds - overhead) for index, seconds in times.items()}


def compare_blocks(dense: BlockProfile, reduced: BlockProfile) -> BlockChange:
    """What the reduction saved in the blocks, and what its own modules cost."""
    saved = sum(b.own for b in dense.blocks) - sum(b.own for b in reduced.blocks)
    cost = sum(reduced.inserted.values()) - sum(dense.inserted.values())
    change = f"{_ms(saved)} less" if saved >= 0 else f"{_ms(-saved)} more"
    verdict = "" if saved > cost else ": no gain here"
    sentence = (
        f"batch {reduced.batch}: the blocks of {reduced.name} take {change} than"
        f" those of {dense.name}"
        f" and its inserted modules {_ms(cost)}{verdict}"
    )
    return BlockChange(dense.name, reduced.name, saved, cost, sentence)


@dataclass(frozen=True)
class _Model:
    """Sessions in which node ``i`` is called ``n<i>``, and the origin of each node."""

    profiled: onnxruntime.InferenceSession
    plain: onnxruntime.InferenceSession
    where: list[Origin]


def _named(model: Path, stack: ExitStack, threads: int) -> _Model:
    """Optimise a model once and open the result under names of ours."""
    import onnx
    import onnxruntime as ort

    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="thresher-")))
    options = session_options(threads, kernel_library())
    options.optimized_model_filepath = str(folder / MODEL)
    config = "session.optimized_model_external_initializers_"
    options.add_session_config_entry(f"{config}file_name", "weights")
    options.add_session_config_entry(f"{config}min_size_in_bytes", "1024")
    open_session(model, options)

    optimised = onnx.load(folder / MODEL, load_external_data=False)
    where = traced(optimised, origins(onnx.load(model, load_external_data=False)))
    for index, node in enumerate(nodes_of(optimised.graph)):
        branches = any(attribute.HasField("g") for attribute in node.attribute)
        node.name = "" if branches else f"n{index}"  # its time is that of its branches
    onnx.save(optimised, folder / MODEL)

    options = session_options(threads, kernel_library())
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    plain = open_session(folder / MODEL, options)
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    return _Model(open_session(folder / MODEL, options), plain, where)


def _node_times(path: Path) -> dict[int, float]:
    """Median seconds of every named node over the runs after the warm-up."""
    events: list[dict[str, Any]] = json.loads(path.read_text())
    times: dict[int, list[float]] = {}
    for event in events:
        name = str(event.get("name", ""))
        number = name.removesuffix(SUFFIX).removeprefix("n")
        if event.get("cat") == "Node" and name.endswith(SUFFIX) and number.isdigit():
            times.setdefault(int(number), []).append(event["dur"] * 1e-6)
    return {index: _median(values) for index, values in times.items()}


def _summed(
    where: Sequence[Origin], times: Mapping[int, float]
) -> tuple[tuple[BlockTime, ...], dict[str, float]]:
    """Times of the blocks, and of each kind of inserted module."""
    blocks = block_names(origin.module for origin in where)
    own: dict[str, float] = {}
    added: dict[str, float] = {}
    kinds: dict[str, float] = {}
    for index, origin in enumerate(where):
        seconds, block = times.get(index, 0.0), blocks[origin.module]
        own.setdefault(block, 0.0)
        if origin.inserted is None:
            own[block] += seconds
        else:
            added[block] = added.get(block, 0.0) + seconds
            kinds[origin.inserted] = kinds.get(origin.inserted, 0.0) + seconds
    order = sorted(own, key=lambda block: block == OUTSIDE)
    rows = tuple(BlockTime(block, own[block], added.get(block, 0.0)) for block in order)
    return rows, kinds


def _median(values: Sequence[float]) -> float:
    """Of the values after the warm-up."""
    return statistics.median(values[WARM_UP:])


def _ms(seconds: float) -> str:
    return f"{milliseconds(seconds)} ms"
