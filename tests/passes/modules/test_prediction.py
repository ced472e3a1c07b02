"""DynamicViT: the tokens that stay are those of the highest chance; in training the others are masked."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.compiler.toys import TOKENS, WIDTH, Toy
from tests.passes.modules.cases import arbitrary, context, doubles, toy
from tests.passes.modules.oracle import between, chances
from thresher.compiler.contract import Context
from thresher.passes.tokens.modules.job import Job
from thresher.passes.tokens.modules.method import ModuleOptions, places
from thresher.passes.tokens.modules.prediction import Deciding, DynamicVit


def method(**options: Any) -> DynamicVit:
    return DynamicVit(ModuleOptions(**options))


@pytest.mark.parametrize("pool", ["class", "mean"])
def test_the_graph_keeps_the_best_by_the_formula(pool: str) -> None:
    model, program = toy(pool)
    made = method(keep=0.6, layers=(0, 1))
    weights = arbitrary(made, program)
    result, _ = made.reduced(program, made.plan(program), weights)
    prefix = int(pool == "class")
    counts = [6, 4]
    assert result.details["tokens"] == [9 + prefix, *(n + prefix for n in counts)]

    def change(layer: int, tokens: Tensor) -> Tensor:
        if layer not in weights:
            return tokens
        left = []
        for item in tokens:
            score = chances(item[prefix:].numpy(), doubles(weights[layer]))
            best = sorted(sorted(range(len(score)), key=lambda n: -score[n])[: counts[layer]])
            left.append(item[[*range(prefix), *(prefix + n for n in best)]])
        return torch.stack(left)

    for batch in (1, 3):
        x = torch.randn(batch, TOKENS, WIDTH, dtype=torch.float64)
        (found,) = result.program.run({"x": x}).values()
        torch.testing.assert_close(found, between(model, x, change), rtol=0, atol=1e-9)


def _deciding(pool: str) -> tuple[Toy, Job, Deciding]:
    model, program = toy(pool, dtype=torch.float32)
    made = method(keep=0.6, layers=(0, 1))
    plan = made.plan(program)
    job = Job("dynamic-vit", program, plan, made.module, places(plan), made.options, Context())
    return model, job, Deciding(job)


@pytest.mark.parametrize("pool", ["class", "mean"])
def test_masked_tokens_are_as_good_as_gone(pool: str) -> None:
    model, job, student = _deciding(pool)
    generator = torch.Generator().manual_seed(3)
    initial = {p.layer: job.module.initial(p, (), generator) for p in job.places}
    weights = {  # so sure that no noise turns a decision
        layer: module | {"last": 1e5 * module["last"], "last_bias": torch.zeros(2)}
        for layer, module in initial.items()
    }
    prefix, shares = int(pool == "class"), []
    for seed in range(3):
        x = torch.randn(1, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))
        kept: list[int] = []

        def change(layer: int, tokens: Tensor, kept: list[int] = kept) -> Tensor:
            if layer not in weights:
                return tokens
            score = chances(tokens[0, prefix:].double().numpy(), doubles(weights[layer]))
            stays = [prefix + n for n in range(len(score)) if score[n] > np.log(0.5)]
            stays = stays or [prefix + int(score.argmax())]
            kept.append(len(stays))
            return tokens[:, [*range(prefix), *stays]]

        wanted = between(model, x, change)
        outputs, penalty = student.trained({"x": x}, weights, torch.Generator())
        (found,) = outputs.values()
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
        errors = [(n / 9 - m / 9) ** 2 for n, m in zip(kept, (6, 4), strict=True)]
        assert float(penalty) == pytest.approx(2 * np.mean(errors), abs=1e-6)
        shares.append(kept)
    assert len({tuple(each) for each in shares}) > 1  # in training the number depends on the image


def test_training_moves_every_tensor_and_kept_modules_serve_other_counts(tmp_path: Any) -> None:
    _, program = toy(dtype=torch.float32)
    result = method(keep=0.6, layers=(0, 1), steps=5)(program, context())
    assert result.applied == 2
    assert result.calibration is not None
    untrained = method(keep=0.6, layers=(0, 1), steps=0)(program, context()).calibration
    assert untrained is not None
    for name, tensor in result.calibration.tensors.items():
        assert not torch.equal(tensor, untrained.tensors[name]), name
    result.calibration.write(tmp_path)
    kept = tmp_path / result.calibration.file
    fewer = method(keep=0.4, layers=(0, 1), calibration=kept)(program, Context())
    assert fewer.details["tokens"] == [10, 5, 3]
