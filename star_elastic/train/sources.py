"""Rows of local data as token ids: JSONL files, saved Hugging Face datasets, parquet files.

Rows are found by number and read when they are asked for; no data is loaded whole and nothing
reaches a hub. This file knows nothing of how training packs documents.
"""

from __future__ import annotations

import bisect
import hashlib
import importlib
import itertools
import json
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from star_elastic.errors import CheckpointError, ConfigError, reason

LENGTH_STEP = 16
"""Padded batches have multiples of this many tokens: kernels are kept for every new shape."""

KEPT_ROWS = 1 << 20
"""Shuffled row numbers kept per source, or three epochs if these are longer."""


@dataclass(frozen=True, slots=True)
class Document:
    """A tokenised row: its `ids`, and `first`, the first position whose next token counts in the
    loss (all later ones but the last count, too)."""

    ids: list[int]
    first: int


class Rows(Protocol):
    """Rows of one file or directory by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> dict[str, Any]: ...

    def where(self, row: int) -> str:
        """The file and the place of a row in it, for messages."""
        ...


class JsonLines:
    """Rows of a JSONL file: one byte offset per row in memory."""

    def __init__(self, file: Path):
        self.file = file
        self._offsets = array("Q")
        offset = 0
        with open(file, "rb") as stream:
            for line in stream:
                if line.strip():
                    self._offsets.append(offset)
                offset += len(line)

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, row: int) -> dict[str, Any]:
        with open(self.file, "rb") as stream:
            stream.seek(self._offsets[row])
            line = stream.readline()
        try:
            content = json.loads(line)
        except ValueError:
            raise CheckpointError(
                f"{self.where(row)} is not valid JSON; correct or remove the line"
            ) from None
        if not isinstance(content, dict):
            raise CheckpointError(
                f"{self.where(row)} is not a JSON object; correct or remove the line"
            )
        return content

    def where(self, row: int) -> str:
        """The file and the line of a row, counted from 1."""
        left, lines = self._offsets[row], 1
        with open(self.file, "rb") as stream:
            while left:
                part = stream.read(min(left, 1 << 20))
                lines += part.count(b"\n")
                left -= len(part)
        return f"{self.file} line {lines}"


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
        try:
            read = datasets.load_from_disk if path.is_dir() else datasets.Dataset.from_parquet
            self._rows: Any = read(str(path))
        except Exception as error:  # whatever a damaged file makes pyarrow raise
            raise CheckpointError(
                f"{path} cannot be read ({reason(error)}); write it again"
            ) from None

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        """The row's columns that have a value (tables fill up with None)."""
        return _without_none(self._rows[row])

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

    A row is `{"text"}`, `{"prompt", "completion"}` or `{"messages"}` (through the chat template).
    With `loss_on="answers"` the completion, or the last message, counts; a text counts whole.
    Raises ConfigError if the files hold no rows.
    """

    def __init__(
        self,
        files: Sequence[str | Path],
        tokenizer: PreTrainedTokenizerBase,
        loss_on: Literal["all", "answers"] = "all",
    ):
        self.name = ", ".join(map(str, files))
        self.tokenizer = tokenizer
        self.loss_on = loss_on
        pad = tokenizer.pad_token_id
        self.pad_id = pad if isinstance(pad, int) else 0  # what stands there is never learned from
        self._parts = [open_rows(file) for file in files]
        self._ends = list(itertools.accumulate(len(part) for part in self._parts))
        if not self._parts or not self._ends[-1]:
            raise ConfigError(f"{self.name or 'a source'} has no rows; name files that hold some")

    def __len__(self) -> int:
        return self._ends[-1]

    def _find(self, row: int) -> tuple[Rows, int]:
        """The file that holds a row, and the row's number in it."""
        assert 0 <= row < len(self), (row, len(self))
        number = bisect.bisect_right(self._ends, row)
        return self._parts[number], row - (self._ends[number] - len(self._parts[number]))

    def where(self, row: int) -> str:
        """The file and the place of a row in it, for messages."""
        rows, within = self._find(row)
        return rows.where(within)

    def document(self, row: int) -> Document:
        """A row's token ids, uncut. Raises CheckpointError, naming the row, if it has no text."""
        rows, within = self._find(row)
        content = rows[within]
        if "text" in content:
            prompt, completion = "", content["text"]
        elif "prompt" in content and "completion" in content:
            prompt, completion = content["prompt"], content["completion"]
        elif "messages" in content:
            prompt, completion = self._render(row, content["messages"])
        else:
            raise CheckpointError(
                f"{self.where(row)} has the keys {sorted(content)}; give text, prompt and "
                "completion, or messages"
            )
        if not isinstance(prompt, str) or not isinstance(completion, str):
            raise CheckpointError(
                f"{self.where(row)} is not text; prompt and completion must be strings"
            )
        encode = self.tokenizer.encode
        head = encode(prompt, add_special_tokens=False) if prompt else []
        first = max(len(head) - 1, 0) if self.loss_on == "answers" else 0
        return Document(head + encode(completion, add_special_tokens=False), first)

    def _render(self, row: int, messages: list[dict]) -> tuple[str, str]:
        """The conversation up to the last turn's start, and that turn.

        A template opens the turn with or without thinking; the opening that the conversation
        really begins with is the prompt.
        """
        render = self.tokenizer.apply_chat_template
        try:
            whole = str(render(messages, tokenize=False))
            for thinking in (True, False):
                prompt = str(
                    render(
                        messages[:-1],
                        tokenize=False,
                        add_generation_prompt=True,
                        enable_thinking=thinking,
                    )
                )
                if whole.startswith(prompt):
                    return prompt, whole.removeprefix(prompt)
        except Exception as error:  # a template is code, and a row may hold anything
            raise CheckpointError(
                f"{self.where(row)}: its messages cannot be rendered ({reason(error)}); correct or "
                "remove the row"
            ) from None
        return "", whole


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


def calibration_batches(
    sources: Sequence[Source],
    weights: Sequence[float],
    *,
    num_samples: int,
    batch_size: int,
    context: int,
) -> Iterator[Batch]:
    """The first rows of the sources, cut to `context` tokens; `num_samples` in all, or as many as
    there are. The sources take turns by weight, in rows: importance is a sum over rows."""
    assert len(sources) == len(weights) and min(weights) > 0, (len(sources), weights)
    taken = [0] * len(sources)
    rows: list[tuple[Source, int]] = []
    for _ in range(min(num_samples, sum(map(len, sources)))):
        left = [n for n, source in enumerate(sources) if taken[n] < len(source)]
        number = min(left, key=lambda n: (taken[n] + 1) / weights[n])
        rows.append((sources[number], taken[number]))
        taken[number] += 1
    for start in range(0, len(rows), batch_size):
        documents = [source.document(row) for source, row in rows[start : start + batch_size]]
        yield padded_batch(documents, context, sources[0].pad_id)


def padded_batch(documents: Sequence[Document], context: int, pad_id: int) -> Batch:
    """The first `context` tokens of each document as one right-padded batch."""
    cut = [document.ids[:context] for document in documents]
    length = max(1, *map(len, cut))
    length = -(-length // LENGTH_STEP) * LENGTH_STEP
    input_ids = torch.full((len(cut), length), pad_id, dtype=torch.long)
    attention_mask = torch.zeros(len(cut), length, dtype=torch.long)
    for number, ids in enumerate(cut):
        input_ids[number, : len(ids)] = torch.tensor(ids, dtype=torch.long)
        attention_mask[number, : len(ids)] = 1
    return Batch(input_ids, attention_mask)
