"""Options that passes of several kinds share."""

from __future__ import annotations

from typing import Annotated, TypeAlias

from pydantic import Field

Flops: TypeAlias = Annotated[
    float | None,
    Field(
        gt=0,
        le=1,
        description="share of the multiply-accumulates to spend, of those that came in",
    ),
]
