"""The options of one source of rows, as a run config and the commands give them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from star_elastic.strict import MOST, require, require_within


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Rows of one kind. Several sources are mixed by weight."""

    files: tuple[str, ...]
    """JSONL files, parquet files, or directories that `datasets` has saved; also patterns
    (`data/train-*.parquet`) and directories of such files. A row is `{"messages"}`,
    which goes through the chat template, or is read as it stands: `{"prompt", "completion"}` or
    `{"text"}`. Start with the text that the sizes will be used on."""
    weight: float = 1.0
    """Share of the tokens, relative to the other sources."""
    loss_on: Literal["all", "answers"] = "all"
    """Which tokens count: all, or only those of completions and last answers. Start with `answers`
    for prompts and conversations."""
    bad_rows: Literal["stop", "skip"] = "stop"
    """Whether a row that cannot be read as it was written stops the run (with its state saved) or
    is left out and counted. Start with `stop`, and with `star-elastic train RUN.toml --check`."""
    notes: tuple[str, ...] = ()
    """Columns that the model need not see, beside those whose names say so (id, source, score).
    Any other words of a row that would not be seen are an error. Start with none."""
    held_out: int = 64
    """Rows drawn from the source that training and ranking never see, at most a tenth of it: the
    verdict is measured on them. 0: none, and no verdict on this source."""

    def __post_init__(self):
        require_within("held_out", self.held_out, 0, MOST)
        forms = sorted({"text", "prompt", "completion", "messages"} & set(self.notes))
        require(
            not forms, f"notes names {', '.join(forms)}, which rows are made of; leave them out"
        )
        require(
            bool(self.files) and all(self.files),
            f"files={list(self.files)} names no file, or one without a name; list JSONL files or "
            "datasets",
        )
        require(self.weight > 0, f"weight={self.weight} is not > 0; leave the source out")
