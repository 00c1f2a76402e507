"""The words of a conversation, wherever a row keeps them, and what a chat template reads of it."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import Enum, auto
from functools import lru_cache, partial
from typing import Any

from jinja2 import meta, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from star_elastic.data.json_text import map_leaves
from star_elastic.data.notes import is_note

ASSISTANT = ("assistant", "model")
TRACES = ("reasoning_content", "thinking", "reasoning")
"""Names under which a message carries its trace; transformers reads them as one."""
FIELDS = (
    "role", "content", *TRACES, "name", "tool_calls", "function_call", "tools", "functions",
    "documents",
)  # fmt: skip
"""Fields of messages that templates know."""
NOT_SPOKEN = ("id", "doc_id")
"""Keys of documents that hold no words."""
DELETE = "\x7f"
"""In every mark: Python, which prints the texts inside a list or an object with escapes, writes it
otherwise than a template that writes the text, or JSON."""
ESCAPED = json.dumps(DELETE)[1:-1]
TRACE = re.compile("think|thought|reason", re.IGNORECASE)
"""In the names of the tags of a trace."""
_TAG = re.compile(r"<[^<>\s]+>|\[/?[A-Z_]+\]")
_SWITCH = re.compile(r"/\w+")
_GENERATION = re.compile(r"\{%[-+]?\s*(?:end)?generation\s*[-+]?%\}")


# What a template reads


@dataclass(frozen=True, slots=True)
class Template:
    """What a chat template reads: its `variables`; `tags` that may split an answer into a trace and
    the rest (`<think>`), and `switches` that steer it (`/no_think`, a word between white space), if
    any; whether it marks what the assistant writes."""

    variables: frozenset[str]
    tags: re.Pattern[str] | None
    switches: re.Pattern[str] | None
    marks_answers: bool


@lru_cache(maxsize=16)
def read_template(source: str) -> Template:
    """What the template of this source reads. Raises what jinja2 raises if it cannot be parsed."""
    environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    # Read token by token: a comment may speak of the mark.
    tokens = [value for _, kind, value in environment.lex(source) if kind != "whitespace"]
    opened = ("{%", "{%-", "{%+")
    marks = any(a in opened and b == "generation" for a, b in itertools.pairwise(tokens))
    tree = environment.parse(_GENERATION.sub("", source))
    constants = [n.value for n in tree.find_all(nodes.Const) if isinstance(n.value, str)]
    written = [n.data for n in tree.find_all(nodes.TemplateData)]
    tags = {tag for text in (*constants, *written) for tag in _TAG.findall(text)}
    switches = {text for text in constants if _SWITCH.fullmatch(text)}
    return Template(
        frozenset(meta.find_undeclared_variables(tree)),
        _any_of(tags),
        _any_of(switches, r"(?<!\S)(?:{})(?!\S)"),
        marks,
    )


def _any_of(texts: Iterable[str], frame: str = "{}") -> re.Pattern[str] | None:
    longest_first = sorted(map(re.escape, texts), key=len, reverse=True)
    return re.compile(frame.format("|".join(longest_first))) if longest_first else None


# What a row says


class Manner(Enum):
    """How the words of a text must come out."""

    ANSWER = auto()
    """As they are; white space around the tags of a trace at its front may change."""
    ASKED = auto()
    """As they are but for switches, which may go."""
    GIVEN = auto()
    """As they are, or escaped inside a JSON text."""
    LITERAL = auto()
    """As they are, never escaped: a JSON text by itself."""


Visit = Callable[[str, int, Manner, str], str]
"""(what a text belongs to, the number of its message or 0, how it must come out, the text) ->
another text in its place."""
Change = Callable[[str], str]
Entry = Callable[[str, Any], tuple[str, Any]]
"""What becomes of a key of an object and of what it holds."""


@dataclass(frozen=True, slots=True)
class Word:
    """A text of a row or a part of one, without white space at its ends; a mark, and the text with
    it inside; and how that stands in the marked copy between tags, where there are any."""

    what: str
    message: int
    text: str
    mark: str
    marked: str
    literal: bool
    between: re.Pattern[str] | None = None

    def stands_in(self, text: str, marked_text: str) -> bool:
        """Whether the template wrote it, and it is the row's own word that was written, its tags
        beside it: as it is or (unless `literal`) inside a JSON text."""
        if self.between is not None and not self.between.search(marked_text):
            return False
        return all(
            own in written or (not self.literal and any(e in written for e in _escaped(own)))
            for own, written in ((self.marked, marked_text), (self.text, text))
        )

    def has_mark_in(self, marked_text: str) -> bool:
        """Whether its mark is there, as it is or in a JSON text of letters alone."""
        return self.mark in marked_text or self.mark.replace(DELETE, ESCAPED) in marked_text


def _escaped(text: str) -> Iterator[str]:
    """A text inside a JSON text, with other letters than English ones or without."""
    for plain in (False, True):
        yield json.dumps(text, ensure_ascii=plain)[1:-1]


@dataclass(frozen=True, slots=True)
class Talk:
    """What a template is given: messages; variables that are `spoken` (tools, documents, a system
    text), and `switches`, which only steer it."""

    messages: list[dict[str, Any]]
    spoken: dict[str, Any]
    switches: dict[str, Any]

    @property
    def variables(self) -> dict[str, Any]:
        """Both kinds."""
        return self.switches | self.spoken

    def marked(self, template: Template) -> tuple[Talk, list[Word]]:
        """A copy with a mark inside every word, and the words."""
        words: list[Word] = []

        def mark(what: str, message: int, manner: Manner, text: str) -> str:
            parts, end = [], 0
            literal = manner is Manner.LITERAL
            for start, stop, before, after in _pieces(text, manner, template):
                # An escaped quote gives away that a text was written as a JSON string.
                sign = f"kq{len(words)}{DELETE}" + ('"qk' if literal else "qk")
                middle = _middle(text, start, stop, template)
                own = text[start:middle] + sign + text[middle:stop]
                between = None
                if before or after:
                    framed = map(re.escape, (*before, own, *after))
                    between = re.compile(r"\s*".join(framed))
                words.append(Word(what, message, text[start:stop], sign, own, literal, between))
                parts += [text[end:middle], sign]
                end = middle
            return "".join([*parts, text[end:]])

        return self._visited(mark), words

    def is_printed_in(self, text: str) -> bool:
        """Whether a list or an object of the conversation stands in a text as Python prints it, and
        JSON does not."""
        beside = [v for m in self.messages for k, v in m.items() if k != "content"]
        printed = set()
        for value in _containers([*beside, *self.spoken.values()]):
            shown = repr(value)
            if shown in text and shown != json.dumps(value, ensure_ascii=False, default=str):
                printed.add(shown)
        if not printed:
            return False
        said: list[str] = []

        def keep(what: str, message: int, manner: Manner, text: str) -> str:
            said.append(text)
            return text

        self._visited(keep)
        return any(text.count(shown) > "\n".join(said).count(shown) for shown in printed)

    def replaced(self, constant: bool | None, stand_in: Any) -> Talk | None:
        """A copy with something else in place of a truth value or None, wherever it stands in
        messages and spoken variables; None if it stands nowhere."""
        found = []

        def change(leaf: Any) -> Any:
            if leaf is not constant:
                return leaf
            found.append(leaf)
            return stand_in

        messages, spoken = (map_leaves(part, change) for part in (self.messages, self.spoken))
        return Talk(messages, spoken, self.switches) if found else None

    def _visited(self, visit: Visit) -> Talk:
        messages = [
            _visited_message(message, number, visit)
            for number, message in enumerate(self.messages, start=1)
        ]
        spoken = {}
        for key, value in self.spoken.items():
            manner = Manner.ASKED if isinstance(value, str) else Manner.GIVEN
            change = _tools if "tools" in key or key == "functions" else _all
            spoken[key] = change(value, partial(visit, key, 0, manner))
        return Talk(messages, spoken, self.switches)


def _containers(values: Iterable[Any]) -> Iterator[Any]:
    """The lists and objects among some values, and those in them."""
    for value in values:
        if isinstance(value, (dict, list)):
            yield value
            yield from _containers(value.values() if isinstance(value, dict) else value)


def _pieces(
    text: str, manner: Manner, template: Template
) -> Iterator[tuple[int, int, list[str], list[str]]]:
    """Where the words of a text stand, without the white space around them, and the tags that stand
    right before and right behind each."""
    gaps: list[re.Match[str]] = []
    if manner is Manner.ANSWER and template.tags:
        tags = list(template.tags.finditer(text))
        # A template takes the trace at the front apart, whatever tags stand in it; what follows is
        # text, tags or not.
        closing = [number for number, tag in enumerate(tags) if tag[0][1] == "/"]
        of_trace = [number for number in closing if TRACE.search(tags[number][0])]
        gaps = tags[: next(iter(of_trace or closing), -1) + 1]
    elif manner is Manner.ASKED and template.switches:
        gaps = list(template.switches.finditer(text))
    edges = [0, *(edge for gap in gaps for edge in gap.span()), len(text)]
    tags_between = [gap[0] for gap in gaps] if manner is Manner.ANSWER else []
    found = []
    for number, (start, stop) in enumerate(zip(edges[::2], edges[1::2], strict=True)):
        part = text[start:stop]
        if part.strip():
            place = start + len(part) - len(part.lstrip())
            found.append((number, place, start + len(part.rstrip())))
    if not found and text.strip() and manner is Manner.ANSWER:  # tags and nothing else
        yield len(text) - len(text.lstrip()), len(text.rstrip()), [], []
    for (last, *_), (number, start, stop), (following, *_) in zip(
        [(0, 0, 0), *found], found, [*found[1:], (len(gaps), 0, 0)], strict=False
    ):
        yield start, stop, tags_between[last:number], tags_between[number:following]


def _middle(text: str, start: int, stop: int, template: Template) -> int:
    """A place for a mark in the middle of a word, inside none of its tags."""
    middle = start + (stop - start + 1) // 2
    for tag in template.tags.finditer(text, start, stop) if template.tags else ():
        if tag.start() < middle < tag.end():
            return tag.end()
    return middle


def _visited_message(message: dict[str, Any], number: int, visit: Visit) -> dict[str, Any]:
    changed = dict(message)
    speaks = Manner.ANSWER if message["role"] in ASSISTANT else Manner.ASKED
    for key, value in message.items():
        own = partial(visit, f"{key} in message {number}", number)
        said, given = partial(own, speaks), partial(own, Manner.GIVEN)
        if key == "content" and isinstance(value, list):
            changed[key] = [{**part, "text": said(part["text"])} for part in value]
        elif key == "content":
            changed[key] = said(value)
        elif key in TRACES or (key == "name" and message["role"] not in ("tool", "function")):
            changed[key] = given(value)
        elif key in ("tool_calls", "function_call"):
            changed[key] = _calls(value, given, partial(own, Manner.LITERAL))
        elif key in ("tools", "functions"):
            changed[key] = _tools(value, given)
        elif key == "documents":
            changed[key] = _all(value, given)
        elif key not in FIELDS and not is_note(key, value):
            changed[key] = _words(value, given)
    return changed


def _each(value: Any, change: Change, entry: Entry) -> Any:
    """A value with another text in place of each, and another entry in place of each of an
    object's."""
    if isinstance(value, dict):
        return dict(entry(key, item) for key, item in value.items())
    if isinstance(value, list):
        return [_each(item, change, entry) for item in value]
    return change(value) if isinstance(value, str) else value


