"""Recipes: which passes, with which options, read strictly from YAML.

::

    name: my-recipe
    summary: half the tokens, late
    learned_on: {data: ImageNet-1k, model: deit_small_patch16_224}  # optional
    passes:
      - tome: {r: 13, inflect: 1.0}
      - cleanup: {allow_zero: true}

Reading the list of built-in recipes imports no pass; loading a recipe imports the passes it names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin

from thresher.compiler import built_in_recipes, marked, registry
from thresher.compiler.errors import UsageError, nearest
from thresher.compiler.marked import Marked

if TYPE_CHECKING:
    from thresher.compiler.contract import Options, Pass

KEYS = ("name", "summary", "learned_on", "passes")
LEARNED_ON = ("data", "model")
ALLOW_ZERO = "allow_zero"
MULTIPLE = "multiple"  # the option that rounds token counts
LISTS = frozenset({list, tuple, set, frozenset})


@dataclass(frozen=True)
class RecipePass:
    """One pass of a recipe; ``allow_zero``: applying nowhere is no error."""

    name: str
    options: Options
    allow_zero: bool = False

    def build(self) -> Pass[Any]:
        """The pass, ready to run."""
        made = registry.load(self.name)(self.options)
        made.allow_zero = self.allow_zero
        return made

    def rounding(self, multiple: int) -> RecipePass:
        """With token counts rounded up, if the pass has such, and leaves open how."""
        said = self.options.model_fields_set
        if MULTIPLE not in type(self.options).model_fields or said & {MULTIPLE, "counts"}:
            return self
        given = {name: getattr(self.options, name) for name in said}
        return replace(self, options=type(self.options)(**given, **{MULTIPLE: multiple}))

    def beside(self, folder: Path) -> RecipePass:
        """With relative paths among the options taken from ``folder``."""
        said = {name: getattr(self.options, name) for name in self.options.model_fields_set}
        files = {name: folder / value for name, value in said.items() if isinstance(value, Path)}
        return replace(self, options=self.options.model_copy(update=files)) if files else self

    def bare(self) -> RecipePass:
        """With files among the options reduced to their names: what decides, wherever they lie."""
        files = {n: Path(v.name) for n, v in self.options if isinstance(v, Path)}
        return replace(self, options=self.options.model_copy(update=files)) if files else self

    def plain(self) -> dict[str, Any] | str:
        """The form in a recipe, with defaults written out unless they are null."""
        fields = type(self.options).model_fields
        values = self.options.model_dump(mode="json")
        shown = {k: v for k, v in values.items() if v is not None or fields[k].default is not None}
        if self.allow_zero != registry.load(self.name).allow_zero:
            shown[ALLOW_ZERO] = self.allow_zero
        return {self.name: shown} if shown else self.name


@dataclass(frozen=True)
class LearnedOn:
    """The data and the model that a recipe's numbers were learned on."""

    data: str
    model: str

    def warning(self) -> str:
        """What to tell everyone who uses the recipe (OpenGVLab/DiffRate, issue 2)."""
        return (
            f"its numbers were learned on {self.data} for {self.model}: on other data or another"
            " model they do not transfer blindly, so verify them on yours"
        )


@dataclass(frozen=True)
class Recipe:
    """A named list of passes.  ``origin`` says where it was read: a file, or ``"built-in ..."``."""

    name: str
    passes: tuple[RecipePass, ...]
    summary: str = ""
    learned_on: LearnedOn | None = None
    origin: str = field(default="", compare=False)

    def build(self) -> tuple[Pass[Any], ...]:
        """The passes, ready to run."""
        return tuple(entry.build() for entry in self.passes)

    def plain(self) -> dict[str, Any]:
        """Plain data, as in the YAML file."""
        passes = [entry.plain() for entry in self.passes]
        learned = {} if self.learned_on is None else {"learned_on": asdict(self.learned_on)}
        return {"name": self.name, "summary": self.summary, **learned, "passes": passes}

    def decided(self, options: Sequence[Mapping[str, Any]], learned_on: LearnedOn | None) -> Recipe:
        """The same recipe with the options that its passes went by, and what they were learned on, if anew."""
        passes = tuple(
            replace(entry, options=type(entry.options).model_validate(given))
            for entry, given in zip(self.passes, options, strict=True)
        )
        if [entry.bare() for entry in passes] == [entry.bare() for entry in self.passes]:
            return replace(self, passes=passes)
        return replace(self, passes=passes, learned_on=learned_on or self.learned_on)

    def beside(self, folder: Path) -> Recipe:
        """The same recipe with the files that its options name looked for in ``folder``."""
        return replace(self, passes=tuple(entry.beside(folder) for entry in self.passes))

    def rounding(self, multiple: int) -> Recipe:
        """The same recipe with its token counts rounded up, where it neither says how nor lists counts."""
        if multiple == 1:
            return self
        return replace(self, passes=tuple(entry.rounding(multiple) for entry in self.passes))

    def to_yaml(self) -> str:
        """The resolved recipe; :func:`parse_recipe` reads it back to an equal one."""
        return marked.write(self.plain())


