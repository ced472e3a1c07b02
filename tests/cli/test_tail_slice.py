"""``tail-slice`` by its command: fewer latents in the engine, less work, and mistakes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from tests.cli.conftest import SOURCE, Cli, listing

TOKENIZER = "tests.cli.toy:tokenizer"


def test_fewer_latents_reach_the_engine(cli: Cli, tmp_path: Path) -> None:
    folder, engine = tmp_path / "out", tmp_path / "engine"
    asked = ("optimize", TOKENIZER, "--recipe", "tail-slice", "--set", "tokens=4")
    done = cli(*asked, "-o", folder, "--json")
    assert done.code == 0, done.err
    details = done.json["passes"][0]["details"]
    assert details["latents"] == {"latent_tokens": [12, 4]}
    assert details["macs"] < details["dense_macs"]
    assert done.json["prediction"]["ideal"] == pytest.approx(details["ideal"], rel=1e-3)
    assert "tokens: 4" in (folder / "recipe.yaml").read_text()
    assert cli("export", folder, "-o", engine).code == 0
    session = onnxruntime.InferenceSession(engine / "model.onnx")
    found = session.run(None, {"x": np.zeros((3, 3, 24, 24), np.float32)})
    assert [value.shape for value in found] == [(3, 6, 1, 4), (3, 4)]


@pytest.mark.parametrize(
    ("source", "setting", "code", "said"),
    [
        (TOKENIZER, "tokens=13", 2, "tokens=13 is more than the 12 latents of latent_tokens: give 11 or less"),
        (TOKENIZER, "tokens=0", 2, "tail-slice.tokens"),
        (TOKENIZER, "latents=registers", 2, "latents=registers does not exist in this model"),
        (TOKENIZER, "tokens=12", 3, "its options ask for no change"),
        (SOURCE, "tokens=4", 3, "no latent tokens were found"),
    ],
)  # fmt: skip
def test_mistakes(
    cli: Cli, tmp_path: Path, source: str, setting: str, code: int, said: str
) -> None:
    done = cli(
        "optimize", source, "--recipe", "tail-slice", "--set", setting, "-o", tmp_path / "out"
    )
    assert (done.code, said in done.err) == (code, True), done.err
    assert "Traceback" not in done.err
    assert listing(tmp_path) == []
