"""``hf:DIR``: each family traces, equals transformers on padded batches, and faults are told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models.folders import (
    IMAGE,
    MODERN,
    SIZES,
    SPEECH,
    WAVE,
    build,
    save,
    tokenizer,
    words,
)
from thresher.compiler.errors import RefusedError, UsageError
from thresher.compiler.program import Program
from thresher.models.sources import load_source

pytest.importorskip("transformers")
LENGTH = ("batch", "length")
SMALL = {**SIZES, "num_hidden_layers": 1}


def same(program: Program, model: Any, inputs: dict[str, torch.Tensor], **options: Any) -> None:
    """The Program's outputs equal those of transformers with its own attention and masks.

    What stands at padded positions is nobody's business.
    """
    real = inputs.get("attention_mask")
    model.set_attn_implementation("eager")
    with torch.no_grad():
        wanted = model(**inputs, **options)
    for name, value in program.run(inputs).items():
        assert value.isfinite().all()
        kept = slice(None) if real is None or value.shape[:2] != real.shape else real.bool()
        torch.testing.assert_close(value[kept], wanted[name][kept], atol=2e-5, rtol=1e-4)


def operators(program: Program) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize(
    ("cls", "config", "outputs"),
    [
        ("ViTModel", "ViTConfig", ["last_hidden_state", "pooler_output"]),
        ("ViTForImageClassification", "ViTConfig", ["logits"]),
        ("Dinov2Model", "Dinov2Config", ["last_hidden_state", "pooler_output"]),
        (
            "CLIPVisionModelWithProjection",
            "CLIPVisionConfig",
            ["image_embeds", "last_hidden_state"],
        ),
    ],
)
def test_images(cls: str, config: str, outputs: list[str], tmp_path: Path) -> None:
    model = build(cls, config, **SIZES, **IMAGE)
    program = load_source(save(model, tmp_path))
    assert [(s.name, s.shape) for s in program.inputs] == [("pixel_values", ("batch", 3, 32, 32))]
    assert [s.name for s in program.outputs] == outputs
    same(program, model, {"pixel_values": torch.randn(3, 3, 32, 32)})
    assert operators(program).count("aten.scaled_dot_product_attention.default") == 2
    assert "aten.arange.default" not in operators(program), "a mask of ones was built"


def test_other_resolution(tmp_path: Path) -> None:
    model = build("CLIPVisionModel", "CLIPVisionConfig", **SMALL, **IMAGE)
    program = load_source(save(model, tmp_path), resolution=48)
    inputs = {"pixel_values": torch.randn(2, 3, 48, 48)}
    same(program, model, inputs, interpolate_pos_encoding=True)
    assert not any("upsample" in name for name in operators(program))


def test_clip_folder_gives_its_vision_half(tmp_path: Path) -> None:
    text = {**SMALL, "vocab_size": 60, "bos_token_id": 1, "eos_token_id": 2}
    model = build("CLIPModel", "CLIPConfig", vision_config={**SMALL, **IMAGE}, text_config=text)
    program = load_source(save(model, tmp_path), outputs=("pooler_output",))
    assert [s.name for s in program.outputs] == ["pooler_output"]
    same(program, model.vision_model, {"pixel_values": torch.randn(2, 3, 32, 32)})


@pytest.mark.parametrize(
    ("cls", "outputs"),
    [
        ("BertModel", ["last_hidden_state", "pooler_output"]),
        ("BertForSequenceClassification", ["logits"]),
    ],
)
def test_bert(cls: str, outputs: list[str], tmp_path: Path) -> None:
    names = {0: "bad", 1: "good"}
    model = build(cls, "BertConfig", vocab_size=50, id2label=names, **SIZES)
    program = load_source(save(model, tmp_path))
    assert [s.shape for s in program.inputs] == [LENGTH] * 3
    assert [s.name for s in program.outputs] == outputs
    assert program.info.labels == (("bad", "good") if outputs == ["logits"] else None)
    for batch, length in ((3, 11), (1, 1)):
        inputs = words(batch, length)
        inputs["token_type_ids"] = torch.randint(0, 2, (batch, length))
        same(program, model, inputs)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small BERT with one layer, as a source."""
    settings = {**SIZES, "num_hidden_layers": 1, "vocab_size": 50}
    return save(build("BertModel", "BertConfig", **settings), tmp_path_factory.mktemp("bert"))


