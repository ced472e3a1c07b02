"""Side-by-side measurement: time, memory and size, with the prediction beside the result."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thresher.compiler.errors import UsageError
from thresher.runtime.blocks import BlockChange, BlockProfile, block_profiles, compare_blocks
from thresher.runtime.candidates import Candidate, describe, opened, unique_names
from thresher.runtime.conditions import Conditions, conditions, default_threads, load_average
from thresher.runtime.deviation import plain
from thresher.runtime.engine import Engine
from thresher.runtime.feeds import Array
from thresher.runtime.generate import with_own_past
from thresher.runtime.measure import Clock, Plan, interleave, warm_up
from thresher.runtime.memory import MEANING, Memory, peak_memory
from thresher.runtime.runner import Runnable
from thresher.runtime.sample import batch_symbol, random_inputs, timed_sizes
from thresher.runtime.stats import paired_ratio, spread
from thresher.runtime.timing import Timing
from thresher.runtime.verifying import comparable

if TYPE_CHECKING:
    from thresher.compiler.program import Program

SCHEMA = "thresher.profile/1"
COPIES = "inputs and outputs are arrays in host memory; handing them over is included"
Progress = Callable[[str, int, int], None]
Feeds = Mapping[str, Array]


@dataclass(frozen=True)
class Profile:
    """Everything ``profile`` found; the first candidate is the baseline."""

    candidates: tuple[Candidate, ...]
    timings: tuple[Timing, ...]
    conditions: Conditions
    plan: Plan
    sentences: tuple[str, ...]
    min_speedup: float | None
    met: bool
    copies: str = COPIES
    memory: str = MEANING
    blocks: tuple[BlockProfile, ...] = ()
    changes: tuple[BlockChange, ...] = field(default=())

    def timing(self, candidate: str, batch: int) -> Timing:
        """The timing of a candidate at a batch size."""
        return next(t for t in self.timings if (t.candidate, t.batch) == (candidate, batch))

    def to_json(self) -> dict[str, Any]:
        """Plain data under a versioned schema."""
        return {"schema": SCHEMA, **plain(asdict(self))}


def profile(
    candidates: Sequence[Runnable | Program | Path | str],
    *,
    batches: Sequence[int] = (1,),
    target: str = "cpu",
    precision: str = "fp32",
    threads: int | None = None,
    plan: Plan | None = None,
    sizes: Mapping[str, int] | None = None,
    memory: bool = True,
    blocks: bool = False,
    min_speedup: float | None = None,
    progress: Progress | None = None,
    clock: Clock = time.perf_counter,
) -> Profile:
    """Measure candidates against the first of them, interleaved.

    Candidates whose inputs have other sizes get random ones of their own, which is said.

    Args:
        candidates: engines, engine folders, Programs (exported to ``target`` first, so that like is
            compared with like) or a ProgramRunner for eager torch.
        batches: batch sizes.
        target: back end for Programs.
        precision: precision for Programs.
        threads: CPU threads of every candidate; by default the physical cores, at most 8.
        plan: how long to measure.
        sizes: sizes of symbolic axes other than the batch; by default 64, and of a language model
            one step behind 256 tokens, or as many as it knows positions for.
        memory: measure peak memory, in one more process for each engine.
        blocks: also time the blocks, at the first batch size, with ONNX Runtime.
        min_speedup: demanded of every candidate at every batch size.
        progress: called with what is being done, steps done, and steps in all.
        clock: seconds; for tests.

    Raises:
        UsageError: nothing to compare, inputs of other names, or a batch size that a model does not take.
    """
    if not candidates or not batches:
        raise UsageError("there is nothing to profile: name one engine or more, and a batch size")
    plan, threads = plan or Plan(), default_threads() if threads is None else threads
    progress = progress or (lambda what, done, total: None)
    with ExitStack() as stack:
        load = load_average()
        runs = opened(candidates, stack, target=target, precision=precision, threads=threads)
        names = unique_names(runs)
        for other in runs[1:]:
            comparable(runs[0], other)
        known = getattr(runs[0], "preprocessing", None)
        sizes = timed_sizes(runs[0].inputs, sizes, known)
        memories = [_memory(run, batches[0], threads, sizes) if memory else None for run in runs]
        described = tuple(map(describe, runs, names, memories))
        timings, feeds = tuple[Timing, ...](), list[Feeds]()
        for batch in batches:
            feeds = _feeds(runs, batch, sizes)
            timings += tuple(_time(runs, feeds, described, batch, plan, progress, clock))
        found = _blocks(runs, names, batches[0], threads, sizes) if blocks else ()
        where = conditions(threads, load)
        left = tuple(_left_early(runs, names))
    changes = tuple(compare_blocks(found[0], other) for other in found[1:])
    judged = [t for t in timings if t.speedup is not None]
    met = min_speedup is None or all(t.meets(min_speedup) for t in judged)
    said = (
        *_sentences(described, timings, where, changes, min_speedup),
        *_other_sizes(names, feeds),
        *left,
    )
    return Profile(
        described, timings, where, plan, said, min_speedup, met, blocks=found, changes=changes
    )


def _time(
    runs: Sequence[Runnable],
    feeds: Sequence[Feeds],
    described: Sequence[Candidate],
    batch: int,
    plan: Plan,
    progress: Progress,
    clock: Clock,
) -> list[Timing]:
    """All candidates at one batch size."""
    calls = [_call(run, own) for run, own in zip(runs, feeds, strict=True)]
    warmth = [warm_up(call, plan, clock) for call in calls]
    times = interleave(
        calls, warmth, plan, clock, lambda done, total: progress(f"batch {batch}", done, total)
    )
    base = described[0]
    made = []
    for index, (candidate, values) in enumerate(zip(described, times, strict=True)):
        latency = spread(values)
        ratio = paired_ratio(times[0], values) if index else None
        alike = _shapes(feeds[index]) == _shapes(feeds[0])
        ideal = ideal_ratio(base, candidate, alike=alike) if index else None
        made.append(
            Timing(
                candidate.name,
                batch,
                latency,
                batch / latency.median,
                warmth[index],
                ratio,
                ideal,
                ratio.median / ideal if ratio and ideal else None,
            )
        )
    return made


def _feeds(runs: Sequence[Runnable], batch: int, sizes: Mapping[str, int] | None) -> list[Feeds]:
    """Inputs of each candidate; whoever takes what the first one does is given the same arrays."""
    first = batch_inputs(runs[0], batch, sizes)
    own = (
        first if run.inputs == runs[0].inputs else batch_inputs(run, batch, sizes)
        for run in runs[1:]
    )
    return [first, *own]


def batch_inputs(run: Runnable, batch: int, sizes: Mapping[str, int] | None) -> dict[str, Array]:
    """Seeded inputs of one batch; the past of a language model is its own.

    Raises:
        UsageError: the model's batch is fixed at another size.
    """
    fixed = run.inputs[0].shape[0] if batch_symbol(run.inputs) is None else batch
    if fixed != batch:
        raise UsageError(
            f"{run.name} has a fixed batch of {fixed}, not {batch}: use --batch {fixed}"
        )
    drawn = random_inputs(run.inputs, batch=batch, sizes=sizes, ranges=run.ranges)
    return with_own_past(run, drawn)


def ideal_ratio(base: Candidate, candidate: Candidate, *, alike: bool = True) -> float | None:
    """Multiply-accumulates of the baseline over those of the candidate, where both are known.

    A baseline without a prediction stands for the dense model if it reduces nothing and its inputs
    are ``alike``.
    """
    dense = base.macs or (candidate.dense_macs if alike and not base.reduced else None)
    return dense / candidate.macs if dense and candidate.macs else None


def _call(run: Runnable, feeds: Feeds) -> Callable[[], object]:
    return lambda: run.run(feeds)


def _memory(
    run: Runnable, batch: int, threads: int, sizes: Mapping[str, int] | None
) -> Memory | None:
    if not isinstance(run, Engine):
        return None
    return peak_memory(run.folder, batch=batch, threads=threads, sizes=sizes)


def _blocks(
    runs: Sequence[Runnable],
    names: Sequence[str],
    batch: int,
    threads: int,
    sizes: Mapping[str, int] | None,
) -> tuple[BlockProfile, ...]:
    engines = [run for run in runs if isinstance(run, Engine)]
    if len(engines) < len(runs) or any(engine.manifest.graphs for engine in engines):
        raise UsageError("only engines of one graph have times per block: leave out all others")
    feeds = batch_inputs(runs[0], batch, sizes)
    folders = [engine.folder for engine in engines]
    return block_profiles(folders, feeds, threads=threads, names=names)


def _sentences(
    described: Sequence[Candidate],
    timings: Sequence[Timing],
    where: Conditions,
    changes: Sequence[BlockChange],
    least: float | None,
) -> list[str]:
    base = described[0]
    said = []
    for timing in timings:
        if timing.speedup is not None:
            said.append(timing.verdict(base.name))
            if least is not None and not timing.meets(least):
                said[-1] += f"; {least:g} times was demanded"
        if not timing.warm_up.steady:
            said.append(
                f"batch {timing.batch}: {timing.candidate} did not become steady in"
                f" {timing.warm_up.runs} runs of warm-up"
            )
    said += [change.sentence for change in changes]
    said += [where.busy] if where.busy else []
    random = [candidate.name for candidate in described if candidate.weights == "random"]
    if random:
        said.append(f"random weights in {', '.join(random)}: times hold, quality means nothing")
    return said


def _other_sizes(names: Sequence[str], feeds: Sequence[Feeds]) -> Iterator[str]:
    """Inputs that were not of the first candidate's size."""
    first, *others = map(_shapes, feeds)
    for name, shapes in zip(names[1:], others, strict=True):
        for key, shape in shapes.items():
            if shape != first[key]:
                yield f"{name} was given {key!r} of {shape}, {names[0]} of {first[key]}"


def _shapes(feeds: Feeds) -> dict[str, list[int]]:
    return {key: list(array.shape) for key, array in feeds.items()}


def _left_early(runs: Sequence[Runnable], names: Sequence[str]) -> Iterator[str]:
    """Of engines with an exit, how many items left by it while they were measured."""
    for run, name in zip(runs, names, strict=True):
        left = getattr(run, "left_early", None)
        if left is not None:
            yield f"{name}: {left}; inputs were random, and others leave more or less often"
