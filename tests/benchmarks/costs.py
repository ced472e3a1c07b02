"""What thresher itself costs: time and memory of ``optimize``, start-up time of the command line."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class OptimizeCost:
    """Seconds of tracing and of the recipe, and the bytes that each peak lies above its start."""

    model: str
    weights: int
    trace_seconds: float
    trace_extra: int
    recipe_seconds: float
    recipe_extra: int


def optimize_cost(model: str, r: int, threads: int) -> OptimizeCost:
    """Measure a timm model with random weights in a process of its own."""
    code = "import sys; from tests.benchmarks.costs import measure; measure(*sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", code, model, str(r), str(threads)],
        capture_output=True,
        text=True,
        check=True,
    )
    return OptimizeCost(**json.loads(done.stdout.splitlines()[-1]))


def measure(model: str, r: str, threads: str) -> None:
    """The measured process: prints an :class:`OptimizeCost` as JSON."""
    import timm
    import torch

    from thresher.compiler.pipeline import optimize
    from thresher.compiler.program import SourceInfo
    from thresher.compiler.recipe import load_recipe
    from thresher.compiler.trace import trace

    torch.set_num_threads(int(threads))
    recipe = load_recipe("tome", [f"tome.r={r}"])
    recipe.build()  # imports belong to neither
    made = timm.create_model(model, pretrained=False).eval()
    weights = sum(p.numel() * p.element_size() for p in made.parameters())
    before, start = reset_peak(), time.perf_counter()
    program = trace(
        made,
        {"x": torch.zeros(2, 3, 224, 224)},
        dynamic={"x": {0: "batch"}},
        info=SourceInfo(f"timm:{model}", "random"),
    )
    traced, trace_extra = time.perf_counter() - start, peak() - before
    before, start = reset_peak(), time.perf_counter()
    optimize(program, recipe)
    seconds, extra = time.perf_counter() - start, peak() - before
    cost = OptimizeCost(model, weights, traced, trace_extra, seconds, extra)
    print(json.dumps(vars(cost)))


def reset_peak() -> int:
    """Forget the peak of resident memory so far; returns what is resident now (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak() -> int:
    """Most resident memory since :func:`reset_peak`, in bytes."""
    return _status("VmHWM")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024


def start_up(runs: int = 7) -> dict[str, float]:
    """Median seconds of ``thresher --help`` and of a Python that does nothing, taken in turns."""
    commands = {
        "thresher --help": ["-m", "thresher.cli.main", "--help"],
        "python": ["-c", "pass"],
    }
    times: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(runs):
        for name, arguments in commands.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, *arguments], capture_output=True, check=True)
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}
