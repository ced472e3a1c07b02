"""Layers and attention that a file holds in pieces: each form is put together, and look-alikes are not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.models.onnx_text import feed, file_of, onnxruntime_outputs
from thresher.models.onnx_import.importer import build
from thresher.models.onnx_import.node import Node

SHAPING = ("Shape", "Concat", "Reshape", "Transpose", "Unsqueeze", "Squeeze", "Identity")

# What the forms below may use; what they do not use is dropped on import.
NUMBERS = """
    half = Constant<value_float = 0.5>()   one = Constant<value_float = 1.0>()  two = Constant<value_float = 2.0>()
    three = Constant<value_float = 3.0>()  zero = Constant<value_float = 0.0>() low = Constant<value_float = -1e9>()
    i0 = Constant<value_int = 0>()         l1 = Constant<value_ints = [1]>()    l12 = Constant<value_ints = [1, 2]>()
    minus = Constant<value_ints = [-1]>()  l0 = Constant<value_ints = [0]>()
    l211 = Constant<value_ints = [2, 1, 1]>()  root = Constant<value_float = 1.4142135>()
"""
# q, k, v: [b, 2, n, 4]; mask: int64 [b, n]
SCORES = """
    kt = Transpose<perm = [0,1,3,2]>(k)  s = MatMul(q, kt)  qh = Mul(q, half)  kth = Mul(kt, half)
    f = Cast<to = 1>(mask)  m = Unsqueeze(f, l12)  c = Equal(mask, i0)  c4 = Unsqueeze(c, l12)  n4 = Not(c4)
