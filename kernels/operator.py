"""What an operator is on the ONNX side: name, signature, attributes, and a body of standard operators.

A node of domain ``thresher`` carries attributes for TensorRT besides its own: ``plugin_namespace`` and
``plugin_version``, because of which the parser takes a registered plugin instead of the body; which
inputs are counts, as a plugin is given these when shapes are computed; and how many outputs the node
has, which a plugin is not told otherwise.  ONNX Runtime and the function body ignore them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx

DOMAIN = "thresher"
VERSION = 1
PLUGIN = {"plugin_namespace": DOMAIN, "plugin_version": "1"}
SHAPE_INPUTS = "tensorrt_plugin_shape_input_indices"  # TensorRT wants these of rank 1
OUTPUTS = "plugin_outputs"

_AXIS = re.compile(r"([a-z]+)(\d)(\+?)")

FLOATS = ("tensor(float)", "tensor(float16)", "tensor(bfloat16)", "tensor(double)")
ANY = (*FLOATS, "tensor(int64)", "tensor(int32)", "tensor(int8)", "tensor(uint8)", "tensor(bool)")


@dataclass(frozen=True)
class Operator:
    """One ONNX operator.

    ``inputs`` and ``outputs`` map names to a tensor type or to ``"T"``, which ``types`` lists;
    ``attributes`` maps names to ``int``, ``float`` or ``str``.  ``body`` is ONNX text: the statements of a
    function over the inputs, which reads an attribute as ``Constant<value_int: int=@name>``; or it is a
    function of the attributes that writes such text, where their values decide on the statements.
    Outputs that are rarely read come last, so that a model can do without them.  ``shapes`` has the
    axes of each output: ``x0`` is the first axis of x, ``x2+`` all of its axes from the third on, and
    ``keep`` the value of the input of that name.  ``triton``: there are Triton kernels, without
    which the definition runs on CUDA tensors.  ``cuda``: there are CUDA kernels, which need the shapes and
    without which TensorRT takes the body.  A body that is not ``portable`` is for ONNX Runtime: whoever
    inserts the operator knows the target.  ``dense`` is the body for more than ``most_tokens`` tokens, of
    operators that have such a limit.  ``product``: its work is a product with weights, which half
    precision is for; the other operators leave the type of their tokens as it comes.
    """

    name: str
    torch_name: str
    inputs: dict[str, str]
    outputs: dict[str, str]
    body: str | Callable[..., str]
    shapes: dict[str, str] = field(default_factory=dict)
    attributes: dict[str, type] = field(default_factory=dict)
    types: tuple[str, ...] = FLOATS
    portable: bool = True
    triton: bool = True
    cuda: bool = True
    dense: str = ""
    product: bool = False

    @property
    def counts(self) -> tuple[str, ...]:
        """Inputs that are one number each and an axis of an output."""
        counted = {name for axes in self.axes.values() for name, first, _ in axes if first is None}
        return tuple(name for name in self.inputs if name in counted)

    @property
    def axes(self) -> dict[str, list[tuple[str, int | None, bool]]]:
        """``shapes``, read: by output, of each axis the input that it comes from, which of its axes (None
        for its value), and whether all that follow go with it.
        """
        return {output: list(map(self._axis, text.split())) for output, text in self.shapes.items()}

    def _axis(self, text: str) -> tuple[str, int | None, bool]:
        if text in self.inputs:
            return text, None, False
        name, first, rest = _AXIS.fullmatch(text).groups()  # type: ignore[union-attr]
        return name, int(first), bool(rest)

    @property
    def plugin(self) -> dict[str, Any]:
        """The attributes for TensorRT, but for the number of outputs; none without a plugin."""
        if not self.cuda:
            return {}
        places = [at for at, name in enumerate(self.inputs) if name in self.counts]
        return {**PLUGIN, SHAPE_INPUTS: places} if places else dict(PLUGIN)

    def output_shapes(
        self, shapes: Mapping[str, Sequence[Any]], counts: Mapping[str, Any]
    ) -> dict[str, tuple[Any, ...]]:
        """Of all outputs, from the shapes of the inputs and the counts, whatever stands for a size."""
        found: dict[str, tuple[Any, ...]] = {}
        for output, axes in self.axes.items():
            sizes: list[Any] = []
            for name, first, rest in axes:
                if first is None:
                    sizes.append(counts[name])
                else:
                    sizes += shapes[name][first : None if rest else first + 1]
            found[output] = tuple(sizes)
        return found

    def schema(self) -> onnx.defs.OpSchema:
        """Signature for exporters and checkers; the plugin attributes are optional."""
        from onnx.defs import OpSchema

        kinds = {
            int: OpSchema.AttrType.INT,
            float: OpSchema.AttrType.FLOAT,
            str: OpSchema.AttrType.STRING,
        }
        own = [
            OpSchema.Attribute(n, kinds[kind], required=True) for n, kind in self.attributes.items()
        ]
        plugin = [OpSchema.Attribute(n, OpSchema.AttrType.STRING, required=False) for n in PLUGIN]
        plugin += [
            OpSchema.Attribute(SHAPE_INPUTS, OpSchema.AttrType.INTS, required=False),
            OpSchema.Attribute(OUTPUTS, OpSchema.AttrType.INT, required=False),
        ]
        return OpSchema(
            self.name,
            DOMAIN,
            VERSION,
            doc=f"See thresher.kernels.{self.torch_name}.reference.",
            inputs=[OpSchema.FormalParameter(n, kind) for n, kind in self.inputs.items()],
            outputs=[OpSchema.FormalParameter(n, kind) for n, kind in self.outputs.items()],
            type_constraints=[("T", list(self.types), "Type of the tokens.")],
            attributes=own + plugin,
        )

    def kind(self, attributes: Mapping[str, Any]) -> str:
        """What tells this body from others of the operator: its name, and where the body hangs on the
        attributes, their values too.
        """
        if isinstance(self.body, str):
            return self.name
        return "_".join([self.name, *(str(attributes[name]) for name in self.attributes)])

    def function(
        self,
        opset: int = 20,
        outputs: int | None = None,
        attributes: Mapping[str, Any] | None = None,
        name: str | None = None,
    ) -> onnx.FunctionProto:
        """The body as a model-local function.

        Args:
            opset: must be the model's own.
            outputs: how many of the outputs, from the first on, are wanted; statements that only
                the others need are left out, as ONNX Runtime would run them for nobody.
            attributes: of the nodes that call it; only a body that is a function reads them.
            name: of the function, by default the operator's.
        """
        import onnx.parser

        names = f" <{', '.join(self.attributes)}>" if self.attributes else ""
        wanted = list(self.outputs)[:outputs]
        body = self.body if isinstance(self.body, str) else self.body(**(attributes or {}))
        called = name or self.name
        text = (
            f'<domain: "{DOMAIN}", opset_import: ["": {opset}]> {called}{names}'
            f" ({', '.join(self.inputs)}) => ({', '.join(wanted)}) {{ {body} }}"
        )
        function = onnx.parser.parse_function(text)
        live, nodes = set(wanted), []
        for node in reversed(function.node):
            if live.intersection(node.output):
                live.update(reads(node))
                node.name = f"{called}/{node.output[0]}"
                nodes.append(node)
        del function.node[:]
        function.node.extend(reversed(nodes))
        return function


def reads(node: onnx.NodeProto) -> set[str]:
    """Names that a node reads, those that its subgraphs take from around them among them."""
    names = set(node.input)
    for attribute in node.attribute:
        made = {name for inner in attribute.g.node for name in inner.output}
        names.update(*(reads(inner) - made for inner in attribute.g.node))
    return names
