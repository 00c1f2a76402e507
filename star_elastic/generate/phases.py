"""What a phased generation is asked for and what it reports: plain data, no tensor library.

Everything is counted in tokens. The new tokens of a sequence are its trace, then the end of
thinking (written by the model or injected), then its answer, which includes the end-of-turn token.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from star_elastic.errors import BudgetError

THINKING, ANSWERING = "thinking", "answering"
DEFAULT_GRACE = 32
DEFAULT_MAX_NEW_TOKENS = 256

Ended = Literal["natural", "cut_at_newline", "cut", "length", "stopped"]
"""How a phase ended.

`natural`: the model closed its trace, or ended its turn after the answer. `cut_at_newline`: the
budget was used up and the line at hand finished within the grace. `cut`: budget and grace were
used up in the middle of a line. `length`: `max_new_tokens` was reached. `stopped`: the model ended
its turn inside the trace, so there is no answer.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Who thinks, who answers, and how many tokens they get.

    `thinking_budget` None leaves the trace's length to the model; 0 asks for no trace at all; with
    N the trace ends at the first line end from token N on, at the latest at token `N + grace`.
    `max_new_tokens` bounds trace, end of thinking and answer together. Raises BudgetError for
    numbers that leave no room for an answer.
    """

    think: str
    answer: str
    thinking_budget: int | None = None
    grace: int = DEFAULT_GRACE
    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS

    def __post_init__(self) -> None:
        _require_count("max_new_tokens", self.max_new_tokens, minimum=1)
        _require_count("grace", self.grace, minimum=0)
        if self.thinking_budget is not None:
            _require_count("thinking_budget", self.thinking_budget, minimum=0)

    def require_room(self, num_closing: int) -> None:
        """Raises BudgetError unless a used-up budget, the injected end and an answer token fit."""
        spent = self.thinking_budget + self.grace if self.thinking_budget else 0
        needed = spent + num_closing + 1
        if needed > self.max_new_tokens:
            raise BudgetError(
                f"max_new_tokens={self.max_new_tokens} leaves no token for an answer after "
                f"{spent} of thinking (budget and grace) and {num_closing} to end it; "
                f"use max_new_tokens={needed} or more"
            )

    @property
    def label(self) -> str:
        """`size`, or `think>answer` for a pair, with `@budget` where there is one."""
        if self.thinking_budget == 0:
            return f"{self.answer}@0"
        name = self.think if self.think == self.answer else f"{self.think}>{self.answer}"
        return name if self.thinking_budget is None else f"{name}@{self.thinking_budget}"


def _require_count(name: str, value: Any, *, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise BudgetError(
            f"{name}={value!r} is not a number of tokens of {minimum} or more; "
            f"use a whole number from {minimum} up"
        )


@dataclass(frozen=True, slots=True)
class PhaseResult:
    """One phase of one sequence.

    `tokens` counts what the model wrote in the phase, without the end of thinking.
    `prefill_tokens` and `decode_steps` count the tokens that `size` read for this sequence, all at
    once and one by one. `seconds` is the wall time of the phase of the whole batch the sequence
    ran in: thinking lasts until the last sequence has stopped thinking, answering is the rest.
    """

    name: str
    size: str
    tokens: int
    seconds: float
    ended: Ended
    prefill_tokens: int
    decode_steps: int


@dataclass(frozen=True, slots=True)
class Generation:
    """One finished sequence. `text` is everything after the prompt but the end-of-turn token.

    `thinking` and `answer` are its two parts without the line ends around them, as a chat template
    takes them back. `token_ids` are all new tokens; `closing_tokens` of them end the thinking.
    """

    text: str
    thinking: str
    answer: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    closing_tokens: int
    phases: tuple[PhaseResult, ...]

    def phase(self, name: str) -> PhaseResult | None:
        """The phase of this name, or None if the sequence did not have it."""
        return next((phase for phase in self.phases if phase.name == name), None)

    def to_json(self) -> dict[str, Any]:
        """Everything as plain JSON data."""
        phases = [asdict(phase) for phase in self.phases]
        return {**asdict(self), "token_ids": list(self.token_ids), "phases": phases}
