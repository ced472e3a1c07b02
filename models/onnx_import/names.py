"""Names: of modules, parameters and symbols, from what exporters write into ONNX files."""

from __future__ import annotations

import ast
import keyword
import re

import onnx_ir as ir

_SCOPES = "pkg.torch.onnx.name_scopes"  # a list, outermost first; the last is the node's own name


def identifier(name: str) -> str:
    """The nearest Python identifier: ``input.1`` to ``input_1``."""
    clean = re.sub(r"\W", "_", name, flags=re.ASCII) or "_"
    return f"_{clean}" if clean[0].isdigit() or keyword.iskeyword(clean) else clean


def dotted(name: str) -> str:
    """A module path of words and numbers: ``/layer.0/MatMul`` to ``layer.0.MatMul``."""
    kept: list[str] = []
    for part in name.replace("::", "_").split("/"):
        if kept and part.startswith(f"{kept[-1]}."):  # "/blocks/blocks.0", from a Sequential
            kept.pop()
        kept.append(part)
    words = [word for part in kept for word in part.split(".") if word]
    return ".".join(re.sub(r"\W", "_", word, flags=re.ASCII) for word in words)


def scope(node: ir.Node) -> str:
    """Path of the module that a node came from; the node's own name where the file does not say."""
    text = node.metadata_props.get(_SCOPES)
    if text:
        try:
            scopes = ast.literal_eval(text)
        except (SyntaxError, ValueError):
            scopes = []
        if len(scopes) > 1:
            path = str(scopes[-2])
            return "" if path.startswith("_empty_") else dotted(path)
    names = [node.name or "", node.outputs[0].name or ""]
    name = next((name for name in names if "/" in name), names[0])
    return dotted(name.rsplit("/", 1)[0] if "/" in name else name)  # "/path/of/module/Op"
