"""What a back end is: one class in one file of this folder, found by its target name.

A new back end subclasses :class:`Backend` and gets a line in ``backends/__init__.py``.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from numpy.typing import NDArray

from thresher.compiler.errors import MissingRequirementError, RefusedError, UsageError
from thresher.runtime.manifest import CALIBRATED, Manifest, Ranges, TensorInfo, installed
from thresher.runtime.provenance import node_source

if TYPE_CHECKING:
    import onnx

Array = NDArray[Any]
Feeds = Mapping[str, Array]
Tell = Callable[[str, int, int], None]  # what is being done, steps done, steps in all (0: unknown)


def silent(what: str, done: int, total: int) -> None:
    """Progress that shows nothing."""


@dataclass(frozen=True)
class Problem:
    """A node that a back end will not take, and why.

    ``source`` is the module of the model that it belongs to, ``inserted`` the pass or the body of an
    operator of ours that it comes from.
    """

    node: str
    op: str
    reason: str
    source: str = ""
    inserted: str = ""

    def __str__(self) -> str:
        place = ", ".join(filter(None, (self.op, self.source, self.inserted)))
        return f"{self.node or 'a node'} ({place}): {self.reason}"


@dataclass(frozen=True)
class Availability:
    """Whether a back end can be built for here; the reason and the command that mends what it lacks."""

    ok: bool
    version: str | None = None
    reason: str = ""
    install: str = ""


class Session(Protocol):
    """A loaded engine.  ``run`` takes checked arrays and returns all outputs by name."""

    details: dict[str, str]

    def run(self, feeds: Feeds) -> dict[str, Array]: ...

    def close(self) -> None: ...


class Backend(ABC):
    """Builds and opens engines for one target.

    ``choice`` is what stands behind the target's name: the GPUs in ``tensorrt-rtx:sm86+sm89``.
    """

    target: ClassVar[str]
    summary: ClassVar[str]
    package: ClassVar[str]
    install: ClassVar[str]
    prefix: ClassVar[str]  # of the files in the folder that it loads
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "fp16")
    multiple: ClassVar[int] = 1  # token counts that are multiples of it run best
    cached: ClassVar[bool] = (
        False  # whether what is built is kept; fingerprint() then has to be whole
    )
    branches: ClassVar[bool] = False  # whether prompts are best told apart by an If
    choices: ClassVar[bool] = False  # whether a choice may follow the target's name

    def __init__(self, choice: str = "") -> None:
        self.choice = choice
        if choice and not self.choices:
            raise UsageError(f"target {self.target!r} leaves nothing to choose: drop ':{choice}'")

    @property
    def name(self) -> str:
        """Target and choice, as the user writes them."""
        return f"{self.target}:{self.choice}" if self.choice else self.target

    def graph_precision(self, precision: str) -> str:
        """In which precision a Program is lowered; calibrated ones are rewritten from there."""
        return "fp32" if precision in CALIBRATED else precision

    def cannot_run(self) -> str:
        """Why engines can be built here but not run, or nothing."""
        return ""

    def check_shapes(  # noqa: B027  (most take any)
        self, specs: Sequence[TensorInfo], ranges: Ranges
    ) -> None:
        """Refuse sizes that the back end cannot build for, before any work.

        Raises:
            UsageError: an axis needs a bound; the message shows how to give it.
        """

    def available(self) -> Availability:
        """Import the package; a failure carries the loader's own words."""
        try:
            importlib.import_module(self.package)
        except ImportError as error:
            return Availability(False, None, str(error), self.install)
        return Availability(True, installed(self.package))

    def demand(self) -> None:
        """Raise MissingRequirementError unless the back end can run here."""
        state = self.available()
        if not state.ok:
            raise MissingRequirementError(
                f"target {self.name!r} cannot run here ({state.reason}): {state.install}"
            )

    @abstractmethod
    def can_take(self, node: onnx.NodeProto, opset: int) -> str | None:
        """None when the back end takes this node, else the reason; a pure predicate.

        ``opset`` is the version of the node's domain that the model imports.
        """

    def problems(self, model: onnx.ModelProto) -> list[Problem]:
        """Every node that the back end refuses, function bodies and branches included."""
        known = {(function.domain, function.name) for function in model.functions}
        found: list[Problem] = []
        for node, opset, body in _nodes(model):
            if (node.domain, node.op_type) in known:
                continue
            reason = self.can_take(node, opset)
            if reason:
                found.append(problem(node, body, reason))
        return found

    def refuse_problems(self, model: onnx.ModelProto) -> None:
        """Raise RefusedError listing the first problems, if there are any."""
        found = self.problems(model)
        if found:
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            raise RefusedError(
                f"target {self.name!r} does not take {'; '.join(map(str, found[:3]))}{more}:"
                " choose another target or another recipe"
            )

    @abstractmethod
    def requires(self, model: onnx.ModelProto) -> dict[str, str]:
        """Packages an engine of this model needs where it runs, as ``{"name": ">=1.18"}``."""

    def free_memory(self) -> int | None:
        """Bytes that engines can take here, or None where that is not known."""
        return None

    def fingerprint(self) -> dict[str, str]:
        """What decides the built files beside the model and what is asked for, by name: versions of
        packages, and the GPU and its driver where a build measures them.  Part of the cache's key."""
        return {self.package: self.available().version or ""}

    def build(self, folder: Path, manifest: Manifest, tell: Tell = silent) -> dict[str, Any]:
        """Turn ``folder/model.onnx`` into the back end's own files.

        Returns what is to be told about them; ``manifest`` lists no files yet.  An interrupt ends the
        build as soon as the back end can.

        Raises:
            RefusedError: the back end does not take the model.
        """
        return {}

    @abstractmethod
    def open(self, folder: Path, manifest: Manifest, threads: int) -> Session:
        """Load the engine in ``folder``; the manifest has been checked by the caller."""


def problem(node: onnx.NodeProto, body: str, reason: str) -> Problem:
    """What is wrong with a node of the graph or of a function's ``body``."""
    module, inserted = node_source(node)
    inserted = f"the body of {body}" if body else inserted and f"the pass {inserted}"
    return Problem(node.name, _operator(node.domain, node.op_type), reason, module, inserted)


def _nodes(model: onnx.ModelProto) -> Iterator[tuple[onnx.NodeProto, int, str]]:
    """All nodes with the opset version of their domain, and the function whose body they are in."""
    for node, opset in _walk(model.graph.node, _versions(model.opset_import)):
        yield node, opset, ""
    for function in model.functions:
        body = _operator(function.domain, function.name)
        for node, opset in _walk(function.node, _versions(function.opset_import)):
            yield node, opset, body


def _walk(nodes: Any, opsets: Mapping[str, int]) -> Iterator[tuple[onnx.NodeProto, int]]:
    for node in nodes:
        yield node, opsets.get(node.domain, 1)
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                yield from _walk(graph.node, opsets)


def _versions(imports: Any) -> dict[str, int]:
    return {entry.domain: entry.version for entry in imports}


def _operator(domain: str, name: str) -> str:
    return f"{domain}::{name}" if domain else name
