"""Trained routers kept beside a recipe, so that any tau can be had without training."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from thresher.compiler.analysis.ffn import FFN
from thresher.passes.adaptive.job import Job
from thresher.passes.experts.calibrate import GRID
from thresher.passes.experts.job import ExpertsOptions, Routed
from thresher.passes.experts.mixture import Mixture
from thresher.passes.experts.train import cut
from thresher.passes.learning import saved

TAU, SHARE, CURVE, ORDER = "tau", "share", "curve", "order"


def tensors(found: Routed, ffns: Sequence[FFN]) -> dict[str, Tensor]:
    """Orders of neurons, routers, shares and curves by ``"what.layer"``, and the tau that they were measured at."""
    kept = {TAU: torch.tensor(found.tau, dtype=torch.float64)}
    for ffn, mixture, order, share, curve in zip(
        ffns, found.mixtures, found.orders, found.shares, found.curves, strict=True
    ):
        own = {ORDER: order, SHARE: torch.tensor(share, dtype=torch.float64), CURVE: curve}
        own |= {name: parameter.detach() for name, parameter in mixture.router().items()}
        kept |= {f"{name}.{ffn.layer}": tensor for name, tensor in own.items()}
    return kept


def restored(job: Job[FFN, ExpertsOptions], name: str, digest: str) -> Routed:
    """What :func:`tensors` kept, at its tau or at the one asked for, for which curves tell the shares.

    Raises:
        UsageError: the file is not of this model and these options.
    """
    path = job.options.calibration
    assert path is not None
    sites = [str(ffn.layer) for ffn in job.sites]
    kept = saved.read(path, digest, name, sites, job.options.facts)
    chosen = [kept[f"{ORDER}.{site}"] for site in sites]
    mixtures = []
    for site, experts in zip(sites, cut(job, chosen), strict=True):
        own = {key.partition(".")[0]: t for key, t in kept.items() if key.endswith(f".{site}")}
        mixtures.append(Mixture(experts, own))
    curves = [kept[f"{CURVE}.{site}"] for site in sites]
    made_for = float(kept[TAU])
    tau = made_for if job.options.tau is None else job.options.tau
    if tau == made_for:
        shares = tuple(float(kept[f"{SHARE}.{site}"]) for site in sites)
    else:
        shares = tuple(float(np.interp(tau, GRID, curve)) for curve in curves)
    return Routed(mixtures, chosen, tau, shares, curves)
