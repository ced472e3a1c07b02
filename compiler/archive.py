"""``.pt2`` archives read as data: what torch.export.load would execute is refused beforehand.

``torch.export.load`` warns against untrusted files, and rightly.  In torch 2.15 it

* falls back to an older format, and from there to plain unpickling;
* unpickles tensor subclasses, example inputs and old-style weights without ``weights_only``;
* unpickles script and opaque objects;
* loads shared libraries of compiled (AOTInductor) packages;
* hands size expressions to ``sympy.sympify``, which evaluates them as Python;
* resolves operators by attribute from ``torch`` and ``operator``, whatever they are;
* pastes names into generated source, and executes guards that are stored as source.

So the archive's listing and JSON are checked first, with the reader that torch itself uses, and
``torch.load`` is held to weights by the environment variable that torch provides for that; the
function that reads the present format is called directly, which leaves the fallback out.
"""

from __future__ import annotations

import importlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.pt2_archive._package import load_pt2

from thresher.compiler.errors import RefusedError, UsageError

_PLAIN = re.compile(r"-?[\w.+:]*")  # names, types, versions, devices: nothing that could be code
_SPACES = "aten|prims|thresher|torchvision|quantized_decomposed"
_OPERATOR = re.compile(
    rf"torch\.ops\.({_SPACES})\.(?!from_file)([a-zA-Z]\w*|_[a-zA-Z]\w*|__[a-z]+__)(\.[a-zA-Z]\w*)?"
    r"|torch\.ops\.higher_order\.wrap_with_(set_grad_enabled|autocast)"
    r"|_operator\.(add|sub|mul|truediv|floordiv|mod|pow|neg|pos|abs|eq|ne|lt|le|gt|ge|getitem)"
    r"|_operator\.(and_|or_|xor|not_|lshift|rshift)"
    r"|math\.[a-z0-9]+|torch\._?sym_\w+"
)
_EXPRESSION = re.compile(r"[\w\s+\-*/%(),<>=!&|~^]*")
_WORDS = """
Abs Add And CeilDiv CeilToInt CleanDiv Eq Equality Float FloatPow FloatTrueDiv FloorDiv FloorToInt
Ge Gt GreaterThan Identity Integer IntTrueDiv LShift Le LessThan Lt Max Min Mod ModularIndexing Mul
Ne Not Or Piecewise Pow PowByNatural PythonMod RShift Rational RoundDecimal RoundToInt
StrictGreaterThan StrictLessThan Symbol ToFloat TruncToFloat TruncToInt Unequality Where Xor
True False ceiling floor int_oo oo true false positive nonnegative integer real nonzero finite
precision
"""  # what sizes are written with, of sympy and torch.utils._sympy.functions
_KNOWN = frozenset(_WORDS.split())
_SYMBOL = re.compile(r"[a-z]{1,4}_?\d+|\d+")
_OUTPUT_MODULE = re.compile(r"transformers\.(?:modeling_outputs|models\.\w+\.modeling_\w+)")
_FREE = ("as_string", "metadata")  # quoted wherever they are used
_SPECS = ("in_spec", "out_spec", "treespec")  # JSON in a string


def read_archive(path: Path) -> ExportedProgram:
    """The exported program in a ``.pt2`` file.

    Raises:
        UsageError: not a whole archive of this torch's format.
        RefusedError: the archive holds something that would be executed.
    """
    if not path.is_file():
        raise UsageError(f"{path} does not exist: give a file written by torch.export.save")
    try:
        records = _records(path)
    except RuntimeError as error:
        raise UsageError(f"{path} is not a whole .pt2 archive: write it again") from error
    _check(path, records)
    _register_outputs(records)
    try:
        with _weights_only():
            exported: ExportedProgram = load_pt2(path).exported_programs["model"]
    except Exception as error:  # torch raises many kinds
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        text = f"{path} cannot be loaded by torch {torch.__version__} ({reason}): export it again"
        raise UsageError(text) from error
    exported._guards_code = []  # source text of checks on inputs; engines do their own
    return exported


def _records(path: Path) -> dict[str, bytes | None]:
    """Names in the archive, with the content of those that are JSON."""
    reader = torch._C.PyTorchFileReader(str(path))
    names = reader.get_all_records()
    return {name: reader.get_record(name) if name.endswith(".json") else None for name in names}


def _check(path: Path, records: dict[str, bytes | None]) -> None:
    if "archive_version" not in records or not any(n.startswith("models/") for n in records):
        raise UsageError(
            f"{path} is not an archive of torch.export.save as torch {torch.__version__} writes it:"
            " export the model again"
        )
    folded = [name.lower() for name in records]
    if len(set(folded)) != len(folded):
        raise RefusedError(f"{path} has entries whose names differ in case alone")
    for name, content in records.items():
        if name.startswith("data/aotinductor/"):
            raise RefusedError(
                f"{path} holds compiled code ({name}), which is not loaded:"
                " give the archive of torch.export.save"
            )
        if re.search(r"/(custom_obj|opaque_obj)_", name):
            raise RefusedError(
                f"{path} holds a pickled object ({name}), which is not loaded:"
                " export a model whose constants are tensors"
            )
        if content is not None:
            for fault in _faults(json.loads(content), ""):
                raise RefusedError(f"{path}: {name} holds {fault}, so the archive is not loaded")


def _register_outputs(records: dict[str, bytes | None]) -> None:
    """Output classes of transformers are known to torch once their module is imported."""
    text = b" ".join(content or b"" for content in records.values()).decode(errors="replace")
    for module in set(re.findall(_OUTPUT_MODULE, text)):
        with suppress(ImportError):
            importlib.import_module(module)


def _faults(value: Any, key: str) -> Iterator[str]:
    """What in a JSON value could be executed, by the rule for the key it stands under."""
    if isinstance(value, dict):
        operator = value.get("target") if "inputs" in value and "outputs" in value else None
        if operator is not None and not _OPERATOR.fullmatch(str(operator)):
            yield f"the unknown operator {operator!r}"
        for name, item in value.items():
            if not _PLAIN.fullmatch(name):
                yield f"the name {name!r}"
            if name not in _FREE and name != "guards_code" and (name, item) != ("target", operator):
                yield from _faults(item, name)
    elif isinstance(value, list):
        for item in value:
            yield from _faults(item, key)
    elif isinstance(value, str):
        yield from _text_faults(value, key)


def _text_faults(text: str, key: str) -> Iterator[str]:
    if key == "expr_str":
        bare = re.sub(r"'[\w.]*'", "", text)
        known = all(w in _KNOWN or _SYMBOL.fullmatch(w) for w in re.findall(r"\w+", bare))
        if not (known and _EXPRESSION.fullmatch(bare)):
            yield f"the size expression {text!r}"
    elif key in _SPECS or text[:1] in ("[", "{", '"'):
        try:
            yield from _faults(json.loads(text) if text else None, "")
        except ValueError:
            yield f"the text {text!r}"
    elif re.match(r"(custom_obj|opaque_obj)_", text):
        yield f"a pickled object ({text})"
    elif not _PLAIN.fullmatch(text):
        yield f"the text {text!r}"


@contextmanager
def _weights_only() -> Iterator[None]:
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
