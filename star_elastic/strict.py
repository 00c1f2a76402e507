"""Strict configs: dataclasses from plain data, with the nearest name for every unknown key."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import re
import reprlib
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

from star_elastic.errors import ConfigError

MOST_TOKENS, MOST_ROWS, MOST = 2**24, 2**20, 2**62
"""Of a text, of a batch, of whatever is only counted: more is a slip of the pen, and would fill the
memory or never end."""


def require(condition: bool, message: str) -> None:
    """Raises ConfigError with `message` unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def require_within(name: str, value: int, least: int, most: int) -> None:
    """Raises ConfigError unless an integer lies from `least` to `most`."""
    below = "is negative" if value < 0 == least else f"is less than {least}"
    require(value >= least, f"{name}={value} {below}; raise it")
    require(value <= most, f"{name}={value} is more than {most:,}; lower it")


def require_above_zero(config: Any, **advice: str) -> None:
    """Raises ConfigError unless the named fields of a config are above zero; says what to give."""
    for name, like in advice.items():
        value = getattr(config, name)
        require(value > 0, f"{name}={value} is not > 0; give {like}")


def require_not_negative(config: Any, *names: str) -> None:
    """Raises ConfigError unless fields of a config are at least zero."""
    for name in names:
        value = getattr(config, name)
        require(value >= 0, f"{name}={value} is negative; give 0 or more")


@contextlib.contextmanager
def at(where: str) -> Iterator[None]:
    """Puts `where` before what a ConfigError inside says, which begins with a key."""
    try:
        yield
    except ConfigError as error:
        raise type(error)(f"{where}{error}") from None


def parse(kind: type, content: Any, where: str) -> Any:
    """A config dataclass from plain data, strictly. `where` is the dotted path for messages, and is
    put before what the dataclass itself says of its values, which begins with a key."""
    if not isinstance(content, dict):
        raise ConfigError(
            f"{where.rstrip('.') or 'the config'}={reprlib.repr(content)} is not a table; give one"
        )
    hints = typing.get_type_hints(kind)
    known = {f.name: f for f in dataclasses.fields(kind)}
    for key in content:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            advice = f"did you mean {near[0]}?" if near else f"use {', '.join(known)}"
            raise ConfigError(f"{where}{key} is not a key of the run config; {advice}")
    values = {key: read_value(hints[key], value, f"{where}{key}") for key, value in content.items()}
    for name, entry in known.items():
        required = entry.default is dataclasses.MISSING
        if name not in values and required and entry.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{where}{name} is missing; the run config needs it")
    with at(where):
        return kind(**values)


def read_value(hint: Any, value: Any, where: str) -> Any:
    """A value from plain data as `hint` says, strictly; `where` names it. Raises ConfigError."""
    origin = typing.get_origin(hint)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise _no_table(where, value)
        return parse(hint, value, f"{where}.")
    if origin is Literal:
        options = typing.get_args(hint)
        if value not in options:
            raise ConfigError(
                f"{where}={value!r} is unknown; use {' or '.join(map(repr, options))}"
            )
        return value
    if origin is tuple:
        inner = typing.get_args(hint)[0]
        if not isinstance(value, (list, tuple)):
            advice = "write it in brackets"
            if isinstance(value, dict) and dataclasses.is_dataclass(inner):
                advice = f"write [[{where}]], with two brackets: there may be several"
            raise ConfigError(f"{where}={reprlib.repr(value)} is not a list; {advice}")
        return tuple(read_value(inner, item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is Mapping:
        if not isinstance(value, dict):
            raise _no_table(where, value)
        inner = typing.get_args(hint)[1]
        return {key: read_value(inner, item, f"{where}.{key}") for key, item in value.items()}
    if hint is Any:
        return value
    is_union = origin in (types.UnionType, typing.Union)
    kinds = typing.get_args(hint) if is_union else (hint,)
    lists = [kind for kind in kinds if typing.get_origin(kind) is tuple]
    if lists and isinstance(value, (list, tuple)):
        return read_value(lists[0], value, where)
    if type(value) is int and float in kinds:
        return float(value)
    if not is_union and type(value) is float and not math.isfinite(value):
        raise ConfigError(f"{where}={value} is not finite; give a number")
    if type(value) not in kinds:
        raise _wrong(where, value, kinds)
    return value


def _no_table(where: str, value: Any) -> ConfigError:
    """What stands in the place of a table, or of one in a list of tables."""
    several = re.fullmatch(r"(.+)\[\d+\]", where)
    header = f"[[{several[1]}]]" if several else f"[{where}]"
    return ConfigError(
        f"{where}={reprlib.repr(value)} is not a table; write {header} and its keys below"
    )


KINDS = {
    int: ("a whole number", "write it without quotes, point or exponent"),
    float: ("a number", "write it without quotes"),
    str: ("a text", "write it in quotes"),
    bool: ("true or false", "write one of the two, without quotes"),
}
"""What values are called, and how they are written."""


def _wrong(where: str, value: Any, kinds: Iterable[Any]) -> ConfigError:
    """A value that is of none of some plain types."""
    named = [KINDS[kind] for kind in kinds if kind in KINDS]
    names = " or ".join(name for name, _ in named)
    (_, advice), *_ = named
    return ConfigError(f"{where}={reprlib.repr(value)} is not {names}; {advice}")


def to_plain(config: Any) -> Any:
    """A config as plain JSON data, to be saved resolved beside its results."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_plain(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {key: to_plain(value) for key, value in config.items()}
    return [to_plain(item) for item in config] if isinstance(config, tuple) else config
