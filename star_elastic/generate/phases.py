"""What a phased generation is asked for and what it reports: plain data, no tensor library.

Everything is counted in tokens. The new tokens of a sequence are its trace, then the end of
thinking (written by the model or injected), then its answer, which includes the end-of-turn token.

A model may see it otherwise. If it writes the end of thinking again, then what it has written since
the last one belongs to the trace, and the answer begins anew. If it opens the trace again, then it
thinks on with what is left of its budget, and is closed at once where nothing is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any, Literal, TypedDict, get_args

from star_elastic.errors import BudgetError, ConfigError

Part = Literal["thinking", "tag", "answering"]
"""What a token belongs to: the trace, a tag that ends it (or begins it again), the answer."""
THINKING: Part = "thinking"
TAG: Part = "tag"
ANSWERING: Part = "answering"
MAX_REOPENED = 2
"""How often a model may open a trace again; the next time ends its turn."""
DEFAULT_GRACE = 32
DEFAULT_MAX_NEW_TOKENS = 256

Until = Literal["end_of_thinking", "end_of_turn", "line", "budget"]
"""What ends a phase by itself, before its budget does: the model closes its trace; it ends its
turn; it ends a line; nothing but the budget."""

Switch = Literal["reprefill", "catch-up", "hand-over"]
"""How a size comes to know what another has written: it reads the sequence anew; it reads what it
has missed since it last worked on it (exact as well, at the price of a cache per size); it takes
the other's cache as its own (approximate, free)."""

