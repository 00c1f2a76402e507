"""Packed windows: the batches of a stage, as a function of its seed and step alone.

A step reads `batch_size` windows of `context` tokens, one from each *lane*. A lane packs a stream
of documents of its own, so that a rank reads only the lanes it trains and the data do not depend
on how many ranks, workers or micro-batches there are. Documents are not split over windows (longer
ones are cut to the context); a lane holds a few in hand, places the oldest first and closes its
window with those that fill it best. Sources mix by weight in tokens: a lane's next document comes
from the source that has fallen most behind.

A document of n ids is fed as its first n - 1: the last id is what the last position predicts, so
that stopping is learned and no position is spent on what nothing follows.

Shapes: B windows (lanes), T tokens of the context.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import torch

from star_elastic.data.sources import ShuffledEpochs, Source, epochs_key
from star_elastic.errors import CheckpointError, ConfigError, RowError

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
        named = {**self.inputs, "predicts": self.predicts, "targets": self.targets}
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in named.items()}
        return PackedBatch(**moved, documents=self.documents)


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
    comes once per epoch; documents without a token to learn from are left out (`num_dropped`), and
    so are rows that cannot be read, if their source skips these (`num_skipped`).
    Raises ConfigError for values that cannot be packed.
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
        assert lookahead >= 1, lookahead
        _check(sources, weights, context, batch_size)
        self.sources = tuple(sources)
        self.weights = tuple(weight / sum(weights) for weight in weights)
        self.context = context
        self.batch_size = batch_size
        self.seed = seed
        self.stage = stage
        self.lookahead = lookahead
        self._lanes: dict[int, _Lane] = {}
        self._saved: dict[int, Any] = {}  # states of lanes that nobody has asked for yet
        self.orders = [
            ShuffledEpochs(len(source), epochs_key(seed, stage, number))
            for number, source in enumerate(sources)
        ]
        self._teaches: set[int] = set()
        self.first_skipped = ""
        """What is wrong with the first bad row that was left out."""
        self._head_starts = self._deal_head_starts()

    def batch(self, step: int, lanes: Sequence[int] | None = None) -> PackedBatch:
        """The windows of a step, of all lanes or of some. A lane's steps come in order.

        Raises RowError if a row cannot be read and CheckpointError if a source teaches nothing; the
        lanes are then somewhere inside the step, and of no more use.
        """
        lanes = range(self.batch_size) if lanes is None else lanes
        assert lanes and min(lanes) >= 0 and max(lanes) < self.batch_size, (lanes, self.batch_size)
        shape = (len(lanes), self.context)
        input_ids = np.full(shape, self.sources[0].pad_id, dtype=np.int64)
        position_ids = np.zeros(shape, dtype=np.int64)
        seq_idx = np.zeros(shape, dtype=np.int32)
        predicts = np.zeros(shape, dtype=bool)
        targets = np.full(shape, self.sources[0].pad_id, dtype=np.int64)
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

    @property
    def tokens_read(self) -> tuple[int, ...]:
        """Tokens read from each source by the lanes in use, with those held in hand."""
        each = [lane.tokens for lane in self._lanes.values()]
        return tuple(map(sum, zip(*each, strict=True))) if each else (0,) * len(self.sources)

    @property
    def num_dropped(self) -> int:
        """Documents that the lanes in use left out because nothing in them counts in the loss."""
        return sum(lane.num_dropped for lane in self._lanes.values())

    @property
    def num_cut(self) -> int:
        """Documents that the lanes in use cut to the context."""
        return sum(lane.num_cut for lane in self._lanes.values())

    @property
    def num_skipped(self) -> int:
        """Rows that the lanes in use left out because they cannot be read."""
        return sum(lane.num_skipped for lane in self._lanes.values())

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
        return {
            "seed": self.seed,
            "stage": self.stage,
            "context": self.context,
            "batch_size": self.batch_size,
            "lookahead": self.lookahead,
            "weights": list(self.weights),
            "rows": [len(source) for source in self.sources],
        }

    def _lane(self, number: int) -> _Lane:
        if number not in self._lanes:
            self._lanes[number] = _Lane(self, number, self._head_starts[number])
            if number in self._saved:
                self._lanes[number].load(self._saved.pop(number))
        return self._lanes[number]

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

    def read(self, source: int, row: int) -> _Held | None:
        """A row cut to the context, or None if nothing in it counts in the loss.

        Raises RowError if the row cannot be read.
        """
        document = self.sources[source].document(row)
        ids = np.asarray(document.ids, dtype=np.int32)
        cut = ids[: self.context + 1]
        if not document.teaches(self.context):
            return None
        self._teaches.add(source)
        return _Held(source, row, cut, document.first, len(cut) < len(ids))

    def require_lessons(self, source: int) -> None:
        """Raises CheckpointError unless some row of the source has a token to learn from."""
        rows = range(len(self.sources[source]))
        if source not in self._teaches and not any(self._may_teach(source, row) for row in rows):
            raise CheckpointError(
                f"no row of {self.sources[source].name} has a token to learn from within "
                f"{self.context} tokens; start another run in another directory, with a longer "
                "context or with rows whose prompts are shorter"
            )

    def _may_teach(self, source: int, row: int) -> bool:
        if self.sources[source].is_held_out(row):
            return False
        try:
            return self.read(source, row) is not None
        except RowError as error:
            self.require_skipped(source, error)
            return False

    def require_skipped(self, source: int, error: RowError) -> None:
        """Raises the error of a row that cannot be read, unless its source leaves such rows out."""
        if not self.sources[source].skips_bad_rows:
            raise error
        self.first_skipped = self.first_skipped or str(error)


class _Lane:
    """One lane's place in every source, and the documents it holds in hand."""

    def __init__(self, stream: PackedStream, number: int, head_start: tuple[float, ...]):
        self._stream = stream
        self._number = number
        self._head_start = head_start
        self._held: list[_Held] = []
        self.step = 0
        self.rows = [0] * len(stream.sources)
        self.tokens = [0] * len(stream.sources)
        self.num_dropped = 0
        self.num_cut = 0
        self.num_skipped = 0

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
        """The next document with something to learn, of the source that is most behind."""
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
                self.num_cut += held.is_cut
                return held
            misses += 1
            if misses == len(stream.sources[source]):
                stream.require_lessons(source)

    def _take(self, source: int, row: int) -> _Held | None:
        """A row's document, or None if it is left out, which is counted, or held out."""
        if self._stream.sources[source].is_held_out(row):
            return None
        try:
            held = self._stream.read(source, row)
        except RowError as error:
            self._stream.require_skipped(source, error)
            self.num_skipped += 1
            return None
        self.num_dropped += held is None
        return held

    def state(self) -> dict[str, Any]:
        """Plain data; of the documents in hand only where they are."""
        return {
            "step": self.step,
            "rows": list(self.rows),
            "tokens": list(self.tokens),
            "dropped": self.num_dropped,
            "cut": self.num_cut,
            "skipped": self.num_skipped,
            "held": [[held.source, held.row] for held in self._held],
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state` stands. Rows in hand are read anew: one that has been corrected may
        have become another, or nothing."""
        counts = (state[name] for name in ("step", "dropped", "cut", "skipped"))
        self.step, self.num_dropped, self.num_cut, self.num_skipped = counts
        self.rows, self.tokens = list(state["rows"]), list(state["tokens"])
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
    counts = [state[name] for name in ("step", "dropped", "cut", "skipped")]
    counts += [*state["rows"], *state["tokens"]]
    sound = all(type(count) is int and count >= 0 for count in counts)
    sound = sound and len(state["rows"]) == len(state["tokens"]) == len(sizes)
    if not sound or not all(0 <= row < sizes[source] for source, row in state["held"]):
        raise ValueError(state)
    return state


def _check(
    sources: Sequence[Source], weights: Sequence[float], context: int, batch_size: int
) -> None:
    if not sources:
        raise ConfigError("the stage has no data; name at least one source")
    if len(sources) != len(weights):
        raise ConfigError(
            f"{len(weights)} weights for {len(sources)} sources; give one weight to each source"
        )
    for source, weight in zip(sources, weights, strict=True):
        if not 0 < weight < float("inf"):
            raise ConfigError(
                f"{source.name} has weight {weight}, which is not > 0; leave the source out"
            )
        if not len(source):
            raise ConfigError(f"{source.name} has no rows; name files that hold some")
    for name, value, least in (("context", context, 2), ("batch_size", batch_size, 1)):
        if value < least:
            raise ConfigError(f"{name}={value} is less than {least}; raise it")
