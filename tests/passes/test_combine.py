"""MLERP by its formula, one group at a time in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import thresher.kernels.ops  # noqa: F401
from thresher.passes.tokens.combine import mlerp

FAST = settings(max_examples=40, deadline=None, derandomize=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@FAST
@given(
    seed=st.integers(0, 2**31), batch=st.integers(1, 3), tokens=st.integers(2, 12),
    padding=st.booleans(), ties=st.booleans(),
)  # fmt: skip
def test_means_get_the_length_of_their_longest_member(
    dtype: torch.dtype, seed: int, batch: int, tokens: int, padding: bool, ties: bool
) -> None:
    rng = np.random.default_rng(seed)
    values = (
        rng.integers(-1, 2, (batch, tokens, 3)) if ties else rng.normal(size=(batch, tokens, 3))
    )
    size = rng.integers(1, 5, (batch, tokens)).astype(np.float32)
    if padding:
        size[rng.random(size.shape) < 0.3] = 0
    x, sizes = torch.from_numpy(values).to(dtype), torch.from_numpy(size)
    keep = tokens - int(rng.integers(0, tokens // 2 + 1))
    y, total, slot, kept = torch.ops.thresher.bipartite_merge(x, sizes, x[:, None], keep, 0, True)
    found = mlerp(x, sizes, y, total, slot, kept)
    assert found.dtype == dtype
    exact = x.double().numpy()
    for b in range(batch):
        for j in range(keep):
            group = [n for n in range(tokens) if slot[b, n] == j and size[b, n] > 0]
            if len(group) < 2:
                assert torch.equal(found[b, j], y[b, j])
                continue
            longest = max(float(np.linalg.norm(exact[b, n])) for n in group)
            mean = y[b, j].double().numpy()
            length = float(np.linalg.norm(mean))
            wanted = mean / length * longest if length else mean
            error = np.abs(found[b, j].double().numpy() - wanted).max()
            assert error <= 4 * torch.finfo(dtype).eps * max(longest, 1)
