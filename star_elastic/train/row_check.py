"""Rows of a run's data read before hours are spent on them: all of them, or until each source has
something to teach; and what of them a tokenizer cannot write."""

from __future__ import annotations

import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from star_elastic.data.messages import checked_messages, end_of
from star_elastic.data.rendering import Document
from star_elastic.data.sources import Source
from star_elastic.data.words import ASSISTANT
from star_elastic.errors import CheckpointError, RowError, printable
from star_elastic.progress import Progress
from star_elastic.train.config import RunConfig
from star_elastic.train.fingerprint import spread

SHOWN = 20
"""Bad rows that are told one by one."""
TOLD_EVERY = 100
LONGEST_LOST = 40
"""Characters that are told of those that a tokenizer cannot write."""


@dataclass(slots=True)
class RowCheck:
    """What was found: rows in all, `bad` ones that cannot be read (what is wrong with the first
    SHOWN of them in `problems`), `tokens` that are fed and `counted` ones; and for every stage of
    the run, rows `cut` to its context and rows `left_out` because nothing in them counts. `idle`
    tells of sources that teach nothing in a stage; `warnings` of characters that their tokens do
    not say, and of prompts that generation writes otherwise."""

    rows: int = 0
    bad: int = 0
    problems: list[str] = field(default_factory=list)
    tokens: int = 0
    counted: int = 0
    cut: list[int] = field(default_factory=list)
    left_out: list[int] = field(default_factory=list)
    idle: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def is_sound(self) -> bool:
        """Whether no row is bad (also where bad rows are left out), and every source teaches."""
        return not self.bad and not self.idle

    def lines(self) -> list[str]:
        """The same, to read."""
        unshown = self.bad - len(self.problems)
        lines = [*self.problems, *([f"... and {unshown:,} more"] if unshown else [])]
        lines.append(
            f"{self.rows:,} rows, {self.bad:,} of them bad; {self.tokens:,} tokens, of which "
            f"{self.counted:,} count"
        )
        for number, (cut, left_out) in enumerate(zip(self.cut, self.left_out, strict=True)):
            lines.append(f"stages[{number}]: {cut:,} rows are cut, {left_out:,} teach nothing")
        return [*lines, *self.idle, *(f"warning: {line}" for line in self.warnings)]


def check_rows(
    config: RunConfig, sources: Sequence[Source], progress: Progress, ends: Collection[int]
) -> RowCheck:
    """Reads every row of every source as training reads it, whether bad rows stop the run or not.
    Nothing is written. `ends` are the token ids at which generation stops."""
    contexts = [stage.context for stage in config.stages]
    found = RowCheck(cut=[0] * len(contexts), left_out=[0] * len(contexts))
    progress.stage("rows", sum(map(len, sources)))
    for source in sources:
        lessons, remarks, lengths = [0] * len(contexts), _Remarks(source, ends), _Lengths()
        for row in range(len(source)):
            found.rows += 1
            try:
                document = source.document(row)
            except RowError as error:
                lengths.first_bad = lengths.first_bad or str(error)
                found.bad += 1
                if found.bad <= SHOWN:
                    found.problems.append(str(error))
                continue
            fed = len(document.fed)
            found.tokens += fed
            found.counted += max(fed - document.first, 0)
            for number, context in enumerate(contexts):
                teaches = document.teaches(context)
                found.cut[number] += fed > context
                found.left_out[number] += not teaches
                lessons[number] += teaches and not source.is_held_out(row)
            if not source.is_held_out(row):
                lengths.see(document)
            remarks.look(row, document)
            if found.rows % TOLD_EVERY == 0:
                progress.advance(found.rows)
        found.idle += [
            _idle(source, n, contexts[n], lengths) for n, count in enumerate(lessons) if not count
        ]
        found.warnings += remarks.lines()
    progress.advance(found.rows)
    return found


def require_lessons(config: RunConfig, sources: Sequence[Source], progress: Progress) -> None:
    """Raises CheckpointError unless every source has a row to learn from in every stage, RowError
    at a bad row before it, unless its source skips these. Mostly reads a row of each."""
    for source in sources:
        missing = {number: stage.context for number, stage in enumerate(config.stages)}
        lengths = _Lengths()
        for row in range(len(source)):
            if not missing:
                break
            if row and row % TOLD_EVERY == 0:
                if row == TOLD_EVERY:
                    progress.stage("rows", len(source))
                progress.advance(row)
            if source.is_held_out(row):
                continue
            try:
                document = source.document(row)
            except RowError as error:
                lengths.first_bad = lengths.first_bad or str(error)
                if source.skips_bad_rows:
                    continue
                raise
            lengths.see(document)
            missing = {n: c for n, c in missing.items() if not document.teaches(c)}
        if missing:
            raise CheckpointError(_idle(source, *next(iter(missing.items())), lengths))


def _idle(source: Source, stage: int, context: int, lengths: _Lengths) -> str:
    """Why a source teaches nothing in a stage, and what to do."""
    if not lengths.read:
        return (
            f"{source.name} has no row that can be read, bad ones left out (the first: "
            f"{lengths.first_bad}); correct the rows, or name others"
        )
    if not lengths.teaching:
        return (
            f"{source.name} has no row with a token to learn from, however long the context is: "
            "its texts or answers are empty; name other rows"
        )
    return (
        f"{source.name} has no row with a token to learn from within stages[{stage}].context="
        f"{context:,}; raise it, or name rows whose prompts are shorter"
    )


