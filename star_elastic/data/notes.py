"""What a row may hold beside its words: notes, which no model needs to see.

Data sets name their columns as they like, so what holds words cannot be listed. What holds none
can: where a row comes from, what it is called, how it was rated. Any other text, list or object has
to stand in what the model sees.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

NOTES = frozenset((
    "id", "ids", "idx", "index", "uid", "uuid", "guid", "hash", "md5", "sha1", "sha256", "digest",
    "source", "sources", "origin", "url", "urls", "uri", "link", "links", "href", "dataset",
    "datasets", "dataset_name", "subset", "split", "config", "dump", "file", "filename",
    "file_name", "filepath", "repo", "repository", "repo_name", "path", "domain", "doi", "title",
    "language", "languages", "lang", "langs", "locale", "license", "licence", "copyright",
    "author", "authors", "category", "categories", "subcategory", "type", "kind", "task", "tasks",
    "task_name", "topic", "topics", "tag", "tags", "genre", "format", "difficulty", "level",
    "quality", "score", "scores", "rating", "ratings", "reward", "rewards", "rank", "labels",
    "emojis", "detoxify", "metrics", "stats", "statistics", "generator", "model", "models",
    "model_name", "version", "revision", "date", "time", "datetime", "timestamp", "created",
    "updated", "added", "year", "used_in_training", "role", "from", "metadata", "meta",
    "attributes", "annotations", "extra_info", "cache_control",
))  # fmt: skip
"""Names of notes, in small letters with underscores."""
ENDS = (
    "_id", "_ids", "_idx", "_index", "_uuid", "_hash", "_url", "_urls", "_uri", "_link", "_path",
    "_file", "_source", "_dataset", "_subset", "_split", "_lang", "_language", "_license", "_score",
    "_scores", "_rating", "_model", "_version", "_date", "_time", "_timestamp", "_at", "_type",
    "_category", "_state", "_count", "_length", "_tokens",
)  # fmt: skip
"""How names of notes end."""
MEDIA = frozenset(["image", "images", "audio", "audios", "video", "videos"])
"""What a text model cannot see, whatever it is."""
_CAPITAL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_SWITCH = re.compile("on|off|auto")
_DAY = re.compile(r"\d{4}-\d\d-\d\d([T ]\d\d:\d\d(:\d\d)?\S*)?")


def is_blank(value: Any) -> bool:
    """Whether a value says nothing: None, or an empty text, list or object."""
    return value is None or (isinstance(value, (str, list, dict)) and not value)


def is_note(key: str, value: Any) -> bool:
    """Whether a key need not be seen: its value is blank, a number, a truth value, a day, or `on`
    or `off`, or its name says so."""
    if is_blank(value) or not isinstance(value, (str, list, dict)):
        return True
    name = _CAPITAL.sub("_", key).replace("-", "_").lower()
    if name in MEDIA:
        return False
    if isinstance(value, str) and (_SWITCH.fullmatch(value) or _DAY.fullmatch(value)):
        return True
    return name in NOTES or name.endswith(ENDS)


def words_of(value: Any) -> Iterator[str]:
    """Every text of a value but its notes."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from words_of(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            if not is_note(key, item):
                yield from words_of(item)


def first_unseen(beside: Mapping[str, Any], written: str) -> str | None:
    """The first key that is no note and whose words do not all stand in what was written, as whole
    words and whatever the white space between them; None if there is none."""
    left = {key: value for key, value in beside.items() if not is_note(key, value)}
    if not left:
        return None
    spaced = " ".join(written.split())
    for key, value in left.items():
        if key.lower() in MEDIA or not all(_stands_in(text, spaced) for text in words_of(value)):
            return key
    return None


def _stands_in(text: str, spaced: str) -> bool:
    words = " ".join(text.split())
    place = spaced.find(words)
    while words and place >= 0:
        before, after = spaced[:place][-1:], spaced[place + len(words) :][:1]
        if not (_joins(before, words[0]) or _joins(words[-1], after)):
            return True
        place = spaced.find(words, place + 1)
    return not words


def _joins(left: str, right: str) -> bool:
    """Whether two neighbouring characters belong to one word."""
    return left.isalnum() and right.isalnum()
