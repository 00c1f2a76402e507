"""Rows of local data by number: JSONL files, saved Hugging Face datasets, parquet files.

Rows are found by number and read when they are asked for; no data is loaded whole and nothing
reaches a hub. `rendering.py` makes documents of them; this file knows nothing of what a row says,
nor of how training packs documents.
"""

from __future__ import annotations

import bisect
import copy
import hashlib
import importlib
import itertools
import json
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from star_elastic.errors import CheckpointError, ConfigError, RowError, library_boundary
from star_elastic.train.config import SourceConfig
from star_elastic.train.json_text import read_json
from star_elastic.train.rendering import Document, LossOn, Renderer

LENGTH_STEP = 16
"""Padded batches have multiples of this many tokens: kernels are kept for every new shape."""

MOST_HELD_OUT = 10
"""At most one of so many rows is held out."""

KEPT_ROWS = 1 << 20
"""Shuffled row numbers kept per source, or three epochs if these are longer."""


class Rows(Protocol):
    """Rows of one file or directory by number."""

    path: Path

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> dict[str, Any]:
        """A row. Raises RowError, naming it, if it is damaged."""
        ...

    def raw(self, row: int) -> bytes:
        """A row as it is stored, to be told from another."""
        ...

    def where(self, row: int) -> str:
        """The file and the place of a row in it, for messages."""
        ...


class JsonLines:
    """Rows of a JSONL file: one byte offset per row in memory."""

    def __init__(self, path: Path):
        self.path = path
        self._offsets = array("Q")
        offset = 0
        with self._reading(), open(path, "rb") as stream:
            for line in stream:
                if line.strip():
                    self._offsets.append(offset)
                offset += len(line)

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, row: int) -> dict[str, Any]:
        line = self.raw(row)
        try:
            # json itself raises many kinds: broken bytes, numbers and brackets without end.
            with library_boundary("is not valid JSON", "correct the line", RowError):
                content = read_json(line)
            if not isinstance(content, dict):
                raise RowError("is not a JSON object; correct the line")
        except RowError as error:
            raise error.at(self.where(row)) from None
        return content

    def raw(self, row: int) -> bytes:
        """The line."""
        with self._reading(), open(self.path, "rb") as stream:
            stream.seek(self._offsets[row])
            return stream.readline().strip()

    def _reading(self) -> AbstractContextManager[None]:
        return library_boundary(f"{self.path} cannot be read", "restore the file")

    def where(self, row: int) -> str:
        """The file and the line of a row, counted from 1."""
        left, lines = self._offsets[row], 1
        with open(self.path, "rb") as stream:
            while left:
                part = stream.read(min(left, 1 << 20))
                lines += part.count(b"\n")
                left -= len(part)
        return f"{self.path} line {lines}"


class Table:
    """Rows of a directory that `datasets.Dataset.save_to_disk` wrote, or of a parquet file.

    The package `datasets` maps them from disk; it unpacks a parquet file into its cache once.
    """

    def __init__(self, path: Path):
        self.path = path
        if (path / "dataset_dict.json").is_file():
            splits = sorted(p.parent.name for p in path.glob("*/state.json")) or ["train"]
            raise ConfigError(
                f"{path} holds the splits {', '.join(splits)}; name one, as {path / splits[0]}"
            )
        if path.is_dir() and not (path / "state.json").is_file():
            raise ConfigError(
                f"{path} holds no dataset; name what save_to_disk wrote, or JSONL or parquet files"
            )
        try:
            datasets: Any = importlib.import_module("datasets")
        except ImportError:
            raise ConfigError(
                f"{path} needs the package datasets; run pip install 'star-elastic[datasets]'"
            ) from None
        with library_boundary(f"{path} cannot be read", "write it again"):
            read = datasets.load_from_disk if path.is_dir() else datasets.Dataset.from_parquet
            self._rows: Any = read(str(path))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        """The row's columns that have a value (tables fill up with None)."""
        problem = f"{self.where(row)} cannot be read"
        with library_boundary(problem, "write the data again", RowError):
            return _without_none(self._rows[row])

    def raw(self, row: int) -> bytes:
        """The row as a JSON text."""
        return json.dumps(self[row], default=str, sort_keys=True).encode()

    def where(self, row: int) -> str:
        """The path and the number of a row, counted from 0."""
        return f"{self.path} row {row}"


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(v) for key, v in value.items() if v is not None}
    return [_without_none(v) for v in value] if isinstance(value, list) else value


