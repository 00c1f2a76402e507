"""One sequence under way: a state machine over tokens, through the phases of its plan.

A batch asks which size is to write the next token (`size`) and gives the token that this size has
chosen (`accept`). The token is kept, or thrown away because a budget ends the trace before it; then
the phase goes on or another begins, which may be another size's. Knows tokens and rules; nothing of
models and batches.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from collections.abc import Sequence as ListOf
from dataclasses import dataclass, field

import torch

from star_elastic.generate.caches import RowCache
from star_elastic.generate.phases import (
    ANSWERING,
    GREEDY,
    MAX_REOPENED,
    TAG,
    THINKING,
    ByDifficulty,
    Ended,
    Generation,
    Handed,
    How,
    Part,
    Phase,
    PhaseResult,
    Plan,
    Read,
    Sampling,
    Token,
)
from star_elastic.generate.prompts import EncodedPrompt, FoundTag, Prompt, ThinkingTags
from star_elastic.generate.text import Tag, TextStream, join, parts_of, texts_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A prompt and what is asked for it.

    `plan` says which size writes when, and `sampling` how it chooses. Draws follow from `seed`:
    equal seeds draw alike, whatever else runs. With `streams`, tokens are told as they are written,
    else the result alone. With `compares`, it is measured how far caches that are handed over
    diverge from exact ones, which reads the sequence anew each time.
    """

    prompt: Prompt | EncodedPrompt
    plan: Plan
    sampling: Sampling = GREEDY
    seed: str = "0"
    streams: bool = True
    compares: bool = False


