"""The Triton kernels: a few cases of every operator for every day, long and hostile input, dispatch.

They run in Triton's interpreter, or with TRITON_INTERPRET=0 on a CUDA device.  The full number of
examples is in test_bodies.py.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch.testing import assert_close

import thresher.kernels.ops  # noqa: F401
from tests.kernels import test_bodies as bodies
from tests.kernels.cases import (
    diverse_cases,
    energy_cases,
    keep_cases,
    merge_cases,
    prune_merge_cases,
    redundant_cases,
)
from tests.kernels.triton_back_end import device
from thresher.kernels.bipartite_merge import reference as merging
from thresher.kernels.gpu import dispatch
from thresher.kernels.matching import best_target

ops: Any = torch.ops.thresher
BY_SCORE = tuple(bodies.BY_SCORE)
FEW = settings(bodies.FAST, max_examples=4)


@pytest.fixture(autouse=True)
def _runs() -> None:
    device()


def examples_of(test: Any, *case: Any) -> None:
    """The body of a property test of another file."""
    test.hypothesis.inner_test("triton", *case)


@FEW
@given(case=merge_cases())
def test_merge(case: Any) -> None:
    examples_of(bodies.test_merge, case)


@FEW
@given(case=prune_merge_cases(dtype="float16"))
def test_prune_merge(case: Any) -> None:
    examples_of(bodies.test_prune_merge_half, case)


@FEW
@given(case=keep_cases())
def test_keep(case: Any) -> None:
    examples_of(bodies.test_keep, case)


@FEW
@given(case=diverse_cases(dtype="float16"))
def test_diverse(case: Any) -> None:
    examples_of(bodies.test_select_diverse_half, case)


@FEW
@given(case=energy_cases())
def test_energy(case: Any) -> None:
    examples_of(bodies.test_token_energy, case)


@bodies.by_score
@FEW
@given(case=redundant_cases())
def test_merge_by_score(name: str, case: Any) -> None:
    examples_of(bodies.test_merge_by_score, name, case)


def kernel(name: str, *arguments: Any) -> list[torch.Tensor]:
    """Results of the Triton kernels for tensors that are made on the CPU."""
    function = dispatch.kernels(name)
    assert function is not None
    here = [a.to(device()) if isinstance(a, torch.Tensor) else a for a in arguments]
    found = function(*here)
    return [value.cpu() for value in (found if isinstance(found, tuple) else (found,))]


def same(name: str, *arguments: Any, tolerance: float = 2e-6) -> list[torch.Tensor]:
    """The kernels' results, which must be those of the definition in double precision."""
    found = kernel(name, *arguments)
    wide = [
        a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a
        for a in arguments
    ]
    expected = getattr(ops, name)(*wide)
    for one, other in zip(
        found, expected if isinstance(expected, tuple) else (expected,), strict=True
    ):
        assert one.is_contiguous()
        scale = float(other.double().abs().max()) if other.numel() else 1.0
        assert_close(one.double(), other.double(), rtol=0, atol=tolerance * scale)
    return found


def stream(tokens: int, width: int, depth: int, batch: int = 1) -> list[torch.Tensor]:
    """Tokens, sizes and keys."""
    torch.manual_seed(tokens)
    size = torch.randint(1, 9, (batch, tokens)).float()
    return [torch.randn(batch, tokens, width), size, torch.randn(batch, 2, tokens, depth)]


def test_more_than_one_block_of_everything() -> None:
    """Sources, targets, channels of keys and tokens, and joining tokens exceed each kernel's blocks."""
    x, size, metric = stream(170, 520, 35)
    size[:, 5::37] = 0
    same("bipartite_merge", x, size, metric, 100, 3, True)
    score = torch.randn(1, 170)
    same("prune_merge", x[..., :70], size, score, 165, 25, 1)
    same("keep_tokens", x, score, 133, 2, True)
    for name in BY_SCORE:
        same(name, x[..., :70], size, metric, score, 100, 3)
    same("select_diverse", x, size, 100, 3)
    same("token_energy", metric, size, 0.1, 3)
    q, k = torch.randn(1, 2, 3, 20), torch.randn(1, 2, 300, 20)
    same("class_attention", q, k, None, 0.4, 1)


def test_many_targets_are_split_among_programs() -> None:
    """More than eight blocks of them; of equal ones the first is chosen, wherever the parts end."""
    x, size, _ = stream(620, 4, 2)
    x[:, 300:600] = x[:, :300]
    found = same("prune_merge", x, size, torch.randn(1, 620), 615, 600, 1)
    assert len(set(found[2][0].tolist())) == 601  # 600 rows and what was dropped


