"""Speed against what one would run without thresher: DeiT-S, token merging with r = 13.

Random weights: times hold, quality means nothing.  All candidates are timed interleaved.  In the row
"for nothing" each step only cuts off as many tokens as the method removes: what no kernel can beat.

    python -m tests.benchmarks.speed [--rounds 10] [--no-costs] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx.parser
import torch
from numpy.typing import NDArray
from torch import nn

from tests.benchmarks.common import say
from tests.benchmarks.costs import OptimizeCost, optimize_cost, start_up
from tests.benchmarks.plain_tome import PlainTome
from thresher.compiler.errors import MissingRequirementError
from thresher.compiler.files import atomic_file
from thresher.compiler.lowering.onnx_export import OPSET
from thresher.compiler.pipeline import optimize
from thresher.compiler.program import Program, SourceInfo
from thresher.compiler.recipe import load_recipe
from thresher.compiler.trace import trace
from thresher.kernels.native import CPU, SWITCH, Kind, Library
from thresher.kernels.openvino_library import extension
from thresher.runtime import Engine, export
from thresher.runtime.backends.onnx_runtime import open_session, session_options
from thresher.runtime.conditions import conditions, load_average
from thresher.runtime.manifest import MODEL as MODEL_FILE
from thresher.runtime.measure import Plan, interleave, warm_up
from thresher.runtime.stats import Ratio, paired_ratio
from thresher.runtime.tables import markdown

MODEL, REMOVED = "deit_small_patch16_224", 13
LARGE, LARGE_REMOVED = "vit_large_patch16_224", 8
BATCHES = (1, 8)


class Sort(NamedTuple):
    """Of engines."""

    target: str
    precision: str
    name: str


ENGINES = (
    Sort("cpu", "fp32", "ONNX Runtime"),
    Sort("openvino", "fp32", "OpenVINO"),
    Sort("openvino", "bf16", "OpenVINO bf16"),
    Sort("cpu", "int8", "ONNX Runtime int8"),
    Sort("openvino", "int8", "OpenVINO int8"),
)
ROUNDED = ("bf16", "int8")  # coarser than what should agree
FREE = "ONNX Runtime, tokens cut off for nothing"
Images = NDArray[np.float32]
Run = Callable[[Images], Images]


@dataclass
class Candidate:
    """Something timed; ``dense`` names the candidate that shows what its reduction gains."""

    name: str
    run: Run
    dense: str | None = None


@dataclass
class Timed:
    """Times of one candidate at one batch size, as ratios to eager PyTorch and to its own dense."""

    name: str
    batch: int
    milliseconds: float
    over_eager: Ratio
    over_dense: Ratio | None
    ideal: float
    realised: float | None = field(init=False)

    def __post_init__(self) -> None:
        self.realised = self.over_dense.median / self.ideal if self.over_dense else None


def eager(model: nn.Module) -> Run:
    """A module run as it is."""

    def run(images: Images) -> Images:
        with torch.inference_mode():
            return np.asarray(model(torch.from_numpy(images)).numpy(), np.float32)

    return run


def exported_plainly(model: nn.Module, file: Path, opset: int, threads: int) -> Run:
    """``torch.onnx.export`` and ONNX Runtime, as a user of PyTorch would; our session options."""
    batch = torch.export.Dim("batch", min=1)
    torch.onnx.export(
        model,
        (torch.zeros(2, 3, 224, 224),),
        file,
        dynamo=True,
        opset_version=opset,
        dynamic_shapes=({0: batch},),
        verbose=False,
    )
    session = open_session(file, session_options(threads))
    name = session.get_inputs()[0].name
    return lambda images: np.asarray(session.run(None, {name: images})[0], np.float32)


def engine(
    program: Program, folder: Path, target: str, precision: str, batch: int, threads: int
) -> Run:
    """One of our engines, with the function bodies; for OpenVINO of a fixed batch."""
    shapes = [f"x={batch}x3x224x224"] if target == "openvino" else []
    made = export(
        program,
        folder,
        target=target,
        precision=precision,
        threads=threads,
        shapes=shapes,
        data=Noise() if precision == "int8" else None,
        samples=32,
        check=precision != "int8",  # random networks answer by rounding errors
    )
    return _of(made)


class Noise:
    """Random images: they set ranges well enough for a clock."""

    name = "random images"

    def batches(
        self, size: int, limit: int | None = None
    ) -> Iterator[tuple[dict[str, Images], None]]:
        for start in range(0, limit or size, size):
            yield {"x": _images(min(size, (limit or size) - start))}, None


def _of(engine: Engine) -> Run:
    return lambda images: np.asarray(engine.run({"x": images})["output"], np.float32)


def with_kernels(folder: Path, threads: int, kind: Kind) -> Run:
    """An engine of ours with the native kernels, which are built if need be."""
    library = Library(kind=kind)
    if library.find() is None:
        say("building the native kernels")
        library.build()
    del os.environ[SWITCH]
    try:
        return _of(Engine.load(folder, threads=threads))
    finally:
        os.environ[SWITCH] = "off"


def for_nothing(folder: Path, threads: int) -> Run:
    """An engine of ours whose steps cut off the last tokens, whatever these are."""
    model = onnx.load(folder / MODEL_FILE)
    (function,) = model.functions
    cut = onnx.parser.parse_function(
        f"""<domain: "{function.domain}", opset_import: ["": {OPSET}]>
        {function.name} <{", ".join(function.attribute)}> ({", ".join(function.input)}) => (y, out_size) {{
          from = Constant <value = int64[1] {{0}}> ()
          axis = Constant <value = int64[1] {{1}}> ()
          to = Reshape (keep, axis)
          y = Slice (x, from, to, axis)
          out_size = Slice (size, from, to, axis)
        }}"""
    )
    function.CopyFrom(cut)
    onnx.save(model, folder / "cut.onnx")
    session = open_session(folder / "cut.onnx", session_options(threads))
    return lambda images: np.asarray(session.run(None, {"x": images})[0], np.float32)


def candidates(folder: Path, batch: int, threads: int) -> tuple[list[Candidate], float]:
    """Everything that is timed at a batch size, and the ideal speed-up of the reduced ones."""
    import timm

    torch.manual_seed(0)
    torch.set_num_threads(threads)
    model: Any = timm.create_model(MODEL, pretrained=False).eval()
    dense = trace(
        model,
        {"x": torch.zeros(2, 3, 224, 224)},
        dynamic={"x": {0: "batch"}},
        info=SourceInfo(f"timm:{MODEL}", "random"),
    )
    reduced = optimize(dense, load_recipe("tome", [f"tome.r={REMOVED}"]))
    details = next(record.details for record in reduced.history if "ideal" in record.details)
    made = [
        Candidate("PyTorch eager", eager(model)),
        Candidate("PyTorch eager, plain ToMe", eager(PlainTome(model, REMOVED)), "PyTorch eager"),
    ]
    for opset in (18, 20):
        say(f"torch.onnx.export, opset {opset}")
        run = exported_plainly(model, folder / f"plain{opset}.onnx", opset, threads)
        made.append(Candidate(f"ONNX Runtime, torch.onnx.export opset {opset}", run))
    for sort in ENGINES:
        try:
            made += engines(dense, reduced, folder, sort, batch, threads)
        except MissingRequirementError as error:
            say(f"{sort.name} is left out: {error}")
    return made, float(details["ideal"])


def engines(
    dense: Program, reduced: Program, folder: Path, sort: Sort, batch: int, threads: int
) -> list[Candidate]:
    """Those of one target and precision.

    Raises:
        MissingRequirementError: this machine does not run them.
    """
    target, precision, name = sort
    made = list[Candidate]()
    for form, program in (("dense", dense), ("tome", reduced)):
        say(f"engine: {name}, {form}")
        place = folder / f"{target}-{precision}-{form}.engine"
        run = engine(program, place, target, precision, batch, threads)
        of = f"{name}, thresher dense" if form == "tome" else None
        made.append(Candidate(f"{name}, thresher {form}", run, of))
        if of and precision != "int8":
            native = f"{name}, thresher tome, native kernels"
            library = CPU if target == "cpu" else extension()
            made.append(Candidate(native, with_kernels(place, threads, library), of))
        if of and (target, precision) == ("cpu", "fp32"):
            made.append(Candidate(FREE, for_nothing(place, threads), of))
    return made


def agreement(found: Sequence[Candidate], batch: int) -> list[str]:
    """Largest differences between candidates that should compute the same."""
    images = _images(batch)
    same = [c for c in found if c.name != FREE and not any(p in c.name for p in ROUNDED)]
    results = {candidate.name: candidate.run(images) for candidate in same}
    said = []
    for group in ([c for c in same if not c.dense], [c for c in same if c.dense]):
        base = results[group[0].name]
        worst = max(float(np.abs(results[c.name] - base).max()) for c in group)
        scale = float(np.abs(base).max())
        said.append(f"all like {group[0].name!r} agree within {worst:.1e} (outputs to {scale:.2g})")
    return said


def timed(found: Sequence[Candidate], ideal: float, batch: int, rounds: int) -> list[Timed]:
    """All candidates at one batch size, interleaved."""
    plan, clock = Plan(rounds=rounds, seconds=600.0, warm_up=6), time.perf_counter
    images = _images(batch)
    calls = [_call(candidate.run, images) for candidate in found]
    warmth = [warm_up(call, plan, clock) for call in calls]
    times = dict(zip((c.name for c in found), interleave(calls, warmth, plan, clock), strict=True))
    first = times[found[0].name]
    return [
        Timed(
            candidate.name,
            batch,
            float(np.median(times[candidate.name])) * 1000,
            paired_ratio(first, times[candidate.name]),
            paired_ratio(times[candidate.dense], times[candidate.name])
            if candidate.dense
            else None,
            ideal,
        )
        for candidate in found
    ]


def _call(run: Run, images: Images) -> Callable[[], object]:
    return lambda: run(images)


def _images(batch: int) -> Images:
    drawn = np.random.default_rng(0).standard_normal((batch, 3, 224, 224))
    return np.asarray(drawn, np.float32)


def speed_table(rows: Sequence[Timed]) -> str:
    """Markdown, one row per candidate, all batch sizes side by side."""
    header = ["candidate"]
    batches = sorted({row.batch for row in rows})
    for batch in batches:
        header += [f"b{batch} ms", "over eager", "over own dense", "realised"]
    body = []
    for name in dict.fromkeys(row.name for row in rows):
        line = [name]
        for batch in batches:
            row = next(r for r in rows if (r.name, r.batch) == (name, batch))
            line += [f"{row.milliseconds:.1f}", _ratio(row.over_eager), _ratio(row.over_dense)]
            line.append(f"{row.realised:.2f}" if row.realised else "")
        body.append(line)
    return markdown(header, body)


def _ratio(ratio: Ratio | None) -> str:
    return f"{ratio.median:.2f} ({ratio.low:.2f}-{ratio.high:.2f})" if ratio else ""


def cost_table(costs: Sequence[OptimizeCost]) -> str:
    """Markdown: what tracing and the recipe cost."""
    mega = 1_000_000
    return markdown(
        ["model", "weights MB", "trace s", "extra MB", "recipe s", "extra MB"],
        [
            [
                cost.model,
                f"{cost.weights / mega:.0f}",
                f"{cost.trace_seconds:.1f}",
                f"{cost.trace_extra / mega:.0f}",
                f"{cost.recipe_seconds:.1f}",
                f"{cost.recipe_extra / mega:.0f}",
            ]
            for cost in costs
        ],
    )


def main(argv: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--threads", type=int, default=2, help="CPU threads")
    options.add_argument("--rounds", type=int, default=20, help="timed rounds, at least 6")
    options.add_argument("--batches", nargs="*", type=int, default=list(BATCHES))
    options.add_argument(
        "--no-costs", action="store_true", help="leave out the compiler's own cost"
    )
    options.add_argument("--json", type=Path, default=None, help="also write the result here")
    args = options.parse_args(argv)
    os.environ[SWITCH] = "off"
    load = load_average()
    rows: list[Timed] = []
    for batch in args.batches:
        with tempfile.TemporaryDirectory(prefix="thresher-") as folder:
            found, ideal = candidates(Path(folder), batch, args.threads)
            notes = agreement(found, batch)
            say(f"timing at batch {batch}")
            rows += timed(found, ideal, batch, args.rounds)
    where = conditions(args.threads, load)
    notes += [f"ideal {ideal:.2f}; {where.cpu}, {args.threads} threads; random weights"]
    notes += [where.busy] if where.busy else []
    print(f"### {MODEL}, ToMe r = {REMOVED}\n\n{speed_table(rows)}\n")
    print("\n".join(f"- {note}" for note in notes))
    costs: list[OptimizeCost] = []
    started: dict[str, float] = {}
    if not args.no_costs:
        say("cost of thresher itself")
        pairs = ((MODEL, REMOVED), (LARGE, LARGE_REMOVED))
        costs = [optimize_cost(model, r, args.threads) for model, r in pairs]
        started = start_up()
        print(f"\n### What thresher itself costs\n\n{cost_table(costs)}\n")
        print("\n".join(f"- {name}: {seconds:.2f} s" for name, seconds in started.items()))
    if args.json is not None:
        record = {
            "schema": "thresher.benchmark-speed/1",
            "conditions": vars(where),
            "rows": [vars(row) | _ratios(row) for row in rows],
            "notes": notes,
            "costs": [vars(cost) for cost in costs],
            "start_up": started,
        }
        with atomic_file(args.json) as target:
            target.write_text(json.dumps(record, indent=2))


def _ratios(row: Timed) -> dict[str, Any]:
    over_dense = vars(row.over_dense) if row.over_dense else None
    return {"over_eager": vars(row.over_eager), "over_dense": over_dense}


if __name__ == "__main__":
    main()
