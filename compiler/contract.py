"""The pass contract: typed options in, truthful counts out, enforced by the base class.

A pass is one small class::

    class Fold(Pass[FoldOptions]):
        name = "fold"
        summary = "fold constants"
        Options = FoldOptions

        def run(self, program: Program, context: Context) -> PassResult: ...

Callers call the object (``fold(program, context)``) or ask it (``fold.explain(program, context)``);
both check that the author kept the contract.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeAlias, TypeVar, cast

import pydantic
from torch import fx

from thresher.compiler.errors import ThresherError, UsageError
from thresher.compiler.program import Program, Refusal

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

FACTS = "facts"  # where a calibration keeps what it answers to
KEBAB = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
RESERVED = frozenset({"allow_zero"})  # words of the recipe, so no option may be called so


class ContractError(TypeError):
    """A pass broke the contract: a bug in the pass, never the user's mistake."""


class Options(pydantic.BaseModel):
    """Base of every pass's options; the fields are the recipe's schema, the help and the docs."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")


_AnyOptions: TypeAlias = Options
O_co = TypeVar("O_co", bound=Options, covariant=True)


class Dataset(Protocol):
    """What passes may ask of data: named batches of arrays and their labels."""

    @property
    def name(self) -> str: ...

    @property
    def labels(self) -> np.ndarray | None: ...

    def __len__(self) -> int: ...

    def take(self, chosen: Sequence[int]) -> tuple[dict[str, np.ndarray], np.ndarray | None]: ...

    def batches(
        self, size: int, limit: int | None = None
    ) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray | None]]: ...


def silent(what: str, done: int, total: int) -> None:
    """Progress callback that shows nothing."""


@dataclass(frozen=True)
class Context:
    """What a pass may use besides the Program.

    Attributes:
        seed: of everything random.
        data: calibration or training data, for passes with ``needs_data``.
        batch: items per batch taken from ``data``.
        progress: called with (what, done, total) by passes that take long.
        dump_dir: where the pipeline writes the text before and after each pass, if anywhere.
        checkpoints: folder where passes that train keep their state and resume from, if anywhere.
    """

    seed: int = 0
    data: Dataset | None = None
    batch: int = 32
    progress: Callable[[str, int, int], None] = silent
    dump_dir: Path | None = None
    checkpoints: Path | None = None


@dataclass(frozen=True)
class Calibration:
    """What a pass measured on data: tensors by name, to be written to ``file`` beside the recipe.

    ``digest`` is that of the weights they were measured on; it and ``facts`` (the options that they
    answer to) go into the file's metadata, as one entry: the format does not keep the order of several.
    """

    file: str
    digest: str
    tensors: Mapping[str, Tensor]
    facts: Mapping[str, str] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write the file, the same bytes for the same tensors."""
        from safetensors.torch import save_file

        whole = {name: tensor.contiguous() for name, tensor in sorted(self.tensors.items())}
        facts = json.dumps({**self.facts, "digest": self.digest}, sort_keys=True)
        save_file(whole, folder / self.file, {FACTS: facts})


@dataclass(frozen=True)
class PassResult:
    """What a pass did: ``matched`` places recognised, ``applied`` of them changed.

    ``details`` is plain data (it is saved with the Program); a sentence under ``"note"`` is shown to
    the user.  A pass that decided something by data says so in ``options``, with which it would do
    the same again without data; they go into the history and the saved recipe, and what would be too much
    for them goes into a ``calibration``.  ``applied == 0`` means exactly that ``program`` is the
    object that came in.
    """

    program: Program
    matched: int
    applied: int
    refused: tuple[Refusal, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)
    options: Options | None = None
    calibration: Calibration | None = None


