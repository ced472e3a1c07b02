"""What only a device can show: sizes of real models, dispatch, graphs, compilation, the same twice."""

from __future__ import annotations

from itertools import zip_longest
from typing import Any

import pytest
import torch
from torch.testing import assert_close

import thresher.kernels.ops  # noqa: F401
from tests.kernels.triton_back_end import device
from thresher.kernels.gpu import dispatch
from thresher.kernels.registry import BY_TORCH_NAME

ops: Any = torch.ops.thresher
SIZES = [(1, 197), (8, 577), (2, 1370), (1, 4097), (0, 197)]


@pytest.fixture(autouse=True)
def _on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    if device().type != "cuda":
        pytest.skip(
            "kernels are interpreted here: run tests/gpu/run_all.sh on a machine with a GPU"
        )
    monkeypatch.delenv("THRESHER_KERNELS", raising=False)


def arguments(name: str, batch: int, tokens: int, dtype: torch.dtype) -> tuple[Any, ...]:
    torch.manual_seed(tokens)
    x = torch.randn(batch, tokens, 384, device="cuda").to(dtype)
    metric = torch.randn(batch, 6, tokens, 64, device="cuda").to(dtype)
    size = torch.randint(1, 9, (batch, tokens), device="cuda").float()
    score = torch.randn(batch, tokens, device="cuda")
    few, some = tokens - tokens // 3, tokens - tokens // 5
    index = torch.randint(0, tokens, (batch, few), device="cuda")
    cases: dict[str, tuple[Any, ...]] = {
        "bipartite_merge": (x, size, metric, few, 1, True),
        "class_attention": (metric, metric, None, 0.125, 0),
        "keep_tokens": (x, score, few, 1, True),
        "prune_merge": (x, size, score, some, few, 1),
        "redundant_merge": (x, size, metric, score, few, 1),
        "split_merge": (x, size, metric, score, few, 1),
        "select_diverse": (x, size, few, 1),
        "token_energy": (metric, size, 0.9, 1),  # no cosine of two tokens comes near
        "gather_tokens": (x, index),
        "restore_tokens": (x[:, :few], index.clamp(max=few) - 1, x[:, :few]),
    }
    return cases[name] if name in cases else network(name, x)


def network(name: str, x: torch.Tensor) -> tuple[Any, ...]:
    """Weights of ordinary scale; about half of the work is skipped."""
    width = x.shape[2]

    def matrix(rows: int, columns: int) -> torch.Tensor:
        made: torch.Tensor = torch.randn(rows, columns, device="cuda") / rows**0.5
        return made.to(x.dtype)

    few = x.flatten(0, 1)[:8]  # more run the definition
    if name == "sparse_linear":
        return few, matrix(width, 4 * width), torch.full((width,), 0.7, device="cuda"), 8
    if name == "sparse_gated_ffn":
        up, down = matrix(width, 4 * width).T.contiguous(), matrix(4 * width, width)
        zero = torch.zeros(4 * width, device="cuda")  # no rounding decides for much
        return few, matrix(width, 4 * width), up, down, zero, "relu", 8
    learners = torch.stack([matrix(width, 256) for _ in range(4)])
    back = torch.stack([matrix(256, width) for _ in range(4)])
    bias = torch.randn(4, 256, device="cuda").to(x.dtype)
    out = torch.randn(width, device="cuda").to(x.dtype)
    k = torch.randint(-1, 6, x.shape[:2], device="cuda")
    run = torch.rand(*x.shape[:2], 4, device="cuda") < 0.5
    if name in ("adaptive_mlp", "expert_mlp"):
        return x, k if name == "adaptive_mlp" else run, learners, bias, back, out, "gelu"
    return x, k, learners, bias, learners.flip(0).contiguous(), bias.flip(0), back, out, "silu"


NETWORKS = ("sparse_linear", "sparse_gated_ffn", "adaptive_mlp", "adaptive_gated_mlp", "expert_mlp")
NAMES = (
    "bipartite_merge",
    "class_attention",
    "keep_tokens",
    "prune_merge",
    "redundant_merge",
    "split_merge",
    "select_diverse",
    "token_energy",
    "gather_tokens",
    "restore_tokens",
    *NETWORKS,
)


