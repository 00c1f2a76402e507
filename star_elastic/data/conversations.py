"""Conversations as text: through the tokenizer's own chat template, faithfully or not at all.

A template is code of its own. It may leave out what it does not know (tools, a trace, a system
message), write a list as Python does, or open the last answer elsewhere than where it begins. So
every word of a row is looked for in what the template wrote, and a row that lacks one is refused.

A word must stand there as it is: nothing was changed. And with a mark put into every word, every
mark must come out: it is the row's own word, not by chance the same one of the template. In the
marked copy lists and objects tell, too, when they are printed as Python does, which is not JSON.

An answer is one that the model could have written where its turn was opened: in an opened trace, it
closes it.
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
from star_elastic.data.words import (
    ASSISTANT,
    DELETE,
    TRACE,
    Talk,
    Template,
    Word,
    read_template,
)
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
THINKING = ("enable_thinking", "thinking")
"""Variables with which templates open a turn with or without a trace."""
NO_THINKING = "/no_think"
"""The word by which some templates are told so in a message."""
RESERVED = {"messages", *inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters}
RESERVED -= {"tools", "documents"}
"""Names with a meaning of their own where a template is called."""
OR_ALL = 'or set loss_on = "all"'
OR_PROMPT = "or write the row as prompt and completion"
REMEDY = "take that out of the row, or write the row as prompt and completion"
CONSTANTS: tuple[tuple[str, bool | None, Any], ...] = (
    ("True", True, 1), ("False", False, 0), ("None", None, ""),
)  # fmt: skip
"""How Python prints what JSON writes otherwise, and something like it that is printed otherwise."""
_OPENED = re.compile(r"(?:<(\w+)>|\[([A-Z_]+)\])\s*\Z")
# They begin with no white space: a search would try every run of it from each of its places.
_EMPTY_TRACE = re.compile(r"<(\w*(?:think|thought|reason)\w*)>\s*</\1>\s*", re.IGNORECASE)
_SECOND_TRACE = re.compile(
    rf"{_EMPTY_TRACE.pattern}(?:</\1>|<\1>(?=.*?</\1>))", re.IGNORECASE | re.DOTALL
)


@dataclass(frozen=True, slots=True)
class Written:
    """A conversation as the template writes it: up to the last answer (empty where that cannot be
    told), the answer, and what stands behind it."""

    opening: str
    answer: str
    end: str = ""


@dataclass(frozen=True, slots=True)
class _Rendered:
    """A conversation with its text, and the same with a mark inside every word."""

    talk: Talk
    text: str
    marked: Talk
    marked_text: str
    words: Sequence[Word]


class _BrokenTrace(RowError):
    """An answer in a trace that its turn opens and that it does not close, or opens again."""


class _SecondTrace(_BrokenTrace):
    """A trace behind an empty one."""


class Conversations:
    """Writes rows with `messages` through one tokenizer's chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        eos = tokenizer.eos_token
        self._eos = eos if isinstance(eos, str) else ""
        marks = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        marks -= {str(tokenizer.bos_token), str(tokenizer.pad_token), self._eos}
        self._marks = sorted({*marks, *filter(None, [self._eos])})
        own = re.escape(self._eos) or "(?!)"
        other = "|".join(map(re.escape, sorted(marks))) or "(?!)"
        # Of other marks only those behind which nothing comes: some open a call of a tool.
        self._end_of_turn = re.compile(rf"\s*(?:{own}|(?:{other})(?=(?:\s|{own}|{other})*\Z))")

    def write(self, row: Mapping[str, Any], *, answers: bool) -> Written:
        """A row's conversation; with `answers`, its last turn must be the assistant's and be told
        apart. Raises RowError for whatever cannot be written faithfully."""
        given, template = self._given(row)
        last = given.messages[-1]["role"]
        if answers and last not in ASSISTANT:
            raise RowError(
                f"ends with a message of the role {last!r}, so there is no answer to count; end it "
                f"with the assistant's, {OR_ALL}"
            )
        _require_weights(given.messages[-1:] if answers else given.messages)
        rendered = self._render_faithfully(given, template)
        try:
            rendered, (start, stop) = self._answer_in_whole(rendered, template)
            text = rendered.text
            stop = start + len(self._closed_at_mark(text[start:stop], rendered.talk))
            written = Written(text[:start], text[start:stop], text[stop:])
        except RowError as error:
            if answers or isinstance(error, _BrokenTrace):
                raise
            written = Written("", rendered.text)
        self._require_seen(row, rendered.text, template)
        return written

    # What the template is given

    def _given(self, row: Mapping[str, Any]) -> tuple[Talk, Template]:
        """What a row gives to the template, and what the template reads."""
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
        own = RESERVED | self.tokenizer.special_tokens_map.keys()
        read = {k: v for k, v in values.items() if k in template.variables and k not in own}
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
        return Talk(messages, spoken, switches), template

    def _require_seen(self, row: Mapping[str, Any], text: str, template: Template) -> None:
        """Raises RowError for words beside the messages that the model would not see."""
        options = row.get(OPTIONS) or {}
        given = {**options, **row}
        own = RESERVED | self.tokenizer.special_tokens_map.keys()
        known = {"messages", OPTIONS, *SPOKEN, *(template.variables - own)}
        unseen = first_unseen({k: v for k, v in given.items() if k not in known}, text)
        if unseen is not None:
            raise RowError(
                f"has {unseen} beside the messages, which would not be seen; write it into "
                "a message, take it out of the row, or name it in data.notes"
            )

    # What the template writes

    def _render(self, talk: Talk, **more: Any) -> str:
        with _refusing("messages that the chat template refuses", "correct them"):
            return str(
                self.tokenizer.apply_chat_template(
                    talk.messages, tokenize=False, **(talk.variables | more)
                )
            )

    def _render_faithfully(self, given: Talk, template: Template) -> _Rendered:
        """The conversation in the first form of which nothing is lost. Raises the RowError of the
        form that was written if there is none."""
        problem: RowError | None = None
        for talk in (form for way in _with_system_message(given) for form in forms(way)):
            try:
                text = self._render(talk)
                return self._faithful(talk, text, template)
            except RowError as error:
                problem = problem or error
        assert problem is not None
        raise problem

    def _faithful(self, talk: Talk, text: str, template: Template) -> _Rendered:
        """Raises RowError unless all that the conversation says stands in its text, as JSON where
        it is no text."""
        marked, words = talk.marked(template)
        marked_text = self._render(marked)
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
                is_python = self._render(other).count(name) < text.count(name)
        if is_python:
            raise RowError(
                "has values (of tools, calls or documents) that the chat template writes as Python "
                f"does, not as JSON; {REMEDY}"
            )
        self._require_one_end(talk, text)
        return _Rendered(talk, text, marked, marked_text, words)

    def _closed_at_mark(self, answer: str, talk: Talk) -> str:
        """An answer up to the mark with which the template ends its turn, behind which generation
        writes nothing."""
        ended, own = answer.rstrip(), end_of(talk.messages[-1])
        marks = (mark for mark in self._marks if not own.endswith(mark))
        return ended if any(map(ended.endswith, marks)) else answer

    def _require_one_end(self, talk: Talk, text: str) -> None:
        """Raises RowError for a content with an end of turn that the template writes again. It need
        not be the tokenizer's own: `<|eot_id|>` ends a turn, `<|end_of_text|>` a text. A mark that
        the row itself has twice is no end."""
        for number, message in enumerate(talk.messages, start=1):
            own = end_of(message)
            for mark in (mark for mark in self._marks if own.endswith(mark)):
                twice = re.compile(rf"{re.escape(mark)}(?=\s*{re.escape(mark)})")
                said = sum(
                    len(twice.findall(part)) for m in talk.messages for part in text_parts(m)
                )
                if len(twice.findall(text)) > said:
                    raise RowError(
                        f"has {mark} at the end of message {number}, which the chat template "
                        "writes itself; take it out of the content"
                    )

    # Where the last answer stands

    def _answer_in_whole(
        self, rendered: _Rendered, template: Template
    ) -> tuple[_Rendered, tuple[int, int]]:
        """The conversation, and characters [start, stop) of its last answer. Where that would break
        the trace that its turn opens: the conversation without thinking, or with an answer that
        leaves it to the template to open its trace."""
        try:
            found = self._find_answer(rendered, template)
            _require_whole_trace(rendered, found, template)
            return rendered, found
        except _BrokenTrace as error:
            others = (
                _without_empty_trace(rendered.talk)
                if isinstance(error, _SecondTrace)
                else _other_traces(rendered, template)
            )
            for talk in others:
                try:
                    other = self._render_faithfully(talk, template)
                    found = self._find_answer(other, template)
                    _require_whole_trace(other, found, template)
                    return other, found
                except RowError:
                    continue
            raise error

    def _find_answer(self, rendered: _Rendered, template: Template) -> tuple[int, int]:
        """Characters [start, stop) of the last answer. Raises RowError if they cannot be told, or
        if words of others would be among them."""
        talk, text = rendered.talk, rendered.text
        last = len(talk.messages)
        if talk.messages[-1]["role"] not in ASSISTANT or last == 1:
            raise RowError(
                f"has an answer to nothing; put the user's message before the assistant's, {OR_ALL}"
            )
        if template.marks_answers:
            found = self._marked_answer(talk, text)
            again = self._marked_answer(rendered.marked, rendered.marked_text)
        else:
            way, found = self._opened_answer(talk, text, template)
            opening = self._open(rendered.marked, way)
            again = (len(opening), len(rendered.marked_text))
            if not rendered.marked_text.startswith(opening):
                again = (0, 0)
        inside = rendered.marked_text[slice(*again)]
        own = [word for word in rendered.words if word.message == last]
        strange = any(word.has_mark_in(inside) for word in rendered.words if word.message != last)
        lost = not template.marks_answers and not all(word.has_mark_in(inside) for word in own)
        if strange or lost:
            raise RowError(
                "has a last answer that the chat template does not write by itself at the end; "
                f"write the row as prompt and completion, {OR_ALL}"
            )
        return found

    def _marked_answer(self, talk: Talk, text: str) -> tuple[int, int]:
        """By the template's own {% generation %} marks: those that the messages before the last
        one do not have."""
        before = len(self._generated(_without_last(talk)))
        spans = self._generated(talk)[before:]
        if not spans:
            raise RowError(
                "has a last answer in which the chat template marks nothing as generated; write "
                f"the row as prompt and completion, {OR_ALL}"
            )
        start, stop = spans[0][0], spans[-1][1]
        # An end behind the mark is one that the model has to write all the same.
        end = self._end_of_turn.match(text, stop)
        return start, end.end() if end else stop

    def _generated(self, talk: Talk) -> list[tuple[int, int]]:
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

    def _opened_answer(
        self, talk: Talk, text: str, template: Template
    ) -> tuple[dict[str, bool], tuple[int, int]]:
        """By the opening for the last turn that the conversation begins with: with a trace or
        without, the longer one if it begins with both."""
        names = template.variables.intersection(THINKING) - talk.switches.keys()
        ways = [dict.fromkeys(names, thinks) for thinks in (True, False)] if names else []
        openings = [(self._open(talk, way), way) for way in ways]
        fitting = [(len(o), way) for o, way in openings if text.startswith(o)]
        if not fitting:  # the template's own default may be neither
            opening = self._open(talk, {})
            if not text.startswith(opening):
                raise RowError(
                    "has a last answer that does not begin as the chat template opens one (with "
                    f"{opening[-24:]!r}), for example without the trace; give it what is missing "
                    "(or, if the template drops that, write the row as prompt and completion), "
                    f"{OR_ALL}"
                )
            fitting = [(len(opening), {})]
        length, way = max(fitting, key=lambda found: found[0])
        return way, (length, len(text))

    def _open(self, talk: Talk, way: Mapping[str, bool]) -> str:
        return self._render(_without_last(talk), add_generation_prompt=True, **way)


