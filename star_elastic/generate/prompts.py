"""From a prompt to token ids, and where thinking opens and closes in a tokenizer's own terms.

The chat template decides how a turn that thinks begins. With thinking, the prompt ends inside an
open thinking tag (added here for templates that leave it to the model to write the tag). Without,
the template's `enable_thinking=False` is used; where a template knows no such switch and opens the
tag regardless, the end of thinking is injected at once.

Only what the template itself writes after the last message counts: a tag in somebody's words, or in
the template's system prompt, is text like any other.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from star_elastic.data.chat import Message, open_turn, require_messages
from star_elastic.data.encoding import HALF_CHARACTER, Encoder
from star_elastic.errors import ConfigError, library_boundary

Prompt = str | Sequence[Message]
"""A user's text, or a conversation of messages with `role` and `content`."""

_CLOSING_TAG = re.compile(r"</[^<>/]+>|\[/[^\[\]/]+\]")


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """A prompt as token ids.

    `in_thinking`: it ends inside an open trace, which may have to be closed. `has_tags`: the
    template (or the end of a plain text) knows the tags, so that those which the model writes are
    tags; else they are text.
    """

    ids: tuple[int, ...]
    in_thinking: bool
    has_tags: bool

    def __post_init__(self) -> None:
        if not self.ids:
            raise ConfigError("the prompt has no tokens; give it some text")


@dataclass(frozen=True, slots=True)
class Tag:
    """A tag among some tokens, in the places from `start` to `stop`.

    `after`: the text that its last token adds behind it. `recalled`: how many tokens before that
    had been taken for the answer, and are none: the tag's own, and of a trace that had gone on.
    """

    text: str
    opens: bool
    start: int
    stop: int
    after: str = ""
    is_injected: bool = False
    recalled: int = 0


class ThinkingTags:
    """How one tokenizer writes the tags around thinking, and which tokens end a line.

    `end_of_thinking` is the text to inject, for example `"\\n</think>\\n"`; it holds a closing tag
    like `</think>` or `[/THINK]`, and the opening one is that without its slash. A tag that is a
    token of its own is that token, and its letters are text; any other is found in the text,
    because a model may split it differently.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, end_of_thinking: str):
        self.tokenizer = tokenizer
        self.end_of_thinking = end_of_thinking
        found = _CLOSING_TAG.findall(end_of_thinking)
        if not found:
            raise ConfigError(
                f"end_of_thinking={end_of_thinking!r} holds no closing tag; "
                "use a text such as '\\n</think>\\n'"
            )
        self.close = found[-1]
        self.open = self.close.replace("/", "")
        own: Any = tokenizer
        added = own.get_added_vocab()
        self._token_of = {tag: added.get(tag) for tag in (self.open, self.close)}
        self._line_ends: dict[int, bool] = {}

    def encode(self, text: str) -> list[int]:
        """Token ids of a text as it stands, without special tokens around it. Raises ConfigError
        for what the tokenizer cannot read."""
        if half := HALF_CHARACTER.search(text):
            raise ConfigError(
                f"the prompt holds half a character (U+{ord(half[0]):04X}), which no tokenizer "
                "reads; remove it"
            )
        with library_boundary(
            "the tokenizer cannot read the prompt", "change its text", ConfigError
        ):
            return list(self.tokenizer.encode(text, add_special_tokens=False))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included."""
        text = self.tokenizer.decode(
            list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str), type(text)
        return text

    def ends_line(self, token: int) -> bool:
        """Whether a token's text holds a line end."""
        if token not in self._line_ends:
            self._line_ends[token] = "\n" in self.decode([token])
        return self._line_ends[token]

    def is_spelled(self, tag: str) -> bool:
        """Whether a tag is written in letters, having no token of its own."""
        return self._token_of[tag] is None

    @property
    def max_tag(self) -> int:
        """The most tokens that a tag can be split into: no token holds less than a byte."""
        return max(len(tag.encode()) for tag in (self.open, self.close))

    def find(self, ids: Sequence[int], before: str = "", *, opening: bool) -> Tag | None:
        """The tag that the last of the ids completes, if it does; only with `opening` may it be one
        that opens. `before` is text in front of them."""
        tags = (self.close, self.open) if opening else (self.close,)
        for tag in tags:
            if ids and ids[-1] == self._token_of[tag]:
                return Tag(tag, tag == self.open, len(ids) - 1, len(ids))
        spelled = [tag for tag in tags if self.is_spelled(tag)]
        text = before + self.decode(ids) if spelled else ""
        found = [(text.find(tag), tag) for tag in spelled if tag in text]
        if not found:
            return None
        place, tag = min(found)
        starts = range(len(ids) - 1, 0, -1)
        start = next((start for start in starts if tag in self.decode(ids[start:])), 0)
        return Tag(tag, tag == self.open, start, len(ids), text[place + len(tag) :])

    def closing_ids(self, before: Sequence[int]) -> list[int]:
        """What to inject after `before`: a line end that is there already is not doubled."""
        text = self.end_of_thinking
        if before and self.decode(before[-1:]).endswith("\n"):
            text = text.removeprefix("\n")
        return self.encode(text)

    @cached_property
    def max_closing(self) -> int:
        """The most tokens that `closing_ids` returns."""
        texts = {self.end_of_thinking, self.end_of_thinking.removeprefix("\n")}
        return max(len(self.encode(text)) for text in texts)

    def encode_prompt(self, prompt: Prompt, *, thinking: bool) -> EncodedPrompt:
        """A prompt as token ids. Raises ConfigError for one that is empty, malformed, refused by
        the template or unreadable for the tokenizer.

        A text becomes one user's turn if the tokenizer has a chat template. Without one it is read
        as it stands, and opens a trace if it ends with the opening tag (and white space).
        """
        has_template = self.tokenizer.chat_template is not None
        if isinstance(prompt, str):
            if not prompt.strip():
                raise ConfigError("the prompt is empty; give it some text")
            if not has_template:
                ends = [prompt.rstrip().endswith(tag) for tag in (self.open, self.close)]
                return EncodedPrompt(self._text_ids(prompt), ends[0], any(ends))
            prompt = [{"role": "user", "content": prompt}]
        require_messages(prompt)
        if not has_template:
            raise ConfigError(
                "the tokenizer has no chat template, so it cannot read messages; give plain text"
            )
        tags = (self.open, self.close)
        turn = open_turn(self.tokenizer, prompt, thinking=thinking, tags=tags)
        known = f"{self.tokenizer.chat_template}{turn.opening}"
        has_tags = any(tag in known for tag in tags)
        text, is_open = turn.text, self._is_open(turn.opening)
        if thinking and not is_open:
            without = open_turn(self.tokenizer, prompt, thinking=False, tags=tags)
            if text != without.text:
                text += f"{self.open}\n"
                is_open = True
        return EncodedPrompt(tuple(self.encode(text)), is_open, has_tags or is_open)

    def _is_open(self, opening: str) -> bool:
        """Whether an opened turn stands inside a trace. A tag that another part of the conversation
        follows is only mentioned."""
        _, tag, rest = opening.rpartition(self.open)
        has_marks = set(self.encode(rest)) & set(self.tokenizer.all_special_ids)
        return bool(tag) and self.close not in rest and not has_marks

    def _text_ids(self, text: str) -> tuple[int, ...]:
        """A text with what the tokenizer puts before one, unless it begins with that itself; what
        is put behind one is left out, because the text goes on."""
        ids, front = self.encode(text), self._front
        return tuple(ids if ids[: len(front)] == front else front + ids)

    @cached_property
    def _front(self) -> list[int]:
        return Encoder(self.tokenizer).front