def built_in() -> dict[str, str]:
    """Names and summaries of the built-in recipes."""
    found = {}
    for name in built_in_recipes.names():
        summary = marked.read(built_in_recipes.text(name), name).at(["summary"]).data
        found[name] = str(summary)
    return found


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """A built-in recipe by name, or a recipe file by path.

    Args:
        source: name or path; a built-in name wins over a file of that name.
        overrides: ``option=value`` or ``pass.option=value``, the value written as in YAML.

    Raises:
        UsageError: no such recipe, or a mistake in it; says where and what is meant instead.
    """
    if isinstance(source, str) and source in built_in_recipes.names():
        return parse_recipe(built_in_recipes.text(source), f"built-in recipe {source}", overrides)
    path = Path(source)
    if not path.exists() and path.suffix not in (".yaml", ".yml"):
        hint = nearest(str(source), built_in_recipes.names())
        raise UsageError(f"there is no recipe {str(source)!r}, neither built in nor a file{hint}")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot read the recipe {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"cannot read the recipe {path}: it is not UTF-8 text") from error
    return parse_recipe(text, str(path), overrides).beside(path.parent)


def parse_recipe(text: str, origin: str, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe from the text of a file; ``origin`` names it in complaints.

    Raises:
        UsageError: a mistake, with file, line and column.
    """
    tree = marked.read(text, origin)
    top = _mapping(tree, "a recipe is a mapping with name, summary and passes")
    for key, value in top.items():
        if key not in KEYS:
            raise UsageError(f"{value.key}: a recipe has no key {key!r}{nearest(key, KEYS)}")
    if "passes" not in top:
        raise UsageError(f"{tree.where}: the recipe has no 'passes': list at least one pass")
    drafts = [_draft(item) for item in _passes(top["passes"])]
    for override in overrides:
        _override(drafts, override)
    return Recipe(
        name=_text(top.get("name"), Path(origin).stem),
        passes=tuple(draft.resolve() for draft in drafts),
        summary=_text(top.get("summary"), ""),
        learned_on=_learned_on(top.get("learned_on")),
        origin=origin,
    )


@dataclass
class _Draft:
    """A pass of a recipe before its options are checked."""

    name: str
    where: str
    options: dict[str, Marked]
    cls: type[Pass[Any]]

    def fields(self) -> list[str]:
        return [*self.cls.Options.model_fields, ALLOW_ZERO]

    def resolve(self) -> RecipePass:
        for key, value in self.options.items():
            if key not in self.fields():
                hint = nearest(key, self.fields())
                raise UsageError(f"{value.key}: pass {self.name!r} has no option {key!r}{hint}")
        given = dict(self.options)
        allow_zero = given.pop(ALLOW_ZERO, Marked(self.cls.allow_zero, self.where))
        if not isinstance(allow_zero.data, bool):
            shown = allow_zero.plain()
            raise UsageError(
                f"{allow_zero.where}: {self.name}.{ALLOW_ZERO} is true or false, not {shown!r}"
            )
        return RecipePass(
            self.name, self._validated(Marked(dict(given), self.where)), allow_zero.data
        )

    def _validated(self, given: Marked) -> Options:
        from pydantic import ValidationError

        try:  # as JSON, so that strict types still take lists for tuples
            return self.cls.Options.model_validate_json(json.dumps(given.plain()), strict=True)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            part = given.at(first["loc"])
            message = first["msg"].removeprefix("Value error, ")
            message = message[0].lower() + message[1:]
            if part is given:
                raise UsageError(f"{part.where}: pass {self.name!r}: {message}") from error
            what = f"{_path(self.name, first['loc'])}: {message}, not {part.plain()!r}"
            raise UsageError(f"{part.where}: {what}") from error


def _draft(item: Marked) -> _Draft:
    form = "a pass is written as its name, or as name: {option: value}"
    if isinstance(item.data, str):
        name, where, options = item.data, item.where, Marked({}, item.where)
    elif isinstance(item.data, dict) and len(item.data) == 1:
        ((name, options),) = item.data.items()
        where = options.key
    else:
        raise UsageError(f"{item.where}: {form}, one pass per list item")
    if options.data is None:
        options = Marked({}, where)
    given = _mapping(options, f"options of pass {name!r} are written as {{option: value}}")
    try:
        return _Draft(name, where, dict(given), registry.load(name))
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from error


def _override(drafts: list[_Draft], override: str) -> None:
    """Put one ``--set`` into the draft that it is meant for."""
    where = f"--set {override}"
    key, equals, text = override.partition("=")
    owner, _, option = key.strip().rpartition(".")
    if not equals or not option:
        raise UsageError(f"{where}: write option=value or pass.option=value, for example r=13")
    named = [draft for draft in drafts if owner in ("", draft.name)]
    if not named:
        hint = nearest(owner, {draft.name for draft in drafts})
        raise UsageError(f"{where}: the recipe has no pass {owner!r}{hint}")
    owners = [draft for draft in named if option in draft.fields()]
    if not owners:
        hint = nearest(option, {name for draft in named for name in draft.fields()})
        raise UsageError(f"{where}: no pass of the recipe has an option {option!r}{hint}")
    if len(owners) > 1:
        forms = sorted({f"{draft.name}.{option}" for draft in owners})
        remedy = f"write {' or '.join(forms)}" if len(forms) > 1 else "write a recipe file instead"
        raise UsageError(f"{where}: {len(owners)} passes of the recipe have this option: {remedy}")
    owners[0].options[option] = _value(text, where, _forms(owners[0].cls, option))


def _value(text: str, where: str, forms: set[Any]) -> Marked:
    """The text as YAML; what can only be a list, or has a comma, needs no brackets."""
    value = marked.read(text, where, whole=True)
    bare = value.data is not None and not isinstance(value.data, list)
    if bare and forms & LISTS and ("," in text or forms <= LISTS | {type(None)}):
        value = marked.read(f"[{text}]", where, whole=True)
    return Marked(value.data, where, where)


def _forms(cls: type[Pass[Any]], option: str) -> set[Any]:
    """The types that an option takes, without what they contain."""
    if option == ALLOW_ZERO:
        return {bool}
    annotation = cls.Options.model_fields[option].annotation
    union = get_origin(annotation) in (Union, UnionType)
    return {get_origin(part) or part for part in (get_args(annotation) if union else (annotation,))}


def _mapping(value: Marked, form: str) -> dict[str, Marked]:
    if not isinstance(value.data, dict):
        raise UsageError(f"{value.where}: {form}, not {value.plain()!r}")
    return value.data


def _passes(value: Marked) -> list[Marked]:
    if not isinstance(value.data, list) or not value.data:
        raise UsageError(f"{value.where}: 'passes' is a list of at least one pass")
    return value.data


def _text(value: Marked | None, default: str) -> str:
    if value is None:
        return default
    if not isinstance(value.data, str):
        raise UsageError(f"{value.where}: this must be text, not {value.plain()!r}")
    return value.data


def _learned_on(value: Marked | None) -> LearnedOn | None:
    if value is None:
        return None
    given = _mapping(value, "'learned_on' is written as {data: ..., model: ...}")
    for key, part in given.items():
        if key not in LEARNED_ON:
            raise UsageError(f"{part.key}: learned_on has no key {key!r}{nearest(key, LEARNED_ON)}")
    missing = [key for key in LEARNED_ON if key not in given]
    if missing:
        raise UsageError(f"{value.where}: learned_on has no {missing[0]!r}: give data and model")
    return LearnedOn(*(_text(given[key], "") for key in LEARNED_ON))


def _path(name: str, loc: Sequence[str | int]) -> str:
    return name + "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in loc)
