"""The commands of the project's promise, letter by letter, on a real DeiT-S and small text models."""

from __future__ import annotations

import json
import shlex
from contextlib import chdir
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from PIL import Image

from tests.cli.conftest import Cli, Result
from thresher.runtime import Engine

pytestmark = pytest.mark.slow
TEXTS = ("the cat sat on the mat\t1", "a dog ran\t0", "the mat sat\t1", "cat\t0")
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "a", "cat", "dog", "sat", "ran", "on", "mat")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the commands name."""
    place = tmp_path_factory.mktemp("promise")
    timm = pytest.importorskip("timm")
    from safetensors.torch import save_file

    model = timm.create_model("deit_small_patch16_224")
    save_file(model.state_dict(), place / "deit_s.safetensors")
    pixels = np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)
    Image.fromarray(pixels).save(place / "photo.jpg")
    (place / "sentences.tsv").write_text("\n".join(TEXTS) + "\n")
    _minilm(place / "minilm")
    return place


def _minilm(folder: Path) -> None:
    """A small BERT with a tokenizer, as a Hugging Face folder."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    config = transformers.BertConfig(
        vocab_size=200,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=64,
    )
    transformers.BertModel(config).save_pretrained(folder)
    numbers = {word: number for number, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    told = {"model_max_length": 128, "model_input_names": ["input_ids", "attention_mask"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(told))


def run(cli: Cli, place: Path, line: str) -> Result:
    with chdir(place):
        return cli(*shlex.split(line.partition("#")[0])[1:])


def test_a_checkpoint_becomes_a_faster_engine(cli: Cli, place: Path) -> None:
    source = "timm:deit_small_patch16_224 --weights deit_s.safetensors"
    done = run(cli, place, f"thresher optimize {source} --recipe tome --set r=13 -o build/deit_s")
    assert (done.code, done.err) == (0, "")
    assert "197 184 171 158 145 132 119 106 93 80 67 54 41" in done.out

    done = run(cli, place, "thresher export   build/deit_s --target cpu -o build/deit_s.engine")
    assert (done.code, done.err) == (0, "")
    session = ort.InferenceSession(place / "build/deit_s.engine/model.onnx")
    (logits,) = session.run(None, {"x": np.zeros((3, 3, 224, 224), np.float32)})
    assert logits.shape == (3, 1000)

    done = run(cli, place, "thresher verify   build/deit_s build/deit_s.engine --json")
    assert (done.code, done.json["same_function"]["same"]) == (0, True)

    done = run(cli, place, "thresher run      build/deit_s.engine --input photo.jpg --json")
    assert done.code == 0
    assert done.json["outputs"]["logits"]["shape"] == [1, 1000]

    done = run(cli, place, "thresher inspect  build/deit_s --image photo.jpg -o kept.png")
    assert (done.code, done.err) == (0, "")
    with Image.open(place / "kept.png") as picture:
        assert picture.width > 1000

    done = run(
        cli,
        place,
        "thresher profile  timm:deit_small_patch16_224 build/deit_s"
        " --weights deit_s.safetensors --batch 1,8 --json",
    )
    assert done.code == 0
    reduced = [timing for timing in done.json["timings"] if timing["speedup"]]
    assert [timing["batch"] for timing in reduced] == [1, 8]
    assert all(timing["ideal"] > 1.6 for timing in reduced)


def test_windows_are_refused_with_node_and_reason(cli: Cli, place: Path) -> None:
    line = "thresher plan     timm:swin_tiny_patch4_window7_224 --weights random --recipe tome"
    done = run(cli, place, line)
    assert (done.code, done.err) == (3, "")
    assert "refused: tome would apply nowhere" in done.out
    assert "window" in done.out


def test_text_keeps_any_length_after_export(cli: Cli, place: Path) -> None:
    done = run(
        cli,
        place,
        "thresher optimize hf:./minilm --recipe tome --set keep=0.7 --data sentences.tsv"
        " -o build/minilm      # any sequence length stays possible after export",
    )
    assert (done.code, done.err) == (0, "")
    done = run(cli, place, "thresher export build/minilm -o build/minilm.engine")
    assert (done.code, done.err) == (0, "")
    with Engine.load(place / "build/minilm.engine") as engine:
        for batch, length in ((1, 5), (3, 40), (2, 128)):
            shape = (batch, length)
            feeds = {spec.name: np.ones(shape, np.int64) for spec in engine.inputs}
            assert all(len(value) == batch for value in engine.run(feeds).values())
    done = run(cli, place, "thresher run build/minilm.engine --text 'the cat sat' --json")
    assert done.code == 0


def test_an_onnx_file_is_a_source(cli: Cli, place: Path) -> None:
    done = run(cli, place, "thresher export thresher.models.fashion:vit -o build/vit.engine")
    assert done.code == 0
    (place / "vit.onnx").write_bytes((place / "build/vit.engine/model.onnx").read_bytes())
    done = run(cli, place, "thresher optimize vit.onnx --recipe evit --flops 0.65 -o build/vit")
    assert (done.code, done.err) == (0, "")
    assert "an ideal speed-up of 1.5" in done.out


def test_doctor(cli: Cli, place: Path) -> None:
    assert run(cli, place, "thresher doctor --json").code == 0