@dataclass(slots=True)
class Stretch:
    """What happened in one phase, or in a part of one between tags, from new token `start` on."""

    phase: int
    start: int
    prefilled: int = 0
    steps: int = 0
    seconds: float = 0.0
    ended: Ended | None = None
    handed: list[Handed] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Sequence:
    """`ids` are prompt and new tokens, `writers` who wrote each new one (None: injected).

    `phase` is the number of the phase at hand, `size` the size that is to write the next token,
    `is_thinking` whether the trace is open. `tags` are those written or injected so far. `caches`
    are what sizes that do not work on it now remember of it, each with how many tokens that is, and
    `cache_bytes` the most that all have taken. `end_of_turn` are the token ids that end a turn.
    """

    request: Request
    prompt: EncodedPrompt
    spelling: ThinkingTags
    end_of_turn: frozenset[int]
    index: int = 0
    ids: list[int] = field(init=False)
    generator: torch.Generator = field(init=False)
    phase: int = 0
    size: str = ""
    is_done: bool = False
    is_thinking: bool = False
    writers: list[str | None] = field(default_factory=list)
    tags: list[Tag] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)
    caches: dict[str, tuple[RowCache, int]] = field(default_factory=dict)
    cache_bytes: int = 0
    _stretches: list[Stretch] = field(default_factory=list)
    _last_of_trace: int = -1
    """Number of the phase that ends with the trace."""
    _num_in_phase: int = 0
    """Tokens that the phase at hand has written outside of a trace that was opened in it."""
    _trace_start: int = 0
    _trace_budget: int | None = None
    """First token and budget of what may end the trace: its last phase, or one that is reopened."""
    _num_told: int = 0
    _text: TextStream | None = None
    _is_injected: bool | None = None
    """The stream of texts, and whether its last token was injected."""

    def __post_init__(self) -> None:
        self.ids, self._last_of_trace = list(self.prompt.ids), len(self.plan.trace) - 1
        digest = hashlib.sha256(self.request.seed.encode()).digest()
        self.generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))
        self._enter(0 if self.prompt.in_thinking else len(self.plan.trace))
        if self.prompt.in_thinking and not self.plan.trace:
            self._close_thinking()

    @property
    def plan(self) -> Plan:
        """The phases it goes through."""
        return self.request.plan

    @property
    def num_prompt(self) -> int:
        """Tokens of the prompt."""
        return len(self.prompt.ids)

    @property
    def now(self) -> Phase:
        """The phase at hand."""
        return self.plan.phases[self.phase]

    @property
    def stretch(self) -> Stretch:
        """What has happened since the phase at hand began, or its last tag."""
        return self._stretches[-1]

    @property
    def sizes_to_come(self) -> set[str]:
        """The sizes of the phase at hand and of those after it."""
        return {size for phase in self.plan.phases[self.phase :] for size in phase.sizes}

    @property
    def looks(self) -> bool:
        """Whether the next token's size is chosen by how sure the size at hand is."""
        policy = self.now.size
        if not isinstance(policy, ByDifficulty) or self.size != policy.small:
            return False
        return policy.look == "token" or self.spelling.ends_line(self.ids[-1])

    def defer(self, entropy: float) -> bool:
        """Leaves the rest of the line to the larger size if this one is unsure (nats)."""
        policy = self.now.size
        assert isinstance(policy, ByDifficulty), policy
        if entropy > policy.threshold:
            self.size = policy.large
        return self.size == policy.large

    def _enter(self, phase: int) -> None:
        """Begins a phase."""
        self.phase, self._num_in_phase = phase, 0
        self.size = self.now.sizes[0]
        self.is_thinking = phase <= self._last_of_trace
        if phase == self._last_of_trace:
            self._trace_start, self._trace_budget = len(self.writers), self.now.budget
        self._stretches.append(Stretch(phase, len(self.writers)))

    @property
    def _is_reopened(self) -> bool:
        """Whether the trace is open in a phase that comes after it."""
        return self.is_thinking and self.phase > self._last_of_trace

    # What is read

    def note_taken_up(self, known: int, how: How, divergence: float | None = None) -> None:
        """Takes down that the size at hand knows `known` tokens and reads the others at once."""
        unread = len(self.ids) - known
        self.stretch.prefilled += unread
        self.stretch.handed.append(Handed(self.size, len(self.ids), unread, how, divergence))
        self.reads.append(Read(self.size, known, unread, at_once=True))

    def note_step(self) -> None:
        """Takes down that the size at hand reads its next token."""
        self.stretch.steps += 1
        last = self.reads[-1]
        if last.at_once:
            self.reads.append(Read(self.size, last.start + last.tokens, 1, at_once=False))
        else:
            self.reads[-1] = Read(self.size, last.start, last.tokens + 1, at_once=False)

    def note_cache_bytes(self, num_bytes: int) -> None:
        """Takes down what its caches take, with so much where it is being worked on."""
        kept = sum(cache.num_bytes for cache, _ in self.caches.values())
        self.cache_bytes = max(self.cache_bytes, num_bytes + kept)

    # What is written

    def _close_thinking(self) -> None:
        """Injects the end of thinking."""
        closing = self.spelling.closing_ids(self.ids)
        start = len(self.writers)
        self.ids += closing
        self.writers += [None] * len(closing)
        self.tags.append(Tag(False, start, len(self.writers), is_injected=True))
        self.is_thinking = False

    def accept(self, token: int) -> None:
        """Takes the model's next token, or ends the phase instead."""
        found = self._find_tag(token)
        if not found and self.is_thinking and (cut := self._cut_trace()):
            # A trace that its model closes right where the budget would cut it has ended naturally.
            # So the token after the last affordable one is looked at before it is thrown away.
            self._cut_off(cut)
        else:
            self._write(token)
            if found:
                self._take_tag(found)
            elif token in self.end_of_turn:
                self._finish("stopped" if self.is_thinking else "natural")
            elif self._has_stop_string():
                self._finish("stop_string")
            elif not self._is_reopened and self.phase != self._last_of_trace:
                self._end_phase(token)
        if not self.is_done and len(self.writers) >= self.plan.max_new_tokens:
            self._finish("length")

    def _write(self, token: int) -> None:
        self.ids.append(token)
        self.writers.append(self.size)
        self._num_in_phase += not self._is_reopened
        policy = self.now.size
        if isinstance(policy, ByDifficulty) and self.spelling.ends_line(token):
            self.size = policy.small

    def _end_phase(self, token: int) -> None:
        """Ends the phase at hand with this token if a line or its budget does."""
        phase = self.now
        if phase.until == "line" and self.spelling.ends_line(token):
            self._end("natural", then=self.phase + 1)
        elif cut := self._cut(self._num_in_phase, phase.budget, phase.grace):
            self._end(cut, then=self.phase + 1)

    def _cut(self, written: int, budget: int | None, grace: int) -> Ended | None:
        if budget is None or written < budget:
            return None
        if self.spelling.ends_line(self.ids[-1]):
            return "cut_at_newline"
        return "cut" if written >= budget + grace else None

    def _has_stop_string(self) -> bool:
        """Whether the text since the last tag has just come to a stop string."""
        stops = self.plan.stop
        if not stops:
            return False
        # No token holds less than a byte, and no character more than four.
        before, ids = self._since_tag(4 * max(map(len, stops)))
        text = before + self.spelling.decode(ids)
        return any(stop in text for stop in stops)

    def _end(self, how: Ended, *, then: int) -> None:
        self.stretch.ended = how
        if then < len(self.plan.phases):
            self._enter(then)
        else:
            self.is_done = True

    def _finish(self, how: Ended) -> None:
        self._end(how, then=len(self.plan.phases))

    # Tags, and the trace between them

    def _find_tag(self, token: int) -> FoundTag | None:
        """The tag that this token completes: in a trace one that closes it, else any."""
        if not self.is_thinking and not self.prompt.has_tags:
            return None
        before, ids = self._since_tag(self.spelling.max_tag - 1)
        return self.spelling.find([*ids, token], before, opening=not self.is_thinking)

    def _since_tag(self, most: int) -> tuple[str, list[int]]:
        """The last tokens behind the last tag, at most so many; and the text before them that the
        last token of the tag holds, if none is left out."""
        first = self._first_since_tag
        begin = max(first, len(self.ids) - most)
        before = self.tags[-1].after if self.tags and begin == first else ""
        return before, self.ids[begin:]

    @property
    def _first_since_tag(self) -> int:
        """Where in `ids` what follows the last tag begins."""
        return self.num_prompt + (self.tags[-1].stop if self.tags else 0)

    def _take_tag(self, found: FoundTag) -> None:
        """Does what a tag says that the model has just written."""
        stop = len(self.writers)
        start = stop - found.num_tokens
        if not self._is_reopened:
            self._num_in_phase = max(self._num_in_phase - found.num_tokens, 0)
        # A closing tag in the answer says that all since the last tag was still the trace.
        taken_back = start if found.opens else self._first_since_tag - self.num_prompt
        recalled = 0 if self.is_thinking else stop - 1 - taken_back
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
        if sum(tag.opens for tag in self.tags) > MAX_REOPENED:
            self._finish("reopened")
            return
        self._part("reopened")
        self.is_thinking = True
        budget = self.plan.thinking_budget
        if budget is not None:
            budget -= self._count_thought()
        self._trace_start, self._trace_budget = len(self.writers), budget
        if budget is not None and self._room_in_trace < 0:
            self._finish("length")
        elif budget is not None and budget <= 0:
            self._cut_off("cut")

    def _count_thought(self) -> int:
        """Tokens of the trace that its budget has to bear: from its last phase on."""
        starts = [s.start for s in self._stretches if s.phase == self._last_of_trace]
        return self.parts()[min(starts, default=0) :].count(THINKING)

    def _cut_trace(self) -> Ended | None:
        """How its budget ends the trace at this place, if it does."""
        if self.phase < self._last_of_trace:
            return None
        budget, trace = self._trace_budget, self.plan.trace
        if budget is not None and self._is_reopened and self._room_in_trace <= 0:
            return "cut"
        grace = trace[-1].grace if trace else 0
        return self._cut(len(self.writers) - self._trace_start, budget, grace)

    @property
    def _room_in_trace(self) -> int:
        """How many tokens fit before an end of thinking that is injected."""
        return self.plan.max_new_tokens - len(self.writers) - self.spelling.max_closing

    def _cut_off(self, how: Ended) -> None:
        """Ends the trace where its budget is used up."""
        in_phase = not self._is_reopened
        self._close_thinking()
        if in_phase:
            self._end(how, then=self.phase + 1)
        else:
            self._part(how)

    def _part(self, how: Ended) -> None:
        """Begins another part of the phase at hand, unless it has none yet."""
        if any(part != TAG for part in self.parts()[self.stretch.start :]):
            self.stretch.ended = how
            self._stretches.append(Stretch(self.phase, len(self.writers)))

    def parts(self) -> ListOf[Part]:
        """What each new token belongs to, as far as is known."""
        return parts_of(self.tags, len(self.writers), is_thinking=self.is_thinking)

    # What is told

    def new_tokens(self) -> Iterator[Token]:
        """The tokens since the last call, as a stream tells them; to be called after every
        `accept`, because what a token belongs to is told as it is known then."""
        for place in range(self._num_told, len(self.writers)):
            yield self._token(place)
        self._num_told = len(self.writers)

    def _token(self, place: int) -> Token:
        text, size, spelling = "", self.writers[place], self.spelling
        if self._text is None or self._is_injected != (size is None):
            # What is injected is a text of its own, in which nothing is looked for.
            text, self._is_injected = self._text.flush() if self._text else "", size is None
            names = (spelling.open, spelling.close) if self.prompt.has_tags else ()
            marks = (self.plan.stop, [name for name in names if spelling.is_spelled(name)])
            self._text = TextStream(spelling.decode, *((), ()) if self._is_injected else marks)
        last = self.tags[-2:]  # the model's own, and one that is injected at once
        own = next((tag for tag in last if tag.stop == place + 1 and not tag.is_injected), None)
        name = "" if own is None else spelling.open if own.opens else spelling.close
        token = self.ids[self.num_prompt + place]
        if token not in self.end_of_turn:
            text += self._text.push([token], name)
        if self.is_done and place == len(self.writers) - 1:
            text += self._text.flush()
        thinks = self.is_thinking or (self.tags and place < self.tags[-1].stop)
        return Token(
            index=self.index,
            id=token,
            text=text,
            size=size,
            phase=THINKING if thinks else ANSWERING,
            recalled=own.recalled if own else 0,
        )

    def result(self) -> Generation:
        """The finished sequence."""
        new, parts = self.ids[self.num_prompt :], self.parts()
        spoken = new[:-1] if new and new[-1] in self.end_of_turn else new
        texts = texts_of(
            spoken, self.tags, self.spelling, self.plan.stop, is_thinking=self.is_thinking
        )
        return Generation(
            text="".join(text for _, text in texts),
            thinking=join(texts, THINKING),
            answer=join(texts, ANSWERING),
            token_ids=tuple(new),
            token_sizes=tuple(self.writers),
            token_parts=tuple(parts),
            prompt_tokens=self.num_prompt,
            closing_tokens=parts.count(TAG),
            phases=tuple(self._phase_results(parts)),
            reads=tuple(self.reads),
            cache_bytes=self.cache_bytes,
        )

    def _phase_results(self, parts: ListOf[Part]) -> Iterator[PhaseResult]:
        """What happened in each phase, or part of one."""
        stops = [stretch.start for stretch in self._stretches[1:]] + [len(self.writers)]
        for stretch, stop in zip(self._stretches, stops, strict=True):
            if stretch.ended is None:
                continue
            own = [place for place in range(stretch.start, stop) if parts[place] != TAG]
            is_last = stretch is self.stretch
            thinks = self.is_thinking if is_last else stretch.phase <= self._last_of_trace
            by_size = Counter(self.writers[place] for place in own)
            yield PhaseResult(
                name=parts[own[0]] if own else THINKING if thinks else ANSWERING,
                size=str(self.plan.phases[stretch.phase].size),
                tokens=len(own),
                by_size={size: count for size, count in by_size.items() if size is not None},
                seconds=stretch.seconds,
                ended=stretch.ended,
                prefill_tokens=stretch.prefilled,
                decode_steps=stretch.steps,
                handed=tuple(stretch.handed),
            )
