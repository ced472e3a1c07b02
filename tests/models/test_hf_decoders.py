"""Causal language models: one graph reads prompts and makes steps, as transformers does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.models.folders import GROUPED, LANGUAGE, build, save
from thresher.compiler.contract import Context
from thresher.compiler.errors import RefusedError, UsageError
from thresher.compiler.program import Program, module_path
from thresher.models.sources import load_source
from thresher.passes.tokens.diffrate import DiffRate, DiffRateOptions
from thresher.passes.tokens.methods import Evit, EvitOptions, Tome, TomeOptions, TopkNorm
from thresher.passes.tokens.options import TokenOptions
from thresher.runtime.feeds import Array
from thresher.runtime.generate import Session, greedy
from thresher.runtime.runner import ProgramRunner

pytest.importorskip("transformers")
STEPS, PAD = 6, 3
QWEN3 = {**GROUPED, "head_dim": 8}


@dataclass(frozen=True)
class Made:
    """A model of transformers and the Program of its folder."""

    model: Any
    program: Program

    @property
    def runner(self) -> ProgramRunner:
        return ProgramRunner(self.program, threads=1)


def made(cls: str, config: str, folder: Path, **settings: Any) -> Made:
    model = build(cls, config, **settings)
    program = load_source(save(model, folder))
    model.set_attn_implementation("eager")
    return Made(model, program)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Rotary positions with shared heads, and learned positions with tied weights."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "llama":
        return made("LlamaForCausalLM", "LlamaConfig", folder, **GROUPED)
    return made("GPT2LMHeadModel", "GPT2Config", folder, **LANGUAGE)


def prompts() -> tuple[Array, Array]:
    """Two prompts ``[2, 9]``, the second shorter and padded on the left, and which tokens are real."""
    ids = np.random.default_rng(0).integers(5, 100, (2, 9))
    real = np.ones_like(ids)
    real[1, :PAD] = 0
    return ids * real, real


def follows_transformers(case: Made) -> None:
    """Token for token what ``generate`` of transformers gives, with its own masks and cache."""
    ids, real = prompts()
    case.model.generation_config.eos_token_id = None
    with torch.no_grad():
        wanted = case.model.generate(
            torch.from_numpy(ids),
            attention_mask=torch.from_numpy(real),
            max_new_tokens=STEPS,
            do_sample=False,
        )
    found = np.stack(list(islice(greedy(case.runner, ids, real), STEPS)), axis=1)
    np.testing.assert_array_equal(found, wanted[:, ids.shape[1] :])
    assert len(np.unique(found)) > 2


def test_tokens_are_those_of_transformers(case: Made) -> None:
    follows_transformers(case)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cls", "config", "settings"),
    [
        ("Qwen2ForCausalLM", "Qwen2Config", GROUPED),
        ("Qwen3ForCausalLM", "Qwen3Config", QWEN3),
        ("MistralForCausalLM", "MistralConfig", {**GROUPED, "sliding_window": None}),
    ],
)
def test_their_relatives(cls: str, config: str, settings: dict[str, Any], tmp_path: Path) -> None:
    follows_transformers(made(cls, config, tmp_path, **settings))


def test_the_usual_layout_survives_saving(case: Made, tmp_path: Path) -> None:
    case.program.save(tmp_path / "saved")
    for program in (case.program, Program.load(tmp_path / "saved")):
        shapes = {spec.name: spec.shape for spec in (*program.inputs, *program.outputs)}
        heads = case.model.config.to_dict().get("num_key_value_heads", 4)
        assert [spec.name for spec in program.inputs][:3] == [
            "input_ids",
            "attention_mask",
            "position_ids",
        ]
        assert shapes["input_ids"] == shapes["position_ids"] == ("batch", "sequence")
        assert shapes["attention_mask"] == ("batch", "past + sequence")
        assert shapes["logits"] == ("batch", "sequence", 120)
        for layer in range(2):
            for part in ("key", "value"):
                past = shapes.pop(f"past_key_values.{layer}.{part}")
                present = shapes.pop(f"present.{layer}.{part}")
                assert past == ("batch", heads, "past", 8)
                assert present == ("batch", heads, "past + sequence", 8)
        assert len(shapes) == 4


def test_logits_with_a_past_are_those_of_transformers(case: Made) -> None:
    ids, real = prompts()
    with torch.no_grad():
        wanted = case.model(torch.from_numpy(ids[:1])).logits.numpy()
    session = Session(case.runner, 1)
    found = [session.feed(ids[:1, part], real[:1, part]) for part in pieces(4, 5, 9)]
    np.testing.assert_allclose(np.concatenate(found, axis=1), wanted, atol=2e-5, rtol=1e-4)


def pieces(*ends: int) -> Iterator[slice]:
    start = 0
    for end in ends:
        yield slice(start, end)
        start = end


def test_a_prompt_in_two_parts_is_a_prompt_in_one(case: Made) -> None:
    """Real tokens only: what stands at padding is nobody's business, but it is finite."""
    ids, real = prompts()
    whole, halves = Session(case.runner, 2), Session(case.runner, 2)
    at_once = whole.feed(ids, real)
    parts = [halves.feed(ids[:, part], real[:, part]) for part in pieces(4, 9)]
    apart = np.concatenate(parts, axis=1)
    assert np.isfinite(at_once).all()
    np.testing.assert_allclose(apart[real > 0], at_once[real > 0], atol=2e-5, rtol=1e-4)
    for name, value in whole.past.items():
        rows = value.transpose(0, 2, 1, 3)[real > 0]
        others = halves.past[name].transpose(0, 2, 1, 3)[real > 0]
        np.testing.assert_allclose(others, rows, atol=2e-5, rtol=1e-4)


