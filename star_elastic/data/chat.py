"""Conversations as a tokenizer's chat template writes them, and what of it is the template's own.

What a template writes after the last message opens the model's turn. To find it, the conversation
is rendered a second time with a mark behind every message. In that rendering thinking tags inside
messages are replaced, so that nobody's words are taken for the template's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from star_elastic.data.json_text import map_leaves
from star_elastic.data.messages import part_text
from star_elastic.errors import ConfigError, library_boundary, reason

Message = Mapping[str, Any]
"""`role` and `content`: a text, or a list of texts and parts `{"type": "text", "text": ...}`, as in
rows. Other fields, such as `tool_calls` (where `content` may be left out), go to the template as
they are."""

_DIGITS = "3141592653589793"
"""Digits pass through whatever templates do to a text: trimming, quoting, changes of case."""


@dataclass(frozen=True, slots=True)
class Turn:
    """A conversation up to where the model goes on; `opening` is what the template itself writes
    after the last message (`text` ends with it)."""

    text: str
    opening: str


def open_turn(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    thinking: bool,
    tags: Sequence[str],
) -> Turn:
    """Renders a conversation and opens the assistant's next turn, also after one of its own.

    `thinking` is the template's `enable_thinking`; `tags` are texts that count as the template's in
    `opening` and nowhere in the messages. Contents reach the template as texts or, if it loses
    these, in parts. Raises ConfigError for messages that are malformed, that the template refuses,
    or that it leaves out.
    """
    messages = [_with_text(message, number) for number, message in enumerate(messages, start=1)]
    try:
        return _opened(tokenizer, messages, thinking, tags)
    except ConfigError:
        with suppress(ConfigError):  # what is told is what is wrong with texts
            return _opened(tokenizer, messages, thinking, tags, in_parts=True)
        raise


def _opened(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[dict[str, Any]],
    thinking: bool,
    tags: Sequence[str],
    *,
    in_parts: bool = False,
) -> Turn:
    """The turn in one of the two forms of contents."""

    def show(messages: Sequence[dict[str, Any]], *, opens_turn: bool = True) -> str:
        with library_boundary(
            "the chat template refuses these messages",
            lambda: _remedy(tokenizer, "correct their roles and contents"),
            ConfigError,
        ):
            form = [_in_parts(message) if in_parts else dict(message) for message in messages]
            options = {"add_generation_prompt": opens_turn, "enable_thinking": thinking}
            return render(tokenizer, form, **options)

    text = show(messages)
    mark = _DIGITS
    while mark in text or mark in repr(messages):
        mark += "8"
    marks = [f"{mark}{number:06}" for number in range(len(messages))]
    call = f"{mark}x"
    marked = [_marked(m, own, call + own, tags) for m, own in zip(messages, marks, strict=True)]
    shown = show(marked)
    if in_parts and any(repr(_in_parts(message)["content"]) in shown for message in marked):
        raise ConfigError("the chat template prints parts as Python does; give texts")
    for number, (message, own) in enumerate(zip(messages, marks, strict=True), start=1):
        # Templates cut old traces out of the assistant's messages; nobody else's words may go.
        if message["role"] != "assistant" and message["content"] and own not in shown:
            raise ConfigError(
                f"the chat template leaves out message {number} (role {message['role']!r}); "
                + _remedy(tokenizer, "use roles that it knows")
            )
        if message.get("tool_calls") and call + own not in shown:
            raise ConfigError(
                f"the chat template leaves out the tool_calls of message {number}; "
                "write them into its content, or use a template that knows tools"
            )
    if messages[-1]["content"] and marks[-1] in shown:
        return Turn(text, shown.rpartition(marks[-1])[2])
    without = show(marked, opens_turn=False)
    both = min(len(shown), len(without))
    same = next((n for n in range(both) if shown[n] != without[n]), both)
    return Turn(text, shown[same:])


def _remedy(tokenizer: PreTrainedTokenizerBase, usual: str) -> str:
    """What to do about messages that a template does not write: `usual`, unless it does not write
    the plainest one either."""
    plain = {"role": "user", "content": _DIGITS}
    for content in (_DIGITS, [{"type": "text", "text": _DIGITS}]):
        with suppress(Exception):
            if _DIGITS in render(tokenizer, [{**plain, "content": content}]):
                return usual
    return "restore the template beside the weights, which writes no message of a user"


def render(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], **options: Any
) -> str:
    """What a tokenizer's chat template writes. Raises ConfigError for a template that cannot be
    parsed, and whatever the template raises for these messages."""
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except TemplateSyntaxError as error:
        raise ConfigError(
            f"the chat template is no valid Jinja ({reason(error)}, line {error.lineno}); correct "
            "it, beside the weights"
        ) from error
    assert isinstance(text, str), type(text)
    return text


def require_messages(messages: object) -> None:
    """Raises ConfigError unless this is a list of messages, one of them with a content."""
    if isinstance(messages, (bytes, Mapping)) or not isinstance(messages, Sequence):
        raise ConfigError(
            f"a prompt of type {type(messages).__name__} cannot be read; "
            "give a text or a list of messages"
        )
    if not messages:
        raise ConfigError("the prompt is empty; give at least one message")
    for message in messages:
        if not isinstance(message, Mapping) or not (
            "role" in message and ("content" in message or message.get("tool_calls"))
        ):
            raise ConfigError(
                f"message {message!r} is not of the form {{'role': ..., 'content': ...}}; "
                "give each message both fields"
            )
    texts = [_with_text(message, n)["content"] for n, message in enumerate(messages, start=1)]
    if not any((text or "").strip() for text in texts):
        raise ConfigError("the prompt is empty; give at least one message some content")


def _with_text(message: Message, number: int) -> dict[str, Any]:
    """The message with its content as one text, or None."""
    content = message.get("content")
    if isinstance(content, Sequence) and not isinstance(content, (str, bytes)):
        content = "".join(_text_of(part, number) for part in content)
    if content is not None and not isinstance(content, str):
        raise ConfigError(
            f"the content of message {number} is of type {type(content).__name__}; give a text, "
            "or a list of parts {'type': 'text', 'text': ...}"
        )
    return {**message, "content": content}


def _text_of(part: Any, number: int) -> str:
    text = part_text(part)
    if text is not None:
        return text
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise ConfigError(
        f"message {number} holds a part of type {kind!r} that is no text; "
        "give parts of the form {'type': 'text', 'text': ...}"
    )


def _in_parts(message: Message) -> dict[str, Any]:
    """The message with its content as a list of one part, as some templates read it."""
    text = message["content"]
    return {**message, "content": [{"type": "text", "text": text}] if text else text}


def _marked(message: Message, mark: str, call: str, tags: Sequence[str]) -> dict[str, Any]:
    """The message with a mark behind its content and the names of its tool calls, and with digits
    in place of the tags in its texts."""

    def untagged(leaf: Any) -> Any:
        for tag in tags if isinstance(leaf, str) else ():
            leaf = leaf.replace(tag, _DIGITS)
        return leaf

    free = map_leaves(message, untagged)
    if message["content"]:
        free["content"] += mark
    if message.get("tool_calls"):
        free["tool_calls"] = _named(free["tool_calls"], call)
    return free


def _named(value: Any, mark: str) -> Any:
    """The value with a mark behind every text called `name` in it."""
    if isinstance(value, dict):
        return {
            key: own + mark if key == "name" and isinstance(own, str) else _named(own, mark)
            for key, own in value.items()
        }
    return [_named(own, mark) for own in value] if isinstance(value, list) else value
