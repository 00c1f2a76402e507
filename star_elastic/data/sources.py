"""Sources of a run: the rows of some files as documents, shuffled, held out, in padded batches.

`row_files.py` finds rows by number and `rendering.py` makes documents of them; this file knows
nothing of what a row says, nor of how training packs documents.
"""

from __future__ import annotations

import bisect
import copy
import hashlib
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from star_elastic.data.rendering import Document, LossOn, Renderer
from star_elastic.data.row_files import Rows, open_rows
from star_elastic.data.row_kinds import find_files
from star_elastic.data.source_config import SourceConfig
from star_elastic.errors import CheckpointError, ConfigError, RowError
from star_elastic.recent import Recent

LENGTH_STEP = 16
"""Padded batches have multiples of this many tokens: kernels are kept for every new shape."""

MAX_TOKENS, MAX_CONTEXT = 8192, 1024
"""Of the held-out rows, what each model reads at most, in all and of one row."""
MOST_HELD_OUT = 10
"""At most one of so many rows is held out."""

KEPT_TOKENS = 1 << 18
"""Of the documents kept per source: some ten megabytes."""

KEPT_ROWS = 1 << 20
"""Shuffled row numbers kept per source, or three epochs if these are longer."""


class Source:
    """The rows of some files, one file after the other, as documents; a name may be a pattern, or a
    directory of files. `begun`: what the files were when a run began, as `open_rows` takes it.

    A row is `{"text"}`, `{"prompt", "completion"}` or `{"messages"}` (through the chat template);
    `loss_on`, `num_embeddings` and `notes` as in `Renderer`. `bad_rows`: whether a row that cannot
    be read stops a run or is left out of it. Raises ConfigError if the files hold no rows.
    """

    def __init__(
        self,
        files: Sequence[str | Path],
        tokenizer: PreTrainedTokenizerBase,
        loss_on: LossOn = "all",
        *,
        num_embeddings: int | None = None,
        bad_rows: Literal["stop", "skip"] = "stop",
        notes: Sequence[str] = (),
        begun: Sequence[Mapping[str, Any]] = (),
    ):
        self.name = ", ".join(map(str, files))
        found = {str(name): find_files(name) for name in files}
        self.found = [_told(name, of) for name, of in found.items() if of != [Path(name)]]
        """What a pattern or a directory stands for, as lines to tell."""
        self.skips_bad_rows = bad_rows == "skip"
        self.tokenizer = tokenizer
        self._renderer = Renderer(tokenizer, loss_on, num_embeddings, notes)
        self.pad_id = 0
        pad = tokenizer.pad_token_id
        # What stands there is never learned from; but it must have an embedding.
        if isinstance(pad, int) and 0 <= pad < (num_embeddings or pad + 1):
            self.pad_id = pad
        paths = [path for name in files for path in found[str(name)]]
        as_begun = begun if len(begun) == len(paths) else [None] * len(paths)
        self.parts = [open_rows(*pair) for pair in zip(paths, as_begun, strict=True)]
        self._ends = list(itertools.accumulate(len(part) for part in self.parts))
        if not self.parts or not self._ends[-1]:
            raise ConfigError(f"{self.name or 'a source'} has no rows; name files that hold some")
        # Of a small source all: it is rendered once, however many epochs it is read for.
        self._kept: Recent[int, Document] = Recent(KEPT_TOKENS, lambda own: len(own.ids))
        self.held_out: tuple[int, ...] = ()
        self._held_out: frozenset[int] = frozenset()

    def __len__(self) -> int:
        return self._ends[-1]

    def hold_out(self, count: int, key: str) -> Source:
        """The same rows, of which `count` are held out: nothing is trained or calibrated on them.

        They are the last rows of the first epoch of `ShuffledEpochs(len(self), key)`, which so goes
        on as if there were none; at most one of `MOST_HELD_OUT` rows.
        """
        count = min(count, len(self) // MOST_HELD_OUT)
        order = ShuffledEpochs(len(self), key)
        other = copy.copy(self)
        other.held_out = tuple(order.row(place) for place in range(len(self) - count, len(self)))
        other._held_out = frozenset(other.held_out)
        return other

    def is_held_out(self, row: int) -> bool:
        """Whether a row is kept from training and calibration."""
        return row in self._held_out

    @property
    def num_used(self) -> int:
        """Rows that are not held out."""
        return len(self) - len(self.held_out)

    def _find(self, row: int) -> tuple[Rows, int]:
        """The file that holds a row, and the row's number in it."""
        assert 0 <= row < len(self), (row, len(self))
        number = bisect.bisect_right(self._ends, row)
        return self.parts[number], row - (self._ends[number] - len(self.parts[number]))

    def where(self, row: int) -> str:
        """The file and the place of a row in it, for messages."""
        rows, within = self._find(row)
        return rows.where(within)

    def content(self, row: int) -> dict[str, Any]:
        """What a row says. Raises RowError, naming the row, if it is damaged."""
        rows, within = self._find(row)
        return rows[within]

    def read(self, document: Document) -> str:
        """What a document says, in words."""
        return str(self.tokenizer.decode(document.ids, clean_up_tokenization_spaces=False))

    def document(self, row: int) -> Document:
        """A row's document, uncut. Raises RowError, naming the row, if it cannot be read as it was
        written."""
        return self._kept.fetch(row, lambda: self._render(row))

    def readable(self, row: int) -> Document | None:
        """The same, or None for a row that cannot be read, if such rows are left out."""
        try:
            return self.document(row)
        except RowError:
            if not self.skips_bad_rows:
                raise
            return None

    def _render(self, row: int) -> Document:
        rows, within = self._find(row)
        content = rows[within]
        try:
            return self._renderer.document(content)
        except RowError as error:
            raise error.at(rows.where(within)) from error


def _told(name: str, found: Sequence[Path]) -> str:
    count = "1 file" if len(found) == 1 else f"{len(found):,} files"
    ends = " to ".join(dict.fromkeys(path.name for path in (found[0], found[-1])))
    return f"{name}: {count}, {ends}"


def open_sources(
    data: Sequence[SourceConfig],
    tokenizer: PreTrainedTokenizerBase,
    num_embeddings: int,
    seed: int = 0,
    begun: Sequence[Sequence[Mapping[str, Any]]] = (),
) -> list[Source]:
    """The sources of a run config, for a model with so many embedding rows; `seed` decides which
    rows are held out. `begun`: of each source, what its files were when the run began.

    Raises ConfigError for a file that is named twice, unless no row of it is held out: under one
    name these would be trained on, under the other they judge.
    """
    as_begun = begun if len(begun) == len(data) else [()] * len(data)
    sources: list[Source] = []
    seen: dict[str, int] = {}
    for number, (own, files) in enumerate(zip(data, as_begun, strict=True)):
        source = Source(
            own.files, tokenizer, own.loss_on, num_embeddings=num_embeddings,
            bad_rows=own.bad_rows, notes=own.notes, begun=files,
        )  # fmt: skip
        for rows in source.parts:
            real = os.path.realpath(rows.path)
            if real in seen and (own.held_out or seen[real]):
                raise ConfigError(
                    f"{rows.path} is named twice in [[data]], so that rows that are held out would "
                    "be trained on, too; name it once (weight says how much of it is read), or set "
                    "held_out = 0 where it is named"
                )
            seen[real] = own.held_out
        sources.append(source.hold_out(own.held_out, epochs_key(seed, 0, number)))
    return sources


def epochs_key(seed: int, stage: int, source: int) -> str:
    """The key of the shuffles of a source in a stage of a run."""
    return f"{seed}/{stage}/{source}"


class ShuffledEpochs:
    """The rows of a source in an endless sequence of epochs, each in an order of its own.

    The order of an epoch depends on `size`, `key` and its number alone.
    """

    def __init__(self, size: int, key: str):
        self.size = size
        self.key = key
        # Many epochs are in use at once only if they are short.
        self._orders: Recent[int, np.ndarray] = Recent(max(3, KEPT_ROWS // size))

    def row(self, place: int) -> int:
        """The row at a place of the sequence."""
        epoch, within = divmod(place, self.size)
        return int(self._orders.fetch(epoch, lambda: self._shuffled(epoch))[within])

    def _shuffled(self, epoch: int) -> np.ndarray:
        digest = hashlib.sha256(f"{self.key}/{epoch}".encode()).digest()
        bits = np.random.Philox(key=int.from_bytes(digest[:16], "big"))
        return np.random.Generator(bits).permutation(self.size)


@dataclass(frozen=True, slots=True)
class Batch:
    """Whole documents, one a row: token ids (B, T), padded on the right, and `attention_mask`
    (B, T), 1 at real tokens."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor

    @property
    def num_tokens(self) -> int:
        """Real tokens."""
        return int(self.attention_mask.sum())


def first_documents(
    sources: Sequence[Source], weights: Sequence[float], num_samples: int
) -> Iterator[Document]:
    """The first documents of the sources that hold tokens and are not held out; `num_samples` in
    all, or as many as there are. The sources take turns by weight, in rows.

    Raises CheckpointError if there is none, RowError at a bad row unless its source skips these.
    """
    assert len(sources) == len(weights) and min(weights) > 0, (len(sources), weights)
    read, used = [0] * len(sources), [0] * len(sources)
    while sum(used) < num_samples:
        left = [n for n, source in enumerate(sources) if read[n] < len(source)]
        if not left:
            break
        number = min(left, key=lambda n: (used[n] + 1) / weights[n])
        row, read[number] = read[number], read[number] + 1
        if sources[number].is_held_out(row):
            continue
        document = sources[number].readable(row)
        if document is not None and document.fed:
            used[number] += 1
            yield document
    if not sum(used):
        names = ", ".join(source.name for source in sources)
        raise CheckpointError(f"{names} has no row with a token to read; name rows with text")


def calibration_batches(
    sources: Sequence[Source],
    weights: Sequence[float],
    *,
    num_samples: int,
    batch_size: int,
    context: int,
) -> Iterator[Batch]:
    """The first documents of the sources as a model reads them, cut to `context` tokens. Importance
    is a sum over rows, so sources mix by rows. Raises as `first_documents`."""
    documents = first_documents(sources, weights, num_samples)
    while part := list(itertools.islice(documents, batch_size)):
        yield padded_batch(part, context, sources[0].pad_id)


def padded_batch(documents: Sequence[Document], context: int, pad_id: int) -> Batch:
    """The first `context` tokens that a model reads of each document, as one right-padded batch."""
    cut = [document.fed[:context] for document in documents]
    length = max(1, *map(len, cut))
    length = -(-length // LENGTH_STEP) * LENGTH_STEP
    input_ids = torch.full((len(cut), length), pad_id, dtype=torch.long)
    attention_mask = torch.zeros(len(cut), length, dtype=torch.long)
    for number, ids in enumerate(cut):
        input_ids[number, : len(ids)] = torch.tensor(ids, dtype=torch.long)
        attention_mask[number, : len(ids)] = 1
    return Batch(input_ids, attention_mask)


def held_out_documents(sources: Sequence[Source], context: int) -> list[Document]:
    """The held-out rows of sources in turn, cut to `context` tokens (`MAX_CONTEXT` at most), as
    many as have `MAX_TOKENS` together. Raises RowError for one that cannot be read, unless its
    source skips such rows."""
    return shorten(_in_turn(sources), MAX_TOKENS, min(context, MAX_CONTEXT))


def _in_turn(sources: Sequence[Source]) -> Iterator[Document]:
    for turn in itertools.zip_longest(*(source.held_out for source in sources)):
        for source, row in zip(sources, turn, strict=True):
            document = None if row is None else source.readable(row)
            if document is not None:
                yield document


def shorten(documents: Iterable[Document], max_tokens: int, context: int) -> list[Document]:
    """Documents cut to `context` tokens, as many as have at most `max_tokens` together (at least
    one); those in which nothing is left to count do not come along."""
    found: list[Document] = []
    left = max_tokens
    for document in documents:
        if not document.teaches(context):
            continue
        ids = document.ids[: context + 1]
        if found and len(ids) > left:
            break
        found.append(Document(ids, document.first))
        left -= len(ids)
    return found
