"""``timm:NAME`` at small sizes: contract, preprocessing, weights from files, errors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from thresher.compiler.errors import MissingRequirementError, UsageError
from thresher.compiler.program import Program
from thresher.models import timm_source
from thresher.models.sources import load_source

timm = pytest.importorskip("timm")
NAME = "test_vit"


def attention_count(program: Program) -> int:
    sdpa = torch.ops.aten.scaled_dot_product_attention.default
    return sum(node.target is sdpa for node in program.graph.nodes)


@pytest.fixture(scope="module")
def program() -> Program:
    return load_source(f"timm:{NAME}", weights="random", resolution=64)


def test_contract(program: Program) -> None:
    assert [(s.name, s.shape) for s in program.inputs] == [("x", ("batch", 3, 64, 64))]
    assert [(s.name, s.shape) for s in program.outputs] == [("logits", ("batch", 1000))]
    assert attention_count(program) == len(timm.create_model(NAME).blocks)
    assert program.info.weights == "random"
    assert program.info.labels is None
    preprocessing = program.info.preprocessing
    assert preprocessing is not None
    assert preprocessing["size"] == [64, 64]
    assert preprocessing["input"] == "x"


def test_random_weights_are_the_same_every_time(program: Program) -> None:
    again = load_source(f"timm:{NAME}", weights="random", resolution=64)
    x = {"x": torch.ones(1, 3, 64, 64)}
    assert torch.equal(program.run(x)["logits"], again.run(x)["logits"])


def test_file_decides_classes_and_channels(tmp_path: Path) -> None:
    model = timm.create_model(NAME, img_size=32, num_classes=7, in_chans=1).eval()
    torch.save({"model": model.state_dict()}, tmp_path / "w.pth")
    program = load_source(f"timm:{NAME}", weights=str(tmp_path / "w.pth"), resolution=32)
    assert program.outputs[0].shape == ("batch", 7)
    assert program.info.weights == "w.pth"
    assert program.info.digest is not None
    assert program.info.preprocessing is not None
    assert program.info.preprocessing["channels"] == 1
    x = torch.randn(3, 1, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(program.run({"x": x})["logits"], model(x))


def test_position_table_is_resampled_for_another_resolution(tmp_path: Path) -> None:
    model = timm.create_model(NAME, img_size=32)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    program = load_source(f"timm:{NAME}", weights=str(tmp_path / "w.pth"), resolution=(64, 32))
    assert program.inputs[0].shape == ("batch", 3, 64, 32)


def test_features_without_a_classifier() -> None:
    program = load_source("timm:vit_small_patch14_dinov2", weights="random", resolution=28)
    assert [s.name for s in program.outputs] == ["features"]
    assert program.info.licence == "apache-2.0"


def test_labels_are_synset_and_word() -> None:
    names = timm_source._labels(timm.create_model(NAME))
    assert names is not None
    assert len(names) == 1000
    assert names[0] == "n01440764 tench"


def test_other_architecture(tmp_path: Path) -> None:
    torch.save(timm.create_model("test_vit2").state_dict(), tmp_path / "w.pth")
    with pytest.raises(UsageError, match=r"do not fit timm:test_vit: .*unexpected"):
        load_source(f"timm:{NAME}", weights=str(tmp_path / "w.pth"))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("timm:vit_tiny_patch16_22", "did you mean 'vit_tiny_patch16_224'"),
        ("timm:", "has no model ''"),
        ("timm:vit_tiny_patch16_224.augreg", "no weights tagged 'augreg'; did you mean"),
        ("timm:vit_small_patch16_18x2_224", "has no pretrained weights"),
    ],
)
def test_bad_names(source: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_source(source)


def test_resolution_must_fit_the_patches() -> None:
    with pytest.raises(UsageError, match="multiple of its patches of 16"):
        load_source("timm:vit_tiny_patch16_224", weights="random", resolution=(64, 60))


def test_pretrained_needs_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timm_source, "_reachable", lambda endpoint: False)
    with pytest.raises(MissingRequirementError, match=r"come from the hub.*--weights FILE"):
        load_source("timm:vit_tiny_patch16_224.augreg_in21k")
