"""Padding counts for nothing in any module, on BERT."""

from __future__ import annotations

import pytest
import torch

from tests.families.traced import program as family
from tests.families.zoo import BY_NAME
from tests.passes.modules.cases import arbitrary
from tests.passes.modules.test_mixers import each, method
from thresher.compiler.contract import Context
from thresher.compiler.ledger import token_maps
from thresher.passes.tokens.modules.embedding import Dtem, Grouping
from thresher.passes.tokens.modules.job import Job
from thresher.passes.tokens.modules.method import ModuleOptions, places
from thresher.passes.tokens.modules.prediction import DynamicVit

pytestmark = pytest.mark.slow


@each
def test_padding_weighs_nothing(name: str) -> None:
    entry, dense = BY_NAME["hf:bert"], family("hf:bert", torch.float32, fixed=True)
    made = method(name, keep=0.5, layers=(0,))
    result, _ = made.reduced(dense, made.plan(dense), arbitrary(made, dense))
    given = entry.build()[1](3)
    other = dict(given)
    other["input_ids"] = torch.where(given["attention_mask"].bool(), given["input_ids"], 7)
    assert not torch.equal(given["input_ids"], other["input_ids"])
    a, b = (result.program.run(inputs) for inputs in (given, other))
    real = given["attention_mask"].bool()
    (states, *_) = (key for key in a if a[key].shape[:2] == real.shape)
    torch.testing.assert_close(a[states][real], b[states][real], rtol=0, atol=1e-6)
    (seen,) = token_maps(result.program, given)
    assert bool(real.gather(1, torch.from_numpy(seen.kept)).all())  # no mean stands for padding


def test_padding_goes_first_and_never_matters() -> None:
    entry, dense = BY_NAME["hf:bert"], family("hf:bert", torch.float32, fixed=True)
    made = DynamicVit(ModuleOptions(keep=0.5, layers=(0,)))
    result, _ = made.reduced(dense, made.plan(dense), arbitrary(made, dense))
    given = entry.build()[1](3)
    real = given["attention_mask"].bool()
    other = given | {"input_ids": torch.where(real, given["input_ids"], 7)}
    maps = [token_maps(result.program, inputs)[0].kept for inputs in (given, other)]
    for item, (a, b) in enumerate(zip(*maps, strict=True)):
        chosen = real[item][torch.from_numpy(a)]
        assert int(chosen.sum()) == min(len(a), int(real[item].sum()))
        assert a[chosen.numpy()].tolist() == b[chosen.numpy()].tolist()


def test_hard_groups_take_padding_as_the_step_does() -> None:
    entry, dense = BY_NAME["hf:bert"], family("hf:bert", torch.float32, fixed=True)
    made = Dtem(ModuleOptions(r=3))
    plan = made.plan(dense)
    weights = arbitrary(made, dense)
    job = Job("dtem", dense, plan, made.module, places(plan), made.options, Context())
    result, _ = made.reduced(dense, plan, weights)
    inputs = entry.build()[1](3)
    assert not inputs["attention_mask"].bool().all()
    found, _ = Grouping(job, 0.3, 1e-4).trained(inputs, weights, torch.Generator())
    wanted = result.program.run(inputs)
    (states,) = (key for key, value in wanted.items() if value.dim() == 3)
    torch.testing.assert_close(found[states][:, 0], wanted[states][:, 0], rtol=0, atol=1e-4)
