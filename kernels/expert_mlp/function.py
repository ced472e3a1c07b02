"""``expert_mlp`` in standard ONNX operators: expert by expert, the tokens that chose it.

For all experts at once a stable sort by counting puts the tokens that chose one first.  Expert e then works
on the first ``c_e`` of its order, one dense product, and its results are added to their rows, each of
which it has once: no masks, no scatter with reduction.  Experts are added in their order, so a token's sum
is the same in every batch.  They are written out, so that a reader that folds constants cuts
their weights apart once.
"""

from __future__ import annotations

from thresher.kernels.body import ACTIVATED
from thresher.kernels.operator import Operator

_SORT = """
    v0 = Constant <value = int64[1] {{0}}> ()
    last = Constant <value = int64[1] {{-1}}> ()
    by_expert = Constant <value = int64[2] {{-1, {experts}}}> ()
    i0 = Constant <value = int64 {{0}}> ()
    i1 = Constant <value = int64 {{1}}> ()
    shape = Shape (x)
    width = Shape <start = 2> (x)
    flat = Concat <axis = 0> (last, width)
    rows = Reshape (x, flat)
    chosen = Reshape (run, by_expert)
    columns = Transpose <perm = [1, 0]> (chosen)
    here = Cast <to = 7> (columns)
    counts = ReduceSum <keepdims = 0> (here, last)

    # A token's place for each expert: those that chose it first, both kinds in their order.
    seen = CumSum (here, i1)
    others = Sub (i1, here)
    passed = CumSum (others, i1)
    count_column = Unsqueeze (counts, last)
    behind = Add (passed, count_column)
    one_on = Where (columns, seen, behind)
    place = Sub (one_on, i1)
    tokens_v = Shape <start = 0, end = 1> (rows)
    tokens = Squeeze (tokens_v)
    each = Constant <value = int64[{experts}] {{{numbers}}}> ()
    starts = Mul (each, tokens)
    ends = Add (starts, counts)
    start_column = Unsqueeze (starts, last)
    place_of_all = Add (place, start_column)
    places = Reshape (place_of_all, last)
    at = Unsqueeze (places, last)
    numbers = Range (i0, tokens, i1)
    sizes = Shape (place)
    numbers_each = Expand (numbers, sizes)
    numbers_of_all = Reshape (numbers_each, last)
    orders = ScatterND (numbers_of_all, at, numbers_of_all)

    rows_shape = Shape (rows)
    sum0 = Expand (b2, rows_shape)
"""

# The rows that chose expert e, and what it adds to them.
_EXPERT = """
    e{e} = Constant <value = int64 {{{e}}}> ()
    own{e} = Constant <value = int64[1] {{{e}}}> ()
    start{e} = Gather (starts, own{e})
    end{e} = Gather (ends, own{e})
    chose{e} = Slice (orders, start{e}, end{e}, v0)
    in{e} = Gather (rows, chose{e})
    w1_{e} = Gather (w1, e{e})
    b1_{e} = Gather (b1, e{e})
    w2_{e} = Gather (w2, e{e})
    product{e} = MatMul (in{e}, w1_{e})
    biased{e} = Add (product{e}, b1_{e})
    {activation}
    out{e} = MatMul (bent{e}, w2_{e})
    so_far{e} = Gather (sum{e}, chose{e})
    more{e} = Add (so_far{e}, out{e})
    at{e} = Unsqueeze (chose{e}, last)
    sum{next} = ScatterND (sum{e}, at{e}, more{e})
"""


def body(experts: int = 4, activation: str = "gelu") -> str:
    """The statements for so many experts."""
    parts = [_SORT.format(experts=experts, numbers=", ".join(map(str, range(experts))))]
    for e in range(experts):
        line = ACTIVATED[activation].format(x=f"biased{e}", y=f"bent{e}")
        parts.append(_EXPERT.format(e=e, next=e + 1, activation=line))
    return "".join([*parts, f"\n    y = Reshape (sum{experts}, shape)\n"])


OPERATOR = Operator(
    name="ExpertMLP",
    torch_name="expert_mlp",
    inputs={"x": "T", "run": "tensor(bool)", "w1": "T", "b1": "T", "w2": "T", "b2": "T"},
    outputs={"y": "T"},
    shapes={"y": "x0 x1 x2"},
    attributes={"experts": int, "activation": str},
    body=body,
    cuda=False,
    product=True,
)