def leaves(result: Any) -> tuple[torch.Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_kernels_equal_the_definition_in_double(
    name: str, size: tuple[int, int], dtype: torch.dtype
) -> None:
    """Positions but for near ties; rows and sizes wherever positions are the same."""
    given = arguments(name, *size, dtype)
    wide = tuple(
        a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() and n != "threshold" else a
        for n, a in zip_longest(BY_TORCH_NAME[name].inputs, given)
    )  # fmt: skip
    found = leaves(getattr(ops, name)(*given))
    expected = leaves(getattr(ops, name)(*wide))  # double: the reference
    if name.endswith("_merge"):
        same = (found[2] == expected[2]).float().mean() if size[0] else 1.0
        assert same > 0.999  # similarities that agree to a rounding error may be ordered either way
        rows = (found[3] == expected[3]) & close(found[1], expected[1], 1e-4)
        assert not size[0] or rows.float().mean() > 0.995
        pairs = [(found[0][rows], expected[0][rows])]
    elif name == "select_diverse":
        same = (found[1] < 0) == (expected[1] < 0)
        assert not size[0] or same.float().mean() > 0.99  # one near tie decides on later ones
        pairs = [(found[0], ops.gather_tokens(given[0], found[2]))]
    else:
        pairs = list(zip(found, expected, strict=True))
    scores = name in ("class_attention", "token_energy")
    assert found[0].dtype == (torch.float32 if scores else dtype)
    # An exponential magnifies roundings, and so does a long sum.
    least = 1e-5 if scores or name in NETWORKS else 4e-7
    for one, other in pairs:
        unit = torch.finfo(one.dtype).eps if one.is_floating_point() else 0.0
        scale = float(other.double().abs().max()) if other.numel() else 1.0
        assert_close(one.double(), other.double(), rtol=0, atol=max(unit, least) * scale)


def close(one: torch.Tensor, other: torch.Tensor, tolerance: float) -> torch.Tensor:
    return (one.double() - other.double()).abs() <= tolerance * other.double().abs().clamp(min=1)


@pytest.mark.parametrize("name", NAMES)
def test_the_operator_runs_the_kernels_and_twice_the_same(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, asked = arguments(name, 4, 197, torch.float16), []
    known = dispatch.kernels

    def noted(operator: str) -> Any:
        asked.append(operator)
        return known(operator)

    monkeypatch.setattr(dispatch, "kernels", noted)
    first, second = (leaves(getattr(ops, name)(*given)) for _ in range(2))
    assert asked == [name, name]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_a_graph_holds_the_kernels(name: str) -> None:
    """Nothing in them waits for the device."""
    given = arguments(name, 4, 197, torch.float16)
    expected = leaves(getattr(ops, name)(*given))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = leaves(getattr(ops, name)(*given))
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_compiled_code_calls_them() -> None:
    x, size, metric, *_ = arguments("bipartite_merge", 4, 197, torch.float32)

    def step(x: torch.Tensor, size: torch.Tensor, metric: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = ops.bipartite_merge(x * 2, size, metric, 184, 1, True)[0]
        return y + 1

    assert_close(torch.compile(step, fullgraph=True)(x, size, metric), step(x, size, metric))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_the_definition(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = arguments(name, 2, 33, torch.float32)
    found = []
    for switch in ("on", "off"):
        monkeypatch.setenv("THRESHER_KERNELS", switch)
        inputs = [
            a.detach().clone().requires_grad_()
            if isinstance(a, torch.Tensor) and a.is_floating_point()
            else a
            for a in given
        ]
        total: Any = leaves(getattr(ops, name)(*inputs))[0].square().sum()
        total.backward()
        found.append([a.grad for a in inputs if isinstance(a, torch.Tensor) and a.grad is not None])
    assert found[0]
    for one, other in zip(*found, strict=True):
        assert_close(one, other, rtol=1e-3, atol=1e-3)
