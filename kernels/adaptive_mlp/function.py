"""``adaptive_mlp`` in standard ONNX operators: tokens sorted by how many learners they run.

Sorted by counting, as there are few counts and TensorRT's TopK ends at 3,840.  Learner n then works on
the first ``c_n = #{k > n}`` rows, one contiguous product without masks.  The
learners are written out, so that a reader that folds constants cuts their weights apart once.
"""

from __future__ import annotations

from functools import partial

from thresher.kernels.body import ACTIVATED
from thresher.kernels.operator import Operator

_SORT = """
    v0 = Constant <value = int64[1] {{0}}> ()
    last = Constant <value = int64[1] {{-1}}> ()
    shape = Shape (x)
    width = Shape <start = 2> (x)
    flat = Concat <axis = 0> (last, width)
    rows = Reshape (x, flat)
    least = Constant <value = int64 {{0}}> ()
    most = Constant <value = int64 {{{learners}}}> ()
    given = Reshape (k, last)
    capped = Min (given, most)
    counts = Max (capped, least)

    # The place of a token: behind those that run more, and behind the earlier ones that run as many.
    levels = Constant <value = int64[{levels}] {{{falling}}}> ()
    column = Unsqueeze (counts, last)
    alike = Equal (column, levels)
    here = Cast <to = 7> (alike)
    seen = CumSum (here, least)
    in_level = ReduceSum <keepdims = 0> (here, v0)
    reached = CumSum (in_level, least)
    before = Sub (reached, in_level)
    behind = Add (seen, before)
    chosen = Mul (here, behind)
    counted = ReduceSum <keepdims = 0> (chosen, last)
    one = Constant <value = int64 {{1}}> ()
    place = Sub (counted, one)
    at = Unsqueeze (place, last)
    total = Shape (counts)
    end = Squeeze (total)
    numbers = Range (least, end, one)
    order = ScatterND (numbers, at, numbers)
    {lengths} = Split <axis = 0, num_outputs = {levels}> (reached)
"""

# Rows that run learner n, and its hidden values.
_LEARNER = """
    i{n} = Constant <value = int64 {{{n}}}> ()
    order{n} = Slice (order, v0, c{n}, v0)
    in{n} = Gather (rows, order{n})
    w1_{n} = Gather (w1, i{n})
    b1_{n} = Gather (b1, i{n})
    w2_{n} = Gather (w2, i{n})
    product{n} = MatMul (in{n}, w1_{n})
    sum{n} = Add (product{n}, b1_{n})
    {activation}
    {factor}
"""

_PLAIN = "hidden{n} = Identity (bent{n})"

_LAST = """
    all{n} = MatMul (hidden{n}, w2_{n})
"""

# What the learners from n on add: the rows of those from n + 1 on are the first of them.
_ADD = """
    room{n} = Sub (c{n}, c{above})
    pads{n} = Concat <axis = 0> (v0, v0, room{n}, v0)
    padded{n} = Pad (all{above}, pads{n})
    all{n} = Gemm (hidden{n}, w2_{n}, padded{n})
"""

_BACK = """
    idle = Sub (total, c0)
    idle_pads = Concat <axis = 0> (v0, v0, idle, v0)
    everyone = Pad (all0, idle_pads)
    back = Gather (everyone, place)
    summed = Reshape (back, shape)
    y = Add (summed, b2)
"""


def body(factor: str, learners: int = 4, activation: str = "gelu") -> str:
    """The statements for so many learners, each of which makes its hidden values by ``factor``."""
    falling = ", ".join(map(str, range(learners, -1, -1)))
    lengths = ", ".join([*(f"c{n}" for n in reversed(range(learners))), "tokens"])
    parts = [_SORT.format(learners=learners, levels=learners + 1, falling=falling, lengths=lengths)]
    for n in range(learners):
        line = ACTIVATED[activation].format(x=f"sum{n}", y=f"bent{n}")
        parts.append(_LEARNER.format(n=n, activation=line, factor=factor.format(n=n)))
    parts.append(_LAST.format(n=learners - 1))
    parts += [_ADD.format(n=n, above=n + 1) for n in reversed(range(learners - 1))]
    return "".join([*parts, _BACK])


def operator(name: str, torch_name: str, factor: str, **opened: str) -> Operator:
    """An operator whose learners make ``hidden{n}`` of ``bent{n}`` and of the inputs ``opened`` by ``factor``."""
    return Operator(
        name=name,
        torch_name=torch_name,
        inputs={
            "x": "T",
            "k": "tensor(int64)",
            "w1": "T",
            "b1": "T",
            **opened,
            "w2": "T",
            "b2": "T",
        },
        outputs={"y": "T"},
        shapes={"y": "x0 x1 x2"},
        attributes={"learners": int, "activation": str},
        body=partial(body, factor),
        cuda=False,
        product=True,
    )


OPERATOR = operator("AdaptiveMLP", "adaptive_mlp", _PLAIN)
