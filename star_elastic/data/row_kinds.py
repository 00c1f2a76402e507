"""What a data file is, told from its first bytes and its name before its rows are read as JSON.

A file of another kind would be told as thousands of bad rows; here it is one line, with what to do.
"""

from __future__ import annotations

import glob
import re
from pathlib import Path

from star_elastic.errors import ConfigError
from star_elastic.files.paths import LFS_POINTER, exists, is_file, is_folder, names_in, no_file

FIRST_BYTES = 1 << 16
PARQUET = b"PAR1"
COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
}
ARROW = (b"ARROW1", b"\xff\xff\xff\xff")
UTF_16 = (b"\xff\xfe", b"\xfe\xff", b"{\0", b"\0{")
TABLES = (".csv", ".tsv", ".txt")
ROW_SUFFIXES = (".jsonl", ".parquet")
SPLIT = re.compile(r"(train|validation|valid|dev|test|eval)(?![a-z])", re.IGNORECASE)


def is_parquet(path: Path) -> bool:
    """Whether a file is parquet, by its name or by what it begins with."""
    return path.suffix.lower() == ".parquet" or _begin(path).startswith(PARQUET)


def require_json_lines(path: Path) -> None:
    """Raises ConfigError for a file that is plainly of another kind than JSON lines."""
    kind = _other_kind(path, _begin(path))
    if kind:
        raise ConfigError(f"{path} {kind}")


def _begin(path: Path) -> bytes:
    with open(path, "rb") as stream:
        return stream.read(FIRST_BYTES)


def _other_kind(path: Path, begin: bytes) -> str:
    """What a file is and what to do, if it is plainly no JSON lines."""
    if begin.startswith(LFS_POINTER):
        return "is a pointer of Git LFS, not the file itself; fetch it with git lfs pull"
    for magic, name in COMPRESSED.items():
        if begin.startswith(magic):
            return f"is compressed ({name}); unpack it and name the JSONL file that comes out"
    if begin.startswith(PARQUET):
        return "is a parquet file; write its rows as JSON lines"
    if begin.startswith(ARROW):
        return "is an Arrow file; name the directory that save_to_disk wrote it into"
    if begin.startswith(UTF_16):
        return f"is UTF-16 text; write it as UTF-8: iconv -f UTF-16 -t UTF-8 {path.name}"
    text = begin.removeprefix(b"\xef\xbb\xbf").lstrip()
    first, _, rest = text.partition(b"\n")
    first, rest = first.strip(), rest.strip()
    one_row_a_line = f"write one object a line: jq -c '.[]' {path.name} > rows.jsonl"
    if re.match(rb"\[\s*\{", text) and not (first.endswith(b"]") and rest):
        return f"is one JSON array; {one_row_a_line}"
    if first == b"{" and rest.startswith(b'"'):
        return f"is JSON over several lines; {one_row_a_line.replace('.[]', '.')}"
    if path.suffix.lower() in TABLES and text and not text.startswith((b"{", b"[")):
        return (
            'is no JSON; write one JSON object a line, such as {"prompt": ..., "completion": ...}'
        )
    return ""


def find_files(name: str | Path) -> list[Path]:
    """The files that a name of a data file stands for: itself, or a directory that `datasets` has
    saved; of a pattern (`data/*.parquet`) or another directory, those that it holds, sorted.

    Raises ConfigError if there are none, or if files of a directory do not belong together.
    """
    path = Path(name)
    if is_folder(path):
        return [path] if _is_saved(path) else _inside(path)
    if exists(path) or not glob.has_magic(str(name)):
        if not is_file(path):
            raise ConfigError(f"{path} {no_file(path)}; name an existing JSONL file or dataset")
        return [path]
    found = sorted(Path(file) for file in glob.glob(str(name), recursive=True))
    files = [file for file in found if is_file(file)]
    if not files:
        raise ConfigError(f"{path} matches no file; correct the pattern")
    return files


def _is_saved(path: Path) -> bool:
    return any(is_file(path / name) for name in ("state.json", "dataset_dict.json"))


def _inside(path: Path) -> list[Path]:
    """The files of rows in a directory, all of one kind and of one split."""
    found = (path / name for name in names_in(path))
    files = [file for file in found if file.suffix.lower() in ROW_SUFFIXES and is_file(file)]
    if not files:
        raise ConfigError(
            f"{path} holds no dataset; name what save_to_disk wrote, or JSONL or parquet files"
        )
    kinds = sorted({file.suffix.lower() for file in files})
    splits = sorted({found[0].lower() for file in files if (found := SPLIT.match(file.name))})
    for what, several in (("kinds", kinds), ("splits", splits)):
        if len(several) > 1:
            one = f"*{several[0]}" if what == "kinds" else f"{several[0]}*"
            raise ConfigError(
                f"{path} holds files of several {what}, {', '.join(several)}; name those of one, "
                f"as {path / one}"
            )
    return files
