"""Core neurons on the command line: two graphs made, judged behind prompts, and run."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tests.cli.conftest import Cli
from tests.passes.sparsity.core_oracle import LENGTH, PROMPT, expected, written

pytest.importorskip("transformers")


@pytest.mark.slow
def test_engines_do_what_the_definition_says(cli: Cli, tmp_path: Path) -> None:
    folder = written("llama", tmp_path / "llama")
    source = f"hf:{folder}"
    recipe = ("--recipe", "core-neurons", "--set", "keep=0.3333")
    for graph in ("prompt", "steps"):
        asked = (*recipe, "--set", f"graph={graph}", "-o", tmp_path / graph)
        done = cli("optimize", source, *asked)
        assert done.code == 0, done.err
        done = cli("export", tmp_path / graph, "-o", tmp_path / f"{graph}.engine")
        assert done.code == 0, done.err
    engines = (tmp_path / "prompt.engine", "--steps", tmp_path / "steps.engine")
    text = ("--data", folder / "text.txt", "--size", f"sequence={LENGTH}")
    judged = ("verify", source, *engines, *text, "--step", "1")
    done = cli(*judged, "--prompt-tokens", str(PROMPT), "--json")
    assert done.code == 0, done.err
    quality = done.json["perplexity"]
    assert math.log(quality["perplexity_b"]) == pytest.approx(
        expected("llama", "griffin", 0.4), abs=1e-4
    )
    assert (quality["prompt"], quality["windows"]) == (PROMPT, 3)
    told = cli("run", *engines, "--prompt", "w11 w7 w30", "--tokens", "4", "--json")
    assert told.code == 0, told.err
    assert len(told.json["tokens"]) == 4
    for wrong, said in (
        (judged, "give --data TEXT and --prompt-tokens N"),
        ((*judged, "--prompt-tokens", "20"), "leaves nothing of a window of 20 tokens"),
        (("run", *engines), "--steps goes with --prompt"),
    ):
        failed = cli(*wrong)
        assert (failed.code, said in failed.err) == (2, True), failed.err
