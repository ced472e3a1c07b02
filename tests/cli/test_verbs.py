"""The other verbs on a toy: what they print, what they write, what they answer with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from PIL import Image

from tests.cli.conftest import SOURCE, Cli, Made, listing
from thresher.runtime import blocks, profiling
from thresher.runtime.stats import milliseconds

QUICK = ("--rounds", "6", "--threads", "1")


def test_export_writes_an_engine_that_plain_onnx_runtime_runs(made: Made) -> None:
    session = ort.InferenceSession(made.engine / "model.onnx")
    (logits,) = session.run(None, {"x": np.zeros((5, 3, 24, 24), np.float32)})
    assert logits.shape == (5, 4)
    assert listing(made.engine) == ["manifest.json", "model.onnx"]


@pytest.mark.parametrize("target", ["cpu", "openvino"])
def test_export_tells_what_it_made(cli: Cli, made: Made, tmp_path: Path, target: str) -> None:
    done = cli("export", made.reduced, "--target", target, "-o", tmp_path / "e.engine", "--json")
    assert (done.code, done.err) == (0, "")
    assert done.json["schema"] == "thresher.export/1"
    assert done.json["target"] == target
    assert done.json["tokens"] == [37, 32, 27, 22]
    assert done.json["recipe"]["passes"][0]["tome"]["r"] == 5
    assert done.json["source"]["licence"] == "Apache-2.0"
    told = cli("export", made.reduced, "--target", target, "-o", tmp_path / "f.engine")
    assert "37 32 27 22" in told.out


def test_verify_says_yes_for_a_program_and_its_engine(cli: Cli, made: Made) -> None:
    done = cli("verify", made.reduced, made.engine, "--json")
    assert (done.code, done.err) == (0, "")
    assert done.json["schema"] == "thresher.verify/1"
    assert done.json["same_function"]["same"] is True
    assert "same function: yes" in cli("verify", made.reduced, made.engine).out


def test_verify_says_no_with_exit_code_1_when_sameness_is_demanded(cli: Cli, made: Made) -> None:
    done = cli("verify", made.dense_engine, made.engine, "--same")
    assert (done.code, done.err) == (1, "")
    assert "same function: no" in done.out
    assert cli("verify", made.dense_engine, made.engine).code == 0


def test_verify_judges_quality_on_labelled_data(cli: Cli, made: Made) -> None:
    arguments = ("verify", made.dense_engine, made.engine, "--data", made.data)
    assert "of 12 samples" in cli(*arguments).out
    kept = cli(*arguments, "--max-drop", "100", "--json")
    assert (kept.code, kept.json["quality"]["kept"]) == (0, True)
    lost = cli(*arguments, "--max-drop", "-101", "--json")
    assert (lost.code, lost.json["quality"]["kept"]) == (1, False)
    few = cli(*arguments, "--limit", "5", "--json")
    assert few.json["quality"]["n"] == 5


@pytest.mark.slow
def test_profile_measures_sources_and_folders_alike(cli: Cli, made: Made) -> None:
    done = cli("profile", SOURCE, made.reduced, "--batch", "1,2", *QUICK, "--json")
    assert (done.code, done.err) == (0, "")
    assert done.json["schema"] == "thresher.profile/1"
    assert [(t["batch"]) for t in done.json["timings"]] == [1, 1, 2, 2]
    second = done.json["timings"][1]
    assert second["ideal"] > 1
    assert second["speedup"]["median"] > 0
    assert done.json["conditions"]["threads"] == 1


def test_profile_prints_tables_and_sentences_and_writes_a_report(
    cli: Cli, made: Made, tmp_path: Path
) -> None:
    report = tmp_path / "report.html"
    done = cli("profile", made.dense_engine, made.engine, *QUICK, "--blocks", "--report", report)
    assert (done.code, done.err) == (0, "")
    for part in ("ms a run", "speed-up", "ideal", "peak MB", "CPU", "batch 1:"):
        assert part in done.out
    assert report.read_text().startswith("<!doctype html>")


def test_an_engine_for_one_batch_takes_any_number_of_samples(
    cli: Cli, failed: Callable[..., str], made: Made, tmp_path: Path
) -> None:
    engine = tmp_path / "fixed.engine"
    done = cli("export", made.reduced, "--shape", "x=5x3x24x24", "-o", engine)
    assert (done.code, done.err) == (0, "")
    assert "batch 5" in done.out
    kept = cli("verify", SOURCE, engine, "--data", made.data, "--max-drop", "100", "--json")
    assert (kept.code, kept.json["quality"]["n"]) == (0, 12)
    free = cli("verify", SOURCE, made.engine, "--data", made.data, "--max-drop", "100", "--json")
    assert kept.json["quality"] == free.json["quality"]
    photo = cli("run", engine, "--input", made.image, "--json").json["outputs"]
    assert photo["logits"]["shape"] == [1, 4]
    assert "(batch) is 1 and must be 5 to 5" in failed(2, "profile", engine, "--batch", "1")


def test_a_shape_that_does_not_fit_is_refused_before_any_work(
    failed: Callable[..., str], tmp_path: Path
) -> None:
    said = failed(2, "export", SOURCE, "--shape", "y=5x3x24x24", "-o", tmp_path / "e")
    assert "there is no input 'y'" in said
    assert listing(tmp_path) == []


def test_times_of_a_block_stand_in_its_row_whatever_its_place_in_the_graph(
    cli: Cli, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inserted steps may come first in the graph, and with them their block."""
    whole, seen = blocks.block_profiles, []

    def turned(*arguments: Any, **options: Any) -> Any:
        dense, reduced = whole(*arguments, **options)
        seen.append(dataclasses.replace(reduced, blocks=reduced.blocks[::-1]))
        return dense, seen[0]

    monkeypatch.setattr(profiling, "block_profiles", turned)
    done = cli("profile", made.dense_engine, made.engine, *QUICK, "--blocks")
    rows = {line.split()[0]: line for line in done.out.splitlines() if line.strip()}
    assert len(seen[0].blocks) > 3
    for block in seen[0].blocks:
        assert milliseconds(block.own) in rows[block.block]


