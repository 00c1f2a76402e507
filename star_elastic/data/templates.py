"""What a chat template writes of a row: all that the row says, or the row is refused.

A template is code of its own. It may leave out what it does not know (tools, a trace, a system
message), or write a list as Python does. So every word of a row is looked for in what the template
wrote, and a row that lacks one is refused.

A word must stand there as it is: nothing was changed. And with a mark put into every word, every
mark must come out: it is the row's own word, not by chance the same one of the template. In the
marked copy lists and objects tell, too, when they are printed as Python does, which is not JSON.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from star_elastic.data.messages import checked_list, checked_messages, end_of, forms, text_parts
from star_elastic.data.notes import first_unseen, is_blank
from star_elastic.data.words import DELETE, Talk, Template, Word, read_template
from star_elastic.errors import RowError, library_boundary

SYSTEM = ("system", "system_prompt", "system_message")
SPOKEN = (
    *SYSTEM, "developer", "custom_instructions", "documents", "functions", "tools", "python_tools",
    "xml_tools", "reasoning_content", "thinking",
)  # fmt: skip
"""Keys of a row that hold words or tools for the model, and no notes."""
FIRST = ("system", "developer")
"""Roles of a message that says what a system text says."""
OPTIONS = "chat_template_kwargs"
"""Where some data sets keep a row's variables for the template."""
RESERVED = {"messages", *inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters}
RESERVED -= {"tools", "documents"}
"""Names with a meaning of their own where a template is called."""
REMEDY = "take that out of the row, or write the row as prompt and completion"
CONSTANTS: tuple[tuple[str, bool | None, Any], ...] = (
    ("True", True, 1), ("False", False, 0), ("None", None, ""),
)  # fmt: skip
"""How Python prints what JSON writes otherwise, and something like it that is printed otherwise."""


