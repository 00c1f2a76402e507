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
from dataclasses import dataclass, field, replace

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
    Part,
    Phase,
    PhaseResult,
    Plan,
    Read,
    Sampling,
    Token,
)
from star_elastic.generate.prompts import EncodedPrompt, Prompt, Tag, ThinkingTags
from star_elastic.generate.text import TextStream, join, parts_of, texts_of


@dataclass(frozen=True, slots=True)
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
    streams: bool = field(default=True, kw_only=True)
    compares: bool = field(default=False, kw_only=True)


@dataclass(slots=True)
class Stretch:
    """What happened in one phase, or in a part of one between tags, from new token `start` on."""

    phase: int
    start: int
    prefill_tokens: int = 0
    decode_steps: int = 0
    seconds: float = 0.0
    ended: Ended | None = None
    handed: list[Handed] = field(default_factory=list)


@dataclass(slots=True)
class Bound:
    """A budget of tokens, with `grace` more to finish the line at hand, and what is spent of it."""

    budget: int | None
    grace: int
    spent: int = 0


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
    plan: Plan = field(init=False)
    num_prompt: int = field(init=False)
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
    _bound: Bound = field(init=False)
    _set_aside: Bound | None = None
    """What ends the phase at hand or a trace that is reopened in it; then the first waits."""
    _stream: TextStream = field(init=False)
    _num_told: int = 0

    def __post_init__(self) -> None:
        self.plan, self.ids = self.request.plan, list(self.prompt.ids)
        self.num_prompt, self._stream = len(self.ids), self._new_stream()
        digest = hashlib.sha256(self.request.seed.encode()).digest()
        self.generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))
        self._last_of_trace = len(self.plan.trace) - 1
        self._enter(0 if self.prompt.in_thinking else len(self.plan.trace))
        if self.prompt.in_thinking and not self.plan.trace:
            self._close_thinking()

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

    # What is written, and how phases end

    def accept(self, token: int) -> None:
        """Takes the model's next token, or ends the phase instead."""
        tag = self._find_tag(token)
        # A trace that its model closes right where the budget would cut it has ended naturally. So
        # the token after the last affordable one is looked at before it is thrown away.
        if not tag and (cut := self._cut_trace()):
            self._close_thinking()
            self._leave_trace(cut)
        else:
            self.ids.append(token)
            self.writers.append(self.size)
            self._bound.spent += 1
            ends_line, policy = self.spelling.ends_line(token), self.now.size
            if isinstance(policy, ByDifficulty) and ends_line:
                self.size = policy.small
            if tag:
                self._take_tag(tag)
            elif token in self.end_of_turn:
                self._end("stopped" if self.is_thinking else "natural")
            elif self._has_stop_string():
                self._end("stop_string")
            elif self._set_aside is None and self.phase != self._last_of_trace:
                is_over = ends_line and self.now.until == "line"
                if how := "natural" if is_over else self._cut():
                    self._end(how, then=self.phase + 1)
        if not self.is_done and len(self.writers) >= self.plan.max_new_tokens:
            self._end("length")

    def _cut(self) -> Ended | None:
        """How the budget at hand ends at this place, if it does."""
        bound = self._bound
        if bound.budget is None or bound.spent < bound.budget:
            return None
        if self.spelling.ends_line(self.ids[-1]):
            return "cut_at_newline"
        return "cut" if bound.spent >= bound.budget + bound.grace else None

    def _cut_trace(self) -> Ended | None:
        """How its budget ends the trace at this place, if it does."""
        if not self.is_thinking or self.phase < self._last_of_trace:
            return None
        if self._set_aside and self._bound.budget is not None and self._room_in_trace <= 0:
            return "cut"
        return self._cut()

    @property
    def _room_in_trace(self) -> int:
        """How many tokens fit before an end of thinking that is injected."""
        return self.plan.max_new_tokens - len(self.writers) - self.spelling.max_closing

    def _has_stop_string(self) -> bool:
        """Whether the text since the last tag has just come to a stop string."""
        stops = self.plan.stop
        if not stops:
            return False
        # No token holds less than a byte, and no character more than four.
        before, ids = self._since_tag(4 * max(map(len, stops)))
        text = before + self.spelling.decode(ids)
        return any(stop in text for stop in stops)

    def _enter(self, phase: int) -> None:
        """Begins a phase."""
        self.phase = phase
        self.size = self.now.sizes[0]
        self.is_thinking = phase <= self._last_of_trace
        self._bound = Bound(self.now.budget, self.now.grace)
        self._stretches.append(Stretch(phase, len(self.writers)))

    def _end(self, how: Ended, *, then: int | None = None) -> None:
        """Ends the phase at hand; `then` is the number of the next, if there is one."""
        self.stretch.ended = how
        if then is None or then == len(self.plan.phases):
            self.is_done = True
        else:
            self._enter(then)

    # Tags, and the trace between them

    def _find_tag(self, token: int) -> Tag | None:
        """The tag that this token completes: in a trace one that closes it, else any."""
        if not self.is_thinking and not self.prompt.has_tags:
            return None
        before, ids = self._since_tag(self.spelling.max_tag - 1)
        return self.spelling.find([*ids, token], before, opening=not self.is_thinking)

    def _since_tag(self, most: int) -> tuple[str, list[int]]:
        """The last tokens behind the last tag, at most so many; and the text before them that the
        last token of the tag holds, if none is left out."""
        first = self.num_prompt + self._num_before
        begin = max(first, len(self.ids) - most)
        before = self.tags[-1].after if self.tags and begin == first else ""
        return before, self.ids[begin:]

    @property
    def _num_before(self) -> int:
        """New tokens up to the last tag."""
        return self.tags[-1].stop if self.tags else 0

    def _take_tag(self, found: Tag) -> None:
        """Does what a tag says that the model has just written."""
        stop = len(self.writers)
        start = stop - (found.stop - found.start)
        self._bound.spent = max(self._bound.spent - (stop - start), 0)
        # A closing tag in the answer says that all since the last tag was still the trace.
        told = stop - 1 - (start if found.opens else self._num_before)
        recalled = 0 if self.is_thinking else told
        self.tags.append(replace(found, start=start, stop=stop, recalled=recalled))
        if found.opens:
            self._reopen()
        else:
            self._leave_trace("natural")

    def _close_thinking(self) -> None:
        """Injects the end of thinking."""
        closing, start = self.spelling.closing_ids(self.ids), len(self.writers)
        self.ids += closing
        self.writers += [None] * len(closing)
        text = self.spelling.decode(closing)
        self.tags.append(Tag(text, False, start, len(self.writers), is_injected=True))
        self.is_thinking = False

    def _leave_trace(self, how: Ended) -> None:
        """Goes on behind an end of thinking."""
        self.is_thinking = False
        if self._set_aside is not None:
            self._bound, self._set_aside = self._set_aside, None
        if self.phase <= self._last_of_trace:
            self._end(how, then=self._last_of_trace + 1)
        else:
            self._part(how)

    def _reopen(self) -> None:
        """Opens the trace again: bounded by what is left of its budget, or closed at once."""
        if sum(tag.opens for tag in self.tags) > MAX_REOPENED:
            self._end("reopened")
            return
        self._part("reopened")
        self.is_thinking = True
        budget, trace = self.plan.thinking_budget, self.plan.trace
        if budget is not None:  # it has to bear the trace from its last phase on
            starts = [s.start for s in self._stretches if s.phase == self._last_of_trace]
            budget -= self.parts()[min(starts, default=0) :].count(THINKING)
        self._set_aside = self._bound
        self._bound = Bound(budget, trace[-1].grace if trace else 0)
        if budget is not None and self._room_in_trace < 0:
            self._end("length")
        elif budget is not None and budget <= 0:
            self._close_thinking()
            self._leave_trace("cut")

    def _part(self, how: Ended) -> None:
        """Begins another part of the phase at hand, unless it has none yet."""
        if any(part != TAG for part in self.parts()[self.stretch.start :]):
            self.stretch.ended = how
            self._stretches.append(Stretch(self.phase, len(self.writers)))

    def parts(self) -> ListOf[Part]:
        """What each new token belongs to, as far as is known."""
        return parts_of(self.tags, len(self.writers), is_thinking=self.is_thinking)

    # What is told

    def _new_stream(self) -> TextStream:
        """For the text of the new tokens."""
        names = (self.spelling.open, self.spelling.close) if self.prompt.has_tags else ()
        spelled = [name for name in names if self.spelling.is_spelled(name)]
        return TextStream(self.spelling.decode, self.plan.stop, spelled)

    def new_tokens(self) -> Iterator[Token]:
        """The tokens since the last call, as a stream tells them; to be called after every
        `accept`, because what a token belongs to is told as it is known then."""
        for place in range(self._num_told, len(self.writers)):
            size, token = self.writers[place], self.ids[self.num_prompt + place]
            last = self.tags[-2:]  # the model's own, and one that is injected at once
            own = next((tag for tag in last if tag.stop == place + 1 and not tag.is_injected), None)
            ids = [] if token in self.end_of_turn else [token]
            text = self._stream.push(ids, own.text if own else "", is_injected=size is None)
            if self.is_done and place == len(self.writers) - 1:
                text += self._stream.flush()
            yield Token(
                index=self.index,
                id=token,
                text=text,
                size=size,
                phase=THINKING if self.is_thinking or place < self._num_before else ANSWERING,
                recalled=own.recalled if own else 0,
            )
        self._num_told = len(self.writers)

    def result(self) -> Generation:
        """The finished sequence."""
        new, parts = self.ids[self.num_prompt :], self.parts()
        spoken = new[:-1] if new and new[-1] in self.end_of_turn else new
        texts = texts_of(spoken, self.tags, self._new_stream(), is_thinking=self.is_thinking)
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
                prefill_tokens=stretch.prefill_tokens,
                decode_steps=stretch.decode_steps,
                handed=tuple(stretch.handed),
            )
