"""Sections ``eager`` and ``compiled``: whole models, dense against reduced, in PyTorch on the device.

Random weights: times hold, quality means nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from tests.cli.toy import ToyViT
from tests.gpu.rows import Call, Row, Setting, compared, timed
from thresher.compiler.pipeline import optimize
from thresher.compiler.program import Program, SourceInfo
from thresher.compiler.recipe import load_recipe
from thresher.compiler.trace import trace
from thresher.kernels.native import SWITCH

Case = tuple[str, str, list[str]]  # model, recipe, overrides
CASES: tuple[Case, ...] = (
    ("deit_small_patch16_224", "tome", ["tome.r=13"]),
    ("deit_small_patch16_224", "diffrate/deit-s@2.9g", []),
    ("vit_base_patch16_224", "tome", ["tome.r=13"]),
)
DRY: tuple[Case, ...] = (("toy", "tome", ["flops=0.6"]),)
AGREEMENT = 0.02  # of the outputs' scale: half precision, and near ties may be decided otherwise


@dataclass(frozen=True)
class Pair:
    """A model dense and reduced, on the device."""

    name: str
    side: int
    dense: torch.nn.Module
    reduced: torch.nn.Module
    ideal: float


def pairs(setting: Setting) -> Iterator[Pair]:
    """Traced on the device, in the precision that is timed; a model's Programs are made once."""
    programs: dict[str, Program] = {}
    for model, recipe, overrides in DRY if setting.dry else CASES:
        side = 24 if setting.dry else 224
        if model not in programs:
            programs = {model: traced(setting, model, side)}
        dense = programs[model]
        reduced = optimize(dense, load_recipe(recipe, overrides))
        ideal = next(r.details["ideal"] for r in reduced.history if "ideal" in r.details)
        name = f"{model} {' '.join([recipe, *overrides])}"
        yield Pair(name, side, _module(dense), _module(reduced), float(ideal))


def _module(program: Program) -> torch.nn.Module:
    module = program.module()
    module._forward_pre_hooks.clear()  # torch.export's checks of inputs are none of the model's time
    return module


def traced(setting: Setting, name: str, side: int, dtype: torch.dtype | None = None) -> Program:
    """A model with random weights; the batch is symbolic."""
    torch.manual_seed(0)
    if setting.dry:
        model: Any = ToyViT()
    else:
        import timm

        model = timm.create_model(name, pretrained=False)
    dtype = dtype or setting.dtype
    return trace(
        model.to(setting.device, dtype).eval(),
        {"x": images(setting, 2, side).to(dtype)}, dynamic={"x": {0: "batch"}},
        info=SourceInfo(name, "random"),
    )  # fmt: skip


def images(setting: Setting, batch: int, side: int) -> torch.Tensor:
    return torch.randn(batch, 3, side, side, device=setting.device, dtype=setting.dtype)


def eager(setting: Setting) -> Iterator[Row]:
    """Launch by launch, and as a CUDA graph, where launching costs nothing; kernels against references."""
    for pair in pairs(setting):
        yield agreement(setting, pair)
        for batch in setting.batches:
            x = images(setting, batch, pair.side)
            calls: list[Call] = [partial(module, x=x) for module in (pair.dense, pair.reduced)]
            calls.append(plainly(pair.reduced, x))
            kinds = ["launch by launch"]
            if setting.device == "cuda":
                calls += [graph(call) for call in calls]
                kinds.append("CUDA graph")
            with torch.inference_mode():
                times = timed(setting, calls)
            for kind, (dense, reduced, references) in zip(
                kinds, (times[:3], times[3:]), strict=False
            ):
                case = f"{pair.name}: {kind}"
                yield compared("eager", case, dense, reduced, batch=batch, ideal=pair.ideal)
                note = "baseline: the references in place of the kernels"
                yield compared("eager", case, references, reduced, batch=batch, note=note)


def compiled(setting: Setting) -> Iterator[Row]:
    """``torch.compile`` with CUDA graphs, one batch size after the other."""
    options: dict[str, Any] = (
        {"backend": "aot_eager"} if setting.dry else {"mode": "reduce-overhead"}
    )
    for pair in pairs(setting):
        for batch in setting.batches:
            x = images(setting, batch, pair.side)
            torch.compiler.reset()
            calls = [
                step(torch.compile(module, dynamic=False, **options), x)
                for module in (pair.dense, pair.reduced)
            ]
            with torch.inference_mode():
                dense, reduced = timed(setting, calls)
            yield compared("compiled", pair.name, dense, reduced, batch=batch, ideal=pair.ideal)


def step(compiled: Any, x: torch.Tensor) -> Call:
    """A call of its own: its graph does not follow on that of the call before."""

    def call() -> object:
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        return compiled(x=x)

    return call


def agreement(setting: Setting, pair: Pair) -> Row:
    """Outputs of the reduced model with the kernels and with the references."""
    x = images(setting, 4, pair.side)
    with torch.inference_mode():
        found, expected = (
            call().float() for call in (partial(pair.reduced, x=x), plainly(pair.reduced, x))
        )
    worst = float((found - expected).abs().max() / expected.abs().max())
    note = f"kernels and references differ by {worst:.1e} of the outputs' scale"
    return Row("eager", f"{pair.name}: agreement", passed=worst <= AGREEMENT, note=note)


def plainly(module: torch.nn.Module, x: torch.Tensor) -> Callable[[], Any]:
    """The same with the references in place of the kernels."""

    def call() -> Any:
        before = os.environ.get(SWITCH)
        os.environ[SWITCH] = "off"
        try:
            return module(x=x)
        finally:
            os.environ.pop(SWITCH) if before is None else os.environ.update({SWITCH: before})

    return call


def graph(call: Call) -> Call:
    """The call's launches, recorded once."""
    stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.inference_mode():
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        recorded = torch.cuda.CUDAGraph()
        with torch.cuda.graph(recorded):
            kept = call()

    def replay() -> object:
        recorded.replay()
        return kept

    return replay
