"""Conversations as text: through the tokenizer's own chat template, faithfully or not at all.

A template is code of its own. It may leave out what it does not know (tools, a trace, a system
message), write a list as Python does, or open the last answer elsewhere than where it begins. So
every word of a row is looked for in what the template wrote, and a row that lacks one is refused.

A word must stand there as it is: nothing was changed. And with a mark put into every word, every
mark must come out: it is the row's own word, not by chance the same one of the template.
"""

from __future__ import annotations

import inspect
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from star_elastic.errors import RowError, library_boundary
from star_elastic.train.words import TRACES, Talk, Template, Word, read_template

SYSTEM = ("system", "system_prompt", "system_message")
SPOKEN = (
    *SYSTEM, "developer", "custom_instructions", "documents", "functions", "tools", "python_tools",
    "xml_tools", "reasoning_content", "thinking",
)  # fmt: skip
"""Keys of a row that hold words or tools for the model; whatever else it has is taken for notes."""
OPTIONS = "chat_template_kwargs"
"""Where some data sets keep a row's variables for the template."""
ASSISTANT = ("assistant", "model")
THINKING = ("enable_thinking", "thinking")
"""Variables with which templates open a turn with or without a trace."""
RESERVED = {"messages", *inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters}
RESERVED -= {"tools", "documents"}
"""Names with a meaning of their own where a template is called."""
OR_ALL = 'or set loss_on = "all"'
REMEDY = "take that out of the row, or write the row as prompt and completion"


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


