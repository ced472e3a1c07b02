"""Core neurons: what is picked, by the definitions in float64, and what runs on it, by transformers."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.models.folders import GROUPED, build, save
from tests.passes.sparsity.core_oracle import (
    IDS,
    KEPT,
    KINDS,
    PROMPT,
    definition,
    expected,
    written,
)
from tests.passes.sparsity.toys import toy
from thresher.compiler import pipeline
from thresher.compiler.errors import RefusedError, UsageError
from thresher.compiler.program import Program
from thresher.compiler.recipe import parse_recipe
from thresher.models.sources import load_source
from thresher.passes.sparsity.core_sets import STATISTICS, chosen
from thresher.runtime.deviation import Deviations, tolerance
from thresher.runtime.exporting import export
from thresher.runtime.feeds import Array
from thresher.runtime.generate import with_own_past
from thresher.runtime.perplexity import Windows, compare_perplexity
from thresher.runtime.runner import ProgramRunner
from thresher.runtime.sample import random_inputs
from thresher.runtime.two_graphs import TwoGraphs

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: written(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}


@cache
def loaded(place: Path) -> Program:
    return load_source(f"hf:{place}")


def made(place: Path, **options: Any) -> Program:
    settings = ", ".join(f"{k}: {v}" for k, v in {"keep": 1 / 3, **options}.items())
    return pipeline.run(
        loaded(place), parse_recipe(f"passes: [{{core-neurons: {{{settings}}}}}]", "t")
    )


@pytest.mark.parametrize(
    ("kind", "statistic"),
    [
        ("llama", "griffin"),
        pytest.param("llama", "coreinfer", marks=pytest.mark.slow),
        pytest.param("gpt2", "griffin", marks=pytest.mark.slow),
    ],
)
def test_what_follows_a_prompt_runs_on_its_neurons(
    folders: dict[str, Path], kind: str, statistic: str
) -> None:
    place, dense = folders[kind], ProgramRunner(loaded(folders[kind]))
    both = [
        ProgramRunner(made(place, graph=graph, statistic=statistic))
        for graph in ("prompt", "steps")
    ]
    for step in (None, 1):
        windows = Windows("text", IDS, step, PROMPT)
        found = compare_perplexity(dense, TwoGraphs(*both), windows)
        want = expected(kind, statistic, 0.4)
        assert math.log(found.perplexity_b) == pytest.approx(want, abs=1e-4)
        assert abs(found.rise) > 0.1
        assert f"judged behind a prompt of {PROMPT}" in found.sentence("a", "b")
    whole = TwoGraphs(*(ProgramRunner(made(place, graph=g, keep=1)) for g in ("prompt", "steps")))
    assert abs(compare_perplexity(dense, whole, Windows("text", IDS, 1, PROMPT)).rise) < 1e-3


@pytest.mark.parametrize("statistic", list(STATISTICS))
def test_padding_picks_nothing_and_a_batch_has_one_set(statistic: str) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(2, 7, 48, dtype=torch.float64)
    real = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
    rows = hidden[real.bool()].numpy()
    scores = STATISTICS[statistic](hidden, real, 0.3)
    assert sorted(chosen(scores, KEPT).tolist()) == definition(rows, statistic, 0.3)


def test_graphs_cost_and_hold_what_they_say(folders: dict[str, Path]) -> None:
    place = folders["llama"]
    steps, prompt = made(place, graph="steps"), made(place, graph="prompt")
    assert steps.history[0].details["neurons"] == {
        f"model.model.layers.{i}.mlp.down_proj": [48, KEPT] for i in (0, 1)
    }
    assert steps.history[0].details["macs"] < steps.history[0].details["dense_macs"]
    shapes = {s.name: s.shape for s in steps.inputs if s.name.startswith("core.")}
    assert shapes == {s.name: s.shape for s in prompt.outputs if s.name.startswith("core.")}
    assert shapes["core.1.up.1"] == (32, KEPT)
    assert shapes["core.1.down"] == (KEPT, 32)
    assert not any("mlp" in n.name and n.op == "placeholder" for n in steps.graph.nodes)


def test_graphs_that_do_not_go_together(folders: dict[str, Path]) -> None:
    prompt, steps, wider, dense = (
        ProgramRunner(program, name=name)
        for name, program in (
            ("p", made(folders["llama"], graph="prompt")),
            ("s", made(folders["llama"], graph="steps")),
            ("w", made(folders["llama"], graph="steps", keep=0.9)),
            ("d", loaded(folders["llama"])),
        )
    )
    with pytest.raises(
        UsageError, match=r"p hands on float32\[32, 16\] as core\.0\.up\.0 and w takes"
    ):
        TwoGraphs(prompt, wider)
    with pytest.raises(UsageError, match="d is no graph of prompts: make it with"):
        TwoGraphs(dense, steps)
    with pytest.raises(UsageError, match="s is no graph of prompts"):
        TwoGraphs(steps, prompt)


def test_a_model_without_prompts_is_refused() -> None:
    with pytest.raises(RefusedError, match="is in no causal language model with a cache"):
        pipeline.run(toy("plain"), parse_recipe("passes: [core-neurons]", "t"))


@pytest.mark.slow
def test_neurons_that_matter_equally_may_change_places(tmp_path: Path) -> None:
    """Of 8192 neurons some lie closer together than rounding: an engine has them in another order."""
    wide = {**GROUPED, "intermediate_size": 8192, "num_hidden_layers": 1}
    language = build("LlamaForCausalLM", "LlamaConfig", **wide)
    save(language, tmp_path / "wide")
    program = made(tmp_path / "wide", graph="prompt", keep=0.5)
    engine = export(program, tmp_path / "engine")
    told = engine.manifest.verified
    assert told is not None
    assert not any(name.startswith("core.0.") for name in told["outputs"])
    core = told["outputs"]["core.0"]
    assert core["samples"] == 256
    assert 250 < core["agreeing"] <= 256


def test_other_neurons_are_no_ties(folders: dict[str, Path]) -> None:
    reference = ProgramRunner(made(folders["llama"], graph="prompt"))
    feeds = with_own_past(reference, random_inputs(reference.inputs, batch=2))
    outputs = reference.run(feeds)
    order = np.random.default_rng(0).permutation(KEPT)

    def judged(change: Callable[[str, Array], Array]) -> dict[str, bool]:
        deviations = Deviations(tolerance("fp32"))
        deviations.add(outputs, {name: change(name, value) for name, value in outputs.items()})
        return {error.name: error.same for error in deviations.results()}

    def moved(name: str, value: Array) -> Array:
        return value[order] if name.endswith("down") else value[..., order]

    assert all(judged(lambda n, v: moved(n, v) if n.startswith("core.") else v).values())
    torn = judged(lambda n, v: moved(n, v) if n == "core.1.up.0" else v)
    assert [name for name, same in torn.items() if not same] == ["core.1"]
    half = judged(
        lambda n, v: np.where(np.arange(KEPT) < KEPT // 2, v, 1) if n == "core.0.up.1" else v
    )
    assert [name for name, same in half.items() if not same] == ["core.0"]
