"""The stages of a run: their keys in the config, and which of them a step belongs to."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from star_elastic.router.router import seed_for
from star_elastic.strict import (
    MOST,
    MOST_ROWS,
    MOST_TOKENS,
    at,
    require,
    require_above_zero,
    require_not_negative,
    require_within,
)

MOST_OF_A_STEP = 2**30
"""Tokens."""
FIRST_STAGE = {"context": 8192, "batch_size": 1536}
LATER_STAGES = {"context": 49152, "batch_size": 512}
WARMUP_STEPS, WARMUP_SHARE = 60, 0.1
"""The papers' warm-up, and the most of a stage's steps that it takes by default."""
LATER_WEIGHTS = {3: (0.5, 0.3, 0.2)}
FAVOUR_LARGE = 0.6
"""Weights of the sizes in later stages: the papers' for three sizes, else each this share of the
next larger one's."""


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One stage of the curriculum. The learning rate warms up and falls by a cosine inside it.

    The defaults of a run's first stage are short and uniform over the sizes, those of later ones
    long and weighted to the large sizes.
    """

    tokens: int
    """Tokens to read in all; with `context` and `batch_size` they make the number of steps. Start
    with 50 million: enough for a small model to settle in its sizes and for the router to learn."""
    context: int = 0
    """Tokens per window. Longer rows are cut, shorter ones packed. 0: 8192 in the first stage,
    49152 in later ones. Start with the length of most rows, within the parent's positions."""
    batch_size: int = 0
    """Windows per step. 0: 1536 in the first stage, 512 in later ones. Start with as few as make
    8,000 to 30,000 tokens per step: the router needs many steps rather than large ones."""
    size_weights: tuple[float, ...] = ()
    """Weights of the sizes' losses, largest first; relative. Empty: equal in the first stage, more
    for the large sizes in later ones."""
    sizes_per_step: Literal["all", "one"] = "all"
    """All sizes on the same tokens with one forward of the teacher; or one size for each group of
    windows, drawn by the weights, which costs less a step."""
    groups: int = 1
    """Groups of windows in a step, each with router noise (and with `sizes_per_step = "one"` a
    size) of its own. Must divide `batch_size`."""
    learning_rate: float = 1e-4
    """Peak learning rate of the shared weights. Start with a tenth of the parent's own, and with
    less for models of more than a billion parameters."""
    final_learning_rate: float = 1e-5
    """Learning rate at the end of the stage."""
    warmup_steps: int | None = None
    """Steps in which the learning rate rises to its peak. Left out: a tenth of the stage's steps,
    60 at most."""

    def __post_init__(self):
        require_within("tokens", self.tokens, 1, MOST)
        if self.context:
            require_within("context", self.context, 2, MOST_TOKENS)
        require_within("batch_size", self.batch_size, 0, MOST_ROWS)
        require_within("groups", self.groups, 1, MOST_ROWS)
        require(
            self.step_tokens <= MOST_OF_A_STEP,
            f"context={self.context} and batch_size={self.batch_size} make a step of more "
            f"than {MOST_OF_A_STEP:,} tokens; lower one of them",
        )
        require(
            all(w > 0 for w in self.size_weights),
            f"size_weights={list(self.size_weights)} are not all > 0; raise them",
        )
        require_above_zero(self, learning_rate="one like 1e-4")
        require_not_negative(self, "final_learning_rate")
        if self.warmup_steps is not None:
            require_within("warmup_steps", self.warmup_steps, 0, MOST)
        require(
            self.final_learning_rate <= self.learning_rate,
            f"final_learning_rate={self.final_learning_rate} is above learning_rate="
            f"{self.learning_rate}; set both",
        )

    @property
    def step_tokens(self) -> int:
        """Tokens of a step, with what is left empty in its windows."""
        return self.batch_size * self.context

    @property
    def num_steps(self) -> int:
        """Optimiser steps of the stage."""
        return max(1, round(self.tokens / self.step_tokens))

    def resolve(self, number: int, num_sizes: int) -> StageConfig:
        """The stage with its defaults filled in, which depend on where it stands in a run of so
        many sizes. Raises ConfigError, naming the stage."""
        shape = LATER_STAGES if number else FIRST_STAGE
        later = LATER_WEIGHTS.get(num_sizes, tuple(FAVOUR_LARGE**i for i in range(num_sizes)))
        weights = self.size_weights or (later if number else (1.0,) * num_sizes)
        with at(f"stages[{number}]."):
            require(
                len(weights) == num_sizes,
                f"size_weights has {len(weights)} entries for {num_sizes} sizes; give one for each",
            )
            total = sum(weights)
            stage = replace(
                self,
                context=self.context or shape["context"],
                batch_size=self.batch_size or shape["batch_size"],
                size_weights=tuple(weight / total for weight in weights),
            )
            if stage.warmup_steps is None:
                warm = min(WARMUP_STEPS, round(WARMUP_SHARE * stage.num_steps))
                stage = replace(stage, warmup_steps=warm)
            require(
                stage.batch_size % stage.groups == 0,
                f"groups={stage.groups} does not divide batch_size={stage.batch_size}; change one",
            )
        return stage


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
