"""ONNX's TopK gives equal values in the order of their indices; OpenVINO's only when asked to."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import openvino as ov


def order_ties(model: ov.Model) -> None:
    """Make every sorting TopK of an OpenVINO model stable, as the ONNX file it was read from says."""
    import openvino.opset11 as opset

    for node in model.get_ordered_ops():
        settings = node.get_attributes() if node.get_type_name() == "TopK" else {}
        if settings.get("sort", "none") == "none" or settings["stable"]:
            continue
        stable = opset.topk(
            *node.input_values(),
            settings["axis"],
            settings["mode"],
            settings["sort"],
            settings["index_element_type"],
            stable=True,
        )
        stable.set_friendly_name(node.get_friendly_name())
        for old, new in zip(node.outputs(), stable.outputs(), strict=True):
            old.replace(new)
