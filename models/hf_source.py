"""``hf:DIR``: encoders and causal language models from a Hugging Face folder, offline, no foreign code."""

from __future__ import annotations

import copy
import hashlib
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from thresher.compiler.errors import RefusedError, UsageError, missing_extra
from thresher.compiler.program import Program, SourceInfo
from thresher.models import hf_modules as modules
from thresher.models.hf_folder import label_names, read_json
from thresher.models.hf_tasks import TASKS
from thresher.models.options import SourceOptions
from thresher.models.weights import (
    State,
    digest,
    read_weights,
    report,
    shape_text,
    warn_unless_finite,
)

SEED = 0
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclass(frozen=True)
class Family:
    """Which classes of transformers a ``model_type`` maps to, and what kind of input they take."""

    kind: str
    base: str
    heads: tuple[str, ...] = ()


FAMILIES = {
    "vit": Family("image", "ViTModel", ("ViTForImageClassification",)),
    "dinov2": Family("image", "Dinov2Model", ("Dinov2ForImageClassification",)),
    "dinov2_with_registers": Family(
        "image", "Dinov2WithRegistersModel", ("Dinov2WithRegistersForImageClassification",)
    ),
    "clip": Family("image", "CLIPVisionModel", ("CLIPVisionModelWithProjection",)),
    "clip_vision_model": Family("image", "CLIPVisionModel", ("CLIPVisionModelWithProjection",)),
    "bert": Family("text", "BertModel", ("BertForSequenceClassification",)),
    "modernbert": Family("text", "ModernBertModel", ("ModernBertForSequenceClassification",)),
    "whisper": Family("spectrogram", "WhisperModel"),
    "wav2vec2": Family("waveform", "Wav2Vec2Model", ("Wav2Vec2ForCTC",)),
    "llama": Family("causal", "LlamaForCausalLM"),
    "mistral": Family("causal", "MistralForCausalLM"),
    "qwen2": Family("causal", "Qwen2ForCausalLM"),
    "qwen3": Family("causal", "Qwen3ForCausalLM"),
    "gpt2": Family("causal", "GPT2LMHeadModel"),
}


def load(name: str, options: SourceOptions) -> Program:
    """Trace the model in folder ``name``; the batch is dynamic, and so is the length.

    Inputs of encoders: ``pixel_values``, ``input_ids`` with ``attention_mask`` (and
    ``token_type_ids``), ``input_features`` or ``input_values``.  Outputs: ``logits`` of a classifier,
    otherwise ``last_hidden_state`` and ``pooler_output``; ``sentence_embedding`` where the folder
    belongs to sentence-transformers.  Causal language models: see
    :class:`~thresher.models.hf_decoders.Decoder`.

    Raises:
        UsageError: the folder is incomplete, damaged, or its weights do not fit its config.
        RefusedError: a model type outside :data:`FAMILIES`, or one that cannot be traced.
        MissingRequirementError: transformers is not installed.
    """
    folder = Path(name)
    config = _config(folder)
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None:
        raise RefusedError(
            f"{folder} holds a model of type {config.get('model_type')!r}, and hf: reads"
            f" {', '.join(FAMILIES)}: give it as MODULE:FUNCTION, .pt2 or .onnx instead"
        )
    taken = {"image": ("resolution",), "causal": ()}.get(family.kind, ("length",))
    options.allow(f"hf:DIR ({config['model_type']})", "weights", "outputs", *taken)
    model, weights, fingerprint = _model(folder, config, family, options)
    task = TASKS[family.kind](folder, model, options)
    info = SourceInfo(
        source=f"hf:{folder}",
        weights=weights,
        digest=fingerprint,
        preprocessing=task.preprocessing,
        labels=label_names(config) if type(model).__name__ in family.heads else None,
    )
    return task.trace(info, options.outputs)


def _config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise UsageError(f"hf:{folder} is not a folder: give one with config.json and safetensors")
    config = read_json(folder / "config.json")
    if config is None:
        raise UsageError(f"{folder} has no config.json: give a folder in the Hugging Face layout")
    return config


