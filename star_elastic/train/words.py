"""The words of a conversation, wherever a row keeps them, and what a chat template reads of it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from jinja2 import meta, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

TRACES = ("reasoning_content", "thinking", "reasoning")
"""Names under which a message carries its trace; transformers reads them as one."""
NOT_SPOKEN = ("id", "doc_id")
"""Keys of documents that hold no words."""
_TAG = re.compile(r"<[^<>\s]+>|\[/?[A-Z_]+\]")
_SWITCH = re.compile(r"/\w+")
_GENERATION = re.compile(r"\{%[-+]?\s*(?:end)?generation\s*[-+]?%\}")


# What a template reads


@dataclass(frozen=True, slots=True)
class Template:
    """What a chat template reads: its `variables`; `tags` that split or steer a text (`<think>`,
    `/no_think`), if any; whether it marks what the assistant writes."""

    variables: frozenset[str]
    tags: re.Pattern[str] | None
    marks_answers: bool

    def tags_in(self, text: str) -> list[str]:
        """The tags of a text that a template may move but must not drop: all but switches."""
        found = self.tags.findall(text) if self.tags else []
        return [tag for tag in found if not _SWITCH.fullmatch(tag)]


@lru_cache(maxsize=16)
def read_template(source: str) -> Template:
    """What the template of this source reads. Raises what jinja2 raises if it cannot be parsed."""
    environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    plain = _GENERATION.sub("", source)
    tree = environment.parse(plain)
    constants = [n.value for n in tree.find_all(nodes.Const) if isinstance(n.value, str)]
    written = [n.data for n in tree.find_all(nodes.TemplateData)]
    tags = {tag for text in (*constants, *written) for tag in _TAG.findall(text)}
    tags |= {text for text in constants if _SWITCH.fullmatch(text)}
    longest_first = sorted(tags, key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, longest_first))) if tags else None
    return Template(frozenset(meta.find_undeclared_variables(tree)), pattern, plain != source)


# What a row says

Visit = Callable[[str, int, str, bool], str]
"""(what a text belongs to, the number of its message or 0, the text, whether it must not be escaped
as JSON) -> another text in its place."""
Change = Callable[[str], str]


@dataclass(frozen=True, slots=True)
class Word:
    """A text of a row, or the part of one between two tags, without white space at its ends; and
    the mark inside it in the marked copy."""

    what: str
    message: int
    text: str
    mark: str
    literal: bool

    def stands_in(self, written: str) -> bool:
        """Whether the template wrote it, as it is or (unless `literal`) inside a JSON text."""
        if self.text in written or self.literal:
            return self.text in written
        escaped = (json.dumps(self.text, ensure_ascii=plain)[1:-1] for plain in (False, True))
        return any(form in written for form in escaped)


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

    def marked(self, tags: re.Pattern[str] | None) -> tuple[Talk, list[Word]]:
        """A copy with a mark inside every word, and the words."""
        words: list[Word] = []

        def mark(what: str, message: int, text: str, literal: bool) -> str:
            parts, end = [], 0
            for start, stop in _between(text, tags):
                sign = f"kq{len(words)}qk"
                words.append(Word(what, message, text[start:stop], sign, literal))
                middle = start + (stop - start + 1) // 2
                parts += [text[end:middle], sign]
                end = middle
            return "".join([*parts, text[end:]])

        return self._visited(mark), words

    def texts(self) -> list[str]:
        """Every text that holds words, whole."""
        found: list[str] = []

        def keep(what: str, message: int, text: str, literal: bool) -> str:
            found.append(text)
            return text

        self._visited(keep)
        return found

    def _visited(self, visit: Visit) -> Talk:
        messages = [
            _visited_message(message, number, visit)
            for number, message in enumerate(self.messages, start=1)
        ]
        spoken = {
            key: (_tools if "tools" in key or key == "functions" else _all)(
                value, lambda text, key=key: visit(key, 0, text, False)
            )
            for key, value in self.spoken.items()
        }
        return Talk(messages, spoken, self.switches)


def _between(text: str, tags: re.Pattern[str] | None) -> Iterator[tuple[int, int]]:
    """Where the words of a text stand: what is between its tags and not blank, stripped."""
    edges = [0, *(e for m in tags.finditer(text) for e in m.span())] if tags else [0]
    for start, stop in zip(edges[::2], [*edges[1::2], len(text)], strict=True):
        part = text[start:stop]
        if part.strip():
            yield start + len(part) - len(part.lstrip()), start + len(part.rstrip())


def _visited_message(message: dict[str, Any], number: int, visit: Visit) -> dict[str, Any]:
    changed = dict(message)
    for key, value in message.items():

        def own(text: str, what: str = f"{key} in message {number}") -> str:
            return visit(what, number, text, False)

        def literal(text: str, what: str = f"{key} in message {number}") -> str:
            return visit(what, number, text, True)

        if key == "content" and isinstance(value, list):
            changed[key] = [{**part, "text": own(part["text"])} for part in value]
        elif key in ("content", *TRACES) and isinstance(value, str):
            changed[key] = own(value)
        elif key == "name" and message["role"] not in ("tool", "function"):
            changed[key] = _all(value, own)
        elif key in ("tool_calls", "function_call"):
            changed[key] = _calls(value, own, literal)
        elif key in ("tools", "functions"):
            changed[key] = _tools(value, own)
        elif key == "documents":
            changed[key] = _all(value, own)
    return changed


def _all(value: Any, change: Change) -> Any:
    """Every text, of documents all but their ids."""
    if isinstance(value, dict):
        return {k: v if k in NOT_SPOKEN else _all(v, change) for k, v in value.items()}
    if isinstance(value, list):
        return [_all(item, change) for item in value]
    return change(value) if isinstance(value, str) else value


def _tools(value: Any, change: Change) -> Any:
    """Names, descriptions and choices of tools and of their parameters; a tool may be a text."""
    if isinstance(value, list):
        return [_tools(item, change) for item in value]
    if not isinstance(value, dict):
        return change(value) if isinstance(value, str) else value
    changed = dict(value)
    for key, item in value.items():
        if key in ("name", "description", "enum"):
            changed[key] = _all(item, change)
        elif key == "properties" and isinstance(item, dict):
            changed[key] = {change(name): _tools(v, change) for name, v in item.items()}
        elif isinstance(item, (dict, list)) and key not in ("type", "required"):
            changed[key] = _tools(item, change)
    return changed


def _calls(value: Any, change: Change, literal: Change) -> Any:
    """Names and arguments of calls; the names of arguments are words, too. Arguments that are a
    JSON text must be written as they are."""
    if isinstance(value, list):
        return [_calls(item, change, literal) for item in value]
    if not isinstance(value, dict):
        return value
    changed = dict(value)
    for key, item in value.items():
        if key == "function":
            changed[key] = _calls(item, change, literal)
        elif key == "name":
            changed[key] = _all(item, change)
        elif key == "arguments":
            changed[key] = literal(item) if isinstance(item, str) else _arguments(item, change)
    return changed


def _arguments(value: Any, change: Change) -> Any:
    if isinstance(value, dict):
        return {change(name): _arguments(item, change) for name, item in value.items()}
    if isinstance(value, list):
        return [_arguments(item, change) for item in value]
    return change(value) if isinstance(value, str) else value