def test_a_speed_up_that_is_missed_is_exit_code_1(cli: Cli, made: Made) -> None:
    done = cli("profile", made.dense_engine, made.engine, *QUICK, "--min-speedup", "1000")
    assert (done.code, done.err) == (1, "")
    assert "1000 times was demanded" in done.out


def test_run_names_the_likeliest_classes(cli: Cli, made: Made) -> None:
    done = cli("run", made.engine, "--input", made.image, "--json")
    assert (done.code, done.err) == (0, "")
    assert done.json["schema"] == "thresher.run/1"
    (top,) = done.json["top"]
    assert {entry["label"] for entry in top} == {"ant", "bee", "cat", "dog"}
    assert sum(entry["probability"] for entry in top) == pytest.approx(1)
    logits = np.array(done.json["outputs"]["logits"]["values"][0])
    assert top[0]["class"] == logits.argmax()
    told = cli("run", made.engine, "--input", made.image, "--top", "1")
    assert top[0]["label"] in told.out


def test_run_takes_arrays_and_saves_outputs(cli: Cli, made: Made, tmp_path: Path) -> None:
    given, wanted = tmp_path / "in.npz", tmp_path / "out.npz"
    np.savez(given, x=np.zeros((3, 3, 24, 24), np.float32))
    done = cli("run", made.engine, "--input", given, "--save", wanted)
    assert (done.code, done.err) == (0, "")
    assert np.load(wanted)["logits"].shape == (3, 4)


def test_inspect_shows_sites_and_cost(cli: Cli) -> None:
    done = cli("inspect", SOURCE, "--json")
    assert (done.code, done.err) == (0, "")
    assert done.json["schema"] == "thresher.inspect/1"
    assert [site["layer"] for site in done.json["sites"]] == [0, 1, 2]
    assert (done.json["tokens"], done.json["protected"], done.json["class_token"]) == (37, 1, 0)
    assert sum(done.json["blocks"].values()) == done.json["macs"]
    told = cli("inspect", SOURCE).out
    assert "Sites, where tokens may go" in told
    assert "Cost of one item" in told


def test_inspect_shows_the_tokens_of_a_reduced_program(cli: Cli, made: Made) -> None:
    done = cli("inspect", made.reduced, "--json")
    counts = [(e["tokens_in"], e["tokens_out"]) for e in done.json["ledger"]]
    assert counts == [(37, 32), (32, 27), (27, 22)]
    assert (done.json["sites"], done.json["refusals"]) == ([], [])


def test_inspect_prints_the_graph_without_weights(cli: Cli, made: Made) -> None:
    done = cli("inspect", made.reduced, "--graph")
    assert (done.code, done.err) == (0, "")
    assert "thresher.bipartite_merge" in done.out
    assert len(done.out) < 40_000


