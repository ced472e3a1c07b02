"""Program: the IR.  A traced transformer with its contract, its history and its token ledger."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from torch import fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from thresher.compiler.archive import read_archive
from thresher.compiler.errors import UsageError
from thresher.compiler.files import atomic_folder

FORMAT = 1
ARCHIVE, RECORD = "program.pt2", "program.yaml"


@dataclass(frozen=True)
class SourceInfo:
    """Where a Program came from.  Every field is plain data and travels into the engine's manifest."""

    source: str
    weights: str = "included"
    digest: str | None = None
    preprocessing: dict[str, Any] | None = None
    labels: tuple[str, ...] | None = None
    licence: str | None = None


@dataclass(frozen=True)
class Refusal:
    """Why a pass left a node alone."""

    node: str
    reason: str


@dataclass(frozen=True)
class PassRecord:
    """One applied pass: its options, truthful counts, and its running time in seconds.

    ``exact``: it changed the outputs by no more than rounding.  ``chooses_tokens``: it drops, merges or
    skips tokens by their scores.
    """

    name: str
    options: dict[str, Any]
    matched: int
    applied: int
    refused: tuple[Refusal, ...] = ()
    seconds: float = 0.0
    details: dict[str, Any] = field(default_factory=dict)
    exact: bool = False
    chooses_tokens: bool = False


@dataclass(frozen=True)
class LedgerEntry:
    """How one reduction site maps tokens.

    ``node`` names the step's node; its outputs number ``slot`` and ``kept`` are int64 tensors:
    ``slot[b, i]`` is the position at which incoming token i lives afterwards (-1: dropped),
    ``kept[b, j]`` the incoming position that token j stands for.  ``appended`` of the incoming tokens, at the
    end, stand for none of the input: a pass put them there.
    """

    site: str
    layer: int
    method: str
    combine: str
    tokens_in: int | str
    tokens_out: int | str
    protected: int
    node: str
    slot: int
    kept: int
    appended: int = 0


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype (``"float32"``) and shape of an input or output; a string is a symbolic axis."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


def provenance(node: fx.Node) -> dict[str, Any]:
    """What a pass noted on a node it made: ``{"pass": ..., "site": ...}``; empty for imported nodes.

    ``"replaces"`` is true on a node that stands for one of the model and computes the same kind of thing.
    """
    return cast(dict[str, Any], node.meta.get("custom", {}).get("thresher", {}))


def stored_tensors(exported: ExportedProgram) -> dict[str, torch.Tensor]:
    """Tensors that the graph reads, by name: weights, buffers, and what passes stored as constants."""
    named = {spec.target for spec in exported.graph_signature.input_specs if spec.target}
    stored: dict[str, Any] = {**exported.constants, **exported.state_dict}
    return {k: t for k, t in stored.items() if k in named and isinstance(t, torch.Tensor)}


def module_path(node: fx.Node) -> str:
    """Dotted path of the innermost module that a node came from, or ``""``."""
    stack = node.meta.get("nn_module_stack") or {}
    path = str(next(reversed(stack.values()))[0]) if stack else ""
    return "" if path.startswith("_empty_nn_module_stack") else path


