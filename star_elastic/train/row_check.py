"""Rows of a run's data read before hours are spent on them: all of them, or until each source has
something to teach; and what of them a tokenizer cannot write."""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from star_elastic.data.messages import checked_messages, end_of
from star_elastic.data.rendering import Document
from star_elastic.data.sources import Source
from star_elastic.data.words import ASSISTANT
from star_elastic.errors import CheckpointError, RowError, printable
from star_elastic.progress import Progress
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

    def require_sound(self) -> None:
        """Raises CheckpointError unless `is_sound`: how many rows are bad, and the first of them;
        or what teaches nothing."""
        if self.bad:
            raise CheckpointError(
                f"{self.bad:,} of {self.rows:,} rows cannot be read (the first: "
                f"{self.problems[0]}); correct them or take them out"
            )
        for line in self.idle:
            raise CheckpointError(line)

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
    sources: Sequence[Source], contexts: Sequence[int], progress: Progress, ends: Collection[int]
) -> RowCheck:
    """Reads every row of every source as training reads it, whether bad rows stop the run or not.

    `contexts` are those of the run's stages, `ends` the token ids at which generation stops.
    Nothing is written.
    """
    found = RowCheck(cut=[0] * len(contexts), left_out=[0] * len(contexts))
    progress.stage("rows", sum(map(len, sources)))
    for source in sources:
        lessons, remarks = _Lessons(source, dict(enumerate(contexts))), _Remarks(source, ends)
        for row in range(len(source)):
            found.rows += 1
            try:
                document = lessons.read(row)
            except RowError as error:
                found.bad += 1
                if found.bad <= SHOWN:
                    found.problems.append(str(error))
                continue
            fed = len(document.fed)
            found.tokens += fed
            found.counted += max(fed - document.first, 0)
            for number, context in enumerate(contexts):
                found.cut[number] += fed > context
                found.left_out[number] += not document.teaches(context)
            remarks.look(row, document)
            if found.rows % TOLD_EVERY == 0:
                progress.advance(found.rows)
        found.idle += lessons.idle()
        found.warnings += remarks.lines()
    progress.advance(found.rows)
    return found


def require_lessons(
    sources: Sequence[Source], contexts: Mapping[int, int], progress: Progress
) -> None:
    """Raises CheckpointError unless every source has a row to learn from within the context of
    every stage (by its number); RowError at a bad row before it, unless its source skips these.
    Mostly reads a row of each."""
    for source in sources:
        lessons = _Lessons(source, contexts)
        for row in range(len(source)):
            if not lessons.missing:
                break
            if row and row % TOLD_EVERY == 0:
                if row == TOLD_EVERY:
                    progress.stage("rows", len(source))
                progress.advance(row)
            if source.is_held_out(row):
                continue
            try:
                lessons.read(row)
            except RowError:
                if not source.skips_bad_rows:
                    raise
        for line in lessons.idle():
            raise CheckpointError(line)


class _Lessons:
    """What a source has to learn from. `missing` are the contexts, by stage, in which none of the
    rows read so far teaches anything; rows that are held out do not count."""

    def __init__(self, source: Source, contexts: Mapping[int, int]):
        self.source, self.missing = source, dict(contexts)
        self.num_read = self.num_teaching = 0
        self.first_bad = ""

    def read(self, row: int) -> Document:
        """A row's document, taken note of. Raises RowError for one that cannot be read."""
        try:
            document = self.source.document(row)
        except RowError as error:
            self.first_bad = self.first_bad or str(error)
            raise
        if not self.source.is_held_out(row):
            self.num_read += 1
            self.num_teaching += document.teaches(len(document.ids))
            self.missing = {n: c for n, c in self.missing.items() if not document.teaches(c)}
        return document

    def idle(self) -> list[str]:
        """Why nothing is taught in a stage, and what to do; a line for each such stage."""
        name = self.source.name
        if not self.num_read:
            why = (
                f"{name} has no row that can be read, bad ones left out (the first: "
                f"{self.first_bad}); correct the rows, or name others"
            )
        elif not self.num_teaching:
            why = (
                f"{name} has no row with a token to learn from, however long the context is: "
                "its texts or answers are empty; name other rows"
            )
        else:
            return [
                f"{name} has no row with a token to learn from within stages[{stage}].context="
                f"{context:,}; raise it, or name rows whose prompts are shorter"
                for stage, context in self.missing.items()
            ]
        return [why] * len(self.missing)