@dataclass(slots=True)
class _Lengths:
    """Of the rows of a source that are not held out: how many could be read, how many of these
    teach anything in a context of any length, and what is wrong with the first that could not."""

    read: int = 0
    teaching: int = 0
    first_bad: str = ""

    def see(self, document: Document) -> None:
        """Counts a row."""
        self.read += 1
        self.teaching += document.teaches(len(document.ids))


# What a tokenizer cannot write, and what generation does not


class _Remark(ABC):
    """What is to be told of rows of a source, counted, with the first of them."""

    def __init__(self, source: Source):
        self.source = source
        self.looked_at = self.count = 0
        self.first = ""

    def look(self, row: int, content: Mapping[str, Any], document: Document) -> None:
        """Looks at a row, what it says and its document."""
        self.looked_at += 1
        found = self.find(content, document)
        if found is not None:
            self.count += 1
            self.first = self.first or f"{found}{self.source.where(row)}"

    def lines(self) -> list[str]:
        """A line if there are any."""
        if not self.count:
            return []
        return [f"{self.count:,} of {self.looked_at:,} rows looked at {self.said()}"]

    @abstractmethod
    def find(self, content: Mapping[str, Any], document: Document) -> str | None:
        """What stands before the place of the first such row; None for a row that is none."""

    @abstractmethod
    def said(self) -> str:
        """What is so of these rows, and what to do."""


class _Lost(_Remark):
    """Rows with characters that are not in their documents."""

    def find(self, content: Mapping[str, Any], document: Document) -> str | None:
        lost = _folded(_texts(content)) - _folded([self.source.read(document)])
        return f"{printable(''.join(sorted(lost)), LONGEST_LOST)!r} in " if lost else None

    def said(self) -> str:
        return (
            f"have characters that their tokens do not say (the first, {self.first}): the "
            "tokenizer drops them or writes <unk>; take them out if they matter"
        )


class _Plain(_Remark):
    """Rows whose prompts are plain text though the tokenizer has a chat template."""

    def find(self, content: Mapping[str, Any], document: Document) -> str | None:
        return "" if self.source.has_template and "prompt" in content else None

    def said(self) -> str:
        return (
            f"are a prompt and a completion in plain text (the first, {self.first}), but the "
            "tokenizer has a chat template, which generation puts around every prompt; write them "
            "as messages unless they are to be read as they stand"
        )


class _Endless(_Remark):
    """Rows whose last turn ends in a token at which generation does not stop (`ends` are those at
    which it does)."""

    def __init__(self, source: Source, ends: Collection[int]):
        super().__init__(source)
        self.ends = ends
        self.token = ""

    def find(self, content: Mapping[str, Any], document: Document) -> str | None:
        if content.get("messages") is None:
            return None
        last, mark = checked_messages(content["messages"])[-1], self.source.last_mark(document)
        if last["role"] not in ASSISTANT or mark is None or mark in self.ends:
            return None
        name = self.source.name_of(mark)
        if end_of(last).endswith(name):  # the row's own word
            return None
        self.token = self.token or name
        return ""

    def said(self) -> str:
        return (
            f"end their last turn with {self.token} (the first, {self.first}), at which generation "
            "does not stop: add its id to eos_token_id in the parent's generation_config.json"
        )


class _Remarks:
    """All that is to be told of rows of a source; generation stops at the token ids `ends`."""

    def __init__(self, source: Source, ends: Collection[int]):
        self.source = source
        self.kinds = (_Lost(source), _Plain(source), _Endless(source, ends))

    def look(self, row: int, document: Document) -> None:
        """Looks at a row and its document."""
        content = self.source.content(row)
        for kind in self.kinds:
            kind.look(row, content, document)

    def lines(self) -> list[str]:
        """A line of each kind that there is."""
        return [line for kind in self.kinds for line in kind.lines()]


def warn_of_rows(source: Source, ends: Collection[int]) -> list[str]:
    """A line if rows of a source, of some that are looked at, have characters that the tokenizer
    cannot write; one if they are prompts that generation writes otherwise; and one if they end
    where generation, which stops at the token ids `ends`, does not."""
    remarks = _Remarks(source, ends)
    for row in spread(len(source)):
        try:
            document = source.document(row)
        except RowError:
            continue
        remarks.look(row, document)
    return remarks.lines()


def _texts(row: Mapping[str, Any]) -> Iterator[str]:
    """What a row says, but for what a template may write as JSON."""
    yield from (
        row[key] for key in ("text", "prompt", "completion") if isinstance(row.get(key), str)
    )
    messages = row.get("messages")
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if message.get("role") not in ("tool", "function") else ""
        if isinstance(content, str):
            yield content


def _folded(texts: Iterator[str] | Sequence[str]) -> set[str]:
    """The characters of some texts but white space, without what normalisers may take: case,
    accents, forms of one character."""
    characters = set().union(*texts)
    plain = unicodedata.normalize("NFKD", "".join(characters)).casefold()
    plain = unicodedata.normalize("NFKD", plain)
    return {c for c in plain if not c.isspace() and unicodedata.category(c)[0] not in "MC"}
