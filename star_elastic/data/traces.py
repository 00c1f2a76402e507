"""Traces: whether an answer is one that the model could have written where its turn was opened.

Templates open a turn inside a trace, behind an empty one, or with none. In an opened trace the
answer has to close it; behind an empty one there is no other.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from star_elastic.data.messages import text_parts
from star_elastic.data.templates import Rendered
from star_elastic.data.words import TRACE, Talk, Template
from star_elastic.errors import RowError

THINKING = ("enable_thinking", "thinking")
"""Variables with which templates open a turn with or without a trace."""
NO_THINKING = "/no_think"
"""The word by which some templates are told so in a message."""
_OPENED = re.compile(r"(?:<(\w+)>|\[([A-Z_]+)\])\s*\Z")
# They begin with no white space: a search would try every run of it from each of its places.
_EMPTY_TRACE = re.compile(r"<(\w*(?:think|thought|reason)\w*)>\s*</\1>\s*", re.IGNORECASE)
_SECOND_TRACE = re.compile(
    rf"{_EMPTY_TRACE.pattern}(?:</\1>|<\1>(?=.*?</\1>))", re.IGNORECASE | re.DOTALL
)


class BrokenTrace(RowError):
    """An answer in a trace that its turn opens and that it does not close, or opens again."""


class SecondTrace(BrokenTrace):
    """A trace behind an empty one."""


def require_whole_trace(rendered: Rendered, start: int, stop: int) -> None:
    """Raises BrokenTrace unless the answer at characters [start, stop) closes the trace, if there
    is one, that is opened before it."""
    template = rendered.template
    opening, answer = rendered.text[:start], rendered.text[start:stop]
    tags = _opened_trace(opening, template)
    if tags is None:
        _require_no_second_trace(opening, answer, rendered.talk.messages[-1])
        return
    tag, closing = tags
    if closing not in answer or answer.lstrip().startswith(tag):
        switch = template.switches.fullmatch(NO_THINKING) if template.switches else None
        advice = "write the row as prompt and completion"
        if switch:
            advice = f"put {switch[0]} into the system message"
        raise BrokenTrace(
            f"has a last answer inside {tag}, which the chat template opens, that does not close "
            f"it or opens it again; begin the content with the trace and {closing}, or {advice}"
        )


def _opened_trace(opening: str, template: Template) -> tuple[str, str] | None:
    """The tag of a trace that an opening ends in, and the one that closes it."""
    found = _OPENED.search(opening)
    if found is None:
        return None
    tag = found[0].rstrip()
    closing = f"{tag[0]}/{tag[1:]}"
    is_known = template.tags is not None and template.tags.fullmatch(closing) is not None
    return (tag, closing) if is_known or TRACE.search(tag) else None


def _require_no_second_trace(opening: str, answer: str, last: Mapping[str, Any]) -> None:
    """Raises SecondTrace for a trace behind an empty one, which templates write where there is to
    be none: two traces are learned, and no turn is opened with one. A tag alone is a word, and what
    the row itself has is its own."""
    empty = re.search(rf"{_EMPTY_TRACE.pattern}\Z", opening, re.IGNORECASE)
    found = list(_SECOND_TRACE.finditer((empty[0] if empty else "") + answer))
    if len(found) > sum(len(_SECOND_TRACE.findall(part)) for part in text_parts(last)):
        name = found[0][1]
        raise SecondTrace(
            f"has a last answer with a trace behind an empty one, <{name}></{name}>, which the "
            "chat template writes; take the trace out of the content, or write the row as prompt "
            "and completion"
        )


def other_traces(rendered: Rendered, problem: BrokenTrace) -> Iterator[Talk]:
    """Conversations whose last answer leaves it to the template to open its trace, or to write the
    empty one; and the conversation without thinking."""
    talk, template, last = rendered.talk, rendered.template, rendered.talk.messages[-1]
    is_second = isinstance(problem, SecondTrace)
    content = last.get("content")
    if isinstance(content, str):
        own = content.lstrip()
        tag = _EMPTY_TRACE if is_second else template.tags
        if found := tag and tag.match(own):
            rest = own[found.end() :]
            without = {**last, "content": rest if is_second else rest.lstrip()}
            yield replace(talk, messages=[*talk.messages[:-1], without])
    names = template.variables.intersection(THINKING) - talk.variables.keys()
    if names and not is_second:
        yield replace(talk, switches=talk.switches | dict.fromkeys(names, False))