def open_rows(path: str | Path) -> Rows:
    """Rows of a JSONL file, a parquet file or a saved dataset. Raises ConfigError if there is no
    such thing, CheckpointError if it is damaged."""
    path = Path(path)
    if path.is_dir() or (path.is_file() and path.suffix == ".parquet"):
        return Table(path)
    if not path.is_file():
        raise ConfigError(f"{path} does not exist; name an existing JSONL file or dataset")
    return JsonLines(path)


class Source:
    """The rows of some files, one file after the other, as documents.

    A row is `{"text"}`, `{"prompt", "completion"}` or `{"messages"}` (through the chat template);
    `loss_on` and `num_embeddings` as in `Renderer`. `bad_rows`: whether a row that cannot be read
    stops a run or is left out of it. Raises ConfigError if the files hold no rows.
    """

    def __init__(
        self,
        files: Sequence[str | Path],
        tokenizer: PreTrainedTokenizerBase,
        loss_on: LossOn = "all",
        *,
        num_embeddings: int | None = None,
        bad_rows: Literal["stop", "skip"] = "stop",
    ):
        self.name = ", ".join(map(str, files))
        self.skips_bad_rows = bad_rows == "skip"
        self._renderer = Renderer(tokenizer, loss_on, num_embeddings)
        self.pad_id = 0
        pad = tokenizer.pad_token_id
        # What stands there is never learned from; but it must have an embedding.
        if isinstance(pad, int) and 0 <= pad < (num_embeddings or pad + 1):
            self.pad_id = pad
        self.parts = [open_rows(file) for file in files]
        self._ends = list(itertools.accumulate(len(part) for part in self.parts))
        if not self.parts or not self._ends[-1]:
            raise ConfigError(f"{self.name or 'a source'} has no rows; name files that hold some")
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

    def raw(self, row: int) -> bytes:
        """A row as it is stored."""
        rows, within = self._find(row)
        return rows.raw(within)

    def document(self, row: int) -> Document:
        """A row's document, uncut. Raises RowError, naming the row, if it cannot be read as it was
        written."""
        rows, within = self._find(row)
        content = rows[within]
        try:
            return self._renderer.document(content)
        except RowError as error:
            raise error.at(rows.where(within)) from error


def open_sources(
    data: Sequence[SourceConfig],
    tokenizer: PreTrainedTokenizerBase,
    num_embeddings: int,
    seed: int = 0,
) -> list[Source]:
    """The sources of a run config, for a model with so many embedding rows; `seed` decides which
    rows are held out."""
    return [
        Source(
            source.files, tokenizer, source.loss_on,
            num_embeddings=num_embeddings, bad_rows=source.bad_rows,
        ).hold_out(source.held_out, epochs_key(seed, 0, number))
        for number, source in enumerate(data)
    ]  # fmt: skip


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
        self._orders: OrderedDict[int, np.ndarray] = OrderedDict()

    def row(self, place: int) -> int:
        """The row at a place of the sequence."""
        epoch, within = divmod(place, self.size)
        if epoch not in self._orders:
            digest = hashlib.sha256(f"{self.key}/{epoch}".encode()).digest()
            bits = np.random.Philox(key=int.from_bytes(digest[:16], "big"))
            self._orders[epoch] = np.random.Generator(bits).permutation(self.size)
            # Many epochs are in use at once only if they are short.
            while len(self._orders) > max(3, KEPT_ROWS // self.size):
                self._orders.popitem(last=False)
        self._orders.move_to_end(epoch)
        return int(self._orders[epoch][within])


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
        read[number] += 1
        if sources[number].is_held_out(read[number] - 1):
            continue
        try:
            document = sources[number].document(read[number] - 1)
        except RowError:
            if sources[number].skips_bad_rows:
                continue
            raise
        if document.fed:
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
