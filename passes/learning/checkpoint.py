"""State of an unfinished training, so that it goes on where it stopped."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from thresher.compiler.errors import UsageError
from thresher.compiler.files import atomic_file


def load(path: Path, fingerprint: Mapping[str, Any]) -> dict[str, Any] | None:
    """The state that :func:`save` wrote, or None where there is none.

    Raises:
        UsageError: the file is damaged, or belongs to another run; names what differs.
    """
    if not path.is_file():
        return None
    try:
        stored: dict[str, Any] = torch.load(path, weights_only=True)
        theirs = dict(stored["fingerprint"])
    except Exception as error:
        raise UsageError(
            f"{path} cannot be read as a checkpoint ({type(error).__name__}): delete it to start anew"
        ) from error
    differing = sorted(
        key for key in {*fingerprint, *theirs} if fingerprint.get(key) != theirs.get(key)
    )
    if differing:
        key = differing[0]
        raise UsageError(
            f"{path} belongs to another run ({key} was {theirs.get(key)!r} and is"
            f" {fingerprint.get(key)!r}): repeat that command, or delete the file to start anew"
        )
    return stored


def save(path: Path, fingerprint: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Write the state whole or not at all."""
    with atomic_file(path) as partial:
        torch.save({"fingerprint": dict(fingerprint), **state}, partial)
