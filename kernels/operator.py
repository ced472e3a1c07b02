"""What an operator is on the ONNX side: name, signature, attributes, and a body of standard operators.

A node of domain ``thresher`` carries the plain attributes ``plugin_namespace`` and ``plugin_version``
besides its own.  ONNX Runtime and the function body ignore them; the TensorRT parser takes a registered
plugin instead of the body because of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx
    import torch

DOMAIN = "thresher"
VERSION = 1
PLUGIN = {"plugin_namespace": DOMAIN, "plugin_version": "1"}

FLOATS = ("tensor(float)", "tensor(float16)", "tensor(bfloat16)", "tensor(double)")
ANY = (*FLOATS, "tensor(int64)", "tensor(int32)", "tensor(int8)", "tensor(uint8)", "tensor(bool)")


@dataclass(frozen=True)
class Operator:
    """One ONNX operator.

    ``inputs`` and ``outputs`` map names to a tensor type or to ``"T"``, which ``types`` lists;
    ``attributes`` maps names to ``int`` or ``float``.  ``body`` is ONNX text: the statements of a
    function over the inputs, which reads an attribute as ``Constant<value_int: int=@name>``.
    Outputs that are rarely read come last, so that a model can do without them.  A body that is not
    ``portable`` is for ONNX Runtime: whoever inserts the operator knows the target.
    """

    name: str
    torch_name: str
    inputs: dict[str, str]
    outputs: dict[str, str]
    body: str
    attributes: dict[str, type] = field(default_factory=dict)
    types: tuple[str, ...] = FLOATS
    portable: bool = True

    def overload(self) -> torch._ops.OpOverload:
        """The torch operator that lowers to this one."""
        import torch

        import thresher.kernels.ops  # noqa: F401  (registers it)

        found: torch._ops.OpOverload = getattr(torch.ops.thresher, self.torch_name).default
        return found

    def schema(self) -> onnx.defs.OpSchema:
        """Signature for exporters and checkers; the plugin attributes are optional."""
        from onnx.defs import OpSchema

        kinds = {int: OpSchema.AttrType.INT, float: OpSchema.AttrType.FLOAT}
        own = [
            OpSchema.Attribute(n, kinds[kind], required=True) for n, kind in self.attributes.items()
        ]
        plugin = [OpSchema.Attribute(n, OpSchema.AttrType.STRING, required=False) for n in PLUGIN]
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

    def function(self, opset: int = 20, outputs: int | None = None) -> onnx.FunctionProto:
        """The body as a model-local function.

        Args:
            opset: must be the model's own.
            outputs: how many of the outputs, from the first on, are wanted; statements that only
                the others need are left out, as ONNX Runtime would run them for nobody.
        """
        import onnx.parser

        names = f" <{', '.join(self.attributes)}>" if self.attributes else ""
        wanted = list(self.outputs)[:outputs]
        text = (
            f'<domain: "{DOMAIN}", opset_import: ["": {opset}]> {self.name}{names}'
            f" ({', '.join(self.inputs)}) => ({', '.join(wanted)}) {{ {self.body} }}"
        )
        function = onnx.parser.parse_function(text)
        live, nodes = set(wanted), []
        for node in reversed(function.node):
            if live.intersection(node.output):
                live.update(node.input)
                node.name = f"{self.name}/{node.output[0]}"
                nodes.append(node)
        del function.node[:]
        function.node.extend(reversed(nodes))
        return function
