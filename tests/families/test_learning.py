"""Counts are learned on every family, at a fixed input length."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from tests.families.traced import cast, program
from tests.families.zoo import BY_NAME, REDUCIBLE
from thresher.compiler.analysis.cost import cost_model
from thresher.compiler.analysis.finder import find_sites
from thresher.compiler.contract import Context
from thresher.models.data import Dataset
from thresher.passes.tokens.learning.job import Job, LearningOptions
from thresher.passes.tokens.learning.masked import MaskedForward
from thresher.passes.tokens.learning.train import learn

ITEMS, TARGET = 8, 0.85
# Every day: padding, registers, no prefix, and tokens that are read out by a softmax over them.
SHARP = (
    "hf:bert",
    "timm:vit_small_patch14_reg4_dinov2",
    "timm:vit_base_patch16_siglip_224",
    "compact:cct",
)
CASES = [
    pytest.param(entry.name, marks=() if entry.name in SHARP else pytest.mark.slow)
    for entry in REDUCIBLE
]


@pytest.mark.parametrize("name", CASES)
def test_a_family_learns_counts_that_cost_what_was_asked(name: str) -> None:
    dense = program(name, torch.float32, fixed=True)
    sites = find_sites(dense)
    inputs = cast(BY_NAME[name].build()[1](ITEMS), torch.float32)
    arrays = {key: value.numpy() for key, value in inputs.items()}
    found = MaskedForward(dense, sites).outputs(inputs, {})
    for key, value in dense.run(inputs).items():
        assert torch.allclose(found[key], value, rtol=0, atol=1e-4 * float(value.abs().max()))

    data = Dataset("noise", ITEMS, None, lambda chosen: {k: v[chosen] for k, v in arrays.items()})
    options = LearningOptions(steps=3, granularity=1)
    cost = cost_model(dense.graph, sites)
    job = Job(dense, sites, cost, TARGET, options, Context(data=data, batch=4))
    learned = learn(job)
    assert learned.share <= TARGET
    assert learned.share > TARGET - 0.1  # tokens are few: one of them is several per cent
    assert all(a >= b for a, b in pairwise(learned.counts))
    assert all(np.isfinite(row[0]) for row in learned.history)