"""
SOFTMAX = "p = Softmax<axis = -1>(t) y = MatMul(p, v)"
ATTENTION = {
    "plain": f"t = Identity(s) {SOFTMAX}",
    "scaled scores": f"t = Mul(half, s) {SOFTMAX}",
    "divided scores": f"t = Div(s, half) {SOFTMAX}",
    "scaled query": f"t = MatMul(qh, kt) {SOFTMAX}",
    "both scaled": f"t = MatMul(qh, kth) {SOFTMAX}",
    "key scaled first": f"kh = Mul(k, half) kht = Transpose<perm = [0,1,3,2]>(kh) t = MatMul(q, kht) {SOFTMAX}",
    "scale from a shape": f"d = Shape<start = 3>(q) e = Cast<to = 1>(d) r = Sqrt(e) t = Div(s, r) {SOFTMAX}",
    "additive mask": f"t = Add(m, s) {SOFTMAX}",
    "mask, then scale": f"u = Add(s, m) t = Mul(u, half) {SOFTMAX}",
    "filled where zero": f"t = Where(c4, low, s) {SOFTMAX}",
    "kept where true": f"t = Where(n4, s, low) {SOFTMAX}",
    "mask without effect": "e = Shape(s) o = ConstantOfShape<value = bool[1] {1}>(l1) w = Expand(o, e)"
    f" add = Where(w, zero, low) t = Add(s, add) {SOFTMAX}",
    "guard against empty rows": "p0 = Softmax<axis = -1>(s) g = IsNaN(p0) p = Where(g, zero, p0) y = MatMul(p, v)",
    "heads in the batch": "n = Shape<start = 2>(q) r = Concat<axis = 0>(minus, n)"
    " q3 = Reshape(q, r) k3 = Reshape(k, r) v3 = Reshape(v, r) k3t = Transpose<perm = [0,2,1]>(k3)"
    " t = MatMul(q3, k3t) p = Softmax<axis = -1>(t) y3 = MatMul(p, v3) e = Shape(q) y = Reshape(y3, e)",
    "einsum": "t = Einsum<equation = 'bhid,bhjd->bhij'>(q, k) p = Softmax<axis = -1>(t)"
    " y = Einsum<equation = 'bhij,bhjd->bhid'>(p, v)",
    "a factor per head": f"a = Constant<value_floats = [0.5, 2.0]>() g = Reshape(a, l211) t = Mul(s, g) {SOFTMAX}",
}
ALONE = ("plain", "scale from a shape", "mask without effect", "heads in the batch", "einsum")
NOT_ATTENTION = {
    "softmax over queries": "p = Softmax<axis = -2>(s) z = MatMul(p, v)",
    "values touched in between": "p = Softmax<axis = -1>(s) w = Mul(p, p) z = MatMul(w, v)",
    "a factor per key": "t = Mul(s, m) p = Softmax<axis = -1>(t) z = MatMul(p, v)",
}


def attention_file(body: str, folder: Path, opset: int = 17) -> Path:
    types = ", ".join(f"float[b,2,n,4] {name}" for name in "qkv")
    return file_of(
        f"<ir_version: 10, opset_import: ['' : {opset}]> g ({types}, int64[b,n] mask)"
        f" => (float[b,2,n,4] y) {{ {NUMBERS} {SCORES} {body} }}",
        folder,
    )


def check(path: Path) -> list[Node]:
    """The nodes after raising, once the numbers at two sizes are those of ONNX Runtime."""
    eager = build(path, {})
    for batch, length in ((1, 5), (3, 6)):
        inputs = feed(eager.inputs, batch, length)
        with torch.inference_mode():
            results = eager.module(**inputs)
        for found, wanted in zip(results, onnxruntime_outputs(path, inputs), strict=True):
            np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-4, atol=1e-5)
    return [node for node in eager.module.nodes if node.op not in SHAPING]


def names(nodes: list[Node]) -> list[str]:
    return [node.op for node in nodes]


@pytest.mark.parametrize("form", ATTENTION)
def test_forms_of_attention(form: str, tmp_path: Path) -> None:
    found = names(check(attention_file(ATTENTION[form], tmp_path)))
    assert found.count("Attention") == 1
    assert not {"Softmax", "MatMul", "Einsum"} & set(found)
    if form in ALONE:
        assert found == ["Attention"]


@pytest.mark.parametrize("form", NOT_ATTENTION)
def test_lookalikes_of_attention_stay(form: str, tmp_path: Path) -> None:
    body = f"{NOT_ATTENTION[form]} t2 = MatMul(z, kt) p2 = Softmax<axis = -1>(t2) y = MatMul(p2, v)"
    found = names(check(attention_file(body, tmp_path)))
    assert (found.count("Attention"), found.count("Softmax")) == (1, 1)


@pytest.mark.parametrize(
    "body",
    [
        "y = Attention(q, k, v)",
        "y = Attention<is_causal = 1>(q, k, v)",
        "y = Attention<scale = 0.3>(q, k, v)",
    ],
)
def test_the_operator_attention(body: str, tmp_path: Path) -> None:
    assert names(check(attention_file(body, tmp_path, 23))) == ["Attention"]


# --- layers: x is [b, n, 6]; the attention behind it is only there to make a transformer -----------

ERF = "d = Div(x, root) e = Erf(d) o = Add(e, one)"
TANH = "a = Constant<value_float = 0.044715>() w = Constant<value_float = 0.7978846>()"
GELU = {
    "x (1 + erf) / 2": f"{ERF} m = Mul(x, o) z = Mul(m, half)",
    "x (0.5 (1 + erf))": f"{ERF} m = Mul(half, o) z = Mul(x, m)",
    "(0.5 x) (1 + erf)": f"{ERF} m = Mul(x, half) z = Mul(m, o)",
    "x (1 + erf) over 2": f"{ERF} m = Mul(o, x) z = Div(m, two)",
    "tanh, x cubed": f"{TANH} c = Pow(x, three) ca = Mul(c, a) s = Add(x, ca) i = Mul(s, w) t = Tanh(i)"
    " o = Add(one, t) m = Mul(x, o) z = Mul(m, half)",
    "tanh, factored": f"{TANH} xx = Mul(x, x) ax = Mul(xx, a) f = Add(ax, one) wx = Mul(x, w) i = Mul(wx, f)"
    " t = Tanh(i) o = Add(t, one) m = Mul(half, x) z = Mul(m, o)",
}
NOT_GELU = {
    "another root": "d = Div(x, two) e = Erf(d) o = Add(e, one) m = Mul(x, o) z = Mul(m, half)",
    "not halved": f"{ERF} z = Mul(x, o)",
    "of another value": f"{ERF} xx = Mul(x, x) m = Mul(xx, o) z = Mul(m, half)",
}

NORM = (
    "mu = ReduceMean<axes = [AXIS], keepdims = 1>(x) c = Sub(x, mu) SQUARE"
    " var = ReduceMean<axes = [AXIS], keepdims = 1>(s) e = Constant<value_float = 1e-5>() ve = Add(var, e)"
    " sd = Sqrt(ve) n0 = Div(c, sd)"
)
POW, PRODUCT = "s = Pow(c, two)", "s = Mul(c, c)"
WEIGHTED = (
    "g = Constant<value_floats = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]>() n1 = Mul(n0, g)"
    " b0 = Constant<value_floats = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]>() z = Add(b0, n1)"
)
NORMS = {
    "with weight and bias": f"{NORM} {WEIGHTED}".replace("SQUARE", POW).replace("AXIS", "-1"),
    "squared by a product": f"{NORM} {WEIGHTED}".replace("SQUARE", PRODUCT).replace("AXIS", "2"),
    "bare": f"{NORM} z = Identity(n0)".replace("SQUARE", POW).replace("AXIS", "-1"),
}
NOT_NORMS = {
    "over tokens": f"{NORM} z = Identity(n0)".replace("SQUARE", POW).replace("AXIS", "1"),
    "not squared": f"{NORM} z = Identity(n0)".replace("SQUARE", "s = Abs(c)").replace("AXIS", "-1"),
}


def layer_file(body: str, folder: Path) -> Path:
    tail = "zt = Transpose<perm = [0,2,1]>(z) zz = MatMul(z, zt) p = Softmax<axis = -1>(zz) y = MatMul(p, z)"
    head = "<ir_version: 8, opset_import: ['' : 17]> g (float[b,n,6] x) => (float[b,n,6] y)"
    return file_of(f"{head} {{ {NUMBERS} {body} {tail} }}", folder)


@pytest.mark.parametrize("form", GELU)
def test_forms_of_gelu(form: str, tmp_path: Path) -> None:
    found = check(layer_file(GELU[form], tmp_path))
    assert names(found) == ["Gelu", "Attention"]
    assert found[0].attributes["approximate"] == ("tanh" if "tanh" in form else "none")


@pytest.mark.parametrize("form", NOT_GELU)
def test_lookalikes_of_gelu_stay(form: str, tmp_path: Path) -> None:
    assert "Erf" in names(check(layer_file(NOT_GELU[form], tmp_path)))


@pytest.mark.parametrize("form", NORMS)
def test_forms_of_layer_norm(form: str, tmp_path: Path) -> None:
    found = names(check(layer_file(NORMS[form], tmp_path)))
    assert found == ["LayerNormalization", "Attention"]


@pytest.mark.parametrize("form", NOT_NORMS)
def test_lookalikes_of_layer_norm_stay(form: str, tmp_path: Path) -> None:
    assert "Sqrt" in names(check(layer_file(NOT_NORMS[form], tmp_path)))


# --- tables and sizes ---------------------------------------------------------------------------

ROWS = ", ".join(str(i / 10) for i in range(48))
TABLE = f"w = Constant<value = float[8,6] {{{ROWS}}}>()"
LOOK_UP = f"{TABLE} i = Slice(ids, l0, n, l1) t = Gather(w, i) r = Add(x, t)"
TABLES = {
    "positions counted": f"ids = Constant<value = int64[1,8] {{0,1,2,3,4,5,6,7}}>() {LOOK_UP}",
    "positions from one": f"ids = Constant<value = int64[1,7] {{1,2,3,4,5,6,7}}>() {LOOK_UP}",
    "types all zero": f"ids = Constant<value = int64[1,8] {{0,0,0,0,0,0,0,0}}>() {LOOK_UP}",
    "rows of a table": f"w = Constant<value = float[1,8,6] {{{ROWS}}}>() t = Slice(w, l0, n, l1) r = Add(x, t)",
    "numbers in no order": f"ids = Constant<value = int64[1,8] {{3,1,2,0,5,4,7,6}}>() {LOOK_UP}",
}


@pytest.mark.parametrize("form", TABLES)
def test_tables_do_not_bound_the_length(form: str, tmp_path: Path) -> None:
    body = f"n = Shape<start = 1, end = 2>(x) {TABLES[form]} z = Identity(r)"
    assert "Slice" not in names(check(layer_file(body, tmp_path)))
