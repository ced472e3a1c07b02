"""Digests by which what was measured or trained on a Program knows it again."""

from __future__ import annotations

import hashlib

import torch

from thresher.compiler.program import Program, stored_tensors


def weights_digest(program: Program) -> str:
    """SHA-256 of all weights of a Program, by name, those that passes stored included."""
    digest = hashlib.sha256()
    for name, weight in sorted(stored_tensors(program.exported).items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def program_digest(program: Program) -> str:
    """SHA-256 of the graph, of the passes behind it with their options, and of all weights."""
    return hashlib.sha256(f"{program.text()}{weights_digest(program)}".encode()).hexdigest()