def test_inspect_draws_where_the_patches_go(cli: Cli, made: Made, tmp_path: Path) -> None:
    picture = tmp_path / "kept.png"
    done = cli("inspect", made.reduced, "--image", made.image, "-o", picture, "--json")
    assert (done.code, done.err) == (0, "")
    assert [s["tokens"] for s in done.json["stages"]] == [32, 27, 22]
    assert [s["merged"] for s in done.json["stages"]] == [5, 10, 15]
    with Image.open(picture) as drawn:
        assert drawn.format == "PNG"
    told = cli("inspect", made.reduced, "--image", made.image, "-o", picture)
    assert "merged into others" in told.out


@pytest.mark.slow
def test_plan_predicts_what_optimize_does(cli: Cli) -> None:
    done = cli("plan", SOURCE, "--recipe", "tome", "--set", "r=5", "--json")
    assert (done.code, done.err) == (0, "")
    assert done.json["schema"] == "thresher.plan/1"
    assert done.json["accepted"] is True
    assert done.json["prediction"]["tokens"] == [37, 32, 27, 22]
    assert done.json["target"]["problems"] == []
    assert done.json["target"]["memory"]["activations"] > 0
    assert "accepted" in cli("plan", SOURCE, "--set", "r=5").out


def test_plan_tells_what_the_steps_themselves_take(cli: Cli, tmp_path: Path) -> None:
    """As optimize does: passes behind one another, and the votes of Zero-TPrune among their work."""
    recipe = tmp_path / "two.yaml"
    recipe.write_text("passes: [zero-tprune: {keep: 0.7, layers: [0]}, cleanup: {}]")
    planned = cli("plan", SOURCE, "--recipe", recipe, "--json").json
    made = cli("optimize", SOURCE, "--recipe", recipe, "-o", tmp_path / "made", "--json").json
    told, done = (
        [
            {key: value for key, value in record.items() if key != "seconds"}
            for record in found["passes"]
        ]
        for found in (planned, made)
    )
    assert told == done
    assert told[0]["details"]["inserted_macs"] > 0


def test_plan_of_a_network_without_attention_is_refused_with_the_reason(cli: Cli) -> None:
    done = cli("plan", "tests.cli.toy:convolutions", "--json")
    assert (done.code, done.err) == (3, "")
    assert done.json["accepted"] is False
    assert "no attention" in done.json["passes"][0]["refused"][0]["reason"]
    told = cli("plan", "tests.cli.toy:convolutions")
    assert told.code == 3
    assert "refused: tome would apply nowhere" in told.out


def test_explain_describes_a_pass(cli: Cli) -> None:
    done = cli("explain", "evit", "--json")
    assert (done.code, done.err) == (0, "")
    assert done.json["schema"] == "thresher.explain/1"
    assert {"keep", "flops", "fuse"} <= set(done.json["options"])
    told = cli("explain", "evit").out
    assert "ICLR 2022" in told
    assert "share of the tokens to keep" in told


def test_explain_tries_a_pass_on_a_model(cli: Cli) -> None:
    done = cli("explain", "tome", SOURCE, "--set", "r=5", "--json")
    assert (done.code, done.json["found"]["applied"]) == (0, 3)
    refused = cli("explain", "tome", "tests.cli.toy:convolutions")
    assert refused.code == 3
    assert "no attention" in refused.out


def test_recipes_are_listed_and_written_out(cli: Cli, tmp_path: Path) -> None:
    done = cli("recipes", "--json")
    assert (done.code, done.err) == (0, "")
    assert {"tome", "evit", "topk-norm", "random"} <= set(done.json["recipes"])
    listed = cli("recipes").out
    assert all(name in listed for name in done.json["recipes"])
    told = cli("recipes", "tome", "--set", "r=7")
    (tmp_path / "mine.yaml").write_text(told.out)
    again = cli("recipes", tmp_path / "mine.yaml", "--json")
    assert again.json["recipe"]["passes"][0]["tome"]["r"] == 7


def test_an_engine_needs_no_torch_to_run(cli: Cli, made: Made) -> None:
    import subprocess
    import sys

    code = (
        "import sys; from thresher.cli.main import main\n"
        f"assert main(['run', {str(made.engine)!r}, '--input', {str(made.image)!r}]) == 0\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_an_engine_is_no_source(failed: Callable[..., str], made: Made, tmp_path: Path) -> None:
    said = failed(2, "optimize", made.engine, "-o", tmp_path / "a")
    assert "is an engine already" in said
