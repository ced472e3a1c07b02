"""``timm:NAME``: models of the timm zoo, with weights from the hub, from a file, or random."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor, nn

from thresher.compiler.errors import (
    MissingRequirementError,
    UsageError,
    missing_extra,
    nearest,
)
from thresher.compiler.program import Program, SourceInfo
from thresher.compiler.trace import trace
from thresher.models.options import SourceOptions
from thresher.models.weights import State, digest, fit, mismatches, read_weights

INPUT = "x"
SEED = 0


def load(name: str, options: SourceOptions) -> Program:
    """Trace a timm model: input ``x [batch, C, H, W]``, output ``logits`` or ``features``.

    ``weights`` is ``pretrained`` (the default), ``random`` or a file.  The number of classes and of
    input channels follows the file; position tables are resampled to ``resolution``.

    Raises:
        UsageError: unknown model, a resolution it cannot take, weights that do not fit.
        MissingRequirementError: timm or the hub is missing.
        RefusedError: the model cannot be traced.
    """
    options.allow("timm:NAME", "weights", "resolution")
    timm = _timm()
    source = f"timm:{name}"
    _check_name(timm, name)
    weights = "pretrained" if options.weights in (None, "included") else str(options.weights)
    path = None if weights in ("pretrained", "random") else Path(weights)
    state = read_weights(path) if path else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)  # random weights are the same in every run
        model = _create(name, options.resolution, weights == "pretrained", state)
    _check_patches(source, model, options.resolution)
    if path:
        fit(model, _adapted(model, state), origin=str(path), name=source)
    _fuse_attention(model)

    config = timm.data.resolve_model_data_config(model)
    channels, *size = config["input_size"]
    height, width = options.resolution or _own_size(model) or (size[0], size[1])
    channels = _channels(model, channels)
    info = SourceInfo(
        source=source,
        weights=path.name if path else weights,
        digest=digest(path) if path else None,
        preprocessing=_preprocessing(config, channels, height, width),
        labels=None if weights == "random" else _labels(model),
        licence=model.pretrained_cfg.get("license"),
    )
    return trace(
        _Named(model),
        {INPUT: torch.zeros(2, channels, height, width)},
        dynamic={INPUT: {0: "batch"}},
        info=info,
        outputs=["logits" if model.num_classes else "features"],
    )


class _Named(nn.Module):
    """One argument called ``x``, whatever the model calls it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.model(x)
        return result


def _timm() -> Any:
    try:
        import timm
    except ImportError:
        raise missing_extra("timm", "timm", "a source timm:NAME") from None
    return timm


def _check_name(timm: Any, name: str) -> None:
    """Architecture and tag must be known: ``vit_tiny_patch16_224.augreg_in21k``."""
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        hint = nearest(architecture, timm.list_models())
        hint = hint if "did you mean" in hint else "; timm.list_models() lists them"
        raise UsageError(f"timm {timm.__version__} has no model {architecture!r}{hint}")
    tags = timm.models.get_arch_pretrained_cfgs(architecture)
    if tag and name not in tags:
        known = [key.partition(".")[2] for key in tags]
        raise UsageError(f"timm:{architecture} has no weights tagged {tag!r}{nearest(tag, known)}")


def _create(name: str, resolution: tuple[int, int] | None, pretrained: bool, state: State) -> Any:
    """Build the model for the given size, and for the classes and channels of ``state``."""
    timm = _timm()
    config = timm.get_pretrained_cfg(name, allow_unregistered=True)
    kwargs: dict[str, Any] = _sizes(config.to_dict() if config else {}, state)
    with _hub(name) if pretrained else nullcontext():
        if resolution is None:
            return timm.create_model(name, pretrained=pretrained, **kwargs).eval()
        try:
            return timm.create_model(
                name, pretrained=pretrained, img_size=resolution, **kwargs
            ).eval()
        except TypeError as error:  # convolutional: any size will do
            if "img_size" not in str(error):
                raise
            return timm.create_model(name, pretrained=pretrained, **kwargs).eval()
        except (AssertionError, ValueError) as error:
            height, width = resolution
            size = f"{height}x{width}"
            raise UsageError(f"timm:{name} cannot take images of {size}: {error}") from error


