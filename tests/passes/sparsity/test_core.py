"""Core neurons: what is picked, by the definitions in float64, and what runs on it, by transformers."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.cli.conftest import Cli
from tests.models.folders import GROUPED, LANGUAGE, build, save, word_tokenizer
from tests.passes.sparsity.toys import toy
from thresher.compiler import pipeline
from thresher.compiler.errors import RefusedError, UsageError
from thresher.compiler.program import Program
from thresher.compiler.recipe import parse_recipe
from thresher.models.sources import load_source
from thresher.passes.sparsity.core_sets import STATISTICS, chosen
from thresher.runtime.perplexity import Windows, compare_perplexity
from thresher.runtime.runner import ProgramRunner
from thresher.runtime.two_graphs import TwoGraphs

pytest.importorskip("transformers")
KINDS = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED, "mlp.down_proj"),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {**LANGUAGE, "n_inner": 48}, "mlp.c_proj"),
}
PROMPT, LENGTH, KEPT = 9, 20, 16
IDS = np.random.default_rng(3).integers(5, 120, (3, LENGTH))


def model(kind: str) -> Any:
    cls, config, settings, _ = KINDS[kind]
    return build(cls, config, **settings)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    for kind, place in found.items():
        save(model(kind), place)
        word_tokenizer(place)
        (place / "text.txt").write_text(" ".join(f"w{number}" for number in IDS.flatten()))
    return found


@cache
def loaded(place: Path) -> Program:
    return load_source(f"hf:{place}")


def made(place: Path, **options: Any) -> Program:
    settings = ", ".join(f"{k}: {v}" for k, v in {"keep": 1 / 3, **options}.items())
    return pipeline.run(
        loaded(place), parse_recipe(f"passes: [{{core-neurons: {{{settings}}}}}]", "t")
    )


def definition(hidden: np.ndarray[Any, Any], statistic: str, share: float) -> list[int]:
    """The KEPT neurons of ``[N, H]`` float64 in loops, as the papers have them."""
    width = hidden.shape[1]
    scores = []
    for j in range(width):
        if statistic == "griffin":
            scores.append(
                math.sqrt(sum((row[j] / math.sqrt((row**2).sum())) ** 2 for row in hidden))
            )
        else:
            count = 0
            for row in np.abs(hidden):
                positive = sorted(row[row > 0], reverse=True)
                count += row[j] >= positive[max(1, math.ceil(share * len(positive))) - 1]
            scores.append(float(count))
    return sorted(sorted(range(width), key=lambda j: -scores[j])[:KEPT])


def expected(kind: str, statistic: str, share: float) -> float:
    """Mean loss behind the prompt with the other neurons at zero there, by transformers in float64."""
    language = model(kind).double()
    read: dict[str, np.ndarray[Any, Any]] = {}
    sets: dict[str, list[int]] | None = None

    def hook(name: str) -> Any:
        def see(_: Any, given: tuple[Tensor]) -> tuple[Tensor]:
            (hidden,) = given
            if sets is None:
                read[name] = hidden[0].numpy()
                return (hidden,)
            masked = torch.zeros_like(hidden)
            masked[..., sets[name]] = hidden[..., sets[name]]
            return (torch.cat([hidden[:, :PROMPT], masked[:, PROMPT:]], 1),)

        return see

    for name, module in language.named_modules():
        if name.endswith(KINDS[kind][3]):
            module.register_forward_pre_hook(hook(name))
    losses = []
    for ids in torch.from_numpy(IDS):
        sets = None
        with torch.no_grad():
            language(input_ids=ids[None, :PROMPT])
            sets = {name: definition(h, statistic, share) for name, h in read.items()}
            logits = language(input_ids=ids[None]).logits[0]
        losses.append(
            float(torch.nn.functional.cross_entropy(logits[PROMPT - 1 : -1], ids[PROMPT:]))
        )
    return float(np.mean(losses))


@pytest.mark.parametrize(
    ("kind", "statistic"), [("llama", "griffin"), ("llama", "coreinfer"), ("gpt2", "griffin")]
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
def test_engines_do_the_same_from_the_command_line(
    cli: Cli, folders: dict[str, Path], tmp_path: Path
) -> None:
    source = f"hf:{folders['llama']}"
    recipe = ("--recipe", "core-neurons", "--set", "keep=0.3333")
    for graph in ("prompt", "steps"):
        asked = (*recipe, "--set", f"graph={graph}", "-o", tmp_path / graph)
        done = cli("optimize", source, *asked)
        assert done.code == 0, done.err
        done = cli("export", tmp_path / graph, "-o", tmp_path / f"{graph}.engine")
        assert done.code == 0, done.err
    engines = (tmp_path / "prompt.engine", "--steps", tmp_path / "steps.engine")
    text = ("--data", folders["llama"] / "text.txt", "--size", f"sequence={LENGTH}")
    judged = ("verify", source, *engines, *text, "--step", "1")
    done = cli(*judged, "--prompt-tokens", str(PROMPT), "--json")
    assert done.code == 0, done.err
    quality = done.json["perplexity"]
    assert math.log(quality["perplexity_b"]) == pytest.approx(
        expected("llama", "griffin", 0.4), abs=1e-4
    )
    assert (quality["prompt"], quality["windows"]) == (PROMPT, 3)
    written = cli("run", *engines, "--prompt", "w11 w7 w30", "--tokens", "4", "--json")
    assert written.code == 0, written.err
    assert len(written.json["tokens"]) == 4
    for wrong, said in (
        (judged, "give --data TEXT and --prompt-tokens N"),
        ((*judged, "--prompt-tokens", "20"), "leaves nothing of a window of 20 tokens"),
        (("run", *engines), "--steps goes with --prompt"),
    ):
        failed = cli(*wrong)
        assert (failed.code, said in failed.err) == (2, True), failed.err
