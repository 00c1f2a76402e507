"""Rows of local data by number: JSONL files, saved Hugging Face datasets, parquet files.

Rows are found by number and read when they are asked for; no data is loaded whole and nothing
reaches a hub. What a row says is not known here.
"""

from __future__ import annotations

import bisect
import importlib
import zlib
from array import array
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from star_elastic.data.json_text import read_json
from star_elastic.data.row_kinds import is_parquet, require_json_lines
from star_elastic.errors import CheckpointError, ConfigError, RowError, library_boundary
from star_elastic.files.paths import FILE, FOLDER, is_file, is_folder, kind_of

MOST_BLANK = 1000
"""Blank lines of a file that are remembered."""


class JsonLines:
    """Rows of a JSONL file: the byte offset and a checksum of each in memory.

    Blank lines are no rows, but for those whose numbers are in `emptied`: these are rows that say
    nothing. Raises ConfigError for a file of another kind. A row is read as long as its line is
    what it was, whatever has been written behind it; else CheckpointError says so.
    """

    def __init__(self, path: Path, emptied: Collection[int] = ()):
        self.path = path
        self._offsets = array("Q")
        self._sums = array("I")
        self._blanks = array("Q")  # of each blank line, the rows before it
        offset = 0
        with self._reading():
            require_json_lines(path)
            with open(path, "rb") as stream:
                for number, line in enumerate(stream, start=1):
                    content = line.strip()
                    if content or number in emptied:
                        self._offsets.append(offset)
                        self._sums.append(zlib.crc32(content))
                    else:
                        self._blanks.append(len(self._offsets))
                    offset += len(line)
        self._emptied = frozenset(emptied)

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, row: int) -> dict[str, Any]:
        """A row. Raises RowError, naming it, if it is damaged."""
        with self._reading(), open(self.path, "rb") as stream:
            stream.seek(self._offsets[row])
            line = stream.readline().strip()
        if zlib.crc32(line) != self._sums[row]:
            raise CheckpointError(
                f"{self.path} has changed while it was read; leave it as it is until that is done, "
                "and begin again (a run that has a state, with --resume)"
            )
        if not line and self._line(row) in self._emptied:
            return {"text": ""}
        try:
            # json itself raises many kinds: broken bytes, numbers and brackets without end.
            with library_boundary("is not valid JSON", "correct the line", RowError):
                content = read_json(line)
            if not isinstance(content, dict):
                raise RowError("is not a JSON object; correct the line")
        except RowError as error:
            raise error.at(self.where(row)) from None
        return content

    def _reading(self) -> AbstractContextManager[None]:
        return library_boundary(f"{self.path} cannot be read", "restore the file")

    def _line(self, row: int) -> int:
        return row + 1 + bisect.bisect_right(self._blanks, row)

    def where(self, row: int) -> str:
        """The file and the line of a row, counted from 1."""
        return f"{self.path} line {self._line(row)}"

    @property
    def blank_lines(self) -> tuple[int, ...]:
        """Numbers of lines that are no rows, the first MOST_BLANK of them."""
        before = self._blanks[:MOST_BLANK]
        return tuple(rows + number for number, rows in enumerate(before, start=1))


class Table:
    """Rows of a directory that `datasets.Dataset.save_to_disk` wrote, or of a parquet file.

    The package `datasets` maps them from disk; it unpacks a parquet file into its cache once.
    """

    blank_lines: tuple[int, ...] = ()

    def __init__(self, path: Path):
        self.path = path
        if is_file(path / "dataset_dict.json"):
            splits = sorted(p.parent.name for p in path.glob("*/state.json")) or ["train"]
            raise ConfigError(
                f"{path} holds the splits {', '.join(splits)}; name one, as {path / splits[0]}"
            )
        if is_folder(path) and not is_file(path / "state.json"):
            raise ConfigError(
                f"{path} holds no dataset; name what save_to_disk wrote, or JSONL or parquet files"
            )
        try:
            datasets: Any = importlib.import_module("datasets")
        except ImportError:
            raise ConfigError(
                f"{path} needs the package datasets; run pip install 'star-elastic[datasets]'"
            ) from None
        self._rows: Any = ()
        with library_boundary(f"{path} cannot be read", "write it again"), _quiet(datasets):
            if is_folder(path):
                self._rows = datasets.load_from_disk(str(path))
            # A file without rows, by its own footer, is none that it can read.
            elif importlib.import_module("pyarrow.parquet").read_metadata(path).num_rows:
                try:
                    self._rows = datasets.Dataset.from_parquet(str(path))
                except datasets.exceptions.DatasetGenerationError as error:
                    raise error.__cause__ or error from None  # it only says that there was one

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        """The row's columns that have a value (tables fill up with None). Raises RowError."""
        problem = f"{self.where(row)} cannot be read"
        with library_boundary(problem, "write the data again", RowError):
            return _without_none(self._rows[row])

    def where(self, row: int) -> str:
        """The path and the number of a row, counted from 0."""
        return f"{self.path} row {row}"


@contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """Keeps the package from telling errors and progress itself while the block runs."""
    logging, progress = datasets.utils.logging, datasets.utils
    verbosity, disabled = logging.get_verbosity(), progress.are_progress_bars_disabled()
    logging.set_verbosity(logging.CRITICAL)
    progress.disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if not disabled:
            progress.enable_progress_bars()


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(v) for key, v in value.items() if v is not None}
    return [_without_none(v) for v in value] if isinstance(value, list) else value


Rows = JsonLines | Table


def open_rows(path: str | Path, begun: Mapping[str, Any] | None = None) -> Rows:
    """Rows of a JSONL file, a parquet file or a saved dataset.

    `begun`: how many `rows` a run began with, and which lines were blank (`blank_lines`). A line
    that has been emptied since is a row that says nothing, so that the others keep their numbers.
    Raises ConfigError if there is no such thing, CheckpointError if it is damaged.
    """
    path = Path(path)
    if kind_of(path) not in (FILE, FOLDER):
        raise ConfigError(f"{path} does not exist; name an existing JSONL file or dataset")
    with library_boundary(f"{path} cannot be read", "restore the file"):
        is_table = is_folder(path) or is_parquet(path)
    if is_table:
        return Table(path)
    rows = JsonLines(path)
    if begun and len(rows) < begun["rows"]:
        blank = begun["blank_lines"]
        emptied = {n for n in rows.blank_lines if n <= begun["rows"] + len(blank)} - set(blank)
        if len(rows) + len(emptied) == begun["rows"]:
            return JsonLines(path, emptied)
    return rows
