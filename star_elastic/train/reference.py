"""The reference of the run config, made from the config classes themselves: what a key does stands
below it in their source, and this file reads it there.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from star_elastic.train.config import RunConfig

START = "Start with "
HEAD = """# Run config

Every key of the TOML file that `star-elastic train` reads. `star-elastic config` prints this page,
which is made from the code and cannot lag behind it. Keys that are unknown or of another type are
refused. A commented example is `recipes/llama_24gb/run.toml`.

*Start with* is what to try first where the default is not the answer. Keys without a default must
be given.
"""


@dataclass(frozen=True, slots=True)
class Key:
    """One key: its name, type and default as TOML has them, what it does, what to start with."""

    name: str
    type: str
    default: str
    note: str
    start: str


def reference() -> str:
    """The whole reference as Markdown."""
    parts = [HEAD]
    for title, kind in sections(RunConfig):
        parts.append(f"## {title}\n\n{_flow(inspect.getdoc(kind) or '')}\n")
        parts.append("| key | type | default | what it does | start with |\n|---|---|---|---|---|")
        for key in keys(kind):
            cells = (f"`{key.name}`", key.type, key.default, key.note, key.start)
            parts.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        parts.append("")
    return "\n".join(parts)


def sections(kind: type, path: str = "", opening: str = "[{}]") -> Iterator[tuple[str, type]]:
    """The tables of a config class, with how each begins in the file; the outermost first."""
    yield (f"`{opening.format(path)}`" if path else "At the top"), kind
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        inner, where = hints[field.name], f"{path}.{field.name}" if path else field.name
        if typing.get_origin(inner) is tuple and dataclasses.is_dataclass(
            typing.get_args(inner)[0]
        ):
            yield from sections(typing.get_args(inner)[0], where, "[[{}]]")
        elif isinstance(inner, type) and dataclasses.is_dataclass(inner):
            yield from sections(inner, where)


def keys(kind: type) -> list[Key]:
    """The keys of one table, in their order."""
    hints, said = typing.get_type_hints(kind), notes(kind)
    found = []
    for field in dataclasses.fields(kind):
        note, _, start = said.get(field.name, "").partition(START)
        start = start.strip().removesuffix(".")
        default = _default(field)
        found.append(Key(field.name, _type(hints[field.name]), default, note.strip(), start))
    return found


def notes(kind: type) -> dict[str, str]:
    """What stands below each field of a class in its source, on one line."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    (definition,) = tree.body
    assert isinstance(definition, ast.ClassDef), definition
    found: dict[str, str] = {}
    name = ""
    for node in definition.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            name = node.target.id
            continue
        text = node.value.value if name and _is_text(node) else None
        if isinstance(text, str):
            found[name] = _flow(text)
        name = ""
    return found


def _is_text(node: ast.stmt) -> typing.TypeGuard[Any]:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _flow(text: str) -> str:
    """Lines of a docstring as one."""
    return " ".join(text.split())


def _type(hint: Any) -> str:
    """A type as the writer of a TOML file knows it."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return " or ".join(f'`"{option}"`' for option in inner)
    if origin is tuple:
        return f"list of {_plural(_type(inner[0]))}"
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_type(kind) for kind in inner if kind is not type(None))
    if origin is Mapping or origin is typing.get_origin(Mapping[str, Any]):
        return f"table of {_plural(_type(inner[1]))}"
    if dataclasses.is_dataclass(hint):
        return "table"
    return {str: "text", int: "integer", float: "number", bool: "`true` or `false`"}[hint]


def _plural(name: str) -> str:
    head, separator, rest = name.partition(" of ")
    return " or ".join(f"{word}s" for word in head.split(" or ")) + separator + rest


def _default(field: dataclasses.Field) -> str:
    if field.default is dataclasses.MISSING:
        if field.default_factory is dataclasses.MISSING:
            return "must be given"
        value = field.default_factory()
        return "" if value is None or dataclasses.is_dataclass(value) or not value else str(value)
    value = field.default
    if value is None or value in ("", ()):
        return ""
    return f"`{json.dumps(value)}`"