class Pass(ABC, Generic[O_co]):
    """Base class of every pass.

    Attributes:
        name: kebab-case, unique.
        summary: one sentence for help and docs.
        Options: class of the options; all of them must have defaults that make sense.
        requires, ensures: facts such as ``"tokens-reduced"``; every Program is ``"imported"``.
        after, before: names of passes that must not come later, or earlier, in a pipeline.
        needs_data, trains: what the pass takes from the context, and whether it takes long.
        exact: the outputs stay those of the Program that came in, but for rounding.
        chooses_tokens: it drops, merges or skips tokens by their scores, so that rounding decides
            between equal ones.
        allow_zero: applying nowhere is no error; a recipe may say otherwise per use.
        keeps_outputs: the outputs keep their shapes; where a pass changes them at the user's
            wish, it says so here, and names and dtypes stay nevertheless.
        keeps_interface: the Program has the inputs and outputs that came in, and no others.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    Options: ClassVar[type[_AnyOptions]] = _AnyOptions
    requires: ClassVar[frozenset[str]] = frozenset()
    ensures: ClassVar[frozenset[str]] = frozenset()
    after: ClassVar[frozenset[str]] = frozenset()
    before: ClassVar[frozenset[str]] = frozenset()
    needs_data: ClassVar[bool] = False
    trains: ClassVar[bool] = False
    exact: ClassVar[bool] = False
    chooses_tokens: ClassVar[bool] = False
    allow_zero: bool = False

    def __init__(self, options: O_co | None = None) -> None:
        check_declaration(type(self))
        chosen = self.Options() if options is None else options
        if not isinstance(chosen, self.Options):
            raise ContractError(
                f"pass {self.name!r} takes {self.Options.__name__}, not {type(chosen).__name__}"
            )
        self.options = cast(O_co, chosen)

    @property
    def keeps_outputs(self) -> bool:
        return True

    @property
    def keeps_interface(self) -> bool:
        return True

    @abstractmethod
    def run(self, program: Program, context: Context) -> PassResult:
        """Rewrite ``program``, which stays untouched, or return it as it is with reasons."""

    def match(self, program: Program, context: Context) -> PassResult:
        """What :meth:`run` would count, with the Program unchanged.

        The default runs the pass and drops the result; a pass that takes long must do better.
        """
        if self.trains:
            raise UsageError(f"pass {self.name!r} trains, so what it will do is not known before")
        return replace(self.run(program, context), program=program)

    def __call__(self, program: Program, context: Context) -> PassResult:
        """Run the pass and check that it kept the contract.

        Raises:
            UsageError: the pass needs data and the context has none.
            ContractError: the pass broke its promise.
        """
        self.demand_data(context)
        before = _fingerprint(program)
        result = self.run(program, context)
        self._check_result(result)
        broken = _untruth(program, result)
        if broken is None and _fingerprint(program) != before:
            broken = "changed the Program that it was given instead of returning a new one"
        self._complain(broken)
        return result

    def explain(self, program: Program, context: Context) -> PassResult:
        """Ask the pass what it would do; what it refuses comes back as data, not as an error."""
        try:
            self.demand_data(context)
            result = self.match(program, context)
        except ThresherError as error:
            return PassResult(program, 0, 0, (Refusal("", str(error)),))
        self._check_result(result)
        self._complain(None if result.program is program else "returned another Program from match")
        return result

    @property
    def decided(self) -> bool:
        """Whether the options hold what data would tell, as by a ``calibration`` that was kept."""
        return getattr(self.options, "calibration", None) is not None

    def demand_data(self, context: Context) -> None:
        """Raise UsageError if the pass needs data and the context has none."""
        if self.needs_data and not self.decided and context.data is None:
            raise UsageError(f"pass {self.name!r} needs data and none was given: add --data DATA")

    def _check_result(self, result: object) -> None:
        self._complain(_malformed(result))

    def _complain(self, broken: str | None) -> None:
        if broken is not None:
            raise ContractError(f"pass {self.name!r} {broken}")


def check_declaration(cls: type[Pass[Any]]) -> None:
    """Check what a pass class says about itself.

    Raises:
        ContractError: naming the class and the attribute.
    """
    where = f"{cls.__module__}.{cls.__qualname__}"
    name, summary = getattr(cls, "name", None), getattr(cls, "summary", None)
    if not isinstance(name, str) or not KEBAB.fullmatch(name):
        raise ContractError(f"{where}.name must be kebab-case text, not {name!r}")
    if not isinstance(summary, str) or not summary.strip() or "\n" in summary:
        raise ContractError(f"{where}.summary must be one sentence, not {summary!r}")
    if not (isinstance(cls.Options, type) and issubclass(cls.Options, Options)):
        raise ContractError(f"{where}.Options must be a subclass of thresher's Options")
    taken = RESERVED & cls.Options.model_fields.keys()
    if taken:
        raise ContractError(f"{where}.Options declares {min(taken)!r}, a word of recipes")
    for attribute in ("requires", "ensures", "after", "before"):
        if not isinstance(getattr(cls, attribute), frozenset):
            raise ContractError(f"{where}.{attribute} must be a frozenset of names")


def _malformed(result: object) -> str | None:
    """What is wrong with the types in a result, to follow the name of the pass."""
    if not isinstance(result, PassResult):
        return f"returned {type(result).__name__} instead of PassResult"
    program: object = result.program
    if not isinstance(program, Program):
        return f"returned {type(program).__name__} instead of a Program in its PassResult"
    for what, count in (("matched", result.matched), ("applied", result.applied)):
        if type(count) is not int or count < 0:
            return f"counts {what}={count!r}, which is no number of places"
    for refusal in result.refused:
        if not isinstance(refusal, Refusal) or not refusal.reason:
            return f"refused without a reason: {refusal!r}"
    odd = _not_plain(result.details, "details")
    return None if odd is None else f"returned {odd}, which is not plain data and cannot be saved"


def _untruth(program: Program, result: PassResult) -> str | None:
    """Where counts and result disagree."""
    if result.applied == 0 and result.program is not program:
        return "says that it applied 0 times and returned another Program"
    if result.applied and result.program.exported is program.exported:
        return f"says that it applied {result.applied} times and returned the same graph"
    if result.program.history != program.history:
        return "changed the history, which the pipeline writes"
    return None


def _not_plain(value: object, where: str) -> str | None:
    """The first part of a value that YAML cannot hold without tags."""
    if value is None or type(value) in (str, int, float, bool):
        return None
    if isinstance(value, list | tuple):
        items: Iterator[tuple[object, object]] = iter(enumerate(value))
    elif isinstance(value, dict):
        items = iter(value.items())
    else:
        return f"{where} of type {type(value).__name__}"
    for key, item in items:
        if type(key) not in (str, int):
            return f"{where} with the key {key!r}"
        odd = _not_plain(item, f"{where}[{key!r}]")
        if odd is not None:
            return odd
    return None


def _fingerprint(program: Program) -> tuple[int, int]:
    """Tells an edited graph from an untouched one; nodes compare by name and operands."""

    def line(node: fx.Node) -> tuple[str, int, str]:
        return node.name, id(node.target), f"{node.args}{node.kwargs}"

    lines = [line(node) for node in program.graph.nodes]
    return len(lines), hash(tuple(lines))
