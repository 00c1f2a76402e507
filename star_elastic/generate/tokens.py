"""One sequence's tokens as a stream: each with its text and what it belongs to when it comes."""

from __future__ import annotations

from star_elastic.generate.phases import ANSWERING, THINKING, Token
from star_elastic.generate.sequence import Sequence
from star_elastic.generate.text import TextStream, part_at


class TokenStream:
    """The stream of one sequence's tokens."""

    def __init__(self, sequence: Sequence):
        self._sequence = sequence
        tags = sequence.rules.tags
        names = (tags.open, tags.close) if sequence.has_tags else ()
        self._spelled = [name for name in names if tags.is_spelled(name)]
        self._is_injected: bool | None = None
        self._text = TextStream(tags.decode)

    def token(self, place: int) -> Token:
        """The new token at a place, which is one of the last that the sequence has got."""
        sequence, text = self._sequence, ""
        tags, size = sequence.rules.tags, sequence.writers[place]
        if self._is_injected != (size is None):
            # What is injected is a text of its own, in which nothing is looked for.
            text, self._is_injected = self._text.flush(), size is None
            marks = ((), ()) if self._is_injected else (sequence.rules.plan.stop, self._spelled)
            self._text = TextStream(tags.decode, *marks)
        last = sequence.tags[-2:]  # the model's own, and one that is injected at once
        own = next((t for t in last if t.stop == place + 1 and not t.is_injected), None)
        name = "" if own is None else tags.open if own.opens else tags.close
        token = sequence.ids[sequence.num_prompt + place]
        if token not in sequence.rules.end_of_turn:
            text += self._text.push(token, name)
        if sequence.is_done and place == len(sequence.writers) - 1:
            text += self._text.flush()
        part = part_at(sequence.tags, place, is_thinking=sequence.is_thinking)
        return Token(
            index=sequence.index,
            id=token,
            text=text,
            size=size,
            phase=ANSWERING if part == ANSWERING else THINKING,
            recalled=own.recalled if own else 0,
        )