class Conversations:
    """Writes rows with `messages` through one tokenizer's chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer

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
        rendered = self._render_faithfully(given, template)
        try:
            start, stop = self._find_answer(rendered, template)
        except RowError:
            if answers:
                raise
            return Written("", rendered.text)
        text = rendered.text
        return Written(text[:start], text[start:stop], text[stop:])

    # What the template is given

    def _given(self, row: Mapping[str, Any]) -> tuple[Talk, Template]:
        """What a row gives to the template, and what the template reads."""
        messages = _checked_messages(row["messages"])
        options = row.get(OPTIONS) or {}
        if not isinstance(options, Mapping):
            raise RowError(f"has {OPTIONS} that are no JSON object; correct them")
        values = {key: value for key, value in {**options, **row}.items() if not is_blank(value)}
        for key in {"tools", "documents"} & values.keys():
            values[key] = _checked_list(key, values[key])
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
            if messages[0]["role"] in ("system", "developer"):
                raise RowError(f"has {key} beside a system message; keep one of the two")
            messages.insert(0, {"role": "system", "content": value})
        spoken = {key: value for key, value in read.items() if key in SPOKEN}
        switches = {key: value for key, value in read.items() if key not in SPOKEN}
        return Talk(messages, spoken, switches), template

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
        for talk in _forms(given):
            try:
                text = self._render(talk)
                marked, words = talk.marked(template.tags)
                rendered = _Rendered(talk, text, marked, self._render(marked), words)
                _require_words(rendered, template)
                return rendered
            except RowError as error:
                problem = problem or error
        assert problem is not None
        raise problem

    # Where the last answer stands

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
            found, again = (self._marked_answer(each) for each in (talk, rendered.marked))
        else:
            way, found = self._opened_answer(talk, text, template)
            opening = self._open(rendered.marked, way)
            again = (len(opening), len(rendered.marked_text))
            if not rendered.marked_text.startswith(opening):
                again = (0, 0)
        inside = rendered.marked_text[slice(*again)]
        own = [word for word in rendered.words if word.message == last]
        strange = any(word.mark in inside for word in rendered.words if word.message != last)
        lost = not template.marks_answers and not all(word.mark in inside for word in own)
        if strange or lost:
            raise RowError(
                "has a last answer that the chat template does not write by itself at the end; "
                f"write the row as prompt and completion, {OR_ALL}"
            )
        return found

    def _marked_answer(self, talk: Talk) -> tuple[int, int]:
        """By the template's own {% generation %} marks: those that the messages before the last
        one do not have."""
        before = len(self._generated(_without_last(talk)))
        spans = self._generated(talk)[before:]
        if not spans:
            raise RowError(
                "has a last answer in which the chat template marks nothing as generated; write "
                f"the row as prompt and completion, {OR_ALL}"
            )
        return spans[0][0], spans[-1][1]

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
                    f"{opening[-24:]!r}), for example without the trace; give it what is missing, "
                    f"write the row as prompt and completion, {OR_ALL}"
                )
            fitting = [(len(opening), {})]
        length, way = max(fitting, key=lambda found: found[0])
        return way, (length, len(text))

    def _open(self, talk: Talk, way: Mapping[str, bool]) -> str:
        return self._render(_without_last(talk), add_generation_prompt=True, **way)


def is_blank(value: Any) -> bool:
    """Whether a value says nothing: None, or an empty text, list or object."""
    return value is None or (isinstance(value, (str, list, dict)) and not value)


def _refusing(what: str, remedy: str) -> AbstractContextManager[None]:
    return library_boundary(f"has {what}", remedy, RowError)


def _without_last(talk: Talk) -> Talk:
    return replace(talk, messages=talk.messages[:-1])


# What a row may hold


def _checked_messages(given: Any) -> list[dict[str, Any]]:
    """Messages without empty fields, their content a text or a list of text parts."""
    if not isinstance(given, list) or not given:
        raise RowError('has no list of messages; give messages such as {"role", "content"}')
    messages = []
    for number, message in enumerate(given, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise RowError(f"has no role in message {number}; give each message role and content")
        kept = {k: v for k, v in message.items() if k == "content" or not is_blank(v)}
        first, *others = [key for key in TRACES if key in kept] or [""]
        for key in others:
            if kept[key] == kept[first]:  # the same trace under another of its names
                del kept[key]
        content = kept.get("content")
        if content is None:
            kept.pop("content", None)
            if not kept.keys() & {"tool_calls", "function_call", *TRACES}:
                raise RowError(f"has no content in message {number}; give it one, or take it out")
        elif isinstance(content, list):
            kept["content"] = [_checked_part(part, number) for part in content]
        elif not isinstance(content, str):
            raise RowError(f"has a content in message {number} that is no text; write it as text")
        messages.append(kept)
    return messages


def _checked_part(part: Any, number: int) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    text = part.get("text") if isinstance(part, dict) else None
    if not isinstance(text, str) or part.get("type", "text") != "text":
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        raise RowError(
            f"has a part of type {kind!r} in message {number}, which a text model does not see; "
            "say it in text, or take it out of the row"
        )
    return {"type": "text", "text": text}


def _checked_list(key: str, value: Any) -> list[dict[str, Any]]:
    """Tools or documents, which tables keep as a JSON text."""
    if isinstance(value, str):
        with _refusing(f"{key} that are no JSON list", "correct them"):
            value = json.loads(value)
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise RowError(f"has {key} that are no list of objects; correct them")
    return value


def _forms(talk: Talk) -> Iterator[Talk]:
    """A conversation in the ways that templates read one: content in parts as one text or as it is,
    arguments of calls as they are or the other way, object or JSON text."""
    has_parts = any(isinstance(message.get("content"), list) for message in talk.messages)
    has_calls = any("tool_calls" in message for message in talk.messages)
    for joined in (True, False) if has_parts else (False,):
        for other in (False, True) if has_calls else (False,):
            messages = [_in_form(message, joined, other) for message in talk.messages]
            yield replace(talk, messages=messages)


def _in_form(message: dict[str, Any], joined: bool, other: bool) -> dict[str, Any]:
    changed = dict(message)
    if joined and isinstance(message.get("content"), list):
        changed["content"] = "".join(part["text"] for part in message["content"])
    if other and "tool_calls" in message:
        changed["tool_calls"] = _other_arguments(message["tool_calls"])
    return changed


def _other_arguments(value: Any) -> Any:
    if isinstance(value, list):
        return [_other_arguments(item) for item in value]
    if not isinstance(value, dict):
        return value
    changed = {**value}
    if "function" in value:
        changed["function"] = _other_arguments(value["function"])
    given = value.get("arguments")
    if isinstance(given, dict):
        changed["arguments"] = json.dumps(given, ensure_ascii=False)
    elif isinstance(given, str):
        with suppress(ValueError):  # a text of another kind stays one
            changed["arguments"] = json.loads(given)
    return changed


# What a template may lose


def _require_words(rendered: _Rendered, template: Template) -> None:
    """Raises RowError unless all that the conversation says stands in its text."""
    talk, text = rendered.talk, rendered.text
    for word in rendered.words:
        if word.mark not in rendered.marked_text or not word.stands_in(text):
            raise RowError(
                f"has {word.what} that the chat template leaves out or changes; {REMEDY}"
            )
    tags = Counter(tag for said in talk.texts() for tag in template.tags_in(said))
    lost = next((tag for tag, count in tags.items() if text.count(tag) < count), None)
    if lost is not None:
        raise RowError(f"has {lost}, which the chat template leaves out; {REMEDY}")
    for message in talk.messages:
        for call in message.get("tool_calls", ()):
            own = call.get("function", call) if isinstance(call, dict) else {}
            given = own.get("arguments") if isinstance(own, dict) else None
            if isinstance(given, dict) and given and repr(given) in text:
                raise RowError(
                    "has a call whose arguments the chat template writes as Python does, not as "
                    f"JSON; {REMEDY}"
                )
