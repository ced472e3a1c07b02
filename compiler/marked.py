"""YAML that remembers where everything was written, so that a complaint can point at it.

The YAML 1.2 core schema and nothing else: null, booleans (true, false), integers, floats, text,
lists and mappings with distinct text keys.  No tags, anchors or dates; ``on`` is text and ``1e-3``
is a number.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from thresher.compiler.errors import UsageError

_TAG = "tag:yaml.org,2002:"
_FLOAT = re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_CORE = (
    ("null", re.compile(r"~|null|Null|NULL|")),
    ("bool", re.compile(r"true|True|TRUE|false|False|FALSE")),
    ("int", re.compile(r"[-+]?\d+")),
    ("float", _FLOAT),
)


@dataclass(frozen=True)
class Marked:
    """A value and where it stands; ``data`` holds Marked values inside lists and mappings.

    ``where`` reads ``file:line:column``; ``key`` is the same for the key of a mapping's entry.
    """

    data: bool | int | float | str | list[Marked] | dict[str, Marked] | None
    where: str
    key: str = ""

    def plain(self) -> Any:
        """The value without marks."""
        if isinstance(self.data, list):
            return [item.plain() for item in self.data]
        if isinstance(self.data, dict):
            return {key: item.plain() for key, item in self.data.items()}
        return self.data

    def at(self, path: Iterable[str | int]) -> Marked:
        """The part at a path of keys and indices, or the deepest part on the way that exists."""
        found = self
        for step in path:
            part = found._part(step)
            if part is None:
                break
            found = part
        return found

    def _part(self, step: str | int) -> Marked | None:
        if isinstance(self.data, dict):
            return self.data.get(str(step))
        if isinstance(self.data, list) and isinstance(step, int) and step < len(self.data):
            return self.data[step]
        return None


def read(text: str, origin: str, *, whole: bool = False) -> Marked:
    """Parse one YAML document.

    Args:
        text: the document.
        origin: name of the file for the marks.
        whole: every part is at ``origin`` itself (a value from the command line).

    Raises:
        UsageError: it is not YAML, or uses more of it than the core schema; says where.
    """

    def where(mark: Any) -> str:
        return origin if whole or mark is None else f"{origin}:{mark.line + 1}:{mark.column + 1}"

    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        problem = error.problem or "this is not YAML"
        raise UsageError(f"{where(error.problem_mark)}: not valid YAML: {problem}") from error
    except yaml.YAMLError as error:
        raise UsageError(f"{origin}: not valid YAML: {str(error).splitlines()[0]}") from error
    except RecursionError as error:
        raise UsageError(f"{origin}: not valid here: nested too deeply") from error
    if node is None:
        return Marked(None, origin if whole else f"{origin}:1:1")
    return _marked(node, where, "")


def write(value: Mapping[str, Any]) -> str:
    """Print plain data so that :func:`read` (and YAML 1.1 readers) give it back."""
    return yaml.dump(
        value,
        Dumper=_Dumper,
        sort_keys=False,
        default_flow_style=None,
        allow_unicode=True,
        width=100,
    )


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}  # noqa: RUF012  (replaced by the core schema below)

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise yaml.MarkedYAMLError(
                problem="anchors and aliases are not allowed", problem_mark=event.start_mark
            )
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    """Quotes whatever either schema would take for something else than text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> ScalarNode:
        """Odd characters only survive as escapes."""
        style = None if data.isprintable() else '"'
        return self.represent_scalar(_TAG + "str", data, style=style)


for _name, _pattern in _CORE:
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(rf"(?:{_pattern.pattern})\Z"), None)
    _Dumper.add_implicit_resolver(_TAG + _name, re.compile(rf"(?:{_pattern.pattern})\Z"), None)


_Dumper.add_representer(str, _Dumper.represent_str)


def _marked(node: Node, where: Any, key: str) -> Marked:
    here = where(node.start_mark)
    if isinstance(node, ScalarNode):
        return Marked(_scalar(node, here), here, key)
    if isinstance(node, SequenceNode) and node.tag == _TAG + "seq":
        return Marked([_marked(item, where, "") for item in node.value], here, key)
    if isinstance(node, MappingNode) and node.tag == _TAG + "map":
        return Marked(_mapping(node, where), here, key)
    raise UsageError(f"{here}: the YAML tag {node.tag} is not allowed here")


def _mapping(node: MappingNode, where: Any) -> dict[str, Marked]:
    entries: dict[str, Marked] = {}
    for key_node, value in node.value:
        at = where(key_node.start_mark)
        name = _scalar(key_node, at) if isinstance(key_node, ScalarNode) else None
        if not isinstance(name, str):
            raise UsageError(f"{at}: keys must be text: put this key in quotes or mend it")
        if name in entries:
            raise UsageError(f"{at}: the key {name!r} is given twice, first at {entries[name].key}")
        entries[name] = _marked(value, where, at)
    return entries


def _scalar(node: ScalarNode, here: str) -> bool | int | float | str | None:
    kind, text = node.tag.removeprefix(_TAG), str(node.value)
    try:
        if kind == "str":
            return text
        if kind == "null":
            return None
        if kind == "bool":
            return {"true": True, "false": False}[text.lower()]
        if kind == "int":
            return int(text)
        if kind == "float":
            return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    except (ValueError, KeyError) as error:
        raise UsageError(f"{here}: {text!r} is not of type {kind}") from error
    raise UsageError(f"{here}: the YAML tag {node.tag} is not allowed here")
