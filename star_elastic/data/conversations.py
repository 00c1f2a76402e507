"""Conversations through the tokenizer's own chat template, and where in its text the last answer
stands: what a model learns where only answers count."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from star_elastic.data.messages import end_of
from star_elastic.data.templates import ChatTemplate, Rendered
from star_elastic.data.traces import THINKING, BrokenTrace, other_traces, require_whole_trace
from star_elastic.data.words import ASSISTANT, Talk
from star_elastic.errors import RowError

OR_ALL = 'or set loss_on = "all"'


@dataclass(frozen=True, slots=True)
class Written:
    """A conversation as the template writes it: up to the last answer (empty where that cannot be
    told), the answer, and what stands behind it."""

    opening: str
    answer: str
    end: str = ""


class Conversations:
    """Writes rows with `messages` through one tokenizer's chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._template = ChatTemplate(tokenizer)
        eos = self._template.eos
        own = re.escape(eos) or "(?!)"
        marks = (re.escape(mark) for mark in self._template.marks if mark != eos)
        other = "|".join(marks) or "(?!)"
        # Of other marks only those behind which nothing comes: some open a call of a tool.
        self._end_of_turn = re.compile(rf"\s*(?:{own}|(?:{other})(?=(?:\s|{own}|{other})*\Z))")

    def write(self, row: Mapping[str, Any], *, answers: bool) -> Written:
        """A row's conversation; with `answers`, its last turn must be the assistant's and be told
        apart. Raises RowError for whatever cannot be written faithfully."""
        given = self._template.given(row)
        messages = given.talk.messages
        last = messages[-1]["role"]
        if answers and last not in ASSISTANT:
            raise RowError(
                f"ends with a message of the role {last!r}, so there is no answer to count; end it "
                f"with the assistant's, {OR_ALL}"
            )
        _require_weights(messages[-1:] if answers else messages)
        rendered = self._template.faithful(given.talk, given.template)
        try:
            rendered, (start, stop) = self._answer_in_whole(rendered)
            text = rendered.text
            stop = start + len(self._closed_at_mark(text[start:stop], rendered.talk))
            written = Written(text[:start], text[start:stop], text[stop:])
        except RowError as error:
            if answers or isinstance(error, BrokenTrace):
                raise
            written = Written("", rendered.text)
        given.require_seen(rendered.text)
        return written

    def _closed_at_mark(self, answer: str, talk: Talk) -> str:
        """An answer up to the mark with which the template ends its turn, behind which generation
        writes nothing."""
        ended, own = answer.rstrip(), end_of(talk.messages[-1])
        marks = (mark for mark in self._template.marks if not own.endswith(mark))
        return ended if any(map(ended.endswith, marks)) else answer

    def _answer_in_whole(self, rendered: Rendered) -> tuple[Rendered, tuple[int, int]]:
        """The conversation, and characters [start, stop) of its last answer. Where that would break
        the trace that its turn opens: the conversation without thinking, or with an answer that
        leaves it to the template to open its trace."""
        try:
            return rendered, self._find_answer(rendered)
        except BrokenTrace as error:
            for talk in other_traces(rendered, error):
                with suppress(RowError):
                    other = self._template.faithful(talk, rendered.template)
                    return other, self._find_answer(other)
            raise

    def _find_answer(self, rendered: Rendered) -> tuple[int, int]:
        """Characters [start, stop) of the last answer. Raises RowError if they cannot be told, if
        words of others would be among them, or if they break a trace."""
        talk, marks_answers = rendered.talk, rendered.template.marks_answers
        last = len(talk.messages)
        if talk.messages[-1]["role"] not in ASSISTANT or last == 1:
            raise RowError(
                f"has an answer to nothing; put the user's message before the assistant's, {OR_ALL}"
            )
        if marks_answers:
            start, stop = self._marked_answer(talk, rendered.text)
            again = self._marked_answer(rendered.marked, rendered.marked_text)
        else:
            way, start = self._opened_answer(rendered)
            stop = len(rendered.text)
            opening = self._open(rendered.marked, way)
            again = (len(opening), len(rendered.marked_text))
            if not rendered.marked_text.startswith(opening):
                again = (0, 0)
        inside = rendered.marked_text[slice(*again)]
        own = [word for word in rendered.words if word.message == last]
        strange = any(word.has_mark_in(inside) for word in rendered.words if word.message != last)
        lost = not marks_answers and not all(word.has_mark_in(inside) for word in own)
        if strange or lost:
            raise RowError(
                "has a last answer that the chat template does not write by itself at the end; "
                f"write the row as prompt and completion, {OR_ALL}"
            )
        require_whole_trace(rendered, start, stop)
        return start, stop

    def _marked_answer(self, talk: Talk, text: str) -> tuple[int, int]:
        """By the template's own {% generation %} marks: those that the messages before the last
        one do not have."""
        before = len(self._template.generated(_without_last(talk)))
        spans = self._template.generated(talk)[before:]
        if not spans:
            raise RowError(
                "has a last answer in which the chat template marks nothing as generated; write "
                f"the row as prompt and completion, {OR_ALL}"
            )
        start, stop = spans[0][0], spans[-1][1]
        # An end behind the mark is one that the model has to write all the same.
        end = self._end_of_turn.match(text, stop)
        return start, end.end() if end else stop

    def _opened_answer(self, rendered: Rendered) -> tuple[dict[str, bool], int]:
        """Where the answer begins, by the opening for the last turn that the conversation begins
        with: with a trace or without, the longer one if it begins with both."""
        talk, text = rendered.talk, rendered.text
        names = rendered.template.variables.intersection(THINKING) - talk.switches.keys()
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
        return way, length

    def _open(self, talk: Talk, way: Mapping[str, bool]) -> str:
        return self._template.render(_without_last(talk), add_generation_prompt=True, **way)


def _without_last(talk: Talk) -> Talk:
    return replace(talk, messages=talk.messages[:-1])


def _require_weights(counted: Sequence[Mapping[str, Any]]) -> None:
    """Raises RowError for messages that are not to count and would."""
    for message in counted:
        weight = message.get("weight", 1)
        if weight != 1:
            raise RowError(
                f"has the weight {weight!r} in a message that would count whole; take the message, "
                "or its weight, out of the row"
            )