Ended = Literal["natural", "cut_at_newline", "cut", "length", "stopped", "stop_string", "reopened"]
"""How a phase ended.

`natural`: by what it was to run until. `cut_at_newline`: the budget was used up and the line at
hand finished within the grace. `cut`: budget and grace were used up in the middle of a line.
`length`: `max_new_tokens` was reached. `stopped`: the model ended its turn inside the trace, so
there is no answer. `stop_string`: one of the plan's stop strings was written. `reopened`: the model
opened the trace again (as the last phase: once too often).
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ByDifficulty:
    """Two sizes that share a phase token by token: the large one helps where the small is unsure.

    The small size writes until the entropy of its next token exceeds `threshold` (nats); the large
    one then writes from that token to the end of the line. `look`: before every token, or only
    before the first of each line. An infinite threshold leaves everything to the small size, a
    negative one every line to the large.
    """

    small: str
    large: str
    threshold: float
    look: Literal["token", "line"] = "token"

    def __post_init__(self) -> None:
        if self.small == self.large:
            raise ConfigError(f"a policy needs two sizes; {self.small!r} is named twice")
        if not isinstance(self.threshold, (int, float)) or math.isnan(self.threshold):
            raise ConfigError(f"threshold={self.threshold!r} is not a number; give one in nats")
        if self.look not in ("token", "line"):
            raise ConfigError(f"look={self.look!r} is unknown; use token or line")

    def __str__(self) -> str:
        return f"{self.small}~{self.large}({self.threshold:.3g})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """One stretch of a sequence: who writes it, what ends it, and how many tokens it gets.

    With a `budget` of N the phase ends at the first line end from token N on, at the latest at
    token N + `grace`, unless `until` ends it before. A trace that is cut gets the end of thinking
    injected.
    """

    size: str | ByDifficulty
    until: Until = "end_of_turn"
    budget: int | None = None
    grace: int = DEFAULT_GRACE

    def __post_init__(self) -> None:
        if self.until not in get_args(Until):
            raise ConfigError(f"until={self.until!r} is unknown; use {', '.join(get_args(Until))}")
        if self.until == "budget" and self.budget is None:
            raise BudgetError("a phase until='budget' has no end; give it a budget of tokens")
        _require_count("grace", self.grace, minimum=0)
        if self.budget is not None:
            _require_count("budget", self.budget, minimum=1)

    @property
    def sizes(self) -> tuple[str, ...]:
        """The sizes at work, the one that begins first."""
        if isinstance(self.size, ByDifficulty):
            return (self.size.small, self.size.large)
        return (self.size,)


@dataclass(frozen=True, slots=True)
class Plan:
    """Phases that follow one another, to the end of the turn.

    A plan with a phase until the end of thinking asks for a trace; one without asks for none.
    `max_new_tokens` bounds everything new together. `stop` are strings that end a sequence wherever
    they are written, and are left out of its text. Raises ConfigError for a plan without an end,
    BudgetError for numbers that leave no room for an answer.
    """

    phases: Sequence[Phase]
    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS
    switch: Switch = "reprefill"
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _require_count("max_new_tokens", self.max_new_tokens, minimum=1)
        if self.switch not in get_args(Switch):
            raise ConfigError(
                f"switch={self.switch!r} is unknown; use {', '.join(get_args(Switch))}"
            )
        if isinstance(self.stop, str) or any(not s or not isinstance(s, str) for s in self.stop):
            raise ConfigError(f"stop={self.stop!r} is not a list of texts; leave out empty ones")
        ends = [phase.until for phase in self.phases]
        if not ends or ends[-1] != "end_of_turn":
            raise ConfigError("the plan has no end; its last phase must run until='end_of_turn'")
        if self.switch == "hand-over" and any(len(phase.sizes) > 1 for phase in self.phases):
            raise ConfigError(
                "a choice by difficulty looks at a token before it is written, which a cache that "
                "is handed over cannot take back; use switch='catch-up'"
            )
        for end in ("end_of_turn", "end_of_thinking"):
            if ends.count(end) > 1:
                raise ConfigError(f"the plan has {ends.count(end)} phases until={end!r}; keep one")
        if self.thinking_budget and any(phase.budget is None for phase in self.trace[:-1]):
            raise BudgetError(
                "a trace with a budget cannot follow a phase without one, which might leave no "
                "token for it; give every phase before it a budget"
            )

    @property
    def trace(self) -> Sequence[Phase]:
        """The phases up to the one that ends with the trace; none where none is asked for."""
        ends = [phase.until for phase in self.phases]
        return self.phases[: ends.index("end_of_thinking") + 1] if "end_of_thinking" in ends else ()

    @property
    def sizes(self) -> tuple[str, ...]:
        """Every size at work, in the order of their first phases."""
        return tuple(dict.fromkeys(size for phase in self.phases for size in phase.sizes))

    @property
    def changes(self) -> set[tuple[str, str]]:
        """Which size may go on after which other: phases follow one another, and a trace that is
        closed early goes on with the answer."""
        early = [(phase, self.phases[len(self.trace)]) for phase in self.trace]
        return {
            (giver, taker)
            for before, after in [*pairwise(self.phases), *early]
            for giver in before.sizes
            for taker in after.sizes[:1]
            if giver != taker
        }

    @property
    def thinking_budget(self) -> int | None:
        """Tokens of the phase that ends the trace; 0 without a trace."""
        return self.trace[-1].budget if self.trace else 0

    def require_room(self, num_closing: int, room: float = math.inf) -> None:
        """Raises BudgetError unless an answer fits behind the phases before it, each at its limit,
        and an injected end of thinking of `num_closing` tokens. `room`: new tokens that the model's
        context has room for, so that no more are advised."""
        spent = [p.budget + p.grace for p in self.phases[:-1] if p.budget is not None]
        needed = sum(spent) + num_closing + 1
        if needed > self.max_new_tokens:
            advice = f"use max_new_tokens={needed} or more"
            if needed > room:
                advice = (
                    f"the context has room for {room} new tokens: use budgets and grace of "
                    f"{max(int(room) - num_closing - 1, 0)} in all, or less"
                )
            raise BudgetError(
                f"max_new_tokens={self.max_new_tokens} leaves no token for an answer after "
                f"{sum(spent)} of the phases before (budget and grace) and {num_closing} to end "
                f"thinking; {advice}"
            )

    @property
    def label(self) -> str:
        """`size`, or `think>answer` for a pair, with `@budget` where there is one."""
        names = [str(phase.size) for phase in self.phases]
        name = ">".join(n for i, n in enumerate(names) if i == 0 or n != names[i - 1])
        return name if self.thinking_budget is None else f"{name}@{self.thinking_budget}"


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen: the likeliest at `temperature` 0, else drawn; with `top_p` < 1 only
    from the likeliest that hold this much probability together. Raises ConfigError."""

    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.temperature, (int, float)) or not 0 <= self.temperature < math.inf:
            raise ConfigError(
                f"temperature={self.temperature!r} is not a number of 0 or more; use 0"
            )
        if not isinstance(self.top_p, (int, float)) or not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p!r} is not in (0, 1]; use 1")


GREEDY = Sampling()


class PlanOptions(TypedDict, total=False):
    """What `think_and_answer` takes beside the sizes."""

    thinking_budget: int | None
    grace: int
    max_new_tokens: int
    switch: Switch
    stop: Sequence[str]


def think_and_answer(
    think: str | ByDifficulty,
    answer: str | ByDifficulty,
    *,
    thinking_budget: int | None = None,
    grace: int = DEFAULT_GRACE,
    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
    switch: Switch = "reprefill",
    stop: Sequence[str] = (),
) -> Plan:
    """The common plan: one size thinks, one answers.

    `thinking_budget` None leaves the trace's length to the model; 0 asks for no trace at all.
    """
    phases = [Phase(size=answer)]
    if thinking_budget is not None:
        _require_count("thinking_budget", thinking_budget, minimum=0)
    _require_count("grace", grace, minimum=0)
    if thinking_budget != 0:
        trace = Phase(size=think, until="end_of_thinking", budget=thinking_budget, grace=grace)
        phases.insert(0, trace)
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    return Plan(tuple(phases), max_new_tokens, switch, stops)