@dataclass(frozen=True, slots=True)
class Given:
    """What a row gives to a template, what the template reads, and what is `beside`: other keys of
    the row, whose words must be seen all the same."""

    talk: Talk
    template: Template
    beside: Mapping[str, Any]

    def require_seen(self, text: str) -> None:
        """Raises RowError for words beside the messages that are not in what was written."""
        unseen = first_unseen(self.beside, text)
        if unseen is not None:
            raise RowError(
                f"has {unseen} beside the messages, which would not be seen; write it into "
                "a message, take it out of the row, or name it in data.notes"
            )


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation with its text, and the same with a mark inside every word."""

    template: Template
    talk: Talk
    text: str
    marked: Talk
    marked_text: str
    words: Sequence[Word]


class ChatTemplate:
    """The chat template of a tokenizer. `marks` are the special tokens that may end a turn."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        eos = tokenizer.eos_token
        self.eos = eos if isinstance(eos, str) else ""
        marks = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        marks -= {str(tokenizer.bos_token), str(tokenizer.pad_token)}
        self.marks = sorted({*marks, *filter(None, [self.eos])})

    def given(self, row: Mapping[str, Any]) -> Given:
        """What a row with messages gives to the template. Raises RowError for what it cannot."""
        messages = checked_messages(row["messages"])
        options = row.get(OPTIONS) or {}
        if not isinstance(options, Mapping):
            raise RowError(f"has {OPTIONS} that are no JSON object; correct them")
        values = {key: value for key, value in {**options, **row}.items() if not is_blank(value)}
        for key in {"tools", "documents"} & values.keys():
            values[key] = checked_list(key, values[key])
        if self.tokenizer.chat_template is None:
            raise RowError(
                "has messages, but the tokenizer has no chat template; write the row as prompt and "
                "completion, or start another run with a tokenizer that has one"
            )
        with _refusing(
            "messages, but the chat template cannot be read",
            "write the row as prompt and completion, or start another run with a template that can",
        ):
            template = read_template(self.tokenizer.get_chat_template(None, values.get("tools")))
        variables = template.variables - RESERVED - self.tokenizer.special_tokens_map.keys()
        read = {key: value for key, value in values.items() if key in variables}
        for key in SPOKEN:
            value = values.get(key)
            if key in read or value is None or isinstance(value, (bool, int, float)):
                continue
            if key not in SYSTEM or not isinstance(value, str):
                raise RowError(f"has {key}, which the chat template does not read; {REMEDY}")
            if messages[0]["role"] in FIRST:
                raise RowError(f"has {key} beside a system message; keep one of the two")
            messages.insert(0, {"role": "system", "content": value})
        # A text of several words is no switch.
        spoken = {k: v for k, v in read.items() if k in SPOKEN or len(str(v).split()) > 1}
        switches = {key: value for key, value in read.items() if key not in spoken}
        known = {"messages", OPTIONS, *SPOKEN, *variables}
        beside = {key: value for key, value in values.items() if key not in known}
        return Given(Talk(messages, spoken, switches), template, beside)

    def render(self, talk: Talk, **more: Any) -> str:
        """What the template writes of a conversation."""
        with _refusing("messages that the chat template refuses", "correct them"):
            return str(
                self.tokenizer.apply_chat_template(
                    talk.messages, tokenize=False, **(talk.variables | more)
                )
            )

    def generated(self, talk: Talk) -> list[tuple[int, int]]:
        """The parts of a conversation's text that the template marks as generated."""
        variables = {**self.tokenizer.special_tokens_map, **talk.variables}
        tools = talk.variables.get("tools")
        with _refusing("messages that the chat template refuses", "correct them"):
            rendered: Any = render_jinja_template(
                conversations=[talk.messages],
                chat_template=self.tokenizer.get_chat_template(None, tools),
                return_assistant_tokens_mask=True,
                **variables,
            )
        return rendered[1][0]

    def faithful(self, given: Talk, template: Template) -> Rendered:
        """The conversation in the first form of which nothing is lost. Raises the RowError of the
        form that was written if there is none."""
        problem: RowError | None = None
        for talk in (form for way in _with_system_message(given) for form in forms(way)):
            try:
                return self._whole(talk, template)
            except RowError as error:
                problem = problem or error
        assert problem is not None
        raise problem

    def _whole(self, talk: Talk, template: Template) -> Rendered:
        """Raises RowError unless all that the conversation says stands in its text, as JSON where
        it is no text."""
        text = self.render(talk)
        marked, words = talk.marked(template)
        marked_text = self.render(marked)
        escaped = repr(DELETE)[1:-1]
        is_python = marked_text.count(escaped) > text.count(escaped) or talk.is_printed_in(text)
        for word in words:
            if not (is_python or word.stands_in(text, marked_text)):
                raise RowError(
                    f"has {word.what} that the chat template leaves out or changes; {REMEDY}"
                )
        for name, constant, stand_in in CONSTANTS:
            other = talk.replaced(constant, stand_in) if name in text else None
            if other is not None and not is_python:
                is_python = self.render(other).count(name) < text.count(name)
        if is_python:
            raise RowError(
                "has values (of tools, calls or documents) that the chat template writes as Python "
                f"does, not as JSON; {REMEDY}"
            )
        self._require_one_end(talk, text)
        return Rendered(template, talk, text, marked, marked_text, words)

    def _require_one_end(self, talk: Talk, text: str) -> None:
        """Raises RowError for a content with an end of turn that the template writes again. It need
        not be the tokenizer's own: `<|eot_id|>` ends a turn, `<|end_of_text|>` a text. A mark that
        the row itself has twice is no end."""
        for number, message in enumerate(talk.messages, start=1):
            own = end_of(message)
            for mark in (mark for mark in self.marks if own.endswith(mark)):
                twice = re.compile(rf"{re.escape(mark)}(?=\s*{re.escape(mark)})")
                parts = (part for other in talk.messages for part in text_parts(other))
                if len(twice.findall(text)) > sum(len(twice.findall(part)) for part in parts):
                    raise RowError(
                        f"has {mark} at the end of message {number}, which the chat template "
                        "writes itself; take it out of the content"
                    )


def _refusing(what: str, remedy: str) -> AbstractContextManager[None]:
    return library_boundary(f"has {what}", remedy, RowError)


def _with_system_message(talk: Talk) -> Iterator[Talk]:
    """A conversation as it is; and with a system text, which a template may only seem to read as a
    variable, as a message."""
    yield talk
    for key, value in talk.spoken.items():
        if key in SYSTEM and isinstance(value, str) and talk.messages[0]["role"] not in FIRST:
            others = {k: v for k, v in talk.spoken.items() if k != key}
            first = {"role": "system", "content": value}
            yield replace(talk, messages=[first, *talk.messages], spoken=others)
