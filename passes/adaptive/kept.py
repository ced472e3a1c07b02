"""Trained modules kept beside a recipe, so that the same graph can be made again without training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from thresher.compiler import workers
from thresher.compiler.analysis.ffn import FFN
from thresher.compiler.errors import UsageError
from thresher.passes.adaptive.calibrate import calibrated, shares
from thresher.passes.adaptive.forward import AdaptiveForward
from thresher.passes.adaptive.job import AcmOptions, Distilled, Job
from thresher.passes.adaptive.learners import Learners
from thresher.passes.learning.batches import Batches
from thresher.passes.sparsity import calibration

BUDGET, SHARE = "budget", "share"


def tensors(found: Distilled, ffns: Sequence[FFN], budget: float) -> dict[str, Tensor]:
    """Weights and shares by ``"what.layer"``, the share of all work, and the budget that the gates meet."""
    numbers = {BUDGET: budget, SHARE: found.share}
    kept = {name: torch.tensor(n, dtype=torch.float64) for name, n in numbers.items()}
    for ffn, module, share in zip(ffns, found.modules, found.shares, strict=True):
        kept[f"{SHARE}.{ffn.layer}"] = torch.tensor(share, dtype=torch.float64)
        kept |= {f"{name}.{ffn.layer}": p.detach() for name, p in module.named_parameters()}
    return kept


def restored(job: Job[AcmOptions], name: str, digest: str) -> Distilled:
    """What :func:`tensors` kept; gates are tilted anew on data if another budget is asked for.

    Raises:
        UsageError: the file is not of this model and these options, or another budget needs data.
    """
    path, wanted = job.options.calibration, job.options.budget
    assert path is not None
    sites = [str(ffn.layer) for ffn in job.ffns]
    kept = calibration.read(path, digest, name, sites, job.options.facts)
    modules = [_module(kept, ffn) for ffn in job.ffns]
    told = tuple(float(kept[f"{SHARE}.{site}"]) for site in sites)
    made_for = float(kept[BUDGET])
    if made_for == wanted:
        return Distilled(modules, told, float(kept[SHARE]))
    data = job.context.data
    if data is None:
        raise UsageError(
            f"pass {name!r}: the gates of {path} meet budget={made_for:g}, and for {wanted:g} they must"
            " be tilted on data: add --learn-data DATA"
        )
    batches = Batches(data, job.context.batch, job.context.seed, labels=False)
    forward = AdaptiveForward(job.program, job.ffns, modules)
    with workers.joined():
        tilt = calibrated(forward, modules, batches, wanted)
        found, share = shares(forward, modules, batches.held_out())
    return Distilled(modules, tuple(found), share, tilt)


def _module(kept: dict[str, Tensor], ffn: FFN) -> Learners:
    own = {key.partition(".")[0]: t for key, t in kept.items() if key.endswith(f".{ffn.layer}")}
    own.pop(SHARE)
    assert ffn.form is not None
    return Learners(own, ffn.form.activation)
