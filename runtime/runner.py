"""One shape for everything that can be run: an engine, or a Program run eagerly by torch."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Protocol

from thresher.runtime.conditions import default_threads
from thresher.runtime.feeds import PLUS, Array, checked
from thresher.runtime.manifest import Ranges, TensorInfo

if TYPE_CHECKING:
    import torch

    from thresher.compiler.program import Program


class Runnable(Protocol):
    """What ``verify`` and ``profile`` take.

    ``reduced``: it drops, merges or skips tokens; ``changed_by``: passes that changed its outputs by more than
    rounding, those among them, each with its options.
    """

    @property
    def name(self) -> str: ...

    @property
    def inputs(self) -> tuple[TensorInfo, ...]: ...

    @property
    def outputs(self) -> tuple[TensorInfo, ...]: ...

    @property
    def ranges(self) -> Ranges: ...

    @property
    def precision(self) -> str: ...

    @property
    def reduced(self) -> bool: ...

    @property
    def changed_by(self) -> tuple[str, ...]: ...

    def run(self, inputs: Mapping[str, Array], /) -> dict[str, Array]: ...


class ProgramRunner:
    """A Program run eagerly, with ``threads`` of torch's."""

    precision = "fp32"

    def __init__(self, program: Program, *, name: str | None = None, threads: int | None = None):
        self.threads = default_threads() if threads is None else threads
        self.program = program
        self.name = name or program.info.source
        self.inputs = tuple(tensor_info(spec) for spec in program.inputs)
        self.outputs = tuple(tensor_info(spec) for spec in program.outputs)
        self.ranges: Ranges = symbol_ranges(program)
        records = [asdict(record) for record in program.history]
        self.reduced, self.changed_by = choosing(records), changing(records)
        self.preprocessing = program.info.preprocessing
        self.labels = program.info.labels
        self._module = program.module()  # kept, as making it takes longer than a run
        calling = program.exported.call_spec.in_spec
        assert calling is not None
        self._calling = calling
        self._weights: dict[str, torch.Tensor] = {}  # in place of the module's own

    def rounded(self, share: float, seed: int) -> ProgramRunner:
        """The same Program with every stored float off by up to ``share`` of itself, at random."""
        import torch

        generator = torch.Generator().manual_seed(seed)

        def off(value: torch.Tensor) -> torch.Tensor:
            noise = 2 * torch.rand(value.shape, generator=generator) - 1
            return value.detach() * (1 + share * noise).to(value.dtype)

        twin, stored = copy.copy(self), self._module.state_dict()
        twin._weights = {name: off(v) for name, v in stored.items() if v.is_floating_point()}
        return twin

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run once; inputs are checked as an engine checks them.

        Raises:
            UsageError: an input is unknown, missing, or has the wrong dtype, rank or size.
        """
        import torch
        from torch.utils import _pytree as pytree

        feeds = checked(inputs, self.inputs, self.ranges)
        values = [torch.from_numpy(_own(feeds[spec.name])) for spec in self.inputs]
        args, kwargs = pytree.tree_unflatten(values, self._calling)
        with torch.inference_mode(), _torch_threads(self.threads):
            if self._weights:
                made = torch.func.functional_call(self._module, self._weights, args, kwargs)
            else:
                made = self._module(*args, **kwargs)
        names = (spec.name for spec in self.outputs)
        results = zip(names, pytree.tree_leaves(made), strict=True)
        return {name: value.numpy() for name, value in results}


@contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    """So many threads for what is done inside; the setting is the whole process's."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def choosing(records: Iterable[Mapping[str, Any]]) -> bool:
    """Whether a pass in a history, as plain data, left it to scores which tokens go or are skipped."""
    return any(record["applied"] and record.get("chooses_tokens", False) for record in records)


def changing(records: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    """The passes in a history, as plain data, that changed more than rounding does.

    Each is its name and the options that it resolved to, as one canonical text, since ``r=4`` and
    ``r=8`` are two functions.
    """
    return tuple(
        f"{record['name']} {json.dumps(record['options'], sort_keys=True)}"
        for record in records
        if record["applied"] and not record.get("exact", False)
    )


def _own(value: Array) -> Array:
    """torch warns about arrays that it may not write to."""
    return value if value.flags.writeable else value.copy()


def tensor_info(spec: Any) -> TensorInfo:
    """The manifest's form of a Program's TensorSpec."""
    return TensorInfo(name=spec.name, dtype=spec.dtype, shape=tuple(spec.shape))


def symbol_ranges(program: Program) -> dict[str, tuple[int, int | None]]:
    """Allowed sizes of the symbolic axes by the user's names; None is no upper bound."""
    ranges: dict[str, tuple[int, int | None]] = {}
    names = program.symbols
    for symbol, bounds in program.exported.range_constraints.items():
        name = names.get(str(symbol))
        if name is not None and PLUS not in name:
            low = _finite(bounds.lower)
            ranges[name] = (1 if low is None else low, _finite(bounds.upper))
    return ranges


def _finite(bound: Any) -> int | None:
    """A bound of a value range as an int; torch writes infinity as a symbol or a huge number."""
    try:
        value = int(bound)
    except (TypeError, ValueError, OverflowError, AttributeError):
        return None
    return value if value < 2**31 else None