def test_lists_of_many_targets() -> None:
    """Similarities that tie wherever the parts end; exact, as the keys are axes.  NaN is like nothing."""
    from thresher.kernels.gpu.nearest import Listed, match_pairs

    _, size, _ = stream(1300, 1, 1)
    size[:, ::11] = 0
    keys = torch.eye(16)[torch.randint(0, 16, (1, 1300))]
    keys[:, 500:510] = torch.nan
    order = torch.randperm(1298)[None]
    source, target = 2 + order[:, :80:2], 2 + order[:, 81::2]
    given = [t.to(device()) for t in (keys[:, 2:], size, source, target)]
    best, token = match_pairs(given[0], given[1], Listed(*given[2:]))
    expected, number = best_target(size, keys[:, None], source, target)
    assert_close(best.cpu(), torch.where(size.gather(1, source) == 0, 1e4, expected))
    assert_close(token.cpu(), target.gather(1, number))


@pytest.mark.slow
def test_energies_are_split_among_programs() -> None:
    """More tokens than one program feels; that an item's neighbours change nothing is exact."""
    _, size, metric = stream(1100, 1, 20, batch=2)
    size[:, ::7] = 0
    (both,) = same("token_energy", metric, size, 0.05, 1)
    (alone,) = kernel("token_energy", metric[1:], size[1:], 0.05, 1)
    assert torch.equal(both[1:], alone)


def test_equal_tokens_are_picked_by_index() -> None:
    """More of them than a tile of pairs has columns; their cosines are exact."""
    axes = torch.eye(8)[torch.randint(0, 8, (2, 300))]
    size = (torch.rand(2, 300) < 0.8).float()
    for keep in (9, 200, 300):
        same("select_diverse", axes, size, keep, 2)


@pytest.mark.slow
def test_tokens_beyond_the_sort_of_other_back_ends() -> None:
    """More than 3840; distinct similarities, so that rounding decides nothing."""
    x, size, _ = stream(4001, 2, 2)
    angle = torch.linspace(0.1, 3.0, 2001)[torch.randperm(2001)].repeat_interleave(2)[:4001]
    # All targets alike: the first is chosen. Products with (1, 0) are exact, and angles rank the sources.
    angle[1::2] = 0.0
    metric = torch.stack([angle.cos(), angle.sin()], -1)[None, None]
    found = same("bipartite_merge", x, size, metric, 2700, 0, False)
    assert found[2].max() == 2699


def test_strides_are_followed() -> None:
    x, size, metric = stream(13, 6, 5, batch=2)
    x, size = x.repeat(1, 2, 2)[:, ::2, ::2], size.repeat(1, 2)[:, ::2]
    metric = metric.permute(3, 2, 0, 1).contiguous().permute(2, 3, 1, 0)
    score = torch.randn(13, 2).t()
    assert not any(t.is_contiguous() for t in (x, size, metric, score))
    same("bipartite_merge", x, size, metric, 9, 1, False)
    same("prune_merge", x, size, score, 10, 6, 1)
    same("keep_tokens", x, score, 6, 1, True)
    same("select_diverse", x, size, 6, 1)
    same("token_energy", metric, size, 0.2, 2)
    for name in BY_SCORE:
        same(name, x, size, metric, score, 9, 1)
    index = torch.randint(-1, 13, (5, 2)).t()
    same("restore_tokens", x, index, torch.randn(2, 3, 5).transpose(1, 2)[..., :3].repeat(1, 1, 2))
    same("gather_tokens", x.reshape(2, 13, 3, 2).transpose(2, 3), index.clamp(min=0))
    bias = torch.rand(13, 13).t() < 0.5
    same("class_attention", metric, metric, bias, 0.3, 4)
    run, w = torch.randn(3, 13, 2).permute(2, 1, 0) < 0, torch.randn(3, 5, 6).mT
    same("expert_mlp", x, run, w, w[:, 0], w.mT, w[0, :, 0], "silu")


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8, torch.float16])
def test_gathering_takes_every_type(dtype: torch.dtype) -> None:
    x, index = torch.randint(0, 2, (2, 9)).to(dtype), torch.randint(0, 9, (2, 4))
    (found,) = same("gather_tokens", x, index)
    assert found.dtype == dtype