# What a tokenizer cannot write, and what generation does not

LOST = (
    "have characters that their tokens do not say (the first, {what!r} in {where}): the tokenizer "
    "drops them or writes <unk>; take them out if they matter"
)
PLAIN = (
    "are a prompt and a completion in plain text (the first, {where}), but the tokenizer has a "
    "chat template, which generation puts around every prompt; write them as messages unless they "
    "are to be read as they stand"
)
ENDLESS = (
    "end their last turn with {what} (the first, {where}), at which generation does not stop: add "
    "its id to eos_token_id in the parent's generation_config.json"
)


class _Remarks:
    """What is to be told of rows of a source, each kind of it counted, with the first such row.
    Generation stops at the token ids `ends`."""

    def __init__(self, source: Source, ends: Collection[int]):
        self.source, self.ends = source, ends
        added = source.tokenizer.added_tokens_decoder
        self.special = {number for number, token in added.items() if token.special}
        self.looked_at = 0
        self.counts: dict[str, int] = dict.fromkeys((LOST, PLAIN, ENDLESS), 0)
        self.told: dict[str, str] = {}

    def look(self, row: int, document: Document) -> None:
        """Looks at a row and its document."""
        self.looked_at += 1
        content = self.source.content(row)
        for kind, what in (
            (LOST, self._lost(content, document)),
            (PLAIN, "prompt" in content and self.source.tokenizer.chat_template is not None),
            (ENDLESS, self._endless(content, document)),
        ):
            if what:
                if not self.counts[kind]:
                    self.told[kind] = kind.format(what=what, where=self.source.where(row))
                self.counts[kind] += 1

    def lines(self) -> list[str]:
        """A line of each kind that there is."""
        return [
            f"{count:,} of {self.looked_at:,} rows looked at {self.told[kind]}"
            for kind, count in self.counts.items()
            if count
        ]

    def _lost(self, content: Mapping[str, Any], document: Document) -> str:
        """Characters that are not in a row's document."""
        lost = _folded(_texts(content)) - _folded([self.source.read(document)])
        return printable("".join(sorted(lost)), LONGEST_LOST)

    def _endless(self, content: Mapping[str, Any], document: Document) -> str:
        """The token that ends the last turn of a row, if generation does not stop at it."""
        if content.get("messages") is None:
            return ""
        tokenizer, last = self.source.tokenizer, checked_messages(content["messages"])[-1]
        words = (token for token in reversed(document.ids) if not self._is_space(token))
        mark = next(words, None)  # the last token, white space apart
        if last["role"] not in ASSISTANT or mark not in self.special or mark in self.ends:
            return ""
        name = str(tokenizer.convert_ids_to_tokens(mark))
        return "" if end_of(last).endswith(name) else name  # that would be the row's own word

    def _is_space(self, token: int) -> bool:
        is_special = token in self.special
        return not is_special and not str(self.source.tokenizer.decode([token])).strip()


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


def _folded(texts: Iterable[str]) -> set[str]:
    """The characters of some texts but white space, without what normalisers may take: case,
    accents, forms of one character."""
    characters = set().union(*texts)
    plain = unicodedata.normalize("NFKD", "".join(characters)).casefold()
    plain = unicodedata.normalize("NFKD", plain)
    return {c for c in plain if not c.isspace() and unicodedata.category(c)[0] not in "MC"}
