"""Resize, where torch's interpolation means the same; anything else is refused."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from thresher.models.onnx_import.node import Call, op
from thresher.models.onnx_import.values import Host, same

_LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}


@op("Resize", "Upsample")
def resize(call: Call) -> torch.Tensor:
    x = call.tensor(0)
    at = 1 if call.node.op == "Upsample" or call.node.opset < 11 else 2
    axes = call.listed("axes") or list(range(x.dim()))
    scales = _input(call, at)
    sizes = None if scales else _input(call, at + 1)
    if call.text("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise ValueError("keep_aspect_ratio_policy is not supported")
    if scales is None and sizes is None:
        raise ValueError("neither scales nor sizes are given")
    factor = None if scales is None else _spatial(x, axes, scales, [1.0] * x.dim())
    size = None if sizes is None else _spatial(x, axes, sizes, list(x.shape))
    mode = call.text("mode", "nearest")
    if mode == "nearest":
        return _nearest(call, x, factor, size)
    _require_as_torch(call, x, mode, factor, size)
    return F.interpolate(
        x,
        size,
        factor,
        "bicubic" if mode == "cubic" else _LINEAR[x.dim() - 2],
        align_corners=call.text("coordinate_transformation_mode") == "align_corners",
        recompute_scale_factor=False if factor else None,
        antialias=bool(call.integer("antialias")),
    )


def _require_as_torch(
    call: Call, x: torch.Tensor, mode: str, factor: list[Any] | None, size: list[Any] | None
) -> None:
    """Refuse the forms of linear and cubic interpolation that torch computes in another way."""
    placing = call.text("coordinate_transformation_mode", "half_pixel")
    antialias, outside = call.integer("antialias"), call.integer("exclude_outside")
    if placing not in ("half_pixel", "pytorch_half_pixel", "align_corners"):
        raise ValueError(f"{mode} interpolation with coordinate_transformation_mode {placing!r}")
    if placing == "pytorch_half_pixel" and any(same(n, 1) for n in size or ()):
        raise ValueError("pytorch_half_pixel interpolation to a single row or column")
    sizes = zip(x.shape[2:], factor or (), strict=False)
    if placing == "align_corners" and any(not isinstance(n, int) or n * f % 1 for n, f in sizes):
        raise ValueError("align_corners interpolation by a scale that gives no whole size")
    if (antialias or outside) and antialias != outside:
        raise ValueError("interpolation with only one of antialias and exclude_outside")
    if mode == "cubic":
        usual = -0.5 if antialias else -0.75
        if x.dim() != 4 or call.number("cubic_coeff_a", -0.75) != usual:
            raise ValueError(
                "cubic interpolation of other than images, or with another coefficient"
            )


def _input(call: Call, index: int) -> list[Any] | None:
    if not call.has(index):
        return None
    value = call.value(index)
    empty = value.items.size == 0 if isinstance(value, Host) else value.numel() == 0
    return None if empty else call.ints(index)


def _spatial(x: torch.Tensor, axes: list[int], given: list[Any], kept: list[Any]) -> list[Any]:
    """What is asked of each spatial axis.  ``kept`` asks for no change, as axes 0 and 1 must."""
    asked = {axis % x.dim(): value for axis, value in zip(axes, given, strict=True)}
    if any(axis in asked and not same(asked[axis], kept[axis]) for axis in (0, 1)):
        raise ValueError("batch and channels cannot be resized")
    return [asked.get(axis, kept[axis]) for axis in range(2, x.dim())]


def _nearest(
    call: Call, x: torch.Tensor, factor: list[float] | None, size: list[Any] | None
) -> torch.Tensor:
    placing = call.text("coordinate_transformation_mode", "half_pixel")
    rounding = call.text("nearest_mode", "round_prefer_floor")
    for axis in range(2, x.dim()):
        length = x.shape[axis]
        if not isinstance(length, int):
            raise ValueError("nearest interpolation of an axis whose size is not fixed")
        scale = factor[axis - 2] if factor else size[axis - 2] / length if size else 1.0
        count = size[axis - 2] if size else math.floor(length * scale)
        if count == length and scale == 1.0:
            continue
        picks = [_source(i, scale, length, count, placing, rounding) for i in range(count)]
        x = torch.index_select(x, axis, torch.tensor(picks))
    return x


def _source(i: int, scale: float, length: int, count: int, placing: str, rounding: str) -> int:
    """Input position of output position ``i`` (the ONNX specification of Resize)."""
    match placing:
        case "asymmetric":
            at = i / scale
        case "half_pixel" | "pytorch_half_pixel":
            at = (i + 0.5) / scale - 0.5
        case "align_corners":
            at = i * (length - 1) / (count - 1) if count > 1 else 0.0
        case _:
            raise ValueError(f"nearest with coordinate_transformation_mode {placing!r}")
    whole = {
        "floor": math.floor(at),
        "ceil": math.ceil(at),
        "round_prefer_floor": math.ceil(at - 0.5),
        "round_prefer_ceil": math.floor(at + 0.5),
    }[rounding]
    return min(max(whole, 0), length - 1)
