"""``export --serve``: from a model and from an engine that is there already."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from google.protobuf import text_format

from tests.cli.conftest import SOURCE, Cli, Made, listing
from tests.runtime.triton_schema import model_config

CONFIG = model_config()


def test_a_model_and_an_engine_are_served_from_one_repository(
    cli: Cli, made: Made, tmp_path: Path
) -> None:
    models = tmp_path / "models"
    sized = ("--shape", "x=1..8x3x24x24@4")
    done = cli("export", SOURCE, "--serve", "triton", *sized, "-o", models / "dense", "--json")
    assert (done.code, done.err) == (0, "")
    assert done.json["engine"] == str(models / "dense/1")
    assert done.json["serving"]["command"] == ["tritonserver", f"--model-repository={models}"]
    again = cli("export", made.engine, "--serve", "triton", "-o", models / "reduced")
    assert (again.code, again.err) == (0, "")
    assert "32 is the largest batch" in again.out
    assert listing(models) == ["dense", "reduced"]
    dense, reduced = (
        text_format.Parse((models / name / "config.pbtxt").read_text(), CONFIG())
        for name in ("dense", "reduced")
    )
    assert (dense.max_batch_size, list(dense.dynamic_batching.preferred_batch_size)) == (8, [4])
    assert (list(dense.input[0].dims), list(dense.output[0].dims)) == ([3, 24, 24], [4])
    assert reduced.max_batch_size == 32
    assert (models / "reduced/labels.txt").read_text() == "ant\nbee\ncat\ndog\n"
    run = cli("run", models / "reduced/1", "--input", made.image, "--json")
    assert (
        run.json["outputs"]
        == cli("run", made.engine, "--input", made.image, "--json").json["outputs"]
    )


def test_what_cannot_be_served_leaves_nothing(
    failed: Callable[..., str], made: Made, tmp_path: Path
) -> None:
    served = ("--serve", "triton", "-o", tmp_path / "m/toy")
    assert "no back end for engines of target 'tensorrt-rtx'" in failed(
        3, "export", SOURCE, *served, "--target", "tensorrt-rtx"
    )
    said = failed(2, "export", made.engine, *served, "--precision", "fp16")
    assert "is an engine already: leave --precision out" in said
    assert "there is no input 'y'" in failed(2, "export", SOURCE, *served, "--shape", "y=1")
    said = failed(2, "export", SOURCE, "-o", tmp_path / "e", "--kernels", "/k.so")
    assert "give --serve too" in said
    assert listing(tmp_path) in ([], ["m"])
    assert not (tmp_path / "m").exists() or listing(tmp_path / "m") == []
