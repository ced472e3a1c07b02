"""Cache and head in the graph are what the text says, behind every kind of reduction, and in every back end."""

from __future__ import annotations

import numpy as np
import onnx_ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.compiler.toys import WIDTH
from tests.families.test_matrix import onnxruntime_of, openvino_of
from tests.passes.clca import oracle
from tests.passes.clca.cases import arbitrary, dense, host, model, place, plain, reduced
from thresher.compiler import spec
from thresher.compiler.ledger import final_positions, token_maps
from thresher.compiler.lowering import to_onnx
from thresher.compiler.pipeline import run_passes
from thresher.compiler.program import Program
from thresher.passes.cleanup import Cleanup
from thresher.passes.tokens.clca.head import folded

CLOSE = 1e-6  # logarithms of sizes are float32


def check(depth: int, patches: int, passes: str, *, cached: bool, seed: int) -> Program:
    """Compare one reduced toy with the oracle; returns the Program with cache and head."""
    program = reduced(dense(depth, patches), passes)
    found = place(program, cached=cached)
    weights, stats, token = arbitrary(len(found.anatomy.read), seed)
    made = found.filled(folded(weights, stats) | ({"token": token} if cached else {}))
    spec.verify(made, "optimised", program)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, patches, WIDTH, generator=generator, dtype=torch.float64)
    want = oracle.answers(
        model(depth),
        x,
        host(program),
        plain(weights),
        plain(stats),
        token.numpy() if cached else None,
    )
    (got,) = made.run({"x": x}).values()
    np.testing.assert_allclose(got.numpy(), want, rtol=CLOSE, atol=CLOSE)
    expected = oracle.extra(depth, found.anatomy.reduced) if cached else []
    assert list(found.appended.items()) == expected
    return made


@pytest.mark.parametrize(
    ("depth", "passes", "cached"),
    [
        (4, "evit: {keep: 0.7, layers: [1]}", True),
        (3, "tome: {r: 1}", True),
        (2, "topk-norm: {keep: 0.7, layers: [0]}", True),
        (3, "evit: {keep: 0.7, layers: [2]}", False),
    ],
)
def test_it_is_the_text(depth: int, passes: str, cached: bool) -> None:
    check(depth, 9, passes, cached=cached, seed=depth)


@pytest.mark.slow
@settings(max_examples=12, deadline=None, derandomize=True)
@given(data=st.data())
def test_it_is_the_text_wherever_tokens_leave(data: st.DataObject) -> None:
    depth = data.draw(st.integers(2, 5), "blocks")
    patches = data.draw(st.integers(8, 11), "patches")
    layers = sorted(data.draw(st.sets(st.integers(0, depth - 1), min_size=1), "layers"))
    method = data.draw(
        st.sampled_from(["evit: {keep: 0.7", "topk-norm: {keep: 0.7", "tome: {r: 1"])
    )
    cached = data.draw(st.booleans(), "cache")
    check(depth, patches, f"{method}, layers: {layers}}}", cached=cached, seed=patches)


def test_the_published_places() -> None:
    """Reductions at blocks 3, 6 and 9 of 12: six, six, six and two tokens."""
    assert [count for _, count in oracle.extra(12, (3, 6, 9))] == [1, 6, 6, 6, 2]
    found = place(reduced(dense(12, 9), "topk-norm: {keep: 0.8, layers: [3, 6, 9]}"))
    assert found.appended == {-1: 1, 3: 6, 6: 6, 9: 6, 10: 2}


HOSTS = (
    "evit: {flops: 0.7}", "tome: {r: 1}", "tome: {r: 1, combine: mlerp}", "pitome: {flops: 0.85}",
    "ats: {flops: 0.8}", "zero-tprune: {flops: 0.8}", "max-min: {flops: 0.8}", "diffrate: {flops: 0.8}",
    "random: {flops: 0.8}",
)  # fmt: skip


@pytest.mark.parametrize(
    "passes", [*HOSTS[:2], *(pytest.param(host, marks=pytest.mark.slow) for host in HOSTS[2:])]
)
def test_every_reduction_can_be_undone_and_extended(passes: str) -> None:
    """What is taught by is the model before its reduction; tokens are found again behind cache tokens."""
    whole = dense(3, 9)
    program = reduced(whole, passes)
    found = place(program)
    x = {"x": torch.randn(2, 9, WIDTH, dtype=torch.float64)}
    spec.verify(found.dense, "imported")
    torch.testing.assert_close(found.dense.run(x), whole.run(x), rtol=0, atol=1e-12)
    made = found.filled({name: torch.randn(shape) for name, shape in found.shapes.items()})
    spec.verify(made, "optimised", program)
    assert all(value.isfinite().all() for value in made.run(x).values())
    maps = token_maps(made, x)
    assert [m.slot.shape[1] for m in maps] == [10, *(m.kept.shape[1] for m in maps[:-1])]
    assert sum(m.entry.appended for m in maps) > 0
    for where, one in zip(final_positions(maps, 10), maps, strict=True):
        assert where.shape == (2, 10)
        assert (where < one.kept.shape[1]).all()
        assert (where[:, 0] == 0).all()  # the class token


@pytest.mark.parametrize(
    "passes", [pytest.param("evit: {keep: 0.7}", marks=pytest.mark.slow), "tome: {r: 1}"]
)
def test_back_ends_agree(passes: str) -> None:
    program = reduced(dense(3, 9, torch.float32), passes)
    found = place(program)
    weights, stats, token = arbitrary(len(found.anatomy.read))
    filled = {n: t.float() for n, t in folded(weights, stats).items()} | {"token": token.float()}
    made = run_passes(found.filled(filled), [Cleanup()])
    left = {node.name for node in made.graph.nodes if node.op == "placeholder"}
    assert not left & {"p_head_weight", "p_head_bias", "p_norm_weight", "p_norm_bias"}
    graph = onnx_ir.to_proto(to_onnx(made))
    for run in (onnxruntime_of(graph), openvino_of(graph)):
        for batch in (1, 3):
            x = torch.randn(batch, 9, WIDTH)
            (want,), (got,) = made.run({"x": x}).values(), run({"x": x.numpy()}).values()
            np.testing.assert_allclose(
                got, want.numpy(), rtol=0, atol=2e-4 * float(want.abs().max())
            )
