"""Widths: how many units of each axis a submodel keeps, and the grid of widths to choose from."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterator, Mapping

from star_elastic.errors import ConfigError

NUMBER = re.compile(r"[0-9]{1,18}")
Width = int | tuple[int, ...]
LAYERS = "layers"
"""The axis that cuts no dimension: which layers there are (1 or 0 for each, or 1 for all)."""


class Widths(Mapping[str, Width]):
    """An immutable, hashable map from axis name to a width, or to one width per layer."""

    __slots__ = ("_items",)

    def __init__(self, widths: Mapping[str, Width]):
        self._items = {
            name: tuple(value) if isinstance(value, (list, tuple)) else value
            for name, value in widths.items()
        }

    def __getitem__(self, axis: str) -> Width:
        return self._items[axis]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(frozenset(self._items.items()))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mapping) and self._items == dict(other)

    def __repr__(self) -> str:
        return f"Widths({self})"

    def __str__(self) -> str:
        """As `parse_widths` reads it: `hidden=48,ffn=64/32/64`, slashes between layers. Layers that
        all stay are not told."""
        return ",".join(
            f"{axis}={'/'.join(map(str, width)) if isinstance(width, tuple) else width}"
            for axis, width in self._items.items()
            if not (axis == LAYERS and width == 1)
        )

    def replace(self, **changes: Width) -> Widths:
        """A copy with some axes changed."""
        return Widths({**self._items, **changes})


def parse_widths(text: str) -> dict[str, Width]:
    """`"hidden=1920,expert_ffn=960/960/480"` as a dict; slashes separate the widths of the layers
    that have the axis. Raises ConfigError on anything else."""
    widths: dict[str, Width] = {}
    parts = [p.strip() for p in text.split(",")]
    if not any(parts) and text:
        raise ConfigError(
            f"widths {text!r} name no axis; write for example hidden=1920,expert_ffn=960"
        )
    for part in filter(None, parts):
        name, separator, value = part.partition("=")
        numbers = [number.strip() for number in value.split("/")]
        if not separator or not all(NUMBER.fullmatch(number) for number in numbers):
            raise ConfigError(
                f"widths {reprlib.repr(part)} is not of the form axis=number; "
                "write for example hidden=1920,expert_ffn=960"
            )
        if name.strip() in widths:
            raise ConfigError(f"widths name {name.strip()} twice; leave one of the two out")
        per_layer = list(map(int, numbers))
        widths[name.strip()] = tuple(per_layer) if len(per_layer) > 1 else per_layer[0]
    return widths


def default_step(size: int, num_groups: int) -> int:
    """A step between choices that inference kernels like.

    128 for widths of 1,024 and more, else 16 or 8 for widths that are multiples of it, else the
    group count (Mamba heads, experts).
    """
    for step, least in ((128, 1024), (16, 64), (8, 32)):
        if size >= least and size % step == 0 and step % num_groups == 0:
            return step
    return num_groups