def _sizes(config: Mapping[str, Any], state: State) -> dict[str, int]:
    """Number of classes and channels, where the weights tell them by the layers timm names."""
    sizes = {}
    for key, layer, axis in (("num_classes", "classifier", 0), ("in_chans", "first_conv", 1)):
        weight = state.get(f"{config.get(layer)}.weight")
        if weight is not None and weight.ndim > axis:
            sizes[key] = weight.shape[axis]
    return sizes


def _adapted(model: nn.Module, state: State) -> State:
    """Weights in timm's names and sizes; each timm module knows how to convert its own."""
    if not mismatches(model.state_dict(), state):
        return state
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return state
    try:
        return dict(convert(dict(state), model))
    except Exception:  # not weights of this family: the check that follows says what is wrong
        return state


@contextmanager
def _hub(name: str) -> Iterator[None]:
    """Turn the many ways in which a download fails into one sentence."""
    from huggingface_hub import constants

    offline = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = offline or not _reachable(constants.ENDPOINT)
    try:
        yield
    except OSError as error:  # no network, no such file, hub errors
        raise MissingRequirementError(
            f"the pretrained weights of timm:{name} come from the hub, which cannot be reached:"
            " give --weights FILE, or --weights random where only speed matters"
        ) from error
    except RuntimeError as error:
        if "No pretrained weights" not in str(error):
            raise
        raise UsageError(
            f"timm:{name} has no pretrained weights: give --weights FILE or --weights random"
        ) from error
    finally:
        constants.HF_HUB_OFFLINE = offline


def _reachable(endpoint: str) -> bool:
    """Whether the hub's name resolves; without this look the hub client retries for a minute."""
    if any(name.lower() in ("https_proxy", "all_proxy") for name in os.environ):
        return True
    try:
        socket.getaddrinfo(urlsplit(endpoint).hostname, 443)
    except OSError:
        return False
    return True


def _fuse_attention(model: nn.Module) -> None:
    """Keep attention one operator in the graph, whatever TIMM_FUSED_ATTN says."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = True  # type: ignore[assignment]


def _check_patches(source: str, model: nn.Module, resolution: tuple[int, int] | None) -> None:
    """Pixels beyond the last whole patch would be dropped without a word."""
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if resolution is None or not isinstance(patch, tuple):
        return
    for pixels, size in zip(resolution, patch, strict=False):
        if pixels % size:
            raise UsageError(
                f"{source} takes images whose sides are a multiple of its patches of {size} pixels,"
                f" not {pixels}"
            )


def _own_size(model: nn.Module) -> tuple[int, int] | None:
    """The size that the patch embedding was built for."""
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    return (int(size[0]), int(size[1])) if isinstance(size, tuple | list) else None


def _channels(model: Any, default: int) -> int:
    """Input channels of the layer that timm names as the first one."""
    first = model.pretrained_cfg.get("first_conv")
    weight = model.state_dict().get(f"{first}.weight")
    return weight.shape[1] if weight is not None and weight.ndim == 4 else default


def _preprocessing(
    config: Mapping[str, Any], channels: int, height: int, width: int
) -> dict[str, Any] | None:
    if channels not in (1, 3):
        return None
    return {
        "kind": "image",
        "input": INPUT,
        "size": [height, width],
        "channels": channels,
        "mean": [float(v) for v in config["mean"]][:channels],
        "std": [float(v) for v in config["std"]][:channels],
        "interpolation": config["interpolation"],
        "crop_pct": float(config["crop_pct"]),
        "crop_mode": config["crop_mode"],
    }


def _labels(model: Any) -> tuple[str, ...] | None:
    """``"n01440764 tench"`` for ImageNet heads: a folder name of the data set and a word."""
    data = _timm().data
    subset = data.infer_imagenet_subset(model) if model.num_classes else None
    if subset is None:
        return None
    info = data.ImageNetInfo(subset)
    names = (
        f"{synset} {info.label_name_to_description(synset).split(',')[0]}"
        for synset in info.label_names()
    )
    return tuple(names)