def _refusing(what: str, remedy: str) -> AbstractContextManager[None]:
    return library_boundary(f"has {what}", remedy, RowError)


def _without_last(talk: Talk) -> Talk:
    return replace(talk, messages=talk.messages[:-1])


def _with_system_message(talk: Talk) -> Iterator[Talk]:
    """A conversation as it is; and with a system text, which a template may only seem to read as a
    variable, as a message."""
    yield talk
    for key, value in talk.spoken.items():
        if key in SYSTEM and isinstance(value, str) and talk.messages[0]["role"] not in FIRST:
            others = {k: v for k, v in talk.spoken.items() if k != key}
            first = {"role": "system", "content": value}
            yield replace(talk, messages=[first, *talk.messages], spoken=others)


def _require_weights(counted: Sequence[Mapping[str, Any]]) -> None:
    """Raises RowError for messages that are not to count and would."""
    for message in counted:
        weight = message.get("weight", 1)
        if weight != 1:
            raise RowError(
                f"has the weight {weight!r} in a message that would count whole; take the message, "
                "or its weight, out of the row"
            )


# Traces


def _opened_trace(opening: str, template: Template) -> tuple[str, str] | None:
    """The tag of a trace that an opening ends in, and the one that closes it."""
    found = _OPENED.search(opening)
    if found is None:
        return None
    tag = found[0].rstrip()
    closing = f"{tag[0]}/{tag[1:]}"
    is_known = template.tags is not None and template.tags.fullmatch(closing) is not None
    return (tag, closing) if is_known or TRACE.search(tag) else None


