"""An engine folder appears whole, checked, or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from tests.runtime import toys
from thresher.compiler.errors import RefusedError, UsageError, VerdictError
from thresher.runtime import bundle
from thresher.runtime.bundle import Facts, package
from thresher.runtime.engine import Engine
from thresher.runtime.exporting import agree
from thresher.runtime.manifest import read


def test_what_is_written(tmp_path: Path) -> None:
    folder = tmp_path / "toy.engine"
    with toys.engine(folder, keep=5) as engine:
        assert engine.manifest == read(folder)
    assert {path.name for path in folder.iterdir()} == {"model.onnx", "manifest.json"}
    manifest = read(folder)
    assert (manifest.sites, manifest.tokens) == (1, (8, 5))
    assert manifest.prediction is not None
    assert manifest.prediction.macs == 600
    assert len(onnx.load(folder / "model.onnx").functions) == 1


def test_the_check_sees_the_engine_before_it_has_its_name(tmp_path: Path) -> None:
    def check(engine: Engine) -> dict[str, Any]:
        assert not (tmp_path / "toy").exists()
        assert engine.run(toys.feeds())["logits"].shape == (2, 10)
        return {"fine": True}

    with toys.engine(tmp_path / "toy", check=check) as engine:
        assert engine.manifest.verified == {"fine": True}


@pytest.mark.parametrize("failure", [KeyboardInterrupt, VerdictError])
def test_a_failed_or_interrupted_check_leaves_nothing(
    tmp_path: Path, failure: type[BaseException]
) -> None:
    def check(engine: Engine) -> dict[str, Any]:
        raise failure

    with pytest.raises(failure):
        toys.engine(tmp_path / "toy", check=check)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_kept_unless_overwritten(tmp_path: Path) -> None:
    toys.engine(tmp_path / "toy").close()
    with pytest.raises(UsageError, match="exists already: give another output folder"):
        toys.engine(tmp_path / "toy", keep=5)
    assert read(tmp_path / "toy").tokens is None
    toys.engine(tmp_path / "toy", keep=5, overwrite=True).close()
    assert read(tmp_path / "toy").tokens == (8, 5)


def test_a_refused_model_leaves_nothing(tmp_path: Path) -> None:
    model = toys.transformer(5)
    del model.functions[:]
    with pytest.raises(RefusedError, match=r"node_k \(thresher::Keep, blocks\.0\)"):
        package(model, tmp_path / "toy")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_precision(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="target 'cpu' has no precision 'fp8'"):
        toys.engine(tmp_path / "toy", precision="fp8")


def test_a_large_model_keeps_its_weights_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle, "EXTERNAL_ABOVE", 100)
    model, feeds = toys.transformer(5, width=64), toys.feeds_of(64)
    large = package(model, tmp_path / "large", threads=1)
    assert set(large.manifest.files) == {"model.onnx", "model.onnx.data"}
    found = large.run(feeds)["logits"]
    monkeypatch.undo()
    with package(model, tmp_path / "whole", threads=1) as whole:
        assert set(whole.manifest.files) == {"model.onnx"}
        np.testing.assert_array_equal(whole.run(feeds)["logits"], found)
    (large.folder / "model.onnx.data").write_bytes(b"")
    with pytest.raises(UsageError, match=r"model.onnx.data is not the file"):
        Engine.load(large.folder)


def test_a_large_model_goes_to_openvino_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")
    monkeypatch.setattr(bundle, "EXTERNAL_ABOVE", 100)
    model = toys.transformer(5, width=64)
    with package(model, tmp_path / "large", target="openvino", threads=1) as engine:
        files = {"model.onnx", "model.onnx.data", "openvino.xml", "openvino.bin"}
        assert set(engine.manifest.files) == files
        assert engine.run(toys.feeds_of(64))["logits"].shape == (2, 10)


def test_a_tokenizer_travels_with_the_engine(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    told = {"kind": "text", "tokenizer": str(tmp_path / "tokenizer.json")}
    engine = package(toys.transformer(), tmp_path / "e", facts=Facts(preprocessing=told), threads=1)
    assert engine.manifest.preprocessing == {"kind": "text", "tokenizer": "tokenizer.json"}
    assert engine.preprocessing == {"kind": "text", "tokenizer": str(tmp_path / "e/tokenizer.json")}
    assert "tokenizer.json" in engine.manifest.files


def test_agreement_with_the_reference(tmp_path: Path) -> None:
    with toys.engine(tmp_path / "toy") as engine:
        same = toys.Fake("same")
        same.run = engine.run  # type: ignore[method-assign]
        found = agree(same, engine)
        assert found["outputs"] == {
            "logits": {"relative": 0.0, "samples": 4, "agreeing": 4, "top1": 1.0}
        }

        def off(inputs: Any) -> dict[str, Any]:
            return {name: value * np.float32(1.001) for name, value in engine.run(inputs).items()}

        same.run = off  # type: ignore[method-assign]
        with pytest.raises(
            VerdictError, match=r"'logits' differs .* 0.001 of its scale and 6.1e-05"
        ):
            agree(same, engine)