def test_padding_changes_nothing(bert: str) -> None:
    """A short text beside a long one answers as it does alone."""
    program = load_source(bert, outputs=("pooler_output",))
    inputs = {**words(3, 9), "token_type_ids": torch.zeros(3, 9, dtype=torch.int64)}
    together = program.run(inputs)["pooler_output"]
    for row, length in enumerate(inputs["attention_mask"].sum(1).tolist()):
        alone = program.run({k: v[row : row + 1, :length] for k, v in inputs.items()})
        torch.testing.assert_close(alone["pooler_output"][0], together[row])


def test_fixed_length(bert: str) -> None:
    assert load_source(bert, length=16).inputs[0].shape == ("batch", 16)
    with pytest.raises(UsageError, match="1 to 512 tokens, not 513"):
        load_source(bert, length=513)


def test_encoder_of_a_language_model_has_no_pooler(tmp_path: Path) -> None:
    """transformers would draw the missing pooler at random; the numbers would mean nothing."""
    model = build("BertForMaskedLM", "BertConfig", vocab_size=50, **SMALL)
    program = load_source(save(model, tmp_path))
    assert [s.name for s in program.outputs] == ["last_hidden_state"]


@pytest.mark.parametrize("pooling", [None, "mean", "cls"])
def test_modernbert(pooling: str | None, tmp_path: Path) -> None:
    cls = "ModernBertForSequenceClassification" if pooling else "ModernBertModel"
    extra = {"classifier_pooling": pooling} if pooling else {}
    model = build(cls, "ModernBertConfig", **{**SIZES, **MODERN, **extra})
    program = load_source(save(model, tmp_path))
    assert [s.name for s in program.inputs] == ["input_ids", "attention_mask"]
    same(program, model, words(3, 14))


def test_whisper_encoder(tmp_path: Path) -> None:
    model = build("WhisperForConditionalGeneration", "WhisperConfig", **SPEECH)
    source = save(model, tmp_path)
    program = load_source(source)
    assert program.inputs[0].shape == ("batch", 16, 40)
    same(program, model.model.encoder, {"input_features": torch.randn(3, 16, 40)})
    short = load_source(source, length=24)
    assert short.inputs[0].shape == ("batch", 16, 24)
    assert short.outputs[0].shape == ("batch", 12, 32)


@pytest.mark.parametrize(
    ("cls", "settings"),
    [
        ("Wav2Vec2Model", {}),
        ("Wav2Vec2ForCTC", {"feat_extract_norm": "layer", "do_stable_layer_norm": True}),
    ],
)
def test_wav2vec2(cls: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """The model with a group norm takes no mask; the other equals transformers on padded sound."""
    model = build(cls, "Wav2Vec2Config", **SIZES, **WAVE, **settings)
    program = load_source(save(model, tmp_path))
    masked = bool(settings)
    assert [s.name for s in program.inputs] == ["input_values", "attention_mask"][: 1 + masked]
    assert program.inputs[0].shape == LENGTH
    for batch, length in ((3, 203), (1, 31)):
        real = torch.arange(length)[None] < length - 40 * torch.arange(batch)[:, None]
        inputs = {"input_values": torch.randn(batch, length) * real}
        same(program, model, inputs | ({"attention_mask": real.long()} if masked else {}))
    assert not any("index_put" in name or "weight_norm" in name for name in operators(program))


def test_sentence_embedding(tmp_path: Path) -> None:
    source = save(build("BertModel", "BertConfig", vocab_size=50, **SMALL), tmp_path)
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    (tmp_path / "modules.json").write_text('[{"type": "sentence_transformers.models.Normalize"}]')
    program = load_source(source, outputs=("sentence_embedding", "last_hidden_state"))
    inputs = {**words(3, 9), "token_type_ids": torch.zeros(3, 9, dtype=torch.int64)}
    outputs = program.run(inputs)
    weight = inputs["attention_mask"][..., None]
    mean = (outputs["last_hidden_state"] * weight).sum(1) / weight.sum(1)
    wanted = torch.nn.functional.normalize(mean, dim=1)
    torch.testing.assert_close(outputs["sentence_embedding"], wanted)


def test_preprocessing_of_images(tmp_path: Path) -> None:
    config = {
        "size": {"shortest_edge": 40},
        "crop_size": {"height": 32, "width": 32},
        "do_center_crop": True,
        "resample": 3,
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.2, 0.2, 0.2],
    }
    model = build("ViTForImageClassification", "ViTConfig", **SMALL, **IMAGE)
    source = save(model, tmp_path, preprocessor_config=config)
    found = load_source(source, weights="random", resolution=64).info.preprocessing
    assert found == {
        "kind": "image",
        "input": "pixel_values",
        "size": [64, 64],
        "channels": 3,
        "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.2, 0.2],
        "interpolation": "bicubic",
        "resize": 80,
        "crop_mode": "center",
    }


