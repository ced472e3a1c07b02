"""The verbs on a tiny causal language model: generation, perplexity, costs, and mistakes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.cli.conftest import Cli, Made
from tests.models.folders import LANGUAGE, build, save, word_tokenizer
from thresher.cli.main import main
from thresher.runtime import Engine
from thresher.runtime.perplexity import Windows, logits

pytest.importorskip("transformers")
PROMPT = "w11 w7 w30 w5"
Failed = Callable[..., str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 of one layer and 40 positions with a tokenizer, and engines of it."""
    place = tmp_path_factory.mktemp("gpt2")
    small = {**LANGUAGE, "num_hidden_layers": 1, "max_position_embeddings": 160}
    save(build("GPT2LMHeadModel", "GPT2Config", **small), place)
    word_tokenizer(place)
    settings = json.loads((place / "generation_config.json").read_text())
    (place / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": []}))
    for target in ("cpu", "openvino"):
        engine = str(place / f"{target}.engine")
        assert main(["export", f"hf:{place}", "--target", target, "-o", engine]) == 0
    words = np.random.default_rng(0).integers(5, 120, 700)
    (place / "text.txt").write_text(" ".join(f"w{number}" for number in words))
    return place


def test_a_prompt_is_continued_alike_on_both_back_ends(cli: Cli, folder: Path) -> None:
    given = ("--prompt", PROMPT, "--tokens", "8")
    told = [cli("run", folder / f"{name}.engine", *given, "--json") for name in ("cpu", "openvino")]
    for done in told:
        assert (done.code, done.err) == (0, "")
        assert done.json["schema"] == "thresher.generate/1"
        assert (done.json["prompt_tokens"], done.json["stopped"]) == (4, "tokens")
        assert len(done.json["tokens"]) == 8
        assert done.json["prefill_rate"] > 0
        assert done.json["decode_rate"] > 0
    assert told[0].json["tokens"] == told[1].json["tokens"]
    plain = cli("run", folder / "cpu.engine", *given)
    assert plain.code == 0
    assert plain.out == told[0].json["text"] + "\n"
    assert plain.out.split() == [f"w{token}" for token in told[0].json["tokens"]]
    assert plain.err.startswith("4 tokens read at ")
    assert "8 tokens made (as many as were asked for) at " in plain.err


@pytest.mark.slow
def test_verify_compares_perplexity_on_a_text(cli: Cli, folder: Path) -> None:
    both = (folder / "cpu.engine", folder / "openvino.engine", "--data", folder / "text.txt")
    done = cli(
        "verify", *both, "--size", "sequence=50", "--limit", "6", "--max-drop", "1", "--json"
    )
    assert (done.code, done.err) == (0, "")
    quality = done.json["perplexity"]
    assert (quality["windows"], quality["length"], quality["kept"]) == (6, 50, True)
    assert quality["perplexity_a"] == pytest.approx(independent(folder), rel=1e-5)
    assert abs(quality["rise"]) < 0.01
    missed = cli("verify", *both, "--size", "sequence=50", "--max-drop", "-1")
    assert missed.code == 1
    assert "on 14 windows of 50 tokens" in missed.out


def independent(folder: Path) -> float:
    """Perplexity of the first six windows of 50, in float64 and one token at a time."""
    ids = [int(word[1:]) for word in (folder / "text.txt").read_text().split()]
    losses = []
    with Engine.load(folder / "cpu.engine", threads=1) as engine:
        for window in Windows("text", np.array(ids[:300]).reshape(6, 50)).ids:
            for row, token in zip(logits(engine, window)[:-1], window[1:], strict=True):
                shares = np.exp(row.astype(np.float64))
                losses.append(-np.log(shares[token] / shares.sum()))
    return float(np.exp(np.mean(losses)))


def test_inspect_counts_one_step_unless_told_otherwise(cli: Cli, folder: Path) -> None:
    """Of one layer of width 32: q, k, v and output 4 w^2, MLP 8 w^2, logits 120 w, keys and values.

    The model knows 160 positions, so a step stands behind 159 and not 256 tokens.
    """
    source, width = f"hf:{folder}", 32
    done = cli("inspect", source, "--json")
    assert (done.code, done.err) == (0, "")
    assert done.json["sizes"] == {"past": 159, "sequence": 1}
    assert done.json["macs"] == 12 * width**2 + 120 * width + 2 * 160 * width
    assert done.json["parameters"] == 12 * width**2 + 13 * width + (120 + 160 + 2) * width
    done = cli("inspect", source, "--size", "past=0", "--size", "sequence=10", "--json")
    assert done.json["macs"] == 10 * (12 * width**2 + 120 * width + 2 * 10 * width)


def test_int8_is_calibrated_on_a_text(cli: Cli, folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join([(folder / "text.txt").read_text()] * 4))
    given = ("--precision", "int8", "--data", text, "-o", tmp_path / "e")
    done = cli("export", f"hf:{folder}", *given, "--json")
    assert done.code == 0, done.err
    assert done.json["calibration"]["samples"] == 2800 // 160
    assert done.json["verified"]["inputs"] == str(text)
    assert done.json["estimate"]["activations"] > 0


def test_profile_times_one_step(cli: Cli, folder: Path) -> None:
    quick = ("--rounds", "6", "--threads", "1")
    sizes = ("--size", "past=20", "--size", "sequence=2")
    for more in ((), sizes):
        done = cli("profile", folder / "cpu.engine", *quick, *more, "--json")
        assert done.code == 0, done.err


def test_methods_for_tokens_are_refused(cli: Cli, folder: Path, tmp_path: Path) -> None:
    done = cli("optimize", f"hf:{folder}", "-o", tmp_path / "a")
    assert done.code == 3
    assert "the cache of a decoder" in done.err
    assert not (tmp_path / "a").exists()


def test_mistakes_are_one_sentence(
    failed: Failed, folder: Path, made: Made, tmp_path: Path
) -> None:
    engine = folder / "cpu.engine"
    said = failed(2, "run", engine, "--prompt", " ".join(["w5"] * 161))
    assert "161 tokens and the model knows 160 positions" in said
    assert "no tokens" in failed(2, "run", engine, "--prompt", "")
    assert "continues no text" in failed(2, "run", made.engine, "--prompt", "hello")
    assert "--prompt TEXT" in failed(2, "run", engine, "--text", "hello")
    assert "leave them out" in failed(2, "run", engine, "--prompt", "w5", "--text", "w6")
    text = ("--data", folder / "text.txt")
    said = failed(2, "verify", engine, engine, *text, "--size", "sequence=161")
    assert "2 to 160 tokens" in said
    assert "no text file" in failed(2, "verify", engine, engine, "--data", tmp_path / "none.txt")
    assert "takes no option 'length'" in failed(2, "inspect", f"hf:{folder}", "--length", "5")


def test_a_folder_without_a_tokenizer_is_told(failed: Failed, cli: Cli, tmp_path: Path) -> None:
    small = {**LANGUAGE, "num_hidden_layers": 1}
    save(build("GPT2LMHeadModel", "GPT2Config", **small), tmp_path)
    engine = tmp_path / "e.engine"
    assert cli("export", f"hf:{tmp_path}", "-o", engine).code == 0
    assert "has no tokenizer" in failed(2, "run", engine, "--prompt", "w5")
