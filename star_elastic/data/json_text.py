"""JSON as rows hold it: an object that names a key twice says two things, and is none."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any


def read_json(text: str | bytes) -> Any:
    """What a JSON text says. Raises what json raises, and ValueError for a key that stands twice
    in one object, of which json itself would keep the last."""
    return json.loads(text, object_pairs_hook=_unique)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice[:40]!r} stands twice")
    return found


def map_leaves(value: Any, change: Callable[[Any], Any]) -> Any:
    """A value with `change` of whatever in it is no list and no object."""
    if isinstance(value, Mapping):
        return {key: map_leaves(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [map_leaves(item, change) for item in value]
    return change(value)