def test_padding_changes_nothing(case: Made) -> None:
    ids, real = prompts()
    together = Session(case.runner, 2).feed(ids, real)
    alone = Session(case.runner, 1).feed(ids[1:, PAD:], real[1:, PAD:])
    np.testing.assert_allclose(together[1:, PAD:], alone, atol=2e-5, rtol=1e-4)


def test_layers_of_the_feed_forward_net_are_plain_linears(case: Made) -> None:
    linears = [n for n in case.program.graph.nodes if n.target is torch.ops.aten.linear.default]
    paths = [module_path(node).rpartition(".")[2] for node in linears]
    gated = ("gate_proj", "up_proj", "down_proj") if "gate_proj" in paths else ("c_fc", "c_proj")
    for name in gated:
        assert paths.count(name) == (4 if name == "c_proj" else 2)  # GPT-2's attention has one too
    assert not any("addmm" in str(node.target) for node in case.program.graph.nodes)


@pytest.mark.parametrize(
    "method",
    [
        Tome(TomeOptions(r=1)),
        Evit(EvitOptions(keep=0.5)),
        DiffRate(DiffRateOptions(r=1)),
        TopkNorm(TokenOptions(keep=0.5)),
    ],
    ids=lambda method: type(method).__name__,
)
def test_tokens_of_a_decoder_are_not_reduced(case: Made, method: Any) -> None:
    result = method(case.program, Context())
    assert result.program is case.program
    assert (result.applied, len(result.refused)) == (0, 1)
    assert "the cache of a decoder" in result.refused[0].reason
    assert "scaled_dot_product_attention" in result.refused[0].node


def test_a_mask_of_another_length_is_refused(case: Made) -> None:
    session = Session(case.runner, 1)
    session.feed(np.array([[5, 6]]), np.ones((1, 2), np.int64))
    session._real = session._real[:, 1:]
    with pytest.raises(UsageError, match=r"\(past \+ sequence\) is 2 and must be 3"):
        session.feed(np.array([[7]]), np.ones((1, 1), np.int64))


@pytest.mark.parametrize(
    ("cls", "config", "settings", "said"),
    [
        ("MistralForCausalLM", "MistralConfig", {**GROUPED, "sliding_window": 8}, "sliding window"),
        (
            "GPT2LMHeadModel",
            "GPT2Config",
            {**LANGUAGE, "add_cross_attention": True},
            "attends to an encoder",
        ),
    ],
)
def test_what_the_cache_cannot_hold_is_refused(
    cls: str, config: str, settings: dict[str, Any], said: str, tmp_path: Path
) -> None:
    source = save(build(cls, config, **settings), tmp_path)
    with pytest.raises(RefusedError, match=said):
        load_source(source)
