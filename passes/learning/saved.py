"""What a pass measured or trained, kept so that the same graph can be made again without it.

The tensors lie in one safetensors file beside the saved recipe, with the digest of the weights that
they belong to.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from thresher.compiler.contract import FACTS
from thresher.compiler.errors import UsageError
from thresher.compiler.program import Program

DIGEST = "digest"


def numbered(program: Program, name: str) -> str:
    """What the files of a pass are called: its name, from its second run on with the run's number."""
    before = sum(record.name == name for record in program.history)
    return f"{name}-{before + 1}" if before else name


def read(
    path: Path,
    digest: str,
    name: str,
    sites: Iterable[str],
    facts: Mapping[str, str] | None = None,
) -> dict[str, Tensor]:
    """The tensors of a calibration that was saved beside a recipe, by ``"what.site"``.

    Raises:
        UsageError: there is no such file, it is damaged, holds nothing for one of the ``sites``, or
            belongs to other weights or options.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise UsageError(
            f"pass {name!r}: there is no calibration {path}: copy the file that lies beside the"
            " recipe, or calibrate anew with --data DATA and calibration=null"
        )
    try:
        with safe_open(path, framework="pt") as file:
            told = json.loads((file.metadata() or {}).get(FACTS, "{}"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UsageError(
            f"pass {name!r}: {path} is no calibration that can be read: {error}"
        ) from error
    if told.get(DIGEST) != digest:
        raise UsageError(
            f"pass {name!r}: the calibration {path} was made on other weights than these: use the"
            " checkpoint that it was made on, or calibrate anew with --data DATA and calibration=null"
        )
    for key, value in (facts or {}).items():
        if told.get(key) != value:
            raise UsageError(
                f"pass {name!r}: the calibration {path} was made with {key}={told.get(key)} and not"
                f" {key}={value}: leave that option as it was, or calibrate anew with --data DATA and"
                " calibration=null"
            )
    held = {key.partition(".")[2] for key in tensors}
    missing = next((site for site in sites if site not in held), None)
    if missing is not None:
        raise UsageError(
            f"pass {name!r}: the calibration {path} holds nothing for {missing}: leave the options that"
            " say which linears as they were, or calibrate anew with --data DATA and calibration=null"
        )
    return tensors
