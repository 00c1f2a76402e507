"""What one dimension of a tensor is: a run of segments, each fixed or laid out along an axis.

An axis is a way in which models differ in size (`hidden`, `ffn`, `heads`, ...). It is cut in units:
a unit of `ffn` is one neuron, a unit of `heads` is the `head_dim` elements of one query head. Some
axes are cut alike in several groups, so that what is kept goes on belonging together: the query
heads that read one key-value head are a group. With two groups of three heads, a cut to four heads
keeps the first two of each:

    heads        0 1 2 | 3 4 5        width 6
    kept at 4    0 1 . | 3 4 .        runs (0, 2), (3, 5), in heads
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from star_elastic.errors import ShapeError


@dataclass(frozen=True, slots=True)
class Segment:
    """`num_units` consecutive units of `unit` elements each; fixed if `axis` is None.

    With `per` > 1, so many units share `unit` elements (codes packed into bytes, blocks that share
    a scale): only widths that end on an edge of them can be cut.
    """

    num_units: int
    unit: int = 1
    axis: str | None = None
    num_groups: int = 1
    per: int = 1

    @property
    def size(self) -> int:
        """Elements at full width."""
        return self.num_units * self.unit // self.per

    def length(self, widths: Mapping[str, Any]) -> Any:
        """Elements at `widths`: plain arithmetic, exact for integers, and differentiable for
        tensors of expected widths."""
        elements = (widths[self.axis] if self.axis else self.num_units) * self.unit
        return elements if self.per == 1 else elements // self.per

    def at(self, widths: Mapping[str, Any]) -> Segment:
        """The segment of the model that is cut to `widths`."""
        return replace(self, num_units=widths[self.axis]) if self.axis else self

    def runs(self, width: int, start: int) -> Iterator[tuple[int, int]]:
        """Kept (start, stop) element ranges when the first `width` units survive, per group.

        Raises ShapeError for a width that ends between two edges.
        """
        if self.axis is None:
            yield start, start + self.size
            return
        stride = self.size // self.num_groups
        kept, rest = divmod(width // self.num_groups * self.unit, self.per)
        if rest:
            step = self.per // math.gcd(self.unit, self.per) * self.num_groups
            low = width // step * step
            near = [w for w in (low, low + step) if 0 < w <= self.num_units]
            raise ShapeError(
                f"{self.axis}={width} ends inside a block of {self.per} that is quantised "
                f"together; use {' or '.join(map(str, near))}"
            )
        for group in range(self.num_groups):
            yield start + group * stride, start + group * stride + kept


Dim = tuple[Segment, ...]


def fixed(size: int) -> Dim:
    """A dimension that no axis cuts."""
    return (Segment(size),)


def along(axis: str, num_units: int, unit: int = 1, num_groups: int = 1) -> Dim:
    """A dimension of one segment along an axis."""
    return (Segment(num_units, unit, axis, num_groups),)


def size_of(dim: Dim) -> int:
    """Elements of a dimension at full width."""
    return sum(segment.size for segment in dim)


def cut(dim: Dim, widths: Mapping[str, Any]) -> Dim:
    """A dimension of the model that is cut to `widths`."""
    return tuple(segment.at(widths) for segment in dim)


def runs(dim: Dim, widths: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Kept (start, stop) element ranges of a dimension at `widths`, adjacent ranges merged.

    Raises ShapeError for a width that ends inside a block of elements stored together.
    """
    merged: list[tuple[int, int]] = []
    start = 0
    for segment in dim:
        for low, high in segment.runs(widths[segment.axis] if segment.axis else 0, start):
            if merged and merged[-1][1] == low:
                merged[-1] = (merged[-1][0], high)
            else:
                merged.append((low, high))
        start += segment.size
    return merged