def _words(value: Any, change: Change, stays: Callable[[str, Any], bool] = is_note) -> Any:
    """Every text, but for the keys of objects that stay as they are: notes."""

    def entry(key: str, item: Any) -> tuple[str, Any]:
        return key, item if stays(key, item) else _words(item, change, stays)

    return _each(value, change, entry)


def _all(value: Any, change: Change) -> Any:
    """Every text, of documents all but their ids."""
    return _words(value, change, lambda key, _: key in NOT_SPOKEN)


def _tools(value: Any, change: Change) -> Any:
    """Names, descriptions and choices of tools and of their parameters; a tool may be a text."""

    def entry(key: str, item: Any) -> tuple[str, Any]:
        if key in ("name", "description", "enum"):
            return key, _all(item, change)
        if key == "properties" and isinstance(item, dict):
            return key, {change(name): _tools(own, change) for name, own in item.items()}
        is_inner = isinstance(item, (dict, list)) and key not in ("type", "required")
        return key, _tools(item, change) if is_inner else item

    return _each(value, change, entry)


def _calls(value: Any, change: Change, literal: Change) -> Any:
    """Names and arguments of calls; the names of arguments are words, too. Arguments that are a
    JSON text must be written as they are."""

    def entry(key: str, item: Any) -> tuple[str, Any]:
        if key == "function":
            item = _calls(item, change, literal)
        elif key == "name":
            item = _all(item, change)
        elif key == "arguments":
            item = literal(item) if isinstance(item, str) else _arguments(item, change)
        return key, item

    return _each(value, str, entry)


def _arguments(value: Any, change: Change) -> Any:
    return _each(value, change, lambda name, item: (change(name), _arguments(item, change)))
