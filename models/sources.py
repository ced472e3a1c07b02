"""Where Programs come from: one table of kinds, each with the function that reads it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from thresher.compiler.errors import UsageError
from thresher.models.options import SourceOptions

if TYPE_CHECKING:
    from thresher.compiler.program import Program


@dataclass(frozen=True)
class Kind:
    """A kind of source.

    Attributes:
        form: how it is written, for help and messages.
        pattern: matches the whole source; the group ``name`` is what the reader is given.
        reader: ``module:function`` of ``thresher.models``, imported when first needed.
    """

    form: str
    pattern: re.Pattern[str]
    reader: str

    def load(self, name: str, options: SourceOptions) -> Program:
        module, _, function = self.reader.partition(":")
        read: Callable[[str, SourceOptions], Program]
        read = getattr(import_module(f"thresher.models.{module}"), function)
        from thresher.compiler.idle_masks import without_idle_masks

        return without_idle_masks(read(name, options))


KINDS = (
    Kind("timm:NAME", re.compile(r"timm:(?P<name>.*)"), "timm_source:load"),
    Kind("hf:DIR", re.compile(r"hf:(?P<name>.+)"), "hf_source:load"),
    Kind("FILE.onnx", re.compile(r"(?P<name>.+\.onnx)"), "file_sources:load_onnx"),
    Kind("FILE.pt2", re.compile(r"(?P<name>.+\.pt2)"), "file_sources:load_pt2"),
    Kind("module:function", re.compile(r"(?P<name>[\w.]+:\w+)"), "python_source:load"),
)
FOLDER = Kind(
    "a folder of 'thresher optimize'", re.compile(r"(?P<name>.+)"), "file_sources:load_folder"
)


def load_source(
    source: str,
    options: SourceOptions | None = None,
    *,
    weights: str | None = None,
    resolution: int | tuple[int, int] | None = None,
    length: int | None = None,
    outputs: tuple[str, ...] | None = None,
) -> Program:
    """Read a source of any kind; the wishes are those of :class:`SourceOptions`.

    Args:
        source: ``timm:NAME``, ``hf:DIR``, ``FILE.onnx``, ``FILE.pt2``, ``module:function`` or a
            folder that ``thresher optimize`` wrote.
        options: all wishes in one; the other arguments are then left out.
        weights: a file, ``"pretrained"``, ``"random"`` or ``"included"``.
        resolution: side of the image in pixels, or height and width.
        length: fixed length of the sequence.
        outputs: names of the outputs to keep.

    Raises:
        UsageError: no such source, or a wish that it cannot fulfil.
        RefusedError: the model cannot be taken.
        MissingRequirementError: a package or the network is missing.
    """
    if isinstance(resolution, int):
        resolution = (resolution, resolution)
    options = options or SourceOptions(weights, resolution, length, outputs)
    kind, name = kind_of(source)
    return kind.load(name, options)


def kind_of(source: str) -> tuple[Kind, str]:
    """The kind of a source, and the source without its prefix.

    Raises:
        UsageError: it has none of the known forms and is no folder.
    """
    if Path(source).is_dir():
        if (Path(source) / "config.json").is_file():
            raise UsageError(f"{source} is a folder of Hugging Face: write hf:{source}")
        return FOLDER, source
    for kind in KINDS:
        if match := kind.pattern.fullmatch(source):
            return kind, match["name"]
    forms = ", ".join(kind.form for kind in (*KINDS, FOLDER))
    raise UsageError(f"{source!r} is not a model: give {forms}")
