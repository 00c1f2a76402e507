"""Packed windows: the batches of a stage, as a function of its seed and step alone.

A step reads `batch_size` windows of `context` tokens, one from each *lane*. A lane packs a stream
of documents of its own, so that a rank reads only the lanes it trains and the data do not depend
on how many ranks, workers or micro-batches there are. Documents are not split over windows (longer
ones are cut to the context); a lane holds a few in hand, places the oldest first and closes its
window with those that fill it best. Sources mix by weight in tokens: a lane's next document comes
from the source that has fallen most behind.

A document of n ids is fed as its first n - 1: the last id is what the last position predicts, so
that stopping is learned and no position is spent on what nothing follows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from star_elastic.data.sources import ShuffledEpochs, Source, epochs_key
from star_elastic.errors import CheckpointError, RowError
from star_elastic.progress import Silent
from star_elastic.strict import MOST_ROWS, MOST_TOKENS, require, require_within
from star_elastic.train.row_check import require_lessons
from star_elastic.train.windows import PackedBatch, Placed

FORMAT = 2
"""Of saved positions. In format 1 the last position of a document predicted nothing."""
LOOKAHEAD = 16
"""Documents that a lane holds in hand: the demo's rows then leave 1.4 % of their windows empty (3 %
with 8 in hand; 8 % if the first that fits were taken)."""
COUNTS = ("dropped", "cut", "skipped")
"""What is counted: documents left out because nothing in them counts in the loss, documents cut to
the context, and rows left out because they cannot be read."""


class _Held(NamedTuple):
    """A document that a lane has read and not yet placed, cut to the context: its ids and the one
    after them, so that every position that is fed knows its next id."""

    source: int
    row: int
    ids: np.ndarray
    first: int
    is_cut: bool

    @property
    def length(self) -> int:
        """Tokens that are fed."""
        return len(self.ids) - 1


class PackedStream:
    """The packed windows of one stage.

    `weights` are shares of the tokens, in any unit; `stage` and `seed` are part of the key of every
    shuffle. Each epoch's shuffle of a source is dealt out to the lanes in turn, so that every row
    comes once per epoch; documents without a token to learn from are left out, and so are rows that
    cannot be read, if their source skips these. Raises ConfigError for values that cannot be
    packed.
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
        self.sources, self.context, self.stage = tuple(sources), context, stage
        self.batch_size, self.seed, self.lookahead = batch_size, seed, lookahead
        self.weights = tuple(weight / sum(weights) for weight in weights)
        self.orders = [
            ShuffledEpochs(len(source), epochs_key(seed, stage, number))
            for number, source in enumerate(sources)
        ]
        self.first_skipped = ""
        """What is wrong with the first bad row that was left out."""
        self._head_starts = self._deal_head_starts()
        self._lanes: dict[int, _Lane] = {}
        self._saved: dict[int, Any] = {}  # states of lanes that nobody has asked for yet

    def batch(self, step: int, lanes: Sequence[int] | None = None) -> PackedBatch:
        """The windows of a step, of all lanes or of some. A lane's steps come in order.

        Raises RowError if a row cannot be read and CheckpointError if a source teaches nothing; the
        lanes are then somewhere inside the step, and of no more use.
        """
        lanes = range(self.batch_size) if lanes is None else lanes
        assert lanes and min(lanes) >= 0 and max(lanes) < self.batch_size, (lanes, self.batch_size)
        shape, pad_id = (len(lanes), self.context), self.sources[0].pad_id
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
            position_ids[place, start:] = np.arange(self.context - start)
            seq_idx[place, start:] = len(row)
            documents.append(tuple(row))
        arrays = (input_ids, position_ids, seq_idx, predicts, targets)
        tensors: Any = map(torch.from_numpy, arrays)
        return PackedBatch(*tensors, documents=tuple(documents))

    def counts(self) -> dict[str, int]:
        """Documents `dropped` or `cut` and rows `skipped` by the lanes in use, see `COUNTS`."""
        lanes = self._lanes.values()
        return {name: sum(lane.counts[name] for lane in lanes) for name in COUNTS}

    def state(self) -> dict[str, Any]:
        """Where the lanes in use stand, as plain JSON data. States of ranks with lanes of their own
        become one with `merge_states`."""
        lanes = self._saved | {number: lane.state() for number, lane in self._lanes.items()}
        return {
            "format": FORMAT,
            "made_with": self._made_with(),
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
            for name, value in self._made_with().items():
                if made_with[name] != value:
                    raise CheckpointError(
                        f"the saved position in the data has {name}={made_with[name]!r} and this "
                        f"run {value!r}; resume with what the run began with"
                    )
            sizes = [len(source) for source in self.sources]
            saved = {int(number): _check_lane(lane, sizes) for number, lane in lanes.items()}
        except (KeyError, IndexError, TypeError, ValueError, AttributeError):
            raise CheckpointError(
                "the saved position in the data is damaged; start anew in another directory"
            ) from None
        self._lanes, self._saved = {}, saved

    def _made_with(self) -> dict[str, Any]:
        """What the windows depend on, as plain data."""
        names = ("seed", "stage", "context", "batch_size", "lookahead")
        values = {name: getattr(self, name) for name in names}
        rows = [len(source) for source in self.sources]
        return {**values, "weights": list(self.weights), "rows": rows}

    def _deal_head_starts(self) -> list[tuple[float, ...]]:
        """Tokens that each source is behind by when a lane begins, so that lanes do not all begin
        with the same source: lane n begins as if it had read n whole windows."""
        behind = [0.0] * len(self.sources)
        starts = []
        for _ in range(self.batch_size):
            starts.append(tuple(behind))
            chosen = behind.index(max(behind))
            behind = [b + self.context * w for b, w in zip(behind, self.weights, strict=True)]
            behind[chosen] -= self.context
        return starts

    def _lane(self, number: int) -> _Lane:
        if number not in self._lanes:
            self._lanes[number] = _Lane(self, number, self._head_starts[number])
            if number in self._saved:
                self._lanes[number].load(self._saved.pop(number))
        return self._lanes[number]


class _Lane:
    """A lane's place in every source, and the documents it holds in hand."""

    def __init__(self, stream: PackedStream, number: int, head_start: Sequence[float]):
        self._stream, self._number, self._head_start = stream, number, head_start
        self._held: list[_Held] = []
        self.step = 0
        self.rows = [0] * len(stream.sources)
        self.tokens = [0] * len(stream.sources)
        self.counts: dict[str, int] = dict.fromkeys(COUNTS, 0)

    def window(self) -> list[_Held]:
        """The documents of the next window: the oldest in hand, as long as there is room for all,
        then those that fill what is left best."""
        placed: list[_Held] = []
        room = self._stream.context
        while True:
            while len(self._held) < self._stream.lookahead:
                self._held.append(self._read())
            lengths = [held.length for held in self._held]
            if placed and sum(lengths) > room:
                break
            placed.append(self._held.pop(0))
            room -= lengths[0]
        chosen = _fill(lengths, room)
        placed += [self._held[number] for number in chosen]
        self._held = [held for number, held in enumerate(self._held) if number not in chosen]
        self.step += 1
        return placed

    def _read(self) -> _Held:
        """The next document with something to learn, of the source that is most behind. Raises
        CheckpointError if the source has none, RowError for a bad row unless it skips these."""
        stream, total = self._stream, sum(self.tokens)
        shares = zip(stream.weights, self.tokens, self._head_start, strict=True)
        behind = [weight * total - tokens + start for weight, tokens, start in shares]
        source = behind.index(max(behind))
        misses = 0
        while True:
            place = self._number + self.rows[source] * stream.batch_size
            self.rows[source] += 1
            held = self._take(source, stream.orders[source].row(place))
            if held is not None:
                self.tokens[source] += held.length
                self.counts["cut"] += held.is_cut
                return held
            misses += 1
            if misses == len(stream.sources[source]):  # others may be some other lane's
                require_lessons([stream.sources[source]], {stream.stage: stream.context}, Silent())

    def _take(self, number: int, row: int) -> _Held | None:
        """A row's document, or None if it is left out, which is counted, or held out."""
        stream, source = self._stream, self._stream.sources[number]
        if source.is_held_out(row):
            return None
        try:
            document = source.document(row)
        except RowError as error:
            if not source.skips_bad_rows:
                raise
            stream.first_skipped = stream.first_skipped or str(error)
            self.counts["skipped"] += 1
            return None
        if not document.teaches(stream.context):
            self.counts["dropped"] += 1
            return None
        ids = np.asarray(document.ids[: stream.context + 1], dtype=np.int32)
        return _Held(number, row, ids, document.first, len(ids) < len(document.ids))

    def state(self) -> dict[str, Any]:
        """Plain data; of the documents in hand only where they are."""
        return {
            "step": self.step,
            "rows": list(self.rows),
            "tokens": list(self.tokens),
            **self.counts,
            "held": [[held.source, held.row] for held in self._held],
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state` stands. Rows in hand are read anew: one that has been corrected may
        have become another, or nothing."""
        self.step = state["step"]
        self.rows, self.tokens = list(state["rows"]), list(state["tokens"])
        self.counts = {name: state[name] for name in COUNTS}
        found = (self._take(source, row) for source, row in state["held"])
        self._held = [held for held in found if held is not None]


def _fill(lengths: Sequence[int], room: int) -> tuple[int, ...]:
    """Which of the lengths add up to the most that fits; the first such set, in order."""
    ways: dict[int, tuple[int, ...]] = {0: ()}
    for number, length in enumerate(lengths):
        if room in ways:
            break
        for total, way in list(ways.items()):
            if total + length <= room:
                ways.setdefault(total + length, (*way, number))
    return ways[max(ways)]


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
