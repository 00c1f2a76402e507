"""The windows that a rank trains with, step after step and stage after stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from star_elastic.data.sources import Source
from star_elastic.errors import CheckpointError
from star_elastic.train.config import RunConfig
from star_elastic.train.distributed import World
from star_elastic.train.packing import PackedStream, merge_states
from star_elastic.train.stages import Position
from star_elastic.train.windows import PackedBatch


@dataclass(frozen=True, slots=True)
class Windows:
    """A rank's windows of a step, group after group. Counted over all ranks: tokens of the step,
    those that count in the loss; and rows of this stage so far, as `StepReport` names them."""

    batch: PackedBatch
    num_tokens: int
    num_predicted: int
    rows: dict[str, Any]


class WindowReader:
    """Reads a rank's share of every group of a step's windows.

    `position`: where the data stand after the steps that are finished, as plain JSON data.
    """

    def __init__(self, config: RunConfig, sources: Sequence[Source], world: World):
        self._config, self._sources, self._world = config, sources, world
        self._stage, self._stream = -1, None
        self.position: dict[str, Any] = {}

    def read(self, at: Position) -> Windows:
        """The windows of a step, which follows the one before.

        Raises on every rank what goes wrong on one: RowError for a row that cannot be read.
        """
        stream = self._stream_of(at.stage)
        batch, problem = None, None
        try:
            batch = stream.batch(at.step, lanes=self._lanes(at.stage))
        except CheckpointError as error:
            problem = error
        own = [batch.num_tokens, batch.num_predicted] if batch else [0, 0]
        left_out = stream.counts()
        total = self._world.sum([*own, *left_out.values(), batch is None])
        num_tokens, num_predicted, *counts, failed = map(int, total)
        if batch is None or failed:
            raise next(e for e in self._world.gather(problem) if e is not None)
        rows = {f"rows_{name}": count for name, count in zip(left_out, counts, strict=True)}
        return Windows(batch, num_tokens, num_predicted, rows)

    def finish(self) -> None:
        """The step that was read last is done: a state that is saved now goes on behind it."""
        self.position = {"stage": self._stage, "stream": self._stream_of(self._stage).state()}

    def load(self, positions: Sequence[Mapping[str, Any]]) -> None:
        """Goes on where the ranks that saved their positions stood; there may be others now."""
        if all(positions):
            stream = self._stream_of(positions[0]["stage"])
            stream.load(merge_states([position["stream"] for position in positions]))
            self.finish()

    @property
    def first_skipped(self) -> str:
        """What is wrong with the first bad row that this rank has left out in this stage."""
        return self._stream.first_skipped if self._stream else ""

    def _lanes(self, stage: int) -> list[int]:
        config, world = self._config.stages[stage], self._world
        of_group = config.batch_size // config.groups
        own = of_group // world.size
        return [
            group * of_group + world.rank * own + lane
            for group in range(config.groups)
            for lane in range(own)
        ]

    def _stream_of(self, stage: int) -> PackedStream:
        if self._stream is None or self._stage != stage:
            config = self._config.stages[stage]
            weights = [source.weight for source in self._config.data]
            self._stage, self._stream = stage, PackedStream(
                self._sources, weights, context=config.context, batch_size=config.batch_size,
                seed=self._config.seed, stage=stage,
            )  # fmt: skip
        return self._stream
