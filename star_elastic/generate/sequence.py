"""One sequence under way: a state machine from thinking over answering to done.

A sequence thinks until it closes its trace or its budget is used up; then it answers until it ends
its turn. Knows tokens and rules; nothing of models, batches or caches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from star_elastic.generate.phases import ANSWERING, THINKING, Ended, Generation, PhaseResult, Plan
from star_elastic.generate.prompts import ThinkingTags

DONE = "done"


@dataclass(frozen=True, slots=True)
class Rules:
    """What all sequences of one call obey. `end_of_turn` are the token ids that end an answer."""

    plan: Plan
    tags: ThinkingTags
    end_of_turn: frozenset[int]


@dataclass(slots=True)
class Sequence:
    """`ids` are prompt and new tokens, of which the model at work has read the first `num_read`.

    Tokens per phase: `written` by the model, `prefilled` and read in `steps` of one. `generator`
    is the source of the sequence's draws.
    """

    rules: Rules
    index: int
    ids: list[int]
    num_prompt: int
    phase: str
    generator: torch.Generator
    num_read: int = 0
    num_closing: int = 0
    written: Counter[str] = field(default_factory=Counter)
    prefilled: Counter[str] = field(default_factory=Counter)
    steps: Counter[str] = field(default_factory=Counter)
    ended: dict[str, Ended] = field(default_factory=dict)

    @property
    def wants_token(self) -> bool:
        """Whether the model's next token is asked for (else injected tokens are still unread)."""
        return self.num_read == len(self.ids)

    def prefill(self) -> list[int]:
        """All tokens so far, to be read at once."""
        self.num_read = len(self.ids)
        self.prefilled[self.phase] += self.num_read
        return self.ids

    def read(self) -> int:
        """The next token to be read by itself."""
        self.num_read += 1
        self.steps[self.phase] += 1
        return self.ids[self.num_read - 1]

    def close_thinking(self) -> None:
        """Injects the end of thinking."""
        closing = self.rules.tags.closing_ids(self.ids)
        self.rules.plan.require_room(len(closing))
        self.ids += closing
        self.num_closing = len(closing)

    def accept(self, token: int) -> None:
        """Takes the model's next token, or ends the phase instead."""
        if self.phase == THINKING:
            self._accept_thought(token)
        else:
            self._write(token)
            if token in self.rules.end_of_turn:
                self._end("natural", then=DONE)
        if self.phase != DONE and len(self.ids) - self.num_prompt >= self.rules.plan.max_new_tokens:
            self._end("length", then=DONE)

    def _accept_thought(self, token: int) -> None:
        """A trace that its model closes right where the budget would cut it has ended naturally.

        So the token after the last affordable one is looked at before it is thrown away.
        """
        tail = self.ids[max(self.num_prompt, len(self.ids) - self.rules.tags.max_close) :]
        closing = self.rules.tags.count_closing([*tail, token])
        if closing:
            self.ids.append(token)
            self.num_closing = closing
            self.written[THINKING] -= closing - 1
            self._end("natural", then=ANSWERING)
        elif cut := self._cut():
            self.close_thinking()
            self._end(cut, then=ANSWERING)
        else:
            self._write(token)
            if token in self.rules.end_of_turn:
                self._end("stopped", then=DONE)

    def _cut(self) -> Ended | None:
        """How the budget ends the trace as it stands, if it does."""
        plan, written = self.rules.plan, self.written[THINKING]
        if plan.thinking_budget is None or written < plan.thinking_budget:
            return None
        if self.rules.tags.ends_line(self.ids[-1]):
            return "cut_at_newline"
        return "cut" if written >= plan.thinking_budget + plan.grace else None

    def _write(self, token: int) -> None:
        self.ids.append(token)
        self.written[self.phase] += 1

    def _end(self, how: Ended, *, then: str) -> None:
        self.ended[self.phase] = how
        self.phase = then

    def result(self, seconds: Mapping[str, float]) -> Generation:
        """The finished sequence; `seconds` is the wall time of each phase of its batch."""
        plan, decode = self.rules.plan, self.rules.tags.decode
        new = self.ids[self.num_prompt :]
        num_trace = self.written[THINKING]
        answer_start = num_trace + self.num_closing
        parts = (new[:num_trace], new[num_trace:answer_start], new[answer_start:])
        texts = [decode([i for i in part if i not in self.rules.end_of_turn]) for part in parts]
        sizes = {THINKING: plan.think, ANSWERING: plan.answer}
        return Generation(
            text="".join(texts),
            thinking=texts[0].strip("\n"),
            answer=texts[2].strip("\n"),
            token_ids=tuple(new),
            prompt_tokens=self.num_prompt,
            closing_tokens=self.num_closing,
            phases=tuple(
                PhaseResult(
                    name=phase,
                    size=sizes[phase],
                    tokens=self.written[phase],
                    seconds=seconds[phase],
                    ended=how,
                    prefill_tokens=self.prefilled[phase],
                    decode_steps=self.steps[phase],
                )
                for phase, how in self.ended.items()
            ),
        )
