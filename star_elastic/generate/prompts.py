"""From a prompt to token ids, and where thinking opens and closes in a tokenizer's own terms.

The chat template decides how a turn that thinks begins. With thinking, the prompt ends inside an
open thinking tag (added here for templates that leave it to the model to write the tag). Without,
the template's `enable_thinking=False` is used; where a template knows no such switch and opens the
tag regardless, the end of thinking is injected at once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from star_elastic.errors import ConfigError

Message = Mapping[str, str]
Prompt = str | Sequence[Message]
"""A user's text, or a conversation of messages with `role` and `content`."""

_CLOSING_TAG = re.compile(r"</[^<>/]+>")


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """Token ids; whether the prompt ends inside an open trace (that may have to be closed)."""

    ids: tuple[int, ...]
    in_thinking: bool


class ThinkingTags:
    """How one tokenizer writes the end of thinking, and which tokens end a line.

    `end_of_thinking` is the text to inject, for example `"\\n</think>\\n"`.
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
        self._close_ids = self.encode(self.close)
        self._line_ends: dict[int, bool] = {}

    def encode(self, text: str) -> list[int]:
        """Token ids of a text as it stands, without special tokens around it."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

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

    def count_closing(self, ids: Sequence[int]) -> int:
        """How many of the last ids hold the closing tag that the model has just written; 0: none.

        A tag of several tokens is found in the text, because a model may split it differently.
        """
        if len(self._close_ids) == 1:
            return int(bool(ids) and ids[-1] == self._close_ids[0])
        longest = min(len(ids), self.max_close)
        if self.close not in self.decode(ids[-longest:]):
            return 0
        return next(n for n in range(1, longest + 1) if self.close in self.decode(ids[-n:]))

    @property
    def max_close(self) -> int:
        """The most tokens that a closing tag can be split into."""
        return len(self.close.encode())

    def closing_ids(self, before: Sequence[int]) -> list[int]:
        """What to inject after `before`: a line end that is there already is not doubled."""
        text = self.end_of_thinking
        if before and self.decode(before[-1:]).endswith("\n"):
            text = text.removeprefix("\n")
        return self.encode(text)

    @property
    def max_closing(self) -> int:
        """The most tokens that `closing_ids` returns."""
        texts = {self.end_of_thinking, self.end_of_thinking.removeprefix("\n")}
        return max(len(self.encode(text)) for text in texts)

    def encode_prompt(self, prompt: Prompt, *, thinking: bool) -> EncodedPrompt:
        """A prompt as token ids. Raises ConfigError for an empty or malformed one.

        A text becomes one user's turn if the tokenizer has a chat template, else it is read as it
        stands and may open the thinking tag itself.
        """
        has_template = self.tokenizer.chat_template is not None
        if isinstance(prompt, str):
            if not prompt.strip():
                raise ConfigError("the prompt is empty; give it some text")
            if not has_template:
                ids = self.tokenizer(prompt)["input_ids"]
                return EncodedPrompt(tuple(ids), self._is_open(prompt))
            prompt = [{"role": "user", "content": prompt}]
        _check_messages(prompt)
        if not has_template:
            raise ConfigError(
                "the tokenizer has no chat template, so it cannot read messages; give plain text"
            )
        text = self._render(prompt, thinking)
        if thinking and not self._is_open(text) and text != self._render(prompt, False):
            text += f"{self.open}\n"
        return EncodedPrompt(tuple(self.encode(text)), self._is_open(text))

    def _is_open(self, text: str) -> bool:
        return text.rfind(self.open) > text.rfind(self.close)

    def _render(self, messages: Sequence[Message], thinking: bool) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=thinking,
            )
        except TemplateError as error:
            raise ConfigError(
                f"the chat template refuses these messages ({error}); correct their roles"
            ) from None
        assert isinstance(text, str), type(text)
        return text


class TextStream:
    """The text of tokens as they come, so that all pieces together are the text of all tokens.

    A piece is held back while it might be half a character or the beginning of a stop string; what
    follows a stop string is left out.
    """

    WINDOW = 8
    """Tokens that are decoded anew with each new one: decoders look at what comes before."""

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = ()):
        self._decode = decode
        self._stops = stops
        self._ids: list[int] = []
        self._known = ""
        self._held = ""
        self._stopped = False

    def push(self, token: int) -> str:
        """The text that is certain now."""
        self._ids.append(token)
        text = self._decode(self._ids)
        if self._stopped or text.endswith("\ufffd"):
            return ""
        self._held += text[len(self._known) :]
        self._ids = self._ids[-self.WINDOW :]
        self._known = self._decode(self._ids)
        return self._release()

    def flush(self) -> str:
        """What is left at the end."""
        if self._stopped:
            return ""
        rest = self._held + self._decode(self._ids)[len(self._known) :]
        self._held = ""
        return rest

    def _release(self) -> str:
        found = [self._held.find(stop) for stop in self._stops if stop in self._held]
        if found:
            self._stopped = True
            return self._held[: min(found)]
        starts = [stop[:n] for stop in self._stops for n in range(1, len(stop))]
        held = max((len(start) for start in starts if self._held.endswith(start)), default=0)
        certain = self._held[: len(self._held) - held]
        self._held = self._held[len(certain) :]
        return certain


def _check_messages(messages: Sequence[Message]) -> None:
    if isinstance(messages, (bytes, Mapping)) or not isinstance(messages, Sequence):
        raise ConfigError(
            f"a prompt of type {type(messages).__name__} cannot be read; "
            "give a text or a list of messages"
        )
    if not messages:
        raise ConfigError("the prompt is empty; give at least one message")
    for message in messages:
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise ConfigError(
                f"message {message!r} is not of the form {{'role': ..., 'content': ...}}; "
                "give each message both fields"
            )
    if not any(str(message["content"] or "").strip() for message in messages):
        raise ConfigError("the prompt is empty; give at least one message some content")
