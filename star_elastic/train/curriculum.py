"""The curriculum: which stage a step belongs to, and what follows from it."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from star_elastic.router.router import seed_for
from star_elastic.train.config import StageConfig


@dataclass(frozen=True, slots=True)
class Position:
    """A step's place: the number of its stage, and of the step inside it."""

    stage: int
    step: int


class Curriculum:
    """The stages one after the other; steps are counted over the whole run."""

    def __init__(self, stages: Sequence[StageConfig]):
        self.stages = tuple(stages)
        self._ends = list(itertools.accumulate(stage.num_steps for stage in self.stages))

    @property
    def num_steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self._ends[-1]

    def at(self, step: int) -> Position:
        """Where a step of the run stands."""
        assert 0 <= step < self.num_steps, step
        stage = next(number for number, end in enumerate(self._ends) if step < end)
        return Position(stage, step - (self._ends[stage] - self.stages[stage].num_steps))

    def learning_rate(self, step: int) -> float:
        """Learning rate of the shared weights: linear warm-up and a cosine, stage by stage."""
        position = self.at(step)
        stage = self.stages[position.stage]
        warm = min(1.0, (position.step + 1) / max(stage.warmup_steps or 0, 1))
        low, high = stage.final_learning_rate, stage.learning_rate
        fall = 0.5 * (1 + math.cos(math.pi * position.step / stage.num_steps))
        return warm * (low + (high - low) * fall)

    def sizes(
        self, step: int, group: int, names: Sequence[str], seed: int
    ) -> list[tuple[str, float]]:
        """The sizes that a group of a step's windows trains, with the weights of their losses.

        All sizes with the stage's weights (their sum is 1), or one that is drawn by them; the draw
        depends on (seed, step, group) alone.
        """
        stage = self.stages[self.at(step).stage]
        if stage.sizes_per_step == "all":
            return list(zip(names, stage.size_weights, strict=True))
        draw = random.Random(seed_for(seed, step, group, "size"))
        return [(draw.choices(names, stage.size_weights)[0], 1.0)]
