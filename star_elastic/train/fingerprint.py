"""What a run was begun with, so that it does not go on with something else.

Of a model: the files that its loaders read, whatever else lies beside them. Of the data: how many
rows a file has (every shuffle depends on it) and what some rows spread over it say. A few of them
may change, because rows that stop a run are to be corrected.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from star_elastic.checkpoints.companions import BASIS, MANIFEST, ORDERS, ROUTER, reading_files
from star_elastic.checkpoints.tensors import INDEX_NAME, SINGLE_NAME
from star_elastic.data.sources import Source
from star_elastic.errors import RowError, library_boundary
from star_elastic.files.paths import is_file
from star_elastic.files.writing import digest_files

SAMPLED_ROWS = 64
MAY_CHANGE = 0.25
"""Share of the sampled rows that may differ when a run goes on; of few rows, one may."""
FAMILY = (MANIFEST, ORDERS, BASIS, ROUTER)


def model_files(directory: str | Path) -> list[Path]:
    """The files of a checkpoint that decide what it computes and how it reads text."""
    path = Path(directory)
    files = {path / name for name in FAMILY} | set(reading_files(path))
    return sorted([*_weight_files(path), *(file for file in files if is_file(file))])


def _weight_files(path: Path) -> list[Path]:
    # With both present, the single file is read.
    names = [SINGLE_NAME] if is_file(path / SINGLE_NAME) else [INDEX_NAME, *_shards(path)]
    return sorted(path / name for name in {"config.json", *names} if is_file(path / name))


def _shards(path: Path) -> list[str]:
    try:
        weight_map = json.loads((path / INDEX_NAME).read_text(encoding="utf-8"))["weight_map"]
        return sorted(set(weight_map.values()))
    except (OSError, ValueError, LookupError, AttributeError, TypeError):
        return []  # damaged; loading it says so


def digest_model(directory: str | Path) -> str:
    """What a checkpoint is, as 16 hexadecimal digits."""
    return digest_files(model_files(directory))


def digest_weights(directory: str | Path) -> str:
    """What the weights of a checkpoint are, whatever it reads text with. One model saved twice, in
    other files or another dtype, has two of them."""
    return digest_files(_weight_files(Path(directory)))


def sample_data(sources: Sequence[Source]) -> list[dict[str, Any]]:
    """Of every file of every source (by its number), how many `rows` it has, which lines are blank,
    and a `sample` of what the rows say.

    The sample holds digests of what rows say, however that is spelled in JSON; an empty text stands
    for one that cannot be read, whose correction is no change.
    """
    sampled = []
    for number, source in enumerate(sources):
        start = 0
        for part in source.parts:
            count = len(part)
            sampled.append({
                "source": number,
                "file": str(part.path),
                "rows": count,
                "blank_lines": list(part.blank_lines),
                "sample": [_digest_row(source, start + row) for row in spread(count)],
            })  # fmt: skip
            start += count
    return sampled


def files_by_source(saved: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """The files of `sample_data`, source by source. Raises LookupError or TypeError if `saved` is
    no such sample."""
    count = 1 + max((file["source"] for file in saved), default=-1)
    return [[file for file in saved if file["source"] == number] for number in range(count)]


def spread(count: int) -> list[int]:
    """At most SAMPLED_ROWS rows of so many, from the first to the last."""
    if count <= SAMPLED_ROWS:
        return list(range(count))
    return [number * (count - 1) // (SAMPLED_ROWS - 1) for number in range(SAMPLED_ROWS)]


def _digest_row(source: Source, row: int) -> str:
    try:
        source.document(row)
        with library_boundary("is nested too deeply", "correct it", RowError):
            said = json.dumps(source.content(row), default=str, sort_keys=True)
    except RowError:
        return ""
    return hashlib.blake2b(said.encode(), digest_size=8).hexdigest()


def compare_data(
    saved: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]
) -> tuple[list[str], list[str]]:
    """How the data differ from those that a run began with: what is too much, and what is not.

    Raises LookupError or TypeError if `saved` is no such sample.
    """
    if len(saved) != len(now):
        return [f"the data's files ({len(saved)} then, {len(now)} now)"], []
    refused, allowed = [], []
    for before, after in zip(saved, now, strict=True):
        file, size = after["file"], len(after["sample"])
        if before["rows"] != after["rows"]:
            refused.append(f"the rows of {file} ({before['rows']} then, {after['rows']} now)")
            continue
        pairs = list(zip(before["sample"], after["sample"], strict=True))
        changed = sum(old != new for old, new in pairs)
        others = sum(old not in ("", new) for old, new in pairs)
        if others > max(1, MAY_CHANGE * size):
            refused.append(f"the rows of {file} ({others} of {size} looked at)")
        elif changed:
            allowed.append(f"{file}: {changed} of {size} rows looked at have been changed")
    return refused, allowed