@dataclass(frozen=True)
class Program:
    """A traced model after ``run_decompositions({})``.

    ``axes`` names the symbolic axes of the inputs (``{"x": {0: "batch"}}``), ``output_names`` the
    outputs in order, ``input_names`` the inputs where they are not called as the graph's nodes are.
    A Program is never changed: passes return a new one.
    """

    exported: ExportedProgram
    info: SourceInfo
    axes: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    output_names: tuple[str, ...] = ()
    history: tuple[PassRecord, ...] = ()
    ledger: tuple[LedgerEntry, ...] = ()
    input_names: tuple[str, ...] = ()

    @property
    def graph(self) -> fx.Graph:
        return cast(fx.Graph, self.exported.graph)

    @property
    def stage(self) -> str:
        """``"imported"`` until a pass has run, then ``"optimised"``."""
        return "optimised" if self.history else "imported"

    @property
    def symbols(self) -> dict[str, str]:
        """Symbol of the shape environment (``"s77"``) to the user's name (``"batch"``)."""
        names: dict[str, str] = {}
        for given, node in self.named_inputs():
            for axis, name in self.axes.get(given, {}).items():
                size = node.meta["val"].shape[axis]
                if isinstance(size, torch.SymInt):
                    names.setdefault(str(size.node.expr), name)
        return names

    def input_nodes(self) -> list[fx.Node]:
        """Placeholders of the user's inputs, in order."""
        wanted = set(self.exported.graph_signature.user_inputs)
        return [n for n in self.graph.nodes if n.op == "placeholder" and n.name in wanted]

    def named_inputs(self) -> list[tuple[str, fx.Node]]:
        """The user's inputs in order, each with its name."""
        nodes = self.input_nodes()
        names = self.input_names or tuple(node.name for node in nodes)
        return list(zip(names, nodes, strict=True))

    def placeholder_values(self, inputs: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """Weights, constants and ``inputs`` as the graph takes them, in order; weights are detached."""
        stored = {**self.exported.state_dict, **self.exported.constants}
        given = {
            spec.arg.name: stored[spec.target].detach()
            for spec in self.exported.graph_signature.input_specs
            if spec.target
        }
        given |= {node.name: inputs[name] for name, node in self.named_inputs() if name in inputs}
        return [given[node.name] for node in self.graph.nodes if node.op == "placeholder"]

    def output_nodes(self) -> list[fx.Node]:
        """Nodes returned to the user, in order."""
        output = next(iter(reversed(self.graph.nodes)))
        return list(output.args[0])

    def describe(self, node: fx.Node, name: str | None = None) -> TensorSpec:
        """Spec of a tensor node, with symbols under the user's names."""
        value = node.meta["val"]
        symbols = self.symbols
        shape = tuple(
            size if isinstance(size, int) else _named(size, symbols) for size in value.shape
        )
        return TensorSpec(name or node.name, str(value.dtype).removeprefix("torch."), shape)

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return tuple(self.describe(node, name) for name, node in self.named_inputs())

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        nodes = self.output_nodes()
        names = self.output_names or tuple(node.name for node in nodes)
        return tuple(self.describe(node, name) for node, name in zip(nodes, names, strict=True))

    def module(self) -> torch.nn.Module:
        """The Program as an eager module, with the calling convention of the traced model."""
        import thresher.kernels.ops  # noqa: F401  (registers the operators that the graph may call)

        return self.exported.module(check_guards=False)

    def run(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Run eagerly without gradients; inputs and outputs by name."""
        arguments = [inputs[name] for name, _ in self.named_inputs()]
        spec = self.exported.call_spec.in_spec
        assert spec is not None
        args, kwargs = pytree.tree_unflatten(arguments, spec)
        with torch.inference_mode():
            results = pytree.tree_leaves(self.module()(*args, **kwargs))
        return dict(zip((spec.name for spec in self.outputs), results, strict=True))

    def text(self) -> str:
        """Readable listing, one line per node; weights never in it."""
        from thresher.compiler.text import render

        return render(self)

    def save(self, folder: Path, *, overwrite: bool = False) -> None:
        """Write ``program.pt2`` and ``program.yaml`` to ``folder``, whole or not at all."""
        with atomic_folder(folder, overwrite=overwrite) as target:
            self.write(target)

    def write(self, folder: Path) -> None:
        """Write the files into an existing folder."""
        examples, self.exported._example_inputs = self.exported._example_inputs, None
        try:
            torch.export.save(self.exported, folder / ARCHIVE)
        finally:
            self.exported._example_inputs = examples
        record = {
            "format": FORMAT,
            "thresher": version("thresher"),
            "torch": str(torch.__version__),
            "info": dataclasses.asdict(self.info),
            "axes": {name: dict(axes) for name, axes in self.axes.items()},
            "outputs": list(self.output_names),
            "inputs": list(self.input_names),
            "history": [dataclasses.asdict(entry) for entry in self.history],
            "ledger": [dataclasses.asdict(entry) for entry in self.ledger],
        }
        (folder / RECORD).write_text(yaml.safe_dump(_plain(record), sort_keys=False))

    @staticmethod
    def load(folder: Path) -> Program:
        """Read a folder that :meth:`save` wrote.

        Raises:
            UsageError: the folder is not one of ours, or was written in another format.
        """
        import thresher.kernels.ops  # noqa: F401

        if not (folder / RECORD).is_file() or not (folder / ARCHIVE).is_file():
            raise UsageError(
                f"{folder} is not a folder written by 'thresher optimize': {RECORD} is missing"
            )
        record = yaml.safe_load((folder / RECORD).read_text())
        if record.get("format") != FORMAT:
            raise UsageError(
                f"{folder / RECORD} has format {record.get('format')!r} and this thresher reads {FORMAT}:"
                " run 'thresher optimize' again"
            )
        info = record["info"] | {"labels": tuple(record["info"]["labels"] or ()) or None}
        return Program(
            exported=read_archive(folder / ARCHIVE),
            info=SourceInfo(**info),
            axes=record["axes"],
            output_names=tuple(record["outputs"]),
            input_names=tuple(record.get("inputs", ())),
            history=tuple(_read_record(entry) for entry in record["history"]),
            ledger=tuple(LedgerEntry(**entry) for entry in record["ledger"]),
        )


def _named(size: torch.SymInt, symbols: Mapping[str, str]) -> str:
    text = str(size.node.expr)
    named = re.sub(r"s\d+", lambda match: symbols.get(match[0], match[0]), text)
    return symbols.get(text, named)


def _read_record(entry: dict[str, Any]) -> PassRecord:
    refused = tuple(Refusal(**refusal) for refusal in entry.pop("refused"))
    return PassRecord(refused=refused, **entry)


def _plain(value: Any) -> Any:
    """Tuples to lists and paths to text, so that YAML stays free of tags."""
    if isinstance(value, Mapping):
        return {str(k) if isinstance(k, Path) else k: _plain(v) for k, v in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
