"""An ONNX file as a checked, inlined, simplified graph; nothing outside its folder is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript import optimizer

from thresher.compiler.errors import RefusedError, UsageError

OLDEST_OPSET = 9
OURS = "thresher"
SMALL = 16  # items


def read(path: Path, supported: Collection[str]) -> tuple[ir.Model, set[str]]:
    """Read, refuse what cannot be imported, inline functions, fold and tidy.

    Gives the model and the names of the file's own weights.

    Args:
        path: the ``.onnx`` file; external data must lie in its folder.
        supported: operators, ``Name`` or ``domain::Name``.

    Raises:
        UsageError: no such file, not an ONNX file, broken, or data outside the folder.
        RefusedError: operators that are not supported (all at once), or an already reduced model.
    """
    proto = _parse(path)
    if any(node.domain == OURS for node in _all_nodes(proto)):
        raise RefusedError(
            f"{path} is already reduced: give the folder that 'thresher optimize' wrote instead"
        )
    if proto.graph.sparse_initializer:
        raise RefusedError(
            f"{path} holds sparse weights, which are not read: export it with dense ones"
        )
    _check_external(path, proto)
    _check(path)
    model = ir.from_proto(proto)
    for tensor in (value.const_value for value in model.graph.initializers.values()):
        if isinstance(tensor, ir.ExternalTensor):
            tensor.base_dir = str(path.parent)
    opset = model.opset_imports.get("", 0)
    if opset < OLDEST_OPSET:
        raise RefusedError(
            f"{path} uses ONNX opset {opset} and the oldest supported is {OLDEST_OPSET}:"
            " convert it with onnx.version_converter or export it again"
        )
    _simplify(model)
    _refuse_unsupported(path, model, supported)
    return model, {tensor.name for tensor in proto.graph.initializer}


def _parse(path: Path) -> onnx.ModelProto:
    try:
        proto = onnx.load(str(path), load_external_data=False)
    except FileNotFoundError as error:
        raise UsageError(f"{path} does not exist: give the path of an ONNX file") from error
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}): give an ONNX file") from error
    except Exception as error:  # protobuf's and others, all about the bytes
        raise _broken(path) from error
    if not proto.graph.node or not proto.graph.output or not proto.opset_import:
        raise _broken(path)
    return proto


def _broken(path: Path, reason: str = "") -> UsageError:
    why = f" ({reason})" if reason else ""
    return UsageError(f"{path} is not a whole, valid ONNX file{why}: export or copy it again")


def _all_nodes(proto: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    for owner in (proto.graph, *proto.functions):
        yield from owner.node


def _check_external(path: Path, proto: onnx.ModelProto) -> None:
    """Every tensor kept outside the file must be a whole file of the same folder."""
    folder = path.parent.resolve()
    for tensor in proto.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        place = (folder / entries.get("location", "")).resolve()
        if not place.is_relative_to(folder):
            raise UsageError(
                f"{path} keeps {tensor.name!r} in {entries['location']!r}, outside its own folder:"
                " put the data beside the model"
            )
        end = int(entries.get("offset", 0)) + int(entries.get("length", 0))
        if not place.is_file() or place.stat().st_size < end:
            raise UsageError(
                f"{path} needs the file {place.name!r} beside it, which is missing or too short:"
                " copy the model together with its data"
            )


def _check(path: Path) -> None:
    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as error:
        reason = str(error).strip().splitlines()[0]
        if "No Op registered" in reason or "No opset import" in reason:
            return  # said better, and for all operators at once, by the list of unsupported ones
        raise _broken(path, reason.rstrip(".")) from error


def _simplify(model: ir.Model) -> None:
    """Inline functions, decide constant branches, merge duplicate nodes, drop what is unused.

    Only small constants are folded and merged here, so that weights keep their names; the dry run
    folds the rest.  The optimizer's rewrite rules stay out: they take a norm's epsilon for zero.
    """
    common.InlinePass()(model)
    optimizer.fold_constants(model, input_size_limit=SMALL, output_size_limit=SMALL)
    for tidy in (
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(size_limit=SMALL),
        common.CommonSubexpressionEliminationPass(),
        common.IdentityEliminationPass(),
    ):
        tidy(model)


def _refuse_unsupported(path: Path, model: ir.Model, supported: Collection[str]) -> None:
    keys = [(f"{n.domain}::{n.op_type}" if n.domain else n.op_type, n) for n in model.graph]
    unknown = Counter(key for key, _ in keys if key not in supported)
    if not unknown:
        return
    first, node = next((key, node) for key, node in keys if key in unknown)
    listed = ", ".join(f"{key} ({count})" for key, count in sorted(unknown.items()))
    raise RefusedError(
        f"{path} has operators that cannot be imported, first {first} at node {node.name!r};"
        f" all of them: {listed}; export the model without them, or in float if it is quantised"
    )
