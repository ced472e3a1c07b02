"""The operators as ONNX sees them: names, attributes and function bodies of standard operators.

Every node carries ``plugin_namespace`` and ``plugin_version``: they do nothing in ONNX Runtime and
let a TensorRT plugin of the same name win over the function body.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import onnx
import onnx.parser

from thresher.kernels.bipartite_merge import function as bipartite_merge
from thresher.kernels.class_attention import function as class_attention
from thresher.kernels.gather_tokens import function as gather_tokens
from thresher.kernels.keep_tokens import function as keep_tokens
from thresher.kernels.restore_tokens import function as restore_tokens

DOMAIN = "thresher"
OPSET = 20
PLUGIN = {"plugin_namespace": DOMAIN, "plugin_version": "1"}


@dataclass(frozen=True)
class OnnxOp:
    """An operator of the domain: how many inputs and outputs, which attributes, and its body."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: tuple[str, ...]
    body: str

    @cache  # noqa: B019  (a handful of module-level instances)
    def function(self) -> onnx.FunctionProto:
        """The function body, at opset 20."""
        header = f'<domain: "{DOMAIN}", opset_import: ["" : {OPSET}]>\n'
        return onnx.parser.parse_function(header + self.body)


_PLUGIN = ("plugin_namespace", "plugin_version")

OPS = {
    op.name: op
    for op in (
        OnnxOp(
            "BipartiteMerge",
            ("x", "size", "metric", "keep"),
            ("y", "out_size", "slot", "kept"),
            ("protected", "by_index", *_PLUGIN),
            bipartite_merge.BODY,
        ),
        OnnxOp("ClassAttention", ("q", "k"), ("score",), ("scale", "row", *_PLUGIN), class_attention.BODY),
        OnnxOp(
            "BiasedClassAttention",
            ("q", "k", "bias"),
            ("score",),
            ("scale", "row", *_PLUGIN),
            class_attention.BIASED_BODY,
        ),
        OnnxOp("KeepTokens", ("x", "score", "keep"), ("y", "slot", "kept"), ("protected", *_PLUGIN), keep_tokens.BODY),
        OnnxOp(
            "FuseTokens", ("x", "score", "keep"), ("y", "slot", "kept"), ("protected", *_PLUGIN), keep_tokens.FUSE_BODY
        ),
        OnnxOp("GatherTokens", ("x", "index"), ("y",), _PLUGIN, gather_tokens.BODY),
        OnnxOp("RestoreTokens", ("x", "slot", "aside"), ("y",), _PLUGIN, restore_tokens.BODY),
    )
}
