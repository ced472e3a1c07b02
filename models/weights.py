"""Weight files: read without executing anything, fitted to a model, faults told in one sentence."""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import pickle
import re
import struct
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from thresher.compiler.errors import UsageError

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
State = dict[str, Tensor]

_log = logging.getLogger(__name__)
_WRAPPERS = ("state_dict", "model", "model_state_dict", "module", "state_dict_ema", "model_ema")
_PREFIXES = ("module.", "_orig_mod.", "model.")  # data parallel, torch.compile, Lightning
_SHOWN = 3


def digest(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal text."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_weights(path: Path) -> State:
    """The tensors of a weight file by name; wrapper dictionaries are taken off.

    Nothing is unpickled but tensors and plain containers, so an untrusted file is safe to name.

    Raises:
        UsageError: no such file, unknown suffix, damaged file, or a pickle of other things.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise UsageError(f"the weight file {path} {what}: give a file that ends in {_or(SUFFIXES)}")
    if path.suffix not in SUFFIXES:
        raise UsageError(
            f"{path} is not known as a weight file: give a file that ends in {_or(SUFFIXES)}"
        )
    state = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    if not state:
        raise UsageError(f"{path} holds no tensors: give a file with the model's state dict")
    return state


def fit(model: nn.Module, state: Mapping[str, Tensor], *, origin: str, name: str) -> None:
    """Put ``state`` into ``model``; every tensor of the model must be there with its shape.

    Args:
        origin: what the tensors were read from, for the messages.
        name: what the model is called, for the messages.

    Raises:
        UsageError: names or shapes differ; the message counts them and shows the first ones.
    """
    own = model.state_dict()
    state = _without_prefix(state, own)
    if faults := mismatches(own, state):
        raise UsageError(
            f"the weights in {origin} do not fit {name}: {faults};"
            " give weights of that architecture"
        )
    # assign=False: values are copied into the model's own dtype
    model.load_state_dict(state, strict=False)
    warn_unless_finite(model.state_dict(), origin)


def mismatches(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    """What differs between a model's tensors and the given ones, or ``""``."""
    missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in state if k not in own]
    reshaped = [
        f"{key} is {shape_text(state[key].shape)} and should be {shape_text(value.shape)}"
        for key, value in own.items()
        if key in state and state[key].shape != value.shape
    ]
    return report(missing, unexpected, reshaped, len(own))


def report(missing: list[str], unexpected: list[str], reshaped: list[str], total: int) -> str:
    """The counts and first entries of the three ways not to fit, as part of a sentence."""
    parts = []
    if missing:
        parts.append(f"{len(missing)} of {total} tensors are missing ({_first(missing)})")
    if unexpected:
        parts.append(f"{len(unexpected)} are unexpected ({_first(unexpected)})")
    if reshaped:
        parts.append(f"{len(reshaped)} have another shape ({_first(reshaped)})")
    return ", ".join(parts)


def shape_text(shape: torch.Size | tuple[int, ...]) -> str:
    """``"3x224x224"``, or ``"a scalar"``."""
    return "x".join(map(str, shape)) or "a scalar"


def warn_unless_finite(state: Mapping[str, Tensor], origin: str) -> None:
    """Warn once, by name, of tensors with NaN or infinity in them."""
    bad = [k for k, v in state.items() if v.is_floating_point() and not v.isfinite().all()]
    if bad:
        text = "%s has NaN or infinite values in %d tensors (%s)"
        _log.warning(text, origin, len(bad), _first(bad))


def _read_safetensors(path: Path) -> State:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        reason = _truncation(path) or str(error).splitlines()[0]
        raise UsageError(
            f"{path} is not a whole safetensors file ({reason}): fetch or write it again"
        ) from error


def _truncation(path: Path) -> str:
    """How many bytes a safetensors file lacks, when its header can be read at all."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        start = stream.read(8)
        if len(start) < 8:
            return f"it has only {size} bytes"
        (length,) = struct.unpack("<Q", start)
        if length > size - 8:
            return "its header is cut off"
        try:
            header = json.loads(stream.read(length))
            ends = [v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"]
        except (ValueError, TypeError, KeyError, AttributeError):
            return "its header is no table of tensors"
    need = 8 + length + max(ends, default=0)
    return f"it has {size} bytes and its header promises {need}" if need != size else ""


def _read_pickle(path: Path) -> State:
    """torch.save files through the weights-only unpickler: tensors and plain containers.

    ``argparse.Namespace`` is let through because training scripts store their options in one; it
    is a bag of values whose construction runs nothing.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about the pickle's protocol
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f" (it names {found[1]})" if found else ""
        raise UsageError(
            f"{path} is not a file of plain weights{what}: it was not executed;"
            " save the model's state_dict alone, best with safetensors"
        ) from error
    except Exception as error:  # torch raises many kinds for damaged archives
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        text = f"{path} cannot be read as torch weights ({reason}): save it again"
        raise UsageError(text) from error
    return _unwrap(content, path)


def _unwrap(content: Any, path: Path) -> State:
    """Descend through ``{"model": {...}}`` and the like to the names of tensors."""
    for _ in range(3):
        if not isinstance(content, Mapping):
            break
        inner = [content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping)]
        if not inner:
            return {str(k): v for k, v in content.items() if isinstance(v, Tensor)}
        content = inner[0]
    raise UsageError(
        f"{path} holds {_kind(content)}, not a dictionary of tensors: save the model's state_dict"
    )


def _without_prefix(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> State:
    """Take off a prefix that every name has and the model does not."""
    result = dict(state)
    for prefix in _PREFIXES:
        if all(k.startswith(prefix) for k in result) and not any(k.startswith(prefix) for k in own):
            result = {k.removeprefix(prefix): v for k, v in result.items()}
    return result


def _kind(value: Any) -> str:
    return f"a {type(value).__name__}"


def _first(names: list[str]) -> str:
    more = ", ..." if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _or(names: tuple[str, ...]) -> str:
    return ", ".join(names[:-1]) + " or " + names[-1]
