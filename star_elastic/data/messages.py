"""What messages may hold, field by field, and the forms in which templates read them.

A field of another type than templates expect is one that they skip without a word, so every field
that is known is checked before any template sees it. Tables keep lists and objects as JSON texts;
these are read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from star_elastic.data.json_text import read_json
from star_elastic.data.notes import MEDIA, first_unseen, is_blank, is_note
from star_elastic.data.words import FIELDS, TRACES, Talk
from star_elastic.errors import RowError, library_boundary

Message = dict[str, Any]
CALL_KEYS = ("function", "name", "arguments")
"""What a call says; whatever else it holds must be a note."""


def part_text(part: Any) -> str | None:
    """The text of a part of a content: a text, or `{"type": "text", "text"}`, of which the type may
    be left out. None for a part of another kind."""
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and part.get("type", "text") == "text":
        text = part.get("text")
        return text if isinstance(text, str) else None
    return None


def checked_messages(given: Any) -> list[Message]:
    """Messages without empty fields, every known field of its type; their content is a text or a
    list of text parts. Raises RowError, naming the field and the message."""
    if isinstance(given, str):
        with suppress(ValueError, RecursionError):  # some other text: no list, as told below
            given = read_json(given)
    if not isinstance(given, list) or not given:
        raise RowError('has no list of messages; give messages such as {"role", "content"}')
    return [_checked_message(message, number) for number, message in enumerate(given, start=1)]


def text_parts(message: Mapping[str, Any]) -> Iterator[str]:
    """What a checked message says in its content, part by part."""
    content: Any = message.get("content")
    for part in content if isinstance(content, list) else [{"text": content}]:
        if isinstance(text := part.get("text"), str):
            yield text


def end_of(message: Mapping[str, Any]) -> str:
    """A checked message's content as far as its end shows, without white space behind it."""
    return "".join(text_parts(message)).rstrip()


def _checked_message(message: Any, number: int) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise RowError(f"has no role in message {number}; give each message role and content")
    kept = {k: v for k, v in message.items() if k == "content" or not is_blank(v)}
    first, *others = [key for key in TRACES if key in kept] or [""]
    for key in others:
        if kept[key] == kept[first]:  # the same trace under another of its names
            del kept[key]
    for key in (*TRACES, "name"):
        if key in kept and not isinstance(kept[key], str):
            raise RowError(f"has a {key} in message {number} that is no text; write it as text")
    where = f"in message {number}"
    for key in ("tools", "functions", "documents"):
        if key in kept:
            kept[key] = checked_list(key, kept[key], where)
    if "tool_calls" in kept:
        calls = checked_list("tool_calls", kept["tool_calls"], where)
        kept["tool_calls"] = [_checked_call(call, "tool_calls", where) for call in calls]
    if "function_call" in kept:
        call = _unpacked("function_call", kept["function_call"], where)
        kept["function_call"] = _checked_call(call, "function_call", where)
    content = kept.get("content")
    if content is None:
        kept.pop("content", None)
        if not kept.keys() & {"tool_calls", "function_call", *TRACES}:
            raise RowError(f"has no content in message {number}; give it one, or take it out")
    elif isinstance(content, list):
        kept["content"] = [_checked_part(part, number) for part in content]
    elif not isinstance(content, str):
        raise RowError(f"has a content in message {number} that is no text; write it as text")
    return _without_repeats(kept, number)


def _without_repeats(message: Message, number: int) -> Message:
    """Without fields of other names that only repeat the content; the rest of these are words, to
    be looked for in what the template writes."""
    beside = {k: v for k, v in message.items() if k not in FIELDS and not is_note(k, v)}
    for key in beside:
        if key.lower() in MEDIA:
            raise RowError(
                f"has {key} in message {number}, which a text model does not see; say it in "
                "text, or take it out of the row"
            )
    content = message.get("content", "")
    text = content if isinstance(content, str) else "".join(part["text"] for part in content)
    repeats = [key for key in beside if first_unseen({key: beside[key]}, text) is None]
    return {key: value for key, value in message.items() if key not in repeats}


