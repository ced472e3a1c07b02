"""Tiny ONNX models, made without torch, and engines of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
from numpy.typing import NDArray

from thresher.runtime.bundle import Facts, package
from thresher.runtime.engine import Engine
from thresher.runtime.manifest import Prediction, TensorInfo

CHOSEN = {"name": "topk-norm", "options": {}, "applied": 1, "chooses_tokens": True}
KEEP = """
<domain: "thresher", opset_import: ["":20]> Keep <keep>(x) => (y) {
  n = Constant<value_int: int=@keep>()
  one = Constant<value=int64[1] {1}>()
  last = Constant<value=int64[1] {-1}>()
  count = Reshape(n, one)
  score = ReduceSum<keepdims=0>(x, last)
  best, index = TopK<axis=1>(score, count)
  pairs = Unsqueeze(index, last)
  y = GatherND<batch_dims=1>(x, pairs)
}
"""


def transformer(keep: int | None = None, width: int = 16, tokens: int = 8) -> onnx.ModelProto:
    """Two blocks and a head over ``x[batch, tokens, width]``; ``keep`` tokens reach the second."""
    step = f"k = thresher.Keep<keep={keep}>(r0)" if keep else "k = Identity(r0)"
    model = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["":20, "thresher":1]>
        toy (float[batch, {tokens}, {width}] x) => (float[batch, 10] logits) {{
          h0 = LayerNormalization<axis=-1>(x, scale, bias)
          m0 = MatMul(h0, weight)
          a0 = Add(m0, bias)
          g0 = Gelu(a0)
          r0 = Add(x, g0)
          {step}
          h1 = LayerNormalization<axis=-1>(k, scale, bias)
          m1 = MatMul(h1, weight)
          a1 = Add(m1, bias)
          g1 = Gelu(a1)
          r1 = Add(k, g1)
          p = ReduceMean<keepdims=0>(r1, axis)
          logits = MatMul(p, classify)
        }}"""
        + (KEEP if keep else "")
    )
    rng = np.random.default_rng(0)
    shapes = {
        "weight": (width, width),
        "scale": (width,),
        "bias": (width,),
        "classify": (width, 10),
    }
    arrays: dict[str, NDArray[Any]] = {
        name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()
    }
    arrays["axis"] = np.array([1])
    for name, array in arrays.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    _label(model)
    onnx.checker.check_model(model, full_check=True)
    return model


def _label(model: onnx.ModelProto) -> None:
    parts = {"LayerNormalization": "norm", "MatMul": "mlp", "Gelu": "mlp"}
    for node in model.graph.node:
        digit = next((c for c in node.output[0] if c.isdigit()), None)
        block = f"blocks.{digit}" if digit else "blocks.0" if node.output[0] == "k" else "head"
        path = ".".join(filter(None, (block, parts.get(node.op_type) if digit else None)))
        node.metadata_props.add(key="thresher.module", value=path)
        node.name = f"node_{node.output[0]}"


def engine(folder: Path, keep: int | None = None, **options: Any) -> Engine:
    """An engine of the toy on one thread, with a made-up prediction."""
    macs = 1000 if keep is None else 600
    facts = Facts(
        source={"source": "toy:model", "weights": "random"},
        passes=(CHOSEN,) if keep else (),
        sites=1 if keep else 0,
        tokens=(8, keep) if keep else None,
        prediction=Prediction(dense_macs=1000, macs=macs, ideal=1000 / macs),
    )
    return package(transformer(keep), folder, facts=facts, **{"threads": 1, **options})


class Fake:
    """A runnable computed by a function, for verdicts and clocks."""

    precision = "fp32"

    def __init__(self, name: str, function: Any = None, *, reduced: bool = False) -> None:
        self.name = name
        self.reduced = reduced
        self.changed_by: tuple[str, ...] = ("tome",) if reduced else ()
        self.ranges: dict[str, tuple[int, int | None]] = {}
        self.inputs = (TensorInfo(name="x", dtype="float32", shape=("batch", 10)),)
        self.outputs = (TensorInfo(name="logits", dtype="float32", shape=("batch", 10)),)
        self._function = function or (lambda x: x)
        self.runs = 0

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        self.runs += 1
        return {"logits": self._function(inputs["x"])}


def feeds(batch: int = 2) -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(1)
    return {"x": rng.standard_normal((batch, 8, 16)).astype(np.float32)}


def feeds_of(width: int) -> dict[str, NDArray[Any]]:
    return {"x": np.ones((2, 8, width), np.float32)}
