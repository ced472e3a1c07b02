"""Every method on every family: equal to the oracle, and equal on every back end."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

import numpy as np
import onnx
import onnx_ir
import pytest
import torch

from tests.families.decisions import Method
from tests.families.mode import SIMILAR
from tests.families.oracle import reduced_outputs
from tests.families.traced import cast, program
from tests.families.zoo import BY_NAME, REDUCIBLE, REFUSED
from thresher.compiler.analysis.finder import find_sites
from thresher.compiler.contract import Context, PassResult
from thresher.compiler.lowering import inlined, to_onnx
from thresher.compiler.lowering.ties import order_ties
from thresher.compiler.program import Program
from thresher.passes.tokens.atm import Atm, AtmOptions
from thresher.passes.tokens.ats import Ats, AtsOptions
from thresher.passes.tokens.diffrate import DiffRate, DiffRateOptions
from thresher.passes.tokens.methods import (
    Evit,
    EvitOptions,
    MaxMin,
    Pitome,
    PitomeOptions,
    RandomDrop,
    RandomOptions,
    Tome,
    TomeOptions,
    TopkNorm,
)
from thresher.passes.tokens.options import TokenOptions
from thresher.passes.tokens.zero_tprune import ZeroTPrune, ZeroTPruneOptions

SIZES_IN_FLOAT32 = 3e-6  # relative; sizes and scores are float32 whatever the model's dtype
FLOAT32 = 2e-4

Budget = dict[str, Any]
METHODS: dict[str, Callable[[Budget], Any]] = {
    "tome": lambda b: Tome(TomeOptions(**b, order="reference")),
    "tome-mlerp": lambda b: Tome(TomeOptions(**b, order="reference", combine="mlerp")),
    "evit": lambda b: Evit(EvitOptions(**b, fuse=False)),
    "evit-fuse": lambda b: Evit(EvitOptions(**b, fuse=True)),
    "diffrate": lambda b: DiffRate(DiffRateOptions(**b)),
    "topk-norm": lambda b: TopkNorm(TokenOptions(**b)),
    "random": lambda b: RandomDrop(RandomOptions(**b)),
    "pitome": lambda b: Pitome(PitomeOptions(**b)),
    "atm": lambda b: Atm(AtmOptions(**b, by_size=0)),  # from block 2 on sizes differ
    "max-min": lambda b: MaxMin(TokenOptions(**b)),
    "zero-tprune": lambda b: ZeroTPrune(ZeroTPruneOptions(**b, similar=SIMILAR)),
    "ats": lambda b: Ats(AtsOptions(**b)),
    "ats-capped": lambda b: Ats(AtsOptions(**b, capped=True)),
}
CLASSED = ("evit", "ats")  # need a class token
FAMILIES = [entry.name for entry in REDUCIBLE]
# Every day: all methods on registers, no prefix, and padding; two on most families.
SHARP = ("timm:vit_small_patch14_reg4_dinov2", "timm:vit_base_patch16_siglip_224", "hf:bert")
ALL_DAY = ("tome", "evit")
AS_TOME = ("atm",)  # but for who joins whom: one family every day
LARGE = ("timm:beit_base_patch16_224", "hf:modernbert", "hf:wav2vec2")  # seconds for each
LONG = ("hf:bert", "zero-tprune")  # every vote of every block under a symbolic length
EVERYWHERE = ("dense", "tome", "evit-fuse", "diffrate")
THIRD = {  # the others on every third family, in turns: CI has a limit
    (f, m)
    for i, f in enumerate(FAMILIES)
    for j, m in enumerate(("dense", *METHODS))
    if m in EVERYWHERE or (i + j) % 3 == 0
}


def every_day(name: str, method: str) -> bool:
    if method in ALL_DAY:
        return name not in LARGE
    if method in AS_TOME:
        return name == SHARP[0]
    return name in SHARP and (name, method) != LONG


def cases(chosen: Iterable[tuple[Any, ...]]) -> list[Any]:
    """Parameters that begin with family and method, the rarer ones marked as slow."""
    return [pytest.param(*c, marks=() if every_day(*c[:2]) else pytest.mark.slow) for c in chosen]


ALL = [(f, m) for f in FAMILIES for m in METHODS]
IN_TURNS = [pair for pair in ALL if every_day(*pair) or pair in THIRD]
# neighbours share what was reduced
BATCHED = [(*pair, batch) for pair in ALL for batch in ((3, 1) if pair in IN_TURNS else (3,))]


@lru_cache(maxsize=2)  # neighbouring tests ask for the same
def reduce(
    name: str, method: str, dtype: torch.dtype = torch.float64, **budget: Any
) -> tuple[Program, PassResult]:
    dense = program(name, dtype)
    return dense, METHODS[method](budget)(dense, Context())


def budget_of(name: str, method: str) -> Budget:
    """A few tokens at every block, so that later decisions build on earlier ones."""
    return (
        {"r": 3}
        if method.startswith(("tome", "diffrate", "pitome", "atm"))
        else {"keep": 0.75, "layers": (0, 1, 2)}
    )


def refused_here(name: str, method: str, result: PassResult) -> bool:
    if method.startswith(CLASSED) and find_sites(program(name)).class_token is None:
        assert result.applied == 0
        assert "class token" in result.refused[0].reason
        assert "tome" in result.refused[0].reason
        return True
    return False


@pytest.mark.parametrize("name", FAMILIES)
def test_the_analysis_sees_what_a_reader_sees(name: str) -> None:
    entry, found = BY_NAME[name], find_sites(program(name))
    assert len(found.sites) == entry.layers
    if name != "hf:modernbert":
        assert found.protected == entry.prefix
    assert (found.padding is not None) == (entry.real is not None)


@pytest.mark.parametrize(("name", "method"), cases(IN_TURNS))
def test_nothing_to_remove_is_bit_equal(name: str, method: str) -> None:
    budget = {"r": 0} if method.startswith(("tome", "diffrate", "pitome", "atm")) else {"keep": 1.0}
    dense, result = reduce(name, method, **budget)
    if refused_here(name, method, result):
        return
    assert result.applied == 0
    assert result.program is dense


@pytest.mark.parametrize(("name", "method", "batch"), cases(BATCHED))
def test_reduced_graph_equals_the_oracle(name: str, method: str, batch: int) -> None:
    entry = BY_NAME[name]
    _, result = reduce(name, method, **budget_of(name, method))
    if refused_here(name, method, result):
        return
    inputs = entry.inputs(batch)
    found = find_sites(program(name))
    # a class token that is there but not read out scores all the same
    if method in ("diffrate", "zero-tprune") or method.startswith(CLASSED):
        entry = dataclasses.replace(entry, class_token=found.class_token)
    model, _ = entry.build()
    counts = _counts(result, program(name), inputs)
    expected = reduced_outputs(
        entry,
        model,
        inputs,
        typing.cast(Method, method.removesuffix("-fuse").removesuffix("-mlerp")),
        counts,
        fuse=method == "evit-fuse",
        mlerp=method == "tome-mlerp",
        prefix=found.protected,
    )
    got = result.program.run(cast(inputs, torch.float64))
    assert got.keys() == expected.outputs.keys()
    for key, want in expected.outputs.items():
        value = got[key]
        if key in entry.dense:
            # an empty place goes on being computed, though nothing attends to it
            shown = expected.layers[-1].slot >= 0 if method == "ats-capped" else expected.real
            value, want = value[shown & expected.real], want[shown & expected.real]
        error = float((value - want).abs().max() / want.abs().max())
        assert error < max(SIZES_IN_FLOAT32, 3 * entry.tolerance), (key, error, counts)


def _counts(result: PassResult, dense: Program, inputs: dict[str, torch.Tensor]) -> list[int]:
    """Tokens after each block, read off a run: dynamic lengths have no number before."""
    from thresher.compiler.ledger import token_maps

    maps = token_maps(result.program, cast(inputs, torch.float64))
    sites = len(find_sites(dense).sites)
    tokens: int = maps[0].slot.shape[1]
    counts: list[int] = []
    by_layer = {m.entry.layer: m.kept.shape[1] for m in maps}
    for layer in range(sites):
        tokens = int(by_layer.get(layer, tokens))
        counts.append(tokens)
    return counts


SELDOM = ("timm:mobilevit_s", "timm:cait_xxs24_224")  # they take seconds to trace


@pytest.mark.parametrize(
    "name",
    [pytest.param(e.name, marks=pytest.mark.slow if e.name in SELDOM else ()) for e in REFUSED],
)
@pytest.mark.parametrize("method", ["tome", "topk-norm"])
def test_refused_with_node_and_reason(name: str, method: str) -> None:
    dense, result = reduce(name, method, **({"r": 1} if method == "tome" else {"keep": 0.75}))
    if result.applied:  # a part of the network may be reducible; then it must be true to itself
        pytest.skip(f"{name} is reduced in part: {result.applied} sites")
    assert result.program is dense
    assert result.refused
    assert all(r.node and r.reason for r in result.refused)


# Every day: one with a class token, one with registers, one of sound.
QUICK = {
    ("timm:deit_small_patch16_224", "tome"), ("timm:vit_small_patch14_reg4_dinov2", "diffrate"),
    ("hf:whisper-encoder", "tome"),
}  # fmt: skip
LOWERED = [
    pytest.param(f, m, marks=() if (f, m) in QUICK else pytest.mark.slow)
    for f in FAMILIES
    for m in ("dense", *METHODS)
    if (f, m) in THIRD
]


@pytest.mark.parametrize(("name", "method"), LOWERED)
def test_eager_onnxruntime_and_openvino_agree(name: str, method: str) -> None:
    entry = BY_NAME[name]
    if method == "dense":
        subject = program(name, torch.float32)
    else:
        _, result = reduce(name, method, torch.float32, **budget_of(name, method))
        if refused_here(name, method, result):
            return
        subject = result.program
    model = onnx_ir.to_proto(to_onnx(subject))
    runners = {"onnxruntime": onnxruntime_of(model), "openvino": openvino_of(model)}
    lengths = (None, 23) if _is_text(entry.name) else (None,)
    for batch in (1, 3, 8):
        for length in lengths:
            inputs = cast(entry.inputs(batch, length), torch.float32)
            eager = subject.run(inputs)
            real = entry.real(entry.build()[0], inputs) if entry.real else None
            for back_end, run in runners.items():
                for key, value in run({k: v.numpy() for k, v in inputs.items()}).items():
                    want = eager[key].numpy()
                    if key in entry.dense and real is not None:
                        value, want = value[real.numpy()], want[real.numpy()]
                    error = np.abs(value - want).max() / np.abs(want).max()
                    assert error < FLOAT32, (back_end, key, batch, length, error)


def _is_text(name: str) -> bool:
    return name in ("hf:bert", "hf:modernbert")


def onnxruntime_of(
    model: onnx.ModelProto,
) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [o.name for o in session.get_outputs()]
    return lambda feeds: dict(zip(names, session.run(None, feeds), strict=True))


def openvino_of(
    model: onnx.ModelProto,
) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    openvino = pytest.importorskip("openvino")
    core = openvino.Core()
    read = core.read_model(inlined(model).SerializeToString())
    order_ties(read)
    compiled = core.compile_model(
        read, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    )
    names = [output.name for output in model.graph.output]
    return lambda feeds: {name: compiled(feeds)[name] for name in names}
