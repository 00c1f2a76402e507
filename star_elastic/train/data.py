"""Training rows: JSON lines of text, of prompt and completion, or of chat messages.

Files are indexed by byte offset and read row by row; no data set is loaded whole. Which rows a
step sees depends only on (seed, step), so that a resumed run sees what the uninterrupted one does.
"""

from __future__ import annotations

import json
import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from star_elastic.errors import CheckpointError, ConfigError

LENGTH_STEP = 16
"""Batches are padded to multiples of this: kernels are compiled, and kept, for every new shape."""
LENGTH_POOL = 16
"""Batches are drawn from pools of this many, sorted by length, to pad little."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Token ids (B, T), right-padded; `attention_mask` (B, T) of real tokens; `predicts` (B, T)
    marks the positions whose next token counts in the loss. `weight` of its mean loss, 1 on
    average: rows of like length share a batch, and a batch of short ones counts for less."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    predicts: torch.Tensor
    weight: float = 1.0

    @property
    def num_tokens(self) -> int:
        return int(self.attention_mask.sum())

    @property
    def num_predicted(self) -> int:
        return int(self.predicts.sum())

    def split(self, count: int) -> list[Batch]:
        """At most `count` parts of about equally many rows."""
        tensors = (self.input_ids, self.attention_mask, self.predicts)
        parts = [tensor.tensor_split(min(count, len(tensor))) for tensor in tensors]
        return [Batch(*part, weight=self.weight) for part in zip(*parts, strict=True)]


class JsonLines:
    """Rows of several JSONL files by number, read on demand."""

    def __init__(self, files: Sequence[str | Path]):
        self._files = [Path(file) for file in files]
        self._rows: list[tuple[int, int]] = []
        for number, file in enumerate(self._files):
            if not file.is_file():
                raise ConfigError(f"{file} does not exist; name an existing JSONL file")
            offsets = array("Q")
            with open(file, "rb") as stream:
                offset = 0
                for line in stream:
                    if line.strip():
                        offsets.append(offset)
                    offset += len(line)
            self._rows.extend((number, offset) for offset in offsets)
        if not self._rows:
            raise ConfigError(f"{', '.join(map(str, files))} hold no rows; add JSON lines")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> dict:
        number, offset = self._rows[row]
        file = self._files[number]
        with open(file, "rb") as stream:
            stream.seek(offset)
            line = stream.readline()
        try:
            content = json.loads(line)
        except ValueError:
            raise CheckpointError(
                f"{file} at byte {offset} is not valid JSON; correct or remove the line"
            ) from None
        if not isinstance(content, dict):
            raise CheckpointError(f"{file} at byte {offset} is not a JSON object")
        return content


class Examples:
    """Rows as token ids with the positions that count.

    A row is `{"text"}`, `{"prompt", "completion"}` or `{"messages"}` (through the chat template).
    With `loss_on="answers"` the completion, or the last message, counts; a text counts whole.
    """

    def __init__(
        self, rows: JsonLines, tokenizer: PreTrainedTokenizerBase, context: int, loss_on: str
    ):
        self.rows = rows
        self.tokenizer = tokenizer
        self.context = context
        self.loss_on = loss_on
        pad = tokenizer.pad_token_id
        self.pad_id = pad if isinstance(pad, int) else 0  # never read: padding is masked

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> tuple[list[int], int]:
        """Token ids, cut to the context, and the first position whose next token counts."""
        content = self.rows[row]
        if "text" in content:
            prompt, completion = "", content["text"]
        elif "prompt" in content and "completion" in content:
            prompt, completion = content["prompt"], content["completion"]
        elif "messages" in content:
            prompt, completion = self._render(row, content["messages"])
        else:
            raise CheckpointError(
                f"row {row} has the keys {sorted(content)}; give text, prompt and completion, "
                "or messages"
            )
        if not isinstance(prompt, str) or not isinstance(completion, str):
            raise CheckpointError(f"row {row} is not text; prompt and completion must be strings")
        encode = self.tokenizer.encode
        head = encode(prompt, add_special_tokens=False) if prompt else []
        ids = head + encode(completion, add_special_tokens=False)
        first = max(len(head) - 1, 0) if self.loss_on == "answers" else 0
        return ids[: self.context], first

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
        except (TypeError, KeyError, ValueError, TemplateError) as error:
            raise CheckpointError(
                f"row {row}: its messages cannot be rendered ({error}); correct or remove the row"
            ) from None
        return "", whole

    def batch(self, rows: Sequence[int]) -> Batch:
        """The rows as one right-padded batch."""
        examples = [self[row] for row in rows]
        length = max(len(ids) for ids, _ in examples)
        length = -(-length // LENGTH_STEP) * LENGTH_STEP
        input_ids = torch.full((len(rows), length), self.pad_id, dtype=torch.long)
        mask = torch.zeros(len(rows), length, dtype=torch.long)
        predicts = torch.zeros(len(rows), length, dtype=torch.bool)
        for i, (ids, first) in enumerate(examples):
            input_ids[i, : len(ids)] = torch.tensor(ids)
            mask[i, : len(ids)] = 1
            predicts[i, first : max(len(ids) - 1, first)] = True
        return Batch(input_ids, mask, predicts)


class BatchOrder:
    """Which rows each step sees: every row once per epoch, in pools sorted by length."""

    def __init__(self, examples: Examples, batch_size: int, seed: int):
        self.examples = examples
        self.batch_size = min(batch_size, len(examples))
        self.seed = seed
        self.steps_per_epoch = len(examples) // self.batch_size
        self._epoch = -1
        self._order: list[int] = []
        self._pool_number = (-1, -1)
        self._pool: list[list[int]] = []
        self._mean_length = 1.0

    def rows(self, step: int) -> list[int]:
        """Row numbers of a step's batch."""
        epoch, within = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._order = list(range(len(self.examples)))
            random.Random(f"{self.seed}-epoch-{epoch}").shuffle(self._order)
            self._epoch = epoch
        pool, position = divmod(within, LENGTH_POOL)
        if (epoch, pool) != self._pool_number:
            size = self.batch_size
            begin = pool * LENGTH_POOL * size
            count = min(LENGTH_POOL, self.steps_per_epoch - pool * LENGTH_POOL)
            rows = self._order[begin : begin + count * size]
            lengths = {row: len(self.examples[row][0]) for row in rows}
            rows.sort(key=lambda row: (lengths[row], row))
            self._pool = [rows[i * size : (i + 1) * size] for i in range(count)]
            self._mean_length = sum(lengths.values()) / len(lengths)
            random.Random(f"{self.seed}-pool-{epoch}-{pool}").shuffle(self._pool)
            self._pool_number = (epoch, pool)
        return self._pool[position]

    def batch(self, step: int, limit: int = 0) -> Batch:
        """The batch of a step, or `limit` rows of it, evenly taken."""
        rows = self.rows(step)
        if 0 < limit < len(rows):
            rows = rows[:: len(rows) // limit][:limit]
        batch = self.examples.batch(rows)
        return replace(batch, weight=batch.num_tokens / len(rows) / self._mean_length)
