"""Sets of ATen operators that analyses, lowering and passes tell apart alike."""

from __future__ import annotations

from typing import Any

import torch

aten = torch.ops.aten
PRODUCTS = (aten.matmul.default, aten.bmm.default)
RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


def in_any_layout(target: Any) -> Any:
    """``reshape`` for ``view``, which refuses some memory layouts; any other operator as it is."""
    return aten.reshape.default if target is aten.view.default else target
