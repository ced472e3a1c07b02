"""Trained modules: kept beside a recipe, and taken from checkpoints of the published code."""

from __future__ import annotations

from torch import Tensor

from thresher.compiler.errors import UsageError
from thresher.passes.learning import saved
from thresher.passes.tokens.modules.job import Job
from thresher.passes.tokens.modules.module import Place
from thresher.passes.tokens.reduce import Weights


def tensors(weights: Weights) -> dict[str, Tensor]:
    """All tensors by ``"name.layer"``."""
    return {
        f"{name}.{layer}": tensor.detach()
        for layer, module in weights.items()
        for name, tensor in module.items()
    }


def restored(job: Job, digest: str) -> Weights:
    """What :func:`tensors` kept.

    Raises:
        UsageError: the file is not of this model and these options.
    """
    path = job.options.calibration
    assert path is not None
    sites = [str(place.layer) for place in job.places]
    found = saved.read(path, digest, job.name, sites, job.facts)
    return {
        place.layer: {name: found[f"{name}.{place.layer}"] for name in job.module.shapes(place)}
        for place in job.places
    }


def published(job: Job) -> Weights:
    """The modules of a checkpoint, by the names that the published code gives them.

    Raises:
        UsageError: there is no such file, it is damaged, or a tensor is missing or of another shape.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = job.options.published
    assert path is not None
    if not path.is_file():
        raise UsageError(
            f"pass {job.name!r}: there is no file {path}: give one that ends in .safetensors"
        )
    try:
        stored = load_file(path)
    except SafetensorError as error:
        raise UsageError(
            f"pass {job.name!r}: {path} is no safetensors file ({error}): save the state dict of the"
            " published code as one"
        ) from error
    return {place.layer: _adopted(job, place, stored) for place in job.places}


def _adopted(job: Job, place: Place, stored: dict[str, Tensor]) -> dict[str, Tensor]:
    path, names = job.options.published, job.module.published(place)
    for key in names.values():
        if key not in stored:
            raise UsageError(
                f"pass {job.name!r}: {path} has no tensor {key!r} for the module behind block"
                f" {place.layer}: give the checkpoint of a model with as many modules, or other layers"
            )
    found = job.module.adopted({name: stored[key].float() for name, key in names.items()})
    for name, shape in job.module.shapes(place).items():
        if found[name].shape != shape:
            raise UsageError(
                f"pass {job.name!r}: {names[name]!r} of {path} is {list(found[name].shape)}, and the module"
                f" behind block {place.layer} needs {list(shape)}: ask for the counts and the model that it"
                " was trained for"
            )
    return {name: found[name] for name in job.module.shapes(place)}