def test_preprocessing_of_text(tmp_path: Path) -> None:
    model = build("BertModel", "BertConfig", vocab_size=50, **SMALL)
    inputs = {"model_input_names": ["input_ids", "attention_mask"], "model_max_length": 128}
    source = save(model, tmp_path, tokenizer_config=inputs)
    path = tokenizer(tmp_path)
    program = load_source(source, weights="random")
    assert [s.name for s in program.inputs] == ["input_ids", "attention_mask"]
    assert program.info.preprocessing == {
        "kind": "text",
        "tokenizer": str(path),
        "inputs": ["input_ids", "attention_mask"],
        "max_length": 128,
        "length": None,
        "pad_id": 0,
    }


def test_sharded_weights(tmp_path: Path) -> None:
    model = build("BertModel", "BertConfig", vocab_size=50, **SMALL)
    source = save(model, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    table: dict[str, str] = {}
    for number, keys in enumerate((sorted(state)[::2], sorted(state)[1::2])):
        save_file({key: state[key] for key in keys}, tmp_path / f"part-{number}.safetensors")
        table |= dict.fromkeys(keys, f"part-{number}.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": table}))
    program = load_source(source)
    assert program.info.weights == "included"
    same(program, model, {**words(2, 6), "token_type_ids": torch.zeros(2, 6, dtype=torch.int64)})
    (tmp_path / "part-1.safetensors").unlink()
    with pytest.raises(UsageError, match=r"part-1\.safetensors does not exist"):
        load_source(source)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 2}, r"16 of \d+ tensors are missing \(encoder\.layer\.1"),
        ({"vocab_size": 40}, "word_embeddings.weight is 50x32 and should be 40x32"),
    ],
)
def test_config_of_another_model(change: dict[str, int], message: str, tmp_path: Path) -> None:
    source = save(build("BertModel", "BertConfig", vocab_size=50, **SMALL), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UsageError, match=message):
        load_source(source)


def test_incomplete_folders(tmp_path: Path) -> None:
    source = f"hf:{tmp_path}"
    with pytest.raises(UsageError, match="is not a folder"):
        load_source("hf:nowhere")
    with pytest.raises(UsageError, match=r"has no config\.json"):
        load_source(source)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UsageError, match="not valid JSON"):
        load_source(source)
    (tmp_path / "config.json").write_text('{"model_type": "mamba", "auto_map": {"x": "evil.py"}}')
    with pytest.raises(RefusedError, match=r"'mamba', and hf: reads vit, dinov2"):
        load_source(source)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", **SIZES}))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UsageError, match=r"neither .*pytorch_model\.bin is a pickle"):
        load_source(source)


def test_wishes_that_do_not_apply(tmp_path: Path) -> None:
    source = save(build("ViTModel", "ViTConfig", **SMALL, **IMAGE), tmp_path)
    for wish, message in (
        ({"length": 8}, "takes no option 'length'; it takes weights"),
        ({"resolution": (32, 48)}, "square images, not 32x48"),
        ({"resolution": 44}, "do not divide into patches of 8"),
        ({"outputs": ("logits",)}, "has no output 'logits': it has last_hidden_state"),
    ):
        with pytest.raises(UsageError, match=message):
            load_source(source, **wish)
