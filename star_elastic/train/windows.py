"""Packed windows: rows of exactly so many tokens, filled with whole documents that stay apart.

Shapes: B windows, T tokens of the context.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch


class Placed(NamedTuple):
    """A document in a row of a packed batch: positions [start, start + length) of the row hold
    the first `length` tokens of row `row` of source number `source`."""

    source: int
    row: int
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Windows full of documents. All tensors are (B, T).

    `input_ids` int64. `targets` int64 are the ids that come next; `predicts` bool marks the
    positions where they count in the loss (elsewhere targets may be anything). `position_ids` int64
    start at 0 in every document, from which transformers makes a block-diagonal causal mask when it
    gets neither attention mask nor cache. `seq_idx` int32 is the number of the document in its row,
    which Mamba layers need. What is left of a row is padding, which is like a document that nothing
    is learned from. `documents` tells which documents each row holds.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    seq_idx: torch.Tensor
    predicts: torch.Tensor
    targets: torch.Tensor
    documents: tuple[tuple[Placed, ...], ...]

    @property
    def num_tokens(self) -> int:
        """Real tokens, without padding."""
        return sum(placed.length for row in self.documents for placed in row)

    @property
    def num_predicted(self) -> int:
        """Positions that count in the loss."""
        return int(self.predicts.sum())

    @property
    def inputs(self) -> dict[str, Any]:
        """What a model's forward takes; those without Mamba layers ignore `seq_idx`."""
        names = ("input_ids", "position_ids", "seq_idx")
        return {name: getattr(self, name) for name in names}

    def rows(self, start: int, stop: int) -> PackedBatch:
        """Windows [start, stop), as views."""
        return PackedBatch(*(getattr(self, field.name)[start:stop] for field in fields(self)))

    def split(self, count: int) -> list[PackedBatch]:
        """At most `count` parts of about equally many windows, in order."""
        size = len(self.documents)
        count = min(count, size)
        ends = [size * number // count for number in range(count + 1)]
        return [self.rows(*pair) for pair in itertools.pairwise(ends)]

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same with its tensors on a device."""
        *tensors, documents = (getattr(self, field.name) for field in fields(self))
        moved = (tensor.to(device, non_blocking=True) for tensor in tensors)
        return PackedBatch(*moved, documents=documents)
