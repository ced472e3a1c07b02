"""``restore_tokens`` in standard ONNX operators."""

from __future__ import annotations

from thresher.kernels.operator import Operator

OPERATOR = Operator(
    name="RestoreTokens",
    torch_name="restore_tokens",
    inputs={"x": "T", "slot": "tensor(int64)", "aside": "T"},
    outputs={"y": "T"},
    shapes={"y": "aside0 aside1 aside2"},
    body="""
    last = Constant <value = int64[1] {-1}> ()
    i0 = Constant <value = int64 {0}> ()
    row = Max (slot, i0)
    row_at = Unsqueeze (row, last)
    gathered = GatherND <batch_dims = 1> (x, row_at)
    slot_at = Unsqueeze (slot, last)
    gone = Less (slot_at, i0)
    y = Where (gone, aside, gathered)
""",
)
