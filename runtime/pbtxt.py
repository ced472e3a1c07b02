"""Protobuf's text format, as far as configurations need it: messages, lists, strings and numbers.

A message is a mapping.  A list of messages repeats its field, a list of anything else stands in brackets,
and an empty list is left out, which means the same.
The grammar is protobuf's *Text Format Language Specification*.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

INDENT = "  "


class Name(str):
    """A value that is written without quotes: the name of an enumerator."""


def text(message: Mapping[str, Any], indent: str = "") -> str:
    """The fields of a message in their order, each on lines of its own.

    Values are ``str``, :class:`Name`, ``bool``, ``int``, mappings, and sequences of one kind of these.
    """
    return "".join(
        line for field, value in message.items() for line in _field(field, value, indent)
    )


def _field(name: str, value: Any, indent: str) -> list[str]:
    if isinstance(value, Mapping):
        inner = text(value, indent + INDENT)
        return [f"{indent}{name} {{\n{inner}{indent}}}\n" if inner else f"{indent}{name} {{ }}\n"]
    if isinstance(value, Sequence) and not isinstance(value, str):
        if any(isinstance(entry, Mapping) for entry in value):
            return [line for entry in value for line in _field(name, entry, indent)]
        return [f"{indent}{name}: [{', '.join(map(_scalar, value))}]\n"] if value else []
    return [f"{indent}{name}: {_scalar(value)}\n"]


def _scalar(value: str | bool | int) -> str:
    if isinstance(value, Name):
        return value
    if isinstance(value, str):
        return quoted(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def quoted(value: str) -> str:
    """A string literal in ASCII; every other byte of the UTF-8 form becomes three octal digits."""
    return '"' + "".join(map(_escaped, value.encode())) + '"'


def _escaped(byte: int) -> str:
    character = chr(byte)
    if character in '"\\':
        return f"\\{character}"
    return character if 0x20 <= byte < 0x7F else f"\\{byte:03o}"
