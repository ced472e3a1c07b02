"""Options that trainings have in common, and what they mean."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field

LossName: TypeAlias = Literal["auto", "labels", "dense"]
Rate: TypeAlias = Annotated[float, Field(gt=0, description="learning rate of the first step")]
JudgedBy: TypeAlias = Annotated[
    LossName, Field(description="judge by the labels or by distance to the dense model's outputs")
]
DistilledBy: TypeAlias = Annotated[
    LossName,
    Field(description="train by the labels and the dense model's answers, or by those alone"),
]
Patience: TypeAlias = Annotated[
    int,
    Field(ge=1, description="end a phase when its mean loss of so many steps has not sunk"),
]
