"""Packed windows: the batches of a stage, as a function of its seed and step alone.

A step reads `batch_size` windows of `context` tokens, one from each lane (`lanes.py`). A document
of n ids is fed as its first n - 1: the last id is what the last position predicts, so that stopping
is learned and no position is spent on what nothing follows.

Shapes: B windows (lanes), T tokens of the context.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import torch

from star_elastic.data.sources import Source
from star_elastic.errors import CheckpointError
from star_elastic.strict import MOST_ROWS, MOST_TOKENS, require, require_within
from star_elastic.train.lanes import COUNTS, Deal, Lane

FORMAT = 2
"""Of saved positions. In format 1 the last position of a document predicted nothing."""
LOOKAHEAD = 16
"""Documents that a lane holds in hand: the demo's rows then leave 1.4 % of their windows empty (3 %
with 8 in hand; 8 % if the first that fits were taken)."""


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


class PackedStream:
    """The packed windows of one stage.

    `weights` are shares of the tokens, in any unit; `stage` and `seed` are part of the key of every
    shuffle. Documents without a token to learn from are left out, and so are rows that cannot be
    read, if their source skips these; both are counted. Raises ConfigError for values that cannot
    be packed.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        weights: Sequence[float],
        *,
        context: int,
        batch_size: int,
        seed: int,
        stage: int,
        lookahead: int = LOOKAHEAD,
    ):
        require(bool(sources), "the stage has no data; name at least one source")
        require(
            len(sources) == len(weights),
            f"{len(weights)} weights for {len(sources)} sources; give one weight to each source",
        )
        for source, weight in zip(sources, weights, strict=True):
            require(
                0 < weight < float("inf"),
                f"{source.name} has weight {weight}, which is not > 0; leave the source out",
            )
            require(len(source) > 0, f"{source.name} has no rows; name files that hold some")
        require_within("context", context, 2, MOST_TOKENS)
        require_within("batch_size", batch_size, 1, MOST_ROWS)
        shares = tuple(weight / sum(weights) for weight in weights)
        self._deal = Deal(tuple(sources), shares, context, batch_size, seed, stage, lookahead)
        self._head_starts = self._deal.head_starts()
        self._lanes: dict[int, Lane] = {}
        self._saved: dict[int, Any] = {}  # states of lanes that nobody has asked for yet

    def batch(self, step: int, lanes: Sequence[int] | None = None) -> PackedBatch:
        """The windows of a step, of all lanes or of some. A lane's steps come in order.

        Raises RowError if a row cannot be read and CheckpointError if a source teaches nothing; the
        lanes are then somewhere inside the step, and of no more use.
        """
        count, context = self._deal.batch_size, self._deal.context
        lanes = range(count) if lanes is None else lanes
        assert lanes and min(lanes) >= 0 and max(lanes) < count, (lanes, count)
        shape, pad_id = (len(lanes), context), self._deal.sources[0].pad_id
        input_ids = np.full(shape, pad_id, dtype=np.int64)
        position_ids = np.zeros(shape, dtype=np.int64)
        seq_idx = np.zeros(shape, dtype=np.int32)
        predicts = np.zeros(shape, dtype=bool)
        targets = np.full(shape, pad_id, dtype=np.int64)
        documents = []
        for place, number in enumerate(lanes):
            lane = self._lane(number)
            assert lane.step == step, f"lane {number} is at step {lane.step}, not at {step}"
            row, start = [], 0
            for held in lane.window():
                stop = start + held.length
                input_ids[place, start:stop] = held.ids[:-1]
                targets[place, start:stop] = held.ids[1:]
                position_ids[place, start:stop] = np.arange(stop - start)
                seq_idx[place, start:stop] = len(row)
                predicts[place, start + held.first : stop] = True
                row.append(Placed(held.source, held.row, start, stop - start))
                start = stop
            position_ids[place, start:] = np.arange(context - start)
            seq_idx[place, start:] = len(row)
            documents.append(tuple(row))
        arrays = (input_ids, position_ids, seq_idx, predicts, targets)
        tensors: Any = map(torch.from_numpy, arrays)
        return PackedBatch(*tensors, documents=tuple(documents))

    def counts(self) -> dict[str, int]:
        """Documents `dropped` or `cut` and rows `skipped` by the lanes in use, see `COUNTS`."""
        lanes = self._lanes.values()
        return {name: sum(lane.counts[name] for lane in lanes) for name in COUNTS}

    @property
    def first_skipped(self) -> str:
        """What is wrong with the first bad row that was left out."""
        return self._deal.first_skipped

    def state(self) -> dict[str, Any]:
        """Where the lanes in use stand, as plain JSON data. States of ranks with lanes of their own
        become one with `merge_states`."""
        lanes = self._saved | {number: lane.state() for number, lane in self._lanes.items()}
        return {
            "format": FORMAT,
            "made_with": self._deal.made_with(),
            "lanes": {str(number): lanes[number] for number in sorted(lanes)},
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state` stands; lanes that it does not name begin at step 0.

        Raises CheckpointError if it is damaged or of another stage, seed, data set or shape.
        """
        try:
            made_with, lanes = state["made_with"], state["lanes"]
            if state["format"] != FORMAT:
                raise CheckpointError(
                    f"the saved position in the data has format {state['format']!r}, not {FORMAT}, "
                    "of a version that read rows otherwise; start another run in another directory"
                )
            for name, value in self._deal.made_with().items():
                if made_with[name] != value:
                    raise CheckpointError(
                        f"the saved position in the data has {name}={made_with[name]!r} and this "
                        f"run {value!r}; resume with what the run began with"
                    )
            sizes = [len(source) for source in self._deal.sources]
            saved = {int(number): _check_lane(lane, sizes) for number, lane in lanes.items()}
        except (KeyError, IndexError, TypeError, ValueError, AttributeError):
            raise CheckpointError(
                "the saved position in the data is damaged; start anew in another directory"
            ) from None
        self._lanes, self._saved = {}, saved

    def _lane(self, number: int) -> Lane:
        if number not in self._lanes:
            self._lanes[number] = Lane(self._deal, number, self._head_starts[number])
            if number in self._saved:
                self._lanes[number].load(self._saved.pop(number))
        return self._lanes[number]


def merge_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One state of all lanes from the states of ranks that each read some of them."""
    merged = {**states[0], "lanes": {}}
    for state in states:
        assert state["made_with"] == merged["made_with"], "states of different streams"
        for number, lane in state["lanes"].items():
            known = merged["lanes"].get(number)
            if known is None or known["step"] < lane["step"]:
                merged["lanes"][number] = lane
    return merged


def _check_lane(state: Mapping[str, Any], sizes: Sequence[int]) -> Mapping[str, Any]:
    """The state of a lane. Raises ValueError (or what a wrong type raises) if it is none."""
    counts = [state["step"], *(state[name] for name in COUNTS), *state["rows"], *state["tokens"]]
    sound = all(type(count) is int and count >= 0 for count in counts)
    sound = sound and len(state["rows"]) == len(state["tokens"]) == len(sizes)
    if not sound or not all(0 <= row < sizes[source] for source, row in state["held"]):
        raise ValueError(state)
    return state