def _require_whole_trace(rendered: _Rendered, found: tuple[int, int], template: Template) -> None:
    """Raises _BrokenTrace unless the answer at [start, stop) closes the trace, if there is one,
    that is opened before it."""
    start, stop = found
    opening, answer = rendered.text[:start], rendered.text[start:stop]
    tags = _opened_trace(opening, template)
    if tags is None:
        _require_no_second_trace(opening, answer, rendered.talk.messages[-1])
        return
    tag, closing = tags
    if closing not in answer or answer.lstrip().startswith(tag):
        switch = template.switches.fullmatch(NO_THINKING) if template.switches else None
        advice = f"put {switch[0]} into the system message" if switch else "write the row as prompt"
        raise _BrokenTrace(
            f"has a last answer inside {tag}, which the chat template opens, that does not close "
            f"it or opens it again; begin the content with the trace and {closing}, or {advice}"
            + ("" if switch else " and completion")
        )


def _require_no_second_trace(opening: str, answer: str, last: Mapping[str, Any]) -> None:
    """Raises _SecondTrace for a trace behind an empty one, which templates write where there is to
    be none: two traces are learned, and no turn is opened with one. A tag alone is a word, and what
    the row itself has is its own."""
    empty = re.search(rf"{_EMPTY_TRACE.pattern}\Z", opening, re.IGNORECASE)
    found = list(_SECOND_TRACE.finditer((empty[0] if empty else "") + answer))
    if len(found) > sum(len(_SECOND_TRACE.findall(part)) for part in text_parts(last)):
        name = found[0][1]
        raise _SecondTrace(
            f"has a last answer with a trace behind an empty one, <{name}></{name}>, which the "
            f"chat template writes; take the trace out of the content, {OR_PROMPT}"
        )


def _without_empty_trace(talk: Talk) -> Iterator[Talk]:
    """A conversation with a last answer that leaves it to the template to write an empty trace."""
    last = talk.messages[-1]
    content = last.get("content")
    if isinstance(content, str) and (empty := _EMPTY_TRACE.match(content.lstrip())):
        without = content.lstrip()[empty.end() :]
        yield replace(talk, messages=[*talk.messages[:-1], {**last, "content": without}])


def _other_traces(rendered: _Rendered, template: Template) -> Iterator[Talk]:
    """A conversation with a last answer that leaves it to the template to open its trace; without
    thinking."""
    talk, last = rendered.talk, rendered.talk.messages[-1]
    content = last.get("content")
    if (
        template.tags
        and isinstance(content, str)
        and (tag := template.tags.match(content.lstrip()))
    ):
        own = content.lstrip()[tag.end() :].lstrip()
        yield replace(talk, messages=[*talk.messages[:-1], {**last, "content": own}])
    names = template.variables.intersection(THINKING) - talk.variables.keys()
    if names:
        yield replace(talk, switches=talk.switches | dict.fromkeys(names, False))
