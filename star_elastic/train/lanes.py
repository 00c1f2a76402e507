"""Lanes: each fills one window of every step from a stream of documents of its own.

So a rank reads only the lanes that it trains, and the data do not depend on how many ranks, workers
or micro-batches there are. Documents are not split over windows (longer ones are cut to the
context); a lane holds a few in hand, places the oldest first and closes its window with those that
fill it best. Sources mix by weight in tokens: a lane's next document comes from the source that has
fallen most behind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from star_elastic.data.sources import ShuffledEpochs, Source, epochs_key
from star_elastic.errors import RowError
from star_elastic.progress import Silent
from star_elastic.train.row_check import require_lessons

COUNTS = ("dropped", "cut", "skipped")
"""What is counted: documents left out because nothing in them counts in the loss, documents cut to
the context, and rows left out because they cannot be read."""


class Held(NamedTuple):
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


@dataclass
class Deal:
    """What all lanes of a stage read by: the sources with their shares of the tokens, tokens of a
    window, number of lanes, the key of the shuffles, and how many documents a lane holds in hand.

    Each epoch's shuffle of a source is dealt out to the lanes in turn, so that every row comes once
    per epoch.
    """

    sources: tuple[Source, ...]
    weights: tuple[float, ...]
    context: int
    batch_size: int
    seed: int
    stage: int
    lookahead: int
    first_skipped: str = field(default="", init=False)
    """What is wrong with the first bad row that was left out."""

    def __post_init__(self):
        self._orders = [
            ShuffledEpochs(len(source), epochs_key(self.seed, self.stage, number))
            for number, source in enumerate(self.sources)
        ]

    def made_with(self) -> dict[str, Any]:
        """What the windows depend on, as plain data."""
        names = ("seed", "stage", "context", "batch_size", "lookahead")
        values = {name: getattr(self, name) for name in names}
        rows = [len(source) for source in self.sources]
        return {**values, "weights": list(self.weights), "rows": rows}

    def row_at(self, source: int, place: int, lane: int) -> int:
        """The row at a place of a lane's share of a source."""
        return self._orders[source].row(lane + place * self.batch_size)

    def read(self, source: int, row: int) -> Held | None:
        """A row cut to the context, or None if nothing in it counts in the loss. Raises RowError if
        the row cannot be read."""
        document = self.sources[source].document(row)
        if not document.teaches(self.context):
            return None
        cut = np.asarray(document.ids[: self.context + 1], dtype=np.int32)
        return Held(source, row, cut, document.first, len(cut) < len(document.ids))

    def head_starts(self) -> list[tuple[float, ...]]:
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


class Lane:
    """A lane's place in every source, and the documents it holds in hand."""

    def __init__(self, deal: Deal, number: int, head_start: Sequence[float]):
        self._deal, self._number, self._head_start = deal, number, head_start
        self._held: list[Held] = []
        self.step = 0
        self.rows = [0] * len(deal.sources)
        self.tokens = [0] * len(deal.sources)
        self.counts: dict[str, int] = dict.fromkeys(COUNTS, 0)

    def window(self) -> list[Held]:
        """The documents of the next window: the oldest in hand, as long as there is room for all,
        then those that fill what is left best."""
        placed: list[Held] = []
        room = self._deal.context
        while True:
            while len(self._held) < self._deal.lookahead:
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

    def _read(self) -> Held:
        """The next document with something to learn, of the source that is most behind. Raises
        CheckpointError if the source has none, RowError for a bad row unless it skips these."""
        deal, total = self._deal, sum(self.tokens)
        shares = zip(deal.weights, self.tokens, self._head_start, strict=True)
        behind = [weight * total - tokens + start for weight, tokens, start in shares]
        source = behind.index(max(behind))
        misses = 0
        while True:
            row = deal.row_at(source, self.rows[source], self._number)
            self.rows[source] += 1
            held = self._take(source, row)
            if held is not None:
                self.tokens[source] += held.length
                self.counts["cut"] += held.is_cut
                return held
            misses += 1
            if misses == len(deal.sources[source]):  # others may be some other lane's
                require_lessons([deal.sources[source]], {deal.stage: deal.context}, Silent())

    def _take(self, source: int, row: int) -> Held | None:
        """A row's document, or None if it is left out, which is counted, or held out."""
        if self._deal.sources[source].is_held_out(row):
            return None
        try:
            held = self._deal.read(source, row)
        except RowError as error:
            if not self._deal.sources[source].skips_bad_rows:
                raise
            self._deal.first_skipped = self._deal.first_skipped or str(error)
            self.counts["skipped"] += 1
            return None
        self.counts["dropped"] += held is None
        return held

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
