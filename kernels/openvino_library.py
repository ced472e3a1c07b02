"""The kernels as an extension of OpenVINO: how it is built, and which operators are in it."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from thresher.kernels.native import CPU, KernelError, Kind
from thresher.kernels.operator import Operator
from thresher.kernels.registry import OPERATORS

PROCESSOR = "openvino"
PACKAGE = "openvino"
TAKEN = {name: of for name, of in OPERATORS.items() if of.shapes and not of.product}
"""The operators that it holds: those whose shapes are told, without products with weights, which OpenVINO's own
are as fast at, and faster in bfloat16."""

_HEADER = """// The registry's operators, for OpenVINO {release}.
#pragma once
#include <cstddef>
#include <vector>
namespace thresher::openvino {{
constexpr int COUNT = -1;  // as the first axis: the value of the input
enum class Kind {{ INTEGER, NUMBER, TEXT }};
struct Attribute {{ const char* name; Kind kind; }};
struct Axis {{ size_t input; int first; bool rest; }};
struct Row {{
  const char* name;
  std::vector<Attribute> attributes;
  std::vector<std::vector<Axis>> outputs;
}};
inline const Row ROWS[] = {{
{rows}
}};
}}  // namespace thresher::openvino
"""
_KINDS = {int: "INTEGER", float: "NUMBER", str: "TEXT"}


def extension() -> Kind:
    """The kind of library, for the release of OpenVINO that is installed: its C++ interface changes.

    Raises:
        KernelError: OpenVINO is not installed, or came without what a compiler needs.
    """
    found = find_spec(PACKAGE)
    try:
        release = version(PACKAGE)
    except PackageNotFoundError:
        found = None
    if found is None or not found.submodule_search_locations:
        raise KernelError("OpenVINO is not installed: pip install 'thresher[openvino]'")
    place = Path(found.submodule_search_locations[0])
    include, libraries = place / "include", place / "libs"
    linked = [
        next((file.name for file in sorted(libraries.glob(pattern))), "")
        for pattern in ("libopenvino.so*", "libopenvino_onnx_frontend.so*", "libtbb.so*")
    ]
    if not (include / "openvino").is_dir() or not (include / "tbb").is_dir() or not all(linked):
        raise KernelError(
            f"openvino {release} in {place} has no headers or libraries to build against: install its"
            " wheel from PyPI"
        )
    folders = [f"-isystem{include / part}" for part in ("", "tbb", "oneapi")]
    return Kind(
        processor=PROCESSOR,
        sources=("cpu/*.cc", "*/cpu.cc", "openvino/*.cc"),
        headers=("cpu/*.h",),
        compilers=CPU.compilers,
        variable=CPU.variable,
        needs=CPU.needs,
        flags=(*CPU.flags, *folders),
        apart=True,
        # Nodes of ours may outlive the Core that loaded the library.
        links=(
            *CPU.links, f"-L{libraries}", *(f"-l:{name}" for name in linked),
            f"-Wl,-rpath,{libraries}", "-Wl,-z,nodelete",
        ),
        written=(("operators.h", _HEADER.format(release=release, rows="\n".join(map(_row, TAKEN.values())))),),
    )  # fmt: skip


def _row(operator: Operator) -> str:
    places = {name: at for at, name in enumerate(operator.inputs)}
    outputs = [
        ", ".join(
            f"{{{places[name]}, {'COUNT' if first is None else first}, {str(rest).lower()}}}"
            for name, first, rest in axes
        )
        for axes in operator.axes.values()
    ]
    attributes = (f'{{"{n}", Kind::{_KINDS[kind]}}}' for n, kind in operator.attributes.items())
    told = ", ".join(f"{{{axes}}}" for axes in outputs)
    return f'    {{"{operator.name}", {{{", ".join(attributes)}}}, {{{told}}}}},'