def test_positions_that_are_not_there_read_nothing_else() -> None:
    (found,) = kernel("gather_tokens", torch.ones(1, 3, 2), torch.tensor([[2, 3, -1, 2**40]]))
    assert found[0, :, 0].tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize("tokens", [1, 2, 5])
@pytest.mark.parametrize("protected", [0, 1])
def test_nothing_to_do(tokens: int, protected: int) -> None:
    """No targets, no sources, nothing that merges, a single token."""
    x, size, metric = stream(tokens, 4, 3)
    same("bipartite_merge", x, size, metric, tokens, protected, True)
    same("prune_merge", x, size, size, tokens, tokens, protected)
    same("keep_tokens", x, size, tokens, protected, False)
    same("token_energy", metric, size, 0.2, tokens)
    if tokens > protected:
        same("select_diverse", x, size, tokens, protected)
        for name in BY_SCORE:
            same(name, x, size, metric, size, tokens, protected)


def test_an_empty_batch() -> None:
    x, size, metric = (t[:0] for t in stream(7, 4, 3))
    assert same("bipartite_merge", x, size, metric, 5, 1, True)[0].shape == (0, 5, 4)
    assert same("prune_merge", x, size, size, 5, 4, 1)[0].shape == (0, 4, 4)
    assert same("keep_tokens", x, size, 5, 1, True)[0].shape == (0, 5, 4)
    assert same("select_diverse", x, size, 5, 1)[0].shape == (0, 5, 4)
    assert same("token_energy", metric, size, 0.2, 1)[0].shape == (0, 7)
    for name in BY_SCORE:
        assert same(name, x, size, metric, size, 5, 1)[0].shape == (0, 5, 4)
    index = torch.zeros(0, 5, dtype=torch.int64)
    assert same("gather_tokens", x, index)[0].shape == (0, 5, 4)
    assert same("restore_tokens", x, index, x[:, :5])[0].shape == (0, 5, 4)
    assert same("class_attention", metric, metric, None, 1.0, 0)[0].shape == (0, 7)


def test_nan_is_no_crash() -> None:
    """What is chosen is of no meaning, but positions stay positions, and each is taken once."""
    x, size, metric = (t * torch.nan for t in stream(9, 4, 3))
    for name, arguments in (
        ("bipartite_merge", (x, size, metric, 6, 1, True)),
        ("prune_merge", (x, size, size, 7, 5, 1)),
        ("keep_tokens", (x, size, 6, 1, True)),
        ("select_diverse", (x, size, 6, 1)),
        *((name, (x, size, metric, size, 6, 1)) for name in BY_SCORE),
    ):
        *_, slot, kept = kernel(name, *arguments)
        assert sorted(set(kept[0].tolist())) == sorted(kept[0].tolist())
        assert ((kept >= 0) & (kept < 9)).all()
        assert ((slot >= -1) & (slot < kept.shape[1])).all()


def test_shapes_that_do_not_fit_are_an_error() -> None:
    x, size, metric = stream(6, 4, 3)
    w = torch.zeros(2, 4, 3)
    for name, arguments, said in (
        ("expert_mlp", (x, x[:, :5, :2] > 0, w, w[:, 0], w.mT, w[0, :, 0], "relu"), "run has the"),
        ("bipartite_merge", (x, size[:, :5], metric, 5, 1, True), r"size has the shape \[1, 5\]"),
        ("bipartite_merge", (x, size, metric[:, :, :5], 5, 1, True), "metric has the shape"),
        ("bipartite_merge", (x, size, metric, 7, 1, True), "are possible"),
        ("bipartite_merge", (x, size, metric, 5, -1, True), "protected is -1 and from 0 to 6 is"),
        ("keep_tokens", (x, size, 5, -1, True), "protected is -1"),
        ("prune_merge", (x, size, size, 5, 4, -1), "protected is -1"),
        ("prune_merge", (x, size, size[:, :5], 5, 4, 1), "score has the shape"),
        ("select_diverse", (x, size, 5, -1), "protected is -1"),
        ("split_merge", (x, size, metric, size, 3, 1), "are possible"),
        ("split_merge", (x, size, metric[:, :, :5], size, 5, 1), "metric has the shape"),
        ("redundant_merge", (x, size, metric, size[:, :5], 5, 1), "score has the shape"),
        ("redundant_merge", (x, size, metric, size, 5, -1), "protected is -1"),
        ("token_energy", (metric, size, 0.5, 7), "a prefix of 7 is none of 6 tokens"),
        ("token_energy", (metric, size[:, :5], 0.5, 1), "size has the shape"),
        ("select_diverse", (x, size[:, :5], 5, 1), "size has the shape"),
        ("keep_tokens", (x, size[:, :5], 5, 1, False), "score has the shape"),
        ("class_attention", (metric, metric[:, :1], None, 1.0, 0), "k has the shape"),
        ("gather_tokens", (x, torch.zeros(2, 3, dtype=torch.int64)), "x has the shape"),
        ("restore_tokens", (x, torch.zeros(1, 3, dtype=torch.int64), x), "slot has the shape"),
    ):
        with pytest.raises(ValueError, match=said):
            kernel(name, *arguments)


