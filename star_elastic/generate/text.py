"""The text of new tokens: piece by piece as they come, or cut at its tags when all are there.

Both are one stream of text, fed with one token at a time or with many, so that both give one text.
Tokens that are injected and those that a model writes are decoded apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import repeat

from star_elastic.generate.phases import ANSWERING, TAG, THINKING, Part
from star_elastic.generate.prompts import Tag


def parts_of(tags: Sequence[Tag], num_tokens: int, *, is_thinking: bool) -> list[Part]:
    """What each new token belongs to; `is_thinking` says it of those behind the last tag.

    What stands before a closing tag is the trace, what stands before an opening one the answer.
    """
    parts: list[Part] = []
    for tag in tags:
        parts.extend(repeat(_before(tag), tag.start - len(parts)))
        parts.extend(repeat(TAG, tag.stop - tag.start))
    parts.extend(repeat(THINKING if is_thinking else ANSWERING, num_tokens - len(parts)))
    return parts


def _before(tag: Tag) -> Part:
    return ANSWERING if tag.opens else THINKING


def texts_of(
    ids: Sequence[int], tags: Sequence[Tag], stream: TextStream, *, is_thinking: bool
) -> list[tuple[Part, str]]:
    """The text of new tokens, cut at the tags: what stands before the first, the tag, and so on.
    `stream` is to be a new one."""
    found: list[tuple[Part, str]] = []
    place, text = 0, ""
    for tag in tags:
        if tag.is_injected:
            text = stream.push(ids[place : tag.start])
            text += stream.push(ids[tag.start : tag.stop], is_injected=True)
        else:
            text = stream.push(ids[place : tag.stop], tag.text)
        found.append((_before(tag), text.removesuffix(tag.text)))
        found.append((TAG, tag.text))
        place = tag.stop
    rest = stream.push(ids[place:]) + stream.flush()
    return [*found, (THINKING if is_thinking else ANSWERING, rest)]


def join(texts: Sequence[tuple[Part, str]], part: Part) -> str:
    """The text of one part, without the line ends around it; what tags have parted stands on lines
    of its own."""
    own = [text.strip("\n") for kind, text in texts if kind == part]
    return "\n".join(text for text in own if text)


class TextStream:
    """The text of tokens as they come, so that all pieces together are the text of all tokens.

    A piece is held back while it might be half a character or the beginning of a stop string or a
    spelled tag; what follows a stop string is left out. Stop strings do not reach across tags.
    """

    WINDOW = 8
    """Tokens that are decoded anew with new ones: decoders look at what comes before."""

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        stops: Sequence[str] = (),
        tags: Sequence[str] = (),
    ):
        self._decode = decode
        self._stops = stops
        self._starts = [text[:n] for text in (*stops, *tags) for n in range(1, len(text))]
        self._ids: list[int] = []
        self._known = ""
        self._held = ""
        self._is_stopped = self._is_injected = False

    def push(self, ids: Sequence[int], tag: str = "", *, is_injected: bool = False) -> str:
        """The text that is certain now; `tag` is the text of one that the last id completes."""
        before = ""
        if is_injected != self._is_injected:
            # What is injected is a text of its own, in which nothing is looked for.
            before, self._is_injected = self.flush(), is_injected
            self._ids, self._known = [], ""
        self._ids += ids
        text = self._decode(self._ids)
        if self._is_stopped or (text.endswith("\ufffd") and not tag):
            return before
        self._held += text[len(self._known) :]
        self._ids = self._ids[-self.WINDOW :]
        self._known = self._decode(self._ids)
        if tag:
            own, _, self._held = self._held.rpartition(tag)
            return before + own + tag
        return before + self._release(self._starts)

    def flush(self) -> str:
        """What is left at the end."""
        if not self._is_stopped:
            self._held += self._decode(self._ids)[len(self._known) :]
        return self._release(())

    def _release(self, starts: Sequence[str]) -> str:
        """What is held up to a stop string, or else up to what may be the start of something."""
        stops, starts = ((), ()) if self._is_injected else (self._stops, starts)
        found = [self._held.find(stop) for stop in stops if stop in self._held]
        if found:
            certain, self._held, self._is_stopped = self._held[: min(found)], "", True
            return certain
        num_held = max((len(s) for s in starts if self._held.endswith(s)), default=0)
        certain = self._held[: len(self._held) - num_held]
        self._held = self._held[len(certain) :]
        return certain