def _checked_part(part: Any, number: int) -> dict[str, Any]:
    text = part_text(part)
    if text is None:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        strange: str | None = f"a part of type {kind!r}"
    else:
        unseen = first_unseen({} if isinstance(part, str) else part, text)
        strange = unseen and f"{unseen} in a part"
    if text is None or strange:
        raise RowError(
            f"has {strange} in message {number}, which a text model does not see; "
            "say it in text, or take it out of the row"
        )
    return {"type": "text", "text": text}


def _checked_call(call: Any, key: str, where: str) -> dict[str, Any]:
    """A call: a name and arguments, in an object `function` or by themselves. The arguments are an
    object or a text."""
    own = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(own, dict) or not isinstance(own.get("name"), str):
        raise RowError(
            f"has {key} {where} that are no calls by name; give each call a name and arguments"
        )
    for item in (call, own):
        beside = {k: v for k, v in item.items() if k not in CALL_KEYS and not is_note(k, v)}
        for other in beside:
            raise RowError(
                f"has {other} in {key} {where}, which templates do not read; name the "
                "arguments of a call arguments, or take it out"
            )
    arguments = own.get("arguments", {})
    if not isinstance(arguments, (str, dict)) or (
        isinstance(arguments, str) and not arguments.strip()
    ):
        raise RowError(
            f"has arguments in {key} {where} that are no object; write them as an object, {{}} if "
            "there are none"
        )
    return call


def checked_list(key: str, value: Any, where: str = "") -> list[dict[str, Any]]:
    """Tools, documents or calls, which tables keep as a JSON text. Raises RowError."""
    value = _unpacked(key, value, where)
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise RowError(f"has {key} {where}".rstrip() + " that are no list of objects; correct them")
    return value


def _unpacked(key: str, value: Any, where: str) -> Any:
    if not isinstance(value, str):
        return value
    kind = "object" if key == "function_call" else "list"
    problem = f"has {key} {where}".rstrip() + f" that are no JSON {kind}"
    with library_boundary(problem, "correct them", RowError):
        return read_json(value)


# The forms of a conversation


def forms(talk: Talk) -> Iterator[Talk]:
    """A conversation in the ways that templates read one: every content as a text, or in parts;
    arguments of all calls as objects, or as JSON texts."""
    known: list[list[Message]] = []
    for in_parts in (False, True):
        for as_text in (False, True):
            messages = [_in_form(message, in_parts, as_text) for message in talk.messages]
            if messages not in known:
                known.append(messages)
                yield replace(talk, messages=messages)


def _in_form(message: Message, in_parts: bool, as_text: bool) -> Message:
    changed = dict(message)
    content = message.get("content")
    if isinstance(content, list) and not in_parts:
        changed["content"] = "".join(part["text"] for part in content)
    elif isinstance(content, str) and in_parts:
        changed["content"] = [{"type": "text", "text": content}]
    if "tool_calls" in message:
        changed["tool_calls"] = [_call_in_form(call, as_text) for call in message["tool_calls"]]
    if "function_call" in message:
        changed["function_call"] = _call_in_form(message["function_call"], as_text)
    return changed


def _call_in_form(call: dict[str, Any], as_text: bool) -> dict[str, Any]:
    changed = dict(call)
    if isinstance(call.get("function"), dict):
        changed["function"] = _call_in_form(call["function"], as_text)
    given = call.get("arguments")
    if isinstance(given, dict) and as_text:
        changed["arguments"] = json.dumps(given, ensure_ascii=False)
    elif isinstance(given, str) and not as_text:
        changed["arguments"] = _as_object(given)
    return changed


def _as_object(text: str) -> Any:
    """The object that a JSON text says; any other text, and one whose numbers no object holds,
    stays one."""
    with suppress(ValueError, RecursionError):
        value = read_json(text)
        json.dumps(value, allow_nan=False)
        return value if isinstance(value, dict) else text
    return text
