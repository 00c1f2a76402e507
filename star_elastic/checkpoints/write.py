"""A whole checkpoint written at once: config, tensors, and what stands beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from star_elastic.architectures.config_file import Config
from star_elastic.checkpoints.companions import copy_companions
from star_elastic.checkpoints.tensors import (
    DEFAULT_SHARD_BYTES,
    Planned,
    Progress,
    Value,
    write_tensors,
)
from star_elastic.files.writing import new_directory, write_json


def write_checkpoint(
    out: str | Path,
    config: Config,
    beside: Path,
    plan: Iterable[Planned],
    value_of: Callable[[str], Value],
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Progress | None = None,
    finish: Callable[[Path], None] | None = None,
) -> None:
    """Writes a checkpoint to the new directory `out`, which has its name only when all is there.

    Tokenizer, templates and the like are those of the checkpoint `beside`. `plan` and `value_of`
    as in `write_tensors`. `finish(directory)` may add files. Raises CheckpointError for what cannot
    be copied or written; nothing is left behind then.
    """
    with new_directory(out) as directory:
        copy_companions(beside, directory)
        write_json(directory / "config.json", config)
        write_tensors(directory, plan, value_of, max_shard_bytes=max_shard_bytes, progress=progress)
        if finish:
            finish(directory)
