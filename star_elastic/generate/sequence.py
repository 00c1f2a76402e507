"""One sequence under way: a state machine through the phases of a plan.

Knows tokens and rules; nothing of models, batches or caches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as ListOf
from dataclasses import dataclass, field

import torch

from star_elastic.generate.phases import (
    ANSWERING,
    THINKING,
    ByDifficulty,
    Ended,
    Generation,
    Handed,
    Phase,
    PhaseResult,
    Plan,
    Read,
)
from star_elastic.generate.prompts import ThinkingTags


@dataclass(frozen=True, slots=True)
class Rules:
    """What all sequences of one call obey. `end_of_turn` are the token ids that end an answer."""

    plan: Plan
    tags: ThinkingTags
    end_of_turn: frozenset[int]


@dataclass(slots=True)
class _Stretch:
    """What happened in one phase."""

    by_size: Counter[str] = field(default_factory=Counter)
    prefilled: int = 0
    steps: int = 0
    ended: Ended | None = None
    handed: list[Handed] = field(default_factory=list)


@dataclass(slots=True)
class Sequence:
    """`ids` are prompt and new tokens, `writers` who wrote each new one (None: injected).

    `phase` is the number of the phase at hand (`is_done` after the last), `size` the size that is
    to write the next token. `generator` is the source of the sequence's draws.
    """

    rules: Rules
    index: int
    ids: list[int]
    num_prompt: int
    generator: torch.Generator
    phase: int = 0
    size: str = ""
    is_done: bool = False
    writers: list[str | None] = field(default_factory=list)
    num_trace: int | None = None
    num_closing: int = 0
    reads: list[Read] = field(default_factory=list)
    cache_bytes: int = 0
    _stretches: dict[int, _Stretch] = field(default_factory=dict)
    _written: list[tuple[str, int]] = field(default_factory=list)
    """Size and phase of every token of the trace so far."""

    def __post_init__(self) -> None:
        self.enter(self.phase)

    @property
    def now(self) -> Phase:
        """The phase at hand."""
        return self.rules.plan.phases[self.phase]

    @property
    def sizes_to_come(self) -> set[str]:
        """The sizes of the phase at hand and of those after it."""
        return {size for phase in self.rules.plan.phases[self.phase :] for size in phase.sizes}

    @property
    def is_thinking(self) -> bool:
        """Whether the trace is open."""
        return self._name(self.phase) == THINKING

    @property
    def parts(self) -> tuple[slice, slice, slice]:
        """Where the new tokens are trace, end of thinking and answer."""
        num_trace = self.num_trace
        if num_trace is None:
            num_trace = len(self.writers) if self.is_thinking else 0
        answer = num_trace + self.num_closing
        return slice(0, num_trace), slice(num_trace, answer), slice(answer, None)

    @property
    def looks(self) -> bool:
        """Whether the next token's size is chosen by how sure the size at hand is."""
        policy = self.now.size
        if not isinstance(policy, ByDifficulty) or self.size != policy.small:
            return False
        return policy.look == "token" or self.rules.tags.ends_line(self.ids[-1])

    def defer(self, entropy: float) -> bool:
        """Leaves the rest of the line to the larger size if this one is unsure (nats)."""
        policy = self.now.size
        assert isinstance(policy, ByDifficulty), policy
        if entropy > policy.threshold:
            self.size = policy.large
        return self.size == policy.large

    def enter(self, phase: int) -> None:
        """Begins a phase."""
        self.phase = phase
        self.size = self.now.sizes[0]
        self._stretches[phase] = _Stretch()

    def note_read(self, size: str, start: int, tokens: int, *, at_once: bool) -> None:
        """Takes down what a size has read."""
        stretch = self._stretches[self.phase]
        if at_once:
            stretch.prefilled += tokens
        else:
            stretch.steps += tokens
            last = self.reads[-1] if self.reads else None
            if last and (last.size, last.at_once) == (size, False):
                self.reads[-1] = Read(size, last.start, last.tokens + tokens, False)
                return
        self.reads.append(Read(size, start, tokens, at_once))

    def note_handed(self, handed: Handed) -> None:
        """Takes down that a size has taken over."""
        self._stretches[self.phase].handed.append(handed)

    def close_thinking(self) -> None:
        """Injects the end of thinking."""
        closing = self.rules.tags.closing_ids(self.ids)
        self.num_trace = len(self.writers)
        self.num_closing = len(closing)
        self.ids += closing
        self.writers += [None] * len(closing)

    def accept(self, token: int) -> None:
        """Takes the model's next token, or ends the phase instead."""
        rules, end_of_thinking = self.rules, self.rules.plan.end_of_thinking
        if self.is_thinking and (closing := self._count_closing(token)):
            self._write(token)
            self.num_closing = closing
            self.num_trace = len(self.writers) - closing
            for size, phase in self._written[self.num_trace :]:
                self._stretches[phase].by_size[size] -= 1
            assert end_of_thinking is not None
            self._end("natural", then=end_of_thinking + 1)
        elif self.phase == end_of_thinking and (cut := self._cut()):
            # A trace that its model closes right where the budget would cut it has ended naturally.
            # So the token after the last affordable one is looked at before it is thrown away.
            self.close_thinking()
            self._end(cut, then=self.phase + 1)
        else:
            self._write(token)
            if token in rules.end_of_turn:
                self._finish("stopped" if self.is_thinking else "natural")
            elif self._has_stop_string():
                self._finish("stop_string")
            elif self.now.until == "line" and rules.tags.ends_line(token):
                self._end("natural", then=self.phase + 1)
            elif self.phase != end_of_thinking and (cut := self._cut()):
                self._end(cut, then=self.phase + 1)
        if not self.is_done and len(self.writers) >= rules.plan.max_new_tokens:
            self._finish("length")

    def _count_closing(self, token: int) -> int:
        """How many of the last tokens hold the closing tag if the model writes this one."""
        tags = self.rules.tags
        tail = self.ids[max(self.num_prompt, len(self.ids) - tags.max_close) :]
        return tags.count_closing([*tail, token])

    def _cut(self) -> Ended | None:
        """How the budget ends the phase as it stands, if it does."""
        budget = self.now.budget
        written = self._stretches[self.phase].by_size.total()
        if budget is None or written < budget:
            return None
        if self.rules.tags.ends_line(self.ids[-1]):
            return "cut_at_newline"
        return "cut" if written >= budget + self.now.grace else None

    def _has_stop_string(self) -> bool:
        """Whether the trace or the answer, each by itself, has just come to a stop string."""
        stops = self.rules.plan.stop
        if not stops:
            return False
        part = 0 if self.is_thinking else 2
        begin = self.num_prompt + self.parts[part].start
        longest = 4 * max(map(len, stops))  # no token holds less than a byte
        tail = self.rules.tags.decode(self.ids[max(begin, len(self.ids) - longest) :])
        return any(stop in tail for stop in stops)

    def _write(self, token: int) -> None:
        self.ids.append(token)
        self.writers.append(self.size)
        self._stretches[self.phase].by_size[self.size] += 1
        if self.is_thinking:
            self._written.append((self.size, self.phase))
        policy = self.now.size
        if isinstance(policy, ByDifficulty) and self.rules.tags.ends_line(token):
            self.size = policy.small

    def _end(self, how: Ended, *, then: int) -> None:
        self._stretches[self.phase].ended = how
        if then < len(self.rules.plan.phases):
            self.enter(then)
        else:
            self.is_done = True

    def _finish(self, how: Ended) -> None:
        self._end(how, then=len(self.rules.plan.phases))

    def _name(self, phase: int) -> str:
        end = self.rules.plan.end_of_thinking
        return THINKING if end is not None and phase <= end else ANSWERING

    def result(self, seconds: ListOf[float]) -> Generation:
        """The finished sequence; `seconds` is the wall time of each phase of its batch."""
        plan, decode = self.rules.plan, self.rules.tags.decode
        new = self.ids[self.num_prompt :]
        parts = [new[part] for part in self.parts]
        texts = [decode([i for i in part if i not in self.rules.end_of_turn]) for part in parts]
        if self._stretches[self.phase].ended == "stop_string":
            last = 0 if self.is_thinking else 2
            found = [texts[last].find(stop) for stop in plan.stop if stop in texts[last]]
            texts[last] = texts[last][: min(found)]
        phases = []
        for number, stretch in self._stretches.items():
            if stretch.ended is None:
                continue
            phases.append(PhaseResult(
                name=self._name(number),
                size=str(plan.phases[number].size),
                tokens=stretch.by_size.total(),
                by_size={size: count for size, count in stretch.by_size.items() if count},
                seconds=seconds[number],
                ended=stretch.ended,
                prefill_tokens=stretch.prefilled,
                decode_steps=stretch.steps,
                handed=tuple(stretch.handed),
            ))  # fmt: skip
        return Generation(
            text="".join(texts),
            thinking=texts[0].strip("\n"),
            answer=texts[2].strip("\n"),
            token_ids=tuple(new),
            token_sizes=tuple(self.writers),
            prompt_tokens=self.num_prompt,
            closing_tokens=self.num_closing,
            phases=tuple(phases),
            reads=tuple(self.reads),
            cache_bytes=self.cache_bytes,
        )