def _model(
    folder: Path, config: Mapping[str, Any], family: Family, options: SourceOptions
) -> tuple[Any, str, str | None]:
    """The model in float32 and evaluation mode, where its weights are from, and their digest."""
    transformers = _transformers()
    named = next(iter(config.get("architectures") or ()), family.base)
    cls = getattr(transformers, named if named in family.heads else family.base)
    settings = cls.config_class.from_pretrained(folder, local_files_only=True)
    weights = "included" if options.weights in (None, "pretrained") else str(options.weights)
    size = options.square()
    with _quiet(transformers):
        if weights == "random":
            settings.image_size = size or getattr(settings, "image_size", None)
            return _random(cls, settings), weights, None
        files = _files(folder, weights)
        state = {name: tensor for file in files for name, tensor in read_weights(file).items()}
        origin = str(files[0] if len(files) == 1 else folder)
        model = _loaded(cls, settings, state, origin)
        warn_unless_finite(state, origin)
        if size and size != settings.image_size:
            model = _resized(model, size)
    return model, weights if weights == "included" else files[0].name, _digest(files)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise missing_extra("transformers", "hf", "a source hf:DIR") from None
    modules.register_attention()
    return transformers


def _random(cls: Any, settings: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)  # random weights are the same in every run
        return cls._from_config(
            settings, attn_implementation=modules.ATTENTION, dtype=torch.float32
        ).eval()


def _loaded(cls: Any, settings: Any, state: State, origin: str) -> Any:
    """Let transformers map names of older versions, then insist that nothing was made up.

    A pooler that the file lacks is left out rather than drawn at random.  Tensors beyond the
    encoder (a decoder, another head) are no fault.
    """
    pooler = {} if any("pooler." in key for key in state) else {"add_pooling_layer": False}
    accepted = inspect.signature(cls.__init__).parameters
    model, found = cls.from_pretrained(
        None,
        config=settings,
        state_dict=state,
        attn_implementation=modules.ATTENTION,
        dtype=torch.float32,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        **{key: value for key, value in pooler.items() if key in accepted},
    )
    reshaped = [
        f"{key} is {shape_text(has)} and should be {shape_text(wants)}"
        for key, has, wants in found["mismatched_keys"]
    ]
    missing = sorted(found["missing_keys"])
    if missing or reshaped:
        faults = report(missing, [], reshaped, len(model.state_dict()))
        raise UsageError(
            f"the weights in {origin} do not fit {cls.__name__} as config.json describes it:"
            f" {faults}; give the folder's own weights"
        )
    return model.eval()


def _resized(model: Any, size: int) -> Any:
    """The model for square images of another size, its position table resampled once."""
    settings = copy.deepcopy(model.config)
    settings.image_size = size
    embeddings = next(m for m in model.modules() if hasattr(m, "interpolate_pos_encoding"))
    patch = settings.patch_size
    if size % patch:
        raise UsageError(f"images of {size} pixels do not divide into patches of {patch}")
    state = model.state_dict()
    tokens = torch.empty(1, 1 + (size // patch) ** 2, settings.hidden_size)
    with torch.no_grad():
        table = embeddings.interpolate_pos_encoding(tokens, size, size)
    name = next(k for k in state if "position_embedding" in k and k.endswith(("s", "weight")))
    state[name] = table.reshape(-1, table.shape[-1]) if state[name].ndim == 2 else table
    pooler = {} if getattr(model, "pooler", True) is not None else {"add_pooling_layer": False}
    other = type(model)._from_config(settings, attn_implementation=modules.ATTENTION, **pooler)
    other.load_state_dict(state)
    return other.eval()


def _files(folder: Path, weights: str) -> list[Path]:
    """The safetensors files of the folder, or the one file that was asked for."""
    if weights != "included":
        return [Path(weights)]
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    index = read_json(folder / INDEX)
    if index is not None:
        try:
            return sorted({folder / Path(name).name for name in index["weight_map"].values()})
        except (KeyError, AttributeError, TypeError):
            raise UsageError(f"{folder / INDEX} has no 'weight_map': fetch it again") from None
    pickles = [file.name for file in folder.glob("*.bin")]
    more = f" ({pickles[0]} is a pickle: give it as --weights FILE)" if pickles else ""
    raise UsageError(
        f"{folder} has neither {SINGLE} nor {INDEX}{more}: add one, or use --weights random"
    )


def _digest(files: list[Path]) -> str:
    """SHA-256 of the file; of the digests in order where there are several."""
    digests = [digest(file) for file in files]
    together = hashlib.sha256("".join(digests).encode()).hexdigest()
    return digests[0] if len(digests) == 1 else together


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """No progress bars and load reports: what matters of them is raised or warned of here."""
    log = transformers.utils.logging
    level, bar = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bar:
            log.enable_progress_bar()
