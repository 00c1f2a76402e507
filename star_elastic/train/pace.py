"""How long the rest of a run will take, from the steps that it has taken.

Steps in which the router learns cost more than those of plain slices, so each part is measured by
itself, in seconds per token: stages differ in the tokens of a step.
"""

from __future__ import annotations

from star_elastic.progress import duration
from star_elastic.train.stages import Curriculum

MEASURED = 3
"""Steps that a part is measured by, after its first one, which also builds and warms up."""
WORTH_SAYING = 20.0
"""Seconds left from which it is worth a line."""


class Pace:
    """Watches a run's steps; the router learns before `commit_step`."""

    def __init__(self, curriculum: Curriculum, commit_step: int):
        self.curriculum, self.commit_step = curriculum, commit_step
        self._steps = self._tokens = 0
        self._seconds = 0.0
        self._in_router = False

    def after(self, step: int, seconds: float) -> str:
        """Told that step number `step` took so long; a line to say, or an empty one."""
        in_router = step < self.commit_step
        if in_router != self._in_router:
            self._steps = self._tokens = 0
            self._seconds, self._in_router = 0.0, in_router
        self._steps += 1
        if 1 < self._steps <= 1 + MEASURED:
            self._tokens += self._tokens_of(step, step + 1)
            self._seconds += seconds
        if self._steps != 1 + MEASURED:
            return ""
        return self._line(step + 1)

    def _line(self, step: int) -> str:
        """What is left from `step` on."""
        a_token, a_step = self._seconds / self._tokens, f"{self._seconds / MEASURED:.3g} s a step"
        rest = a_token * self._tokens_of(step, self.curriculum.num_steps)
        if rest < WORTH_SAYING:
            return ""
        if not self._in_router:
            return f"about {duration(rest)} of training left ({a_step})"
        learning = a_token * self._tokens_of(step, self.commit_step)
        return (
            f"about {duration(learning)} until the router has learned ({a_step}), at most "
            f"{duration(rest)} of training in all: plain slices cost less"
        )

    def _tokens_of(self, start: int, stop: int) -> int:
        """Tokens of steps [start, stop), with what is left empty in windows."""
        places = map(self.curriculum.at, range(start, stop))
        return sum(self.curriculum.stages[place.stage].step_tokens for place in places)
