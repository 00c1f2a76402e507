"""One sequence under way: a state machine through the phases of a plan.

Knows tokens and rules; nothing of models, batches or caches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from collections.abc import Sequence as ListOf
from dataclasses import dataclass, field

import torch

from star_elastic.generate.phases import (
    ANSWERING,
    MAX_REOPENED,
    TAG,
    THINKING,
    ByDifficulty,
    Ended,
    Generation,
    Handed,
    Part,
    Phase,
    PhaseResult,
    Plan,
    Read,
)
from star_elastic.generate.prompts import FoundTag, ThinkingTags
from star_elastic.generate.text import Tag, join, parts_of, texts_of


@dataclass(frozen=True, slots=True)
class Rules:
    """What all sequences of one call obey. `end_of_turn` are the token ids that end an answer."""

    plan: Plan
    tags: ThinkingTags
    end_of_turn: frozenset[int]


@dataclass(slots=True)
class _Stretch:
    """What happened in one phase, or in a part of one between tags, from token `start` on."""

    phase: int
    start: int
    prefilled: int = 0
    steps: int = 0
    ended: Ended | None = None
    handed: list[Handed] = field(default_factory=list)


@dataclass(slots=True)
class Sequence:
    """`ids` are prompt and new tokens, `writers` who wrote each new one (None: injected).

    `phase` is the number of the phase at hand (`is_done` after the last), `size` the size that is
    to write the next token, `is_thinking` whether the trace is open. `tags` are those written or
    injected so far; without `has_tags` a model's tags are text, unless it has a trace to end.
    `generator` is the source of the sequence's draws.
    """

    rules: Rules
    index: int
    ids: list[int]
    num_prompt: int
    generator: torch.Generator
    phase: int = 0
    has_tags: bool = True
    size: str = ""
    is_done: bool = False
    is_thinking: bool = False
    writers: list[str | None] = field(default_factory=list)
    tags: list[Tag] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)
    cache_bytes: int = 0
    _stretches: list[_Stretch] = field(default_factory=list)
    _num_in_phase: int = 0
    """Tokens that the phase at hand has written outside of a trace that was opened in it."""
    _trace_start: int = 0
    _trace_budget: int | None = None
    """First token and budget of what may end the trace: its last phase, or one that is reopened."""

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
        self.phase, self._num_in_phase = phase, 0
        self.size = self.now.sizes[0]
        self.is_thinking = phase <= self._last_of_trace
        if phase == self._last_of_trace:
            self._trace_start, self._trace_budget = len(self.writers), self.now.budget
        self._stretches.append(_Stretch(phase, len(self.writers)))

    @property
    def _last_of_trace(self) -> int:
        """Number of the phase that ends with the trace; -1 without a trace."""
        end = self.rules.plan.end_of_thinking
        return -1 if end is None else end

    @property
    def _is_reopened(self) -> bool:
        """Whether the trace is open in a phase that comes after it."""
        return self.is_thinking and self.phase > self._last_of_trace

    def note_read(self, size: str, start: int, tokens: int, *, at_once: bool) -> None:
        """Takes down what a size has read."""
        stretch = self._stretches[-1]
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
        self._stretches[-1].handed.append(handed)

    def close_thinking(self) -> None:
        """Injects the end of thinking."""
        closing = self.rules.tags.closing_ids(self.ids)
        start = len(self.writers)
        self.ids += closing
        self.writers += [None] * len(closing)
        self.tags.append(Tag(False, start, len(self.writers), is_injected=True))
        self.is_thinking = False

    def accept(self, token: int) -> None:
        """Takes the model's next token, or ends the phase instead."""
        rules = self.rules
        found = self._find_tag(token)
        if not found and self.is_thinking and (cut := self._cut_trace()):
            # A trace that its model closes right where the budget would cut it has ended naturally.
            # So the token after the last affordable one is looked at before it is thrown away.
            self._cut_off(cut)
        else:
            self._write(token)
            if found:
                self._take_tag(found)
            elif token in rules.end_of_turn:
                self._finish("stopped" if self.is_thinking else "natural")
            elif self._has_stop_string():
                self._finish("stop_string")
            elif not self._is_reopened and self.phase != self._last_of_trace:
                self._end_phase(token)
        if not self.is_done and len(self.writers) >= rules.plan.max_new_tokens:
            self._finish("length")

    def _find_tag(self, token: int) -> FoundTag | None:
        """The tag that this token completes: in a trace one that closes it, else any."""
        if not self.is_thinking and not self.has_tags:
            return None
        tags = self.rules.tags
        begin = max(self._since_tag, len(self.ids) - tags.max_tag + 1)
        before = self._text_behind_tag if begin == self._since_tag else ""
        return tags.find([*self.ids[begin:], token], before, opening=not self.is_thinking)

    @property
    def _since_tag(self) -> int:
        """Where in `ids` what follows the last tag begins."""
        return self.num_prompt + (self.tags[-1].stop if self.tags else 0)

    @property
    def _text_behind_tag(self) -> str:
        """Text of the last tag's own last token that is no part of it."""
        return self.tags[-1].after if self.tags else ""

    def _take_tag(self, found: FoundTag) -> None:
        """Does what a tag says that the model has just written."""
        stop = len(self.writers)
        start = stop - found.num_tokens
        if not self._is_reopened:
            self._num_in_phase = max(self._num_in_phase - found.num_tokens, 0)
        before = start if found.opens else self._since_tag - self.num_prompt
        recalled = 0 if self.is_thinking else stop - 1 - before
        self.tags.append(Tag(found.opens, start, stop, after=found.after, recalled=recalled))
        if found.opens:
            self._reopen()
        elif self.phase <= self._last_of_trace:
            self._end("natural", then=self._last_of_trace + 1)
        else:
            self.is_thinking = False
            self._part("natural")

    def _reopen(self) -> None:
        """Opens the trace again: bounded by what is left of its budget, or closed at once."""
        plan = self.rules.plan
        if sum(tag.opens for tag in self.tags) > MAX_REOPENED:
            self._finish("reopened")
            return
        self._part("reopened")
        self.is_thinking = True
        budget = plan.thinking_budget
        if budget is not None:
            budget -= self._count_thought()
        self._trace_start, self._trace_budget = len(self.writers), budget
        if budget is not None and self._room_in_trace < 0:
            self._finish("length")
        elif budget is not None and budget <= 0:
            self._cut_off("cut")

    def _count_thought(self) -> int:
        """Tokens of the trace that its budget has to bear: from its last phase on."""
        parts = self.parts()
        starts = [s.start for s in self._stretches if s.phase == self._last_of_trace]
        return parts[min(starts, default=0) :].count(THINKING)

    def _cut_off(self, how: Ended) -> None:
        """Ends the trace where its budget is used up."""
        in_phase = not self._is_reopened
        self.close_thinking()
        if in_phase:
            self._end(how, then=self.phase + 1)
        else:
            self._part(how)

    def _part(self, how: Ended) -> None:
        """Begins another part of the phase at hand, unless it has none yet."""
        if any(part != TAG for part in self.parts()[self._stretches[-1].start :]):
            self._stretches[-1].ended = how
            self._stretches.append(_Stretch(self.phase, len(self.writers)))

    def parts(self) -> ListOf[Part]:
        """What each new token belongs to, as far as is known."""
        return parts_of(self.tags, len(self.writers), is_thinking=self.is_thinking)

    def _cut_trace(self) -> Ended | None:
        """How its budget ends the trace at this place, if it does."""
        if self.phase < self._last_of_trace:
            return None
        budget, end = self._trace_budget, self.rules.plan.end_of_thinking
        if budget is not None and self._is_reopened and self._room_in_trace <= 0:
            return "cut"
        grace = 0 if end is None else self.rules.plan.phases[end].grace
        return self._cut(len(self.writers) - self._trace_start, budget, grace)

    @property
    def _room_in_trace(self) -> int:
        """How many tokens fit before an end of thinking that is injected."""
        rules = self.rules
        return rules.plan.max_new_tokens - len(self.writers) - rules.tags.max_closing

    def _end_phase(self, token: int) -> None:
        """Ends the phase at hand with this token if a line or its budget does."""
        phase = self.now
        if phase.until == "line" and self.rules.tags.ends_line(token):
            self._end("natural", then=self.phase + 1)
        elif cut := self._cut(self._num_in_phase, phase.budget, phase.grace):
            self._end(cut, then=self.phase + 1)

    def _cut(self, written: int, budget: int | None, grace: int) -> Ended | None:
        if budget is None or written < budget:
            return None
        if self.rules.tags.ends_line(self.ids[-1]):
            return "cut_at_newline"
        return "cut" if written >= budget + grace else None

    def _has_stop_string(self) -> bool:
        """Whether the text since the last tag has just come to a stop string."""
        stops = self.rules.plan.stop
        if not stops:
            return False
        longest = 4 * max(map(len, stops))  # no token holds less than a byte
        begin = max(self._since_tag, len(self.ids) - longest)
        before = self._text_behind_tag if begin == self._since_tag else ""
        tail = before + self.rules.tags.decode(self.ids[begin:])
        return any(stop in tail for stop in stops)

    def _write(self, token: int) -> None:
        self.ids.append(token)
        self.writers.append(self.size)
        self._num_in_phase += not self._is_reopened
        policy = self.now.size
        if isinstance(policy, ByDifficulty) and self.rules.tags.ends_line(token):
            self.size = policy.small

    def _end(self, how: Ended, *, then: int) -> None:
        self._stretches[-1].ended = how
        if then < len(self.rules.plan.phases):
            self.enter(then)
        else:
            self.is_done = True

    def _finish(self, how: Ended) -> None:
        self._end(how, then=len(self.rules.plan.phases))

    def result(self, seconds: ListOf[float]) -> Generation:
        """The finished sequence; `seconds` is the wall time of each phase of its batch."""
        rules, new = self.rules, self.ids[self.num_prompt :]
        spoken = new[:-1] if new and new[-1] in rules.end_of_turn else new
        texts = texts_of(spoken, self.tags, rules.tags, is_thinking=self.is_thinking)
        if self._stretches[-1].ended == "stop_string":
            part, text = texts[-1]
            texts[-1] = part, text[: min(text.find(s) for s in rules.plan.stop if s in text)]
        parts = self.parts()
        return Generation(
            text="".join(text for _, text in texts),
            thinking=join(texts, THINKING),
            answer=join(texts, ANSWERING),
            token_ids=tuple(new),
            token_sizes=tuple(self.writers),
            token_parts=tuple(parts),
            prompt_tokens=self.num_prompt,
            closing_tokens=parts.count(TAG),
            phases=tuple(self._phase_results(seconds)),
            reads=tuple(self.reads),
            cache_bytes=self.cache_bytes,
        )

    def _phase_results(self, seconds: ListOf[float]) -> Iterator[PhaseResult]:
        """What happened in each phase, or part of one."""
        parts, stretches = self.parts(), self._stretches
        read = Counter[int]()
        for stretch in stretches:
            read[stretch.phase] += stretch.prefilled + stretch.steps
        stops = [stretch.start for stretch in stretches[1:]] + [len(self.writers)]
        for stretch, stop in zip(stretches, stops, strict=True):
            if stretch.ended is None:
                continue
            own = [place for place in range(stretch.start, stop) if parts[place] != TAG]
            if own:
                name = parts[own[0]]
            else:
                is_last = stretch is stretches[-1]
                thinks = self.is_thinking if is_last else stretch.phase <= self._last_of_trace
                name = THINKING if thinks else ANSWERING
            by_size = Counter(self.writers[place] for place in own)
            share = (stretch.prefilled + stretch.steps) / max(read[stretch.phase], 1)
            alone = sum(other.phase == stretch.phase for other in stretches) == 1
            yield PhaseResult(
                name=name,
                size=str(self.rules.plan.phases[stretch.phase].size),
                tokens=len(own),
                by_size={size: count for size, count in by_size.items() if size is not None},
                seconds=seconds[stretch.phase] * (1 if alone else share),
                ended=stretch.ended,
                prefill_tokens=stretch.prefilled,
                decode_steps=stretch.steps,
                handed=tuple(stretch.handed),
            )
