"""Graph surgery: the one mechanism by which every pass changes a Program.

A :class:`Rewriter` copies the old graph node by node into a new one.  Every value of the new graph
is *computed* by running the operator on fake tensors, never edited, so shapes, dtypes and symbols
are right by construction.  A pass decides, per old node, whether to copy it, to copy it with other
arguments, or to emit something else.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from thresher.compiler.operators import in_any_layout
from thresher.compiler.program import Program

aten = torch.ops.aten
Target = Callable[..., Any]
MORE = "more"  # the argument that holds inputs which passes added


class Rewriter:
    """Builds a new graph from an old one.

    Args:
        program: the Program to rewrite; it stays untouched.
        made_by: name of the pass, noted on every node that the pass emits itself.
    """

    def __init__(self, program: Program, made_by: str) -> None:
        self.old = program
        self.made_by = made_by
        self.graph = fx.Graph()
        self._names = fx.Graph()  # a node for every name that the old graph or the new one has
        for node in program.graph.nodes:
            self._free_name(node.name)
        self.map: dict[fx.Node, fx.Node] = {}
        self._like: fx.Node | None = None
        self._note: dict[str, Any] = {}
        self._mode = next(
            n.meta["val"].fake_mode
            for n in program.graph.nodes
            if hasattr(n.meta.get("val"), "fake_mode")
        )

    # --- copying ------------------------------------------------------------------------------

    def copy(
        self,
        node: fx.Node,
        replace: Mapping[fx.Node, fx.Node] | None = None,
        args: tuple[Any, ...] | None = None,
        target: Target | None = None,
    ) -> fx.Node:
        """Copy a node of the old graph.

        ``replace`` overrides the mapping of operands for this node only, ``args`` the whole positional
        arguments (in terms of new nodes), ``target`` the operator.  ``view`` becomes ``reshape``: what
        comes before it may have another memory layout now.
        """
        if node.op == "placeholder":
            new = self.graph.placeholder(node.name)
            new.meta = copy.copy(node.meta)
            self.map[node] = new
            return new
        chosen: Any = target or in_any_layout(node.target)

        def mapped(n: fx.Node) -> fx.Node:
            return replace[n] if replace and n in replace else self.map[n]

        new_args = fx.node.map_arg(node.args, mapped) if args is None else args
        kwargs = fx.node.map_arg(node.kwargs, mapped)
        new = self._call(chosen, new_args, kwargs, self._name_of(node))
        new.meta = {k: v for k, v in node.meta.items() if k not in ("val", "tensor_meta")} | {
            "val": new.meta["val"]
        }
        self.map[node] = new
        return new

    def call_like(
        self,
        node: fx.Node,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        target: Target | None = None,
    ) -> fx.Node:
        """Copy a node of the old graph with all its arguments given in terms of new nodes."""
        chosen: Any = target or node.target
        new = self._call(chosen, args, kwargs, self._name_of(node))
        new.meta = {k: v for k, v in node.meta.items() if k not in ("val", "tensor_meta")} | {
            "val": new.meta["val"]
        }
        self.map[node] = new
        return new

    # --- emitting -----------------------------------------------------------------------------

    def at(self, node: fx.Node, **note: Any) -> None:
        """Nodes emitted from here on belong to this old node's module; ``note`` goes on each of them."""
        self._like, self._note = node, note

    def emit(self, target: Target, *args: Any, name: str | None = None, **kwargs: Any) -> fx.Node:
        """Append a call of ``target`` on new nodes and plain values; returns the new node.

        Its name is none that the old graph has: nodes keep theirs, and the ledger finds them by it.
        """
        new = self._call(target, args, kwargs, self._free_name(name or _short(target)))
        if self._like is not None:
            for key in ("nn_module_stack", "stack_trace"):
                if key in self._like.meta:
                    new.meta[key] = self._like.meta[key]
        new.meta["custom"] = {"thresher": {"pass": self.made_by, **self._note}}
        return new

    def outputs(self, node: fx.Node) -> list[fx.Node]:
        """The elements of a node that yields a tuple."""
        return [self.emit(operator.getitem, node, i) for i in range(len(node.meta["val"]))]

    def inline(self, function: Callable[..., torch.Tensor], *nodes: fx.Node) -> fx.Node:
        """Trace a plain torch function of tensors on the nodes' values and append its operators."""
        values = [n.meta["val"] for n in nodes]
        with self._mode, torch.no_grad():
            traced = make_fx(function, tracing_mode="real", pre_dispatch=True)(*values)
        inner: dict[fx.Node, Any] = {}
        inputs = iter(nodes)
        for node in traced.graph.nodes:
            if node.op == "placeholder":
                inner[node] = next(inputs)
            elif node.op == "output":
                return inner[node.args[0]]  # type: ignore[no-any-return]
            elif node.op == "call_function":
                args = fx.node.map_arg(node.args, lambda n: inner[n])
                inner[node] = self.emit(
                    node.target, *args, **fx.node.map_arg(node.kwargs, lambda n: inner[n])
                )
            else:
                raise ValueError(
                    f"{function} holds a constant tensor ({node.name}): build it from sizes instead"
                )
        raise AssertionError("a traced graph ends with its output")

    def size(self, node: fx.Node, axis: int) -> fx.Node | int:
        """Length of an axis: an int, or a node that computes it."""
        value = node.meta["val"].shape[axis]
        return value if isinstance(value, int) else self.emit(aten.sym_size.int, node, axis)

    def _call(
        self, target: Target, args: tuple[Any, ...], kwargs: Mapping[str, Any], name: str
    ) -> fx.Node:
        values = fx.node.map_arg((args, dict(kwargs)), lambda n: n.meta["val"])
        # The dispatcher takes the decompositions in Python, which keep symbolic sizes symbolic.
        with enable_python_dispatcher(), self._mode, torch.no_grad():
            result = target(*values[0], **values[1])
        new = self.graph.create_node("call_function", target, args, dict(kwargs), name)
        new.meta["val"] = list(result) if isinstance(result, (tuple, list)) else result
        return new

    def _name_of(self, node: fx.Node) -> str:
        """The name of a copy: that of its node, but for second copies."""
        return self._free_name(node.name) if node in self.map else node.name

    def _free_name(self, wanted: str) -> str:
        """The wanted name, numbered if it is taken; it is taken from now on."""
        return self._names.create_node("placeholder", wanted, name=wanted).name

    # --- finishing ----------------------------------------------------------------------------

    def finish(
        self,
        outputs: list[fx.Node],
        constants: Mapping[str, torch.Tensor] | None = None,
        dropped: frozenset[str] = frozenset(),
        weights: Mapping[str, torch.Tensor] | None = None,
        inputs: Sequence[fx.Node] = (),
    ) -> ExportedProgram:
        """Close the graph and return it with an updated signature.

        Args:
            outputs: new nodes that the user gets, in the old order; more of them may follow.
            constants: tensors of placeholders made by :meth:`constant`.
            dropped: names of placeholders (weights nobody uses any more) to leave out.
            weights: new tensors for placeholders replaced by :meth:`weight`, by parameter name.
            inputs: placeholders made by :meth:`input`; the user gives them in a dict called ``more``.
        """
        self.graph.output(tuple(outputs))
        old, weights = self.old.exported, weights or {}
        output = next(iter(reversed(self.graph.nodes)))
        output.meta["val"] = tuple(n.meta["val"] for n in outputs)
        for node in reversed(list(self.graph.nodes)):
            if node.op == "call_function" and not node.users:
                _erase_dead(self.graph, node)
        for node in [n for n in self.graph.nodes if n.op == "placeholder" and n.name in dropped]:
            self.graph.erase_node(node)
        self.graph.lint()
        specs = [
            s for s in old.graph_signature.input_specs if getattr(s.arg, "name", "") not in dropped
        ]
        folded = [
            InputSpec(
                InputKind.CONSTANT_TENSOR, TensorArgument(name=name), target=name, persistent=None
            )
            for name in constants or {}
        ]
        position = next(
            (i for i, s in enumerate(specs) if s.kind is InputKind.USER_INPUT), len(specs)
        )
        more = [InputSpec(InputKind.USER_INPUT, TensorArgument(name=n.name), None) for n in inputs]
        kinds = [(s.kind, s.target) for s in old.graph_signature.output_specs]
        kinds += [(OutputKind.USER_OUTPUT, None)] * (len(outputs) - len(kinds))
        user_outputs = [
            OutputSpec(kind, TensorArgument(name=n.name), target)
            for (kind, target), n in zip(kinds, outputs, strict=True)
        ]
        signature = ExportGraphSignature(
            [*specs[:position], *folded, *specs[position:], *more], user_outputs
        )
        wanted = {s.target for s in signature.input_specs}
        return ExportedProgram(
            root=torch.nn.Module(),
            graph=self.graph,
            graph_signature=signature,
            state_dict={
                k: weights.get(k, v)
                for k, v in old.state_dict.items()
                if k in wanted or not dropped
            },
            range_constraints=old.range_constraints,
            module_call_graph=_call_graph(old, signature, [n.name for n in inputs]),
            example_inputs=None,
            constants={
                **{
                    k: weights.get(k, v)
                    for k, v in old.constants.items()
                    if k in wanted or not dropped
                },
                **(constants or {}),
            },
        )

    def weight(self, node: fx.Node, tensor: torch.Tensor) -> fx.Node:
        """Copy a weight's placeholder with another tensor behind it (another dtype)."""
        new = self.copy(node)
        new.meta["val"] = self._mode.from_tensor(tensor, static_shapes=True)
        return new

    def constant(self, name: str, tensor: torch.Tensor) -> fx.Node:
        """A placeholder for a folded constant; call it before the user's inputs are copied.

        Its name, and the constant's, is another where the graph has that one.
        """
        node = self.graph.placeholder(self._free_name(name))
        node.meta["val"] = self._mode.from_tensor(tensor, static_shapes=True)
        return node

    def input(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> fx.Node:
        """A placeholder for one more input of the user; call it when all others are copied."""
        node = self.graph.placeholder(name)
        with self._mode:
            node.meta["val"] = torch.empty(*shape, dtype=dtype)
        return node


def _erase_dead(graph: fx.Graph, node: fx.Node) -> None:
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        graph.erase_node(node)


def _call_graph(
    old: ExportedProgram, signature: ExportGraphSignature, more: Sequence[str]
) -> list[Any]:
    """Module call graph with the root's new interface; inner entries are not used after tracing."""
    root = copy.deepcopy(old.module_call_graph[0])
    found = root.signature
    if found is None:
        return [root]
    outputs = [spec.arg for spec in signature.output_specs]
    if len(outputs) > found.out_spec.num_leaves:
        found.out_spec = pytree.tree_structure(list(range(len(outputs))))
    found.outputs = outputs
    if more:
        args, kwargs = pytree.tree_unflatten(range(found.in_spec.num_leaves), found.in_spec)
        found.in_spec = pytree.tree_structure((args, {**kwargs, MORE: dict.fromkeys(more, 0)}))
        if found.inputs:
            found.inputs = [*found.inputs, *(TensorArgument(name=name) for name in more)]
        if found.forward_arg_names is not None:
            found.forward_arg_names = [*found.forward_arg_names, MORE]
    return [root]


def _short(target: Target) -> str:
    schema = getattr(target, "_schema", None)
    return (
        str(schema.name).split("::")[-1]
        if schema is not None
        else getattr(target, "__name__", "node")
    )
