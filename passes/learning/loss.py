"""What a search is judged by: labels where the model classifies, the dense model itself elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from thresher.compiler.contract import Dataset
from thresher.compiler.errors import UsageError
from thresher.compiler.program import Program

Outputs = Mapping[str, Tensor]
Loss = Callable[[Outputs, Outputs, Tensor | None], Tensor]
SMOOTHING = 0.1  # label smoothing of the DeiT recipe that DiffRate trains with


def choose(program: Program, data: Dataset, wanted: str) -> tuple[str, Loss]:
    """The loss ``"labels"`` or ``"dense"``; ``"auto"`` takes labels if there are classes.

    Returns:
        its name, and a function of (outputs, the dense model's outputs, labels ``[B]``).

    Raises:
        UsageError: labels are wanted and the data or the model has none.
    """
    logits = _class_output(program)
    labelled = data.labels is not None and np.issubdtype(data.labels.dtype, np.integer)
    if wanted == "labels" and not labelled:
        raise UsageError(
            f"loss=labels needs class labels and {data.name} has none: give loss=dense"
        )
    if wanted == "labels" and logits is None:
        raise UsageError("loss=labels needs a model that answers with classes: give loss=dense")
    if wanted == "dense" or not labelled or logits is None:
        return "dense", distance

    def cross_entropy(found: Outputs, dense: Outputs, labels: Tensor | None) -> Tensor:
        assert labels is not None
        return F.cross_entropy(found[logits], labels, label_smoothing=SMOOTHING)

    return "labels", cross_entropy


def distillation(program: Program, data: Dataset, wanted: str) -> tuple[str, Loss]:
    """As :func:`choose`, with the dense model as a teacher.

    Where there are classes its answers count, by their divergence ``KL(dense | found)``, in addition to the
    labels or without them; elsewhere the loss is :func:`distance`.
    """
    name, task = choose(program, data, wanted)
    logits = _class_output(program)
    if logits is None:
        return name, task

    def taught(found: Outputs, dense: Outputs, labels: Tensor | None) -> Tensor:
        ours, theirs = (o[logits].float().log_softmax(-1) for o in (found, dense))
        divergence = F.kl_div(ours, theirs, reduction="batchmean", log_target=True)
        return divergence + task(found, dense, labels) if name == "labels" else divergence

    return name, taught


def _class_output(program: Program) -> str | None:
    """The output that answers with classes, if any does."""
    name = next((o.name for o in program.outputs if len(o.shape) == 2), None)
    return name if name == "logits" or program.info.labels is not None else None


def unpadded(outputs: Outputs, alive: Tensor | None) -> dict[str, Tensor]:
    """Vectors of tokens that are padding made zero, which leaves them out of every distance.

    ``alive``: ``[B, N]``, no padding; None where nobody knows.  Outputs of another shape than
    ``[B, N, C]`` stay as they are.
    """
    return {
        name: value * alive[..., None].to(value.dtype)
        if alive is not None and value.dim() == 3 and value.shape[:2] == alive.shape
        else value
        for name, value in outputs.items()
    }


def distance(found: Outputs, dense: Outputs, labels: Tensor | None) -> Tensor:
    """One less the mean cosine to the dense model's vectors, averaged over outputs."""
    terms = []
    for name, value in found.items():
        a, b = value.float().flatten(1), dense[name].float().flatten(1)
        terms.append(1 - F.cosine_similarity(a, b, dim=1).mean())
    return torch.stack(terms).mean()