def parse_phases(text: str) -> tuple[Phase, ...]:
    """Phases from `size:until:budget` parts with commas between them, such as
    `large:budget:16,small:end_of_thinking:64,large`; what is left out is as in `Phase`."""
    phases = []
    for part in text.split(","):
        size, *rest = (piece.strip() for piece in part.split(":"))
        if not size or len(rest) > 2 or (len(rest) == 2 and not rest[1].isdecimal()):
            raise ConfigError(
                f"the phase {part!r} is not of the form size:until:budget; "
                "write for example large:budget:16,small:end_of_thinking:64,large"
            )
        options: dict[str, Any] = dict(zip(("until", "budget"), rest, strict=False))
        if "budget" in options:
            options["budget"] = int(options["budget"])
        phases.append(Phase(size=size, **options))
    return tuple(phases)


def _require_count(name: str, value: Any, *, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise BudgetError(
            f"{name}={value!r} is not a number of tokens of {minimum} or more; "
            f"use a whole number from {minimum} up"
        )


How = Literal["fresh", "reprefill", "catch-up", "hand-over"]


@dataclass(frozen=True, slots=True)
class Read:
    """Tokens of a sequence that a size has read: `start` of them it knew before; all `at_once`, or
    one by one as they were written."""

    size: str
    start: int
    tokens: int
    at_once: bool


@dataclass(frozen=True, slots=True)
class Handed:
    """A size taking a sequence up, when it had `position` tokens: `read` of them at once.

    `how` it came to know the others: all are read (`fresh`: for the first time of any size,
    `reprefill`), it knew those up to its last turn (`catch-up`), or it took the other size's cache
    (`hand-over`). `divergence` from having read everything itself, nats, where it was asked for.
    """

    size: str
    position: int
    read: int
    how: How
    divergence: float | None = None


@dataclass(frozen=True, slots=True)
class PhaseResult:
    """One phase of one sequence, or a part of one where the model closed or opened the trace by
    itself: a part is named after what its tokens turned out to be.

    `tokens` counts what the models wrote in the phase, without tags, and `by_size` says who.
    `prefill_tokens` and `decode_steps` count the tokens read in the phase, all at once and one by
    one. `seconds` is how long the sequence was in it while the engine worked, for others of its
    batch as well. `handed`: the sizes that took over in it.
    """

    name: str
    size: str
    tokens: int
    by_size: Mapping[str, int]
    seconds: float
    ended: Ended
    prefill_tokens: int
    decode_steps: int
    handed: tuple[Handed, ...] = ()


@dataclass(frozen=True, slots=True)
class Generation:
    """One finished sequence. `text` is everything after the prompt but the end-of-turn token.

    `thinking` and `answer` are its two parts without tags and the line ends around them, as a chat
    template takes them back; what a tag has parted stands on lines of its own. `token_ids` are all
    new tokens, `token_sizes` who wrote each (None: injected), `token_parts` what each belongs to.
    `closing_tokens` of them are tags, which end the thinking (or begin it again). `reads` is all
    that any size has read; `cache_bytes` the most memory that the sequence's caches took.
    """

    text: str
    thinking: str
    answer: str
    token_ids: tuple[int, ...]
    token_sizes: tuple[str | None, ...]
    token_parts: tuple[Part, ...]
    prompt_tokens: int
    closing_tokens: int
    phases: tuple[PhaseResult, ...]
    reads: tuple[Read, ...] = field(default=(), repr=False)
    cache_bytes: int = 0

    def phase(self, name: str) -> PhaseResult | None:
        """The first phase of this name, or None if the sequence did not have it."""
        return next((phase for phase in self.phases if phase.name == name), None)

    def to_json(self) -> dict[str, Any]:
        """Everything as plain JSON data."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Token:
    """One new token of sequence number `index`, as it is written.

    `text` may lag behind where several tokens make one character, or a stop string or tag might be
    under way; `size` None: injected. `phase` is what the token belongs to (thinking with its tags,
    or answering) as far as is known by then. The end of a tag may tell that the last `recalled`
    tokens before it, given out as the answer, are thinking in truth: the tag itself where it has
    several tokens, and all of the trace where it had gone on.
    """

    index: int
    id: int
    text: str
    size: str | None
    phase: str
    recalled: int = 0