def test_what_runs_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels, and the reference for double, when switched off, and where there is no Triton."""
    x, size, metric = (t.to(device()) for t in stream(8, 4, 3))
    asked: list[str] = []
    known = dispatch.kernels

    def noted(name: str) -> Any:
        asked.append(name)
        return known(name)

    monkeypatch.setattr(dispatch, "kernels", noted)
    run = dispatch.on_gpu(merging.bipartite_merge)
    assert_close(
        run(x, size, metric, 6, 1, True), merging.bipartite_merge(x, size, metric, 6, 1, True)
    )
    assert asked == []  # the tests switch kernels off
    monkeypatch.delenv("THRESHER_KERNELS")
    assert_close(
        run(x, size, metric, 6, 1, True), merging.bipartite_merge(x, size, metric, 6, 1, True)
    )
    assert asked == ["bipartite_merge"]
    assert run(x.double(), size, metric.double(), 6, 1, True)[0].dtype == torch.float64
    monkeypatch.setattr(dispatch, "kernels", lambda name: None)
    assert run(x, size, metric, 6, 1, True)[0].shape == (1, 6, 4)


@pytest.mark.parametrize("tokens", [1, 3])
def test_skipping_over_many_blocks(tokens: int) -> None:
    """Splits that are not full, columns and neurons beyond a block, and strides that are followed."""
    torch.manual_seed(tokens)
    x, weight = torch.randn(2 * tokens, 333)[::2], torch.randn(75, 333).t() / 18
    threshold = torch.rand(666)
    for rows in (x, x[0]):
        (y,) = kernel("sparse_linear", rows, weight, threshold[:333], 8)
        expected = ops.sparse_linear(rows.double(), weight.double(), threshold[:333], 8)
        assert_close(y.double(), expected, rtol=0, atol=2e-6)
    gate, up, down = (torch.randn(n) / n[0] ** 0.5 for n in ((333, 131), (131, 333), (131, 40)))
    x, up = x.t().contiguous().t(), up * 131**0.5 / 333**0.5
    (y,) = kernel("sparse_gated_ffn", x, gate, up, down, threshold[:131], "silu", 8)
    wide = [one.double() for one in (x, gate, up, down)]
    expected = ops.sparse_gated_ffn(*wide, threshold[:131], "silu", 8)
    assert_close(y.double(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("tokens", [1, 8, 9])
def test_weights_in_bfloat16_beside_float32(tokens: int) -> None:
    torch.manual_seed(0)
    x, weight, threshold = torch.randn(tokens, 50), torch.randn(50, 37).bfloat16(), torch.rand(50)
    (y,) = kernel("sparse_linear", x, weight, threshold, 8)
    expected = ops.sparse_linear(x.double(), weight.double(), threshold, 8)
    assert_close(y.double(), expected, rtol=0, atol=1e-5)


def test_without_triton_there_are_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    assert dispatch.kernels.__wrapped__("gather_tokens") is None


def test_operators_have_a_kernel_for_cuda_tensors_where_they_say_so() -> None:
    from thresher.kernels.registry import OPERATORS

    for operator in OPERATORS.values():
        name = f"thresher::{operator.torch_name}"
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")
        module = f"thresher.kernels.{operator.torch_name}.gpu"
        assert (importlib.util.find_spec(module) is not None) == operator.triton
        assert (dispatch.kernels(operator.torch_name) is not None) == operator.triton


def test_importing_the_operators_imports_no_triton() -> None:
    code = (
        "import sys, torch; before = 'triton' in sys.modules; import thresher.kernels.ops;"
        "print(before, 'triton' in sys.modules, 'thresher.kernels.gpu.rows' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False", "False"]
