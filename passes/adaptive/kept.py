"""Trained modules kept beside a recipe, so that the same graph can be made again without training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from thresher.compiler import workers
from thresher.compiler.errors import UsageError
from thresher.passes.adaptive.calibrate import calibrated, shares
from thresher.passes.adaptive.forward import AdaptiveForward
from thresher.passes.adaptive.job import AcmOptions, Distilled, Job
from thresher.passes.adaptive.learners import Learners
from thresher.passes.adaptive.sites import Site
from thresher.passes.learning import saved
from thresher.passes.learning.batches import Batches

BUDGET, SHARE, KEPT = "budget", "share", "kept"


def tensors(found: Distilled, sites: Sequence[Site], budget: float) -> dict[str, Tensor]:
    """Weights and numbers of modules by ``"what.layer"``, the share of all work, the budget that gates meet."""
    numbers = {BUDGET: budget, SHARE: found.share}
    kept = {name: torch.tensor(n, dtype=torch.float64) for name, n in numbers.items()}
    for place, site in enumerate(sites):
        facts = {SHARE: found.shares[place], KEPT: found.kept[place]}
        kept |= {
            f"{k}.{site.layer}": torch.tensor(v, dtype=torch.float64) for k, v in facts.items()
        }
        weights = found.modules[place].named_parameters()
        kept |= {f"{name}.{site.layer}": p.detach() for name, p in weights}
    return kept


def restored(job: Job[Site, AcmOptions], name: str, digest: str) -> Distilled:
    """What :func:`tensors` kept; gates are tilted anew on data if another budget is asked for.

    Raises:
        UsageError: the file is not of this model and these options, or another budget needs data.
    """
    path, wanted = job.options.calibration, job.options.budget
    assert path is not None
    sites = [str(site.layer) for site in job.sites]
    kept = saved.read(path, digest, name, sites, job.options.facts)
    modules = [_module(kept, site) for site in job.sites]
    told, begun = (tuple(float(kept[f"{k}.{s}"]) for s in sites) for k in (SHARE, KEPT))
    made_for = float(kept[BUDGET])
    if made_for == wanted:
        return Distilled(modules, begun, told, float(kept[SHARE]))
    data = job.context.data
    if data is None:
        raise UsageError(
            f"pass {name!r}: the gates of {path} meet budget={made_for:g}, and for {wanted:g} they must"
            " be tilted on data: add --learn-data DATA"
        )
    batches = Batches(data, job.context.batch, job.context.seed, labels=False)
    forward = AdaptiveForward(job.program, job.sites, modules)
    with workers.joined():
        tilt = calibrated(forward, modules, batches, wanted)
        found, share = shares(forward, modules, batches.held_out())
    return Distilled(modules, begun, tuple(found), share, tilt)


def _module(kept: dict[str, Tensor], site: Site) -> Learners:
    named = (key.partition(".") for key in kept)
    own = {name: kept[f"{name}.{layer}"] for name, _, layer in named if layer == str(site.layer)}
    assert site.activation is not None
    return Learners({n: t for n, t in own.items() if n not in (SHARE, KEPT)}, site.activation)
