"""Writing files and directories whole or not at all.

Everything is written under a temporary name, flushed to the disk and then renamed. What cannot be
written is told before work starts.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError

from star_elastic.errors import CheckpointError, library_boundary, reason
from star_elastic.files.paths import exists, is_folder, names_in

logger = logging.getLogger(__name__)

PARTIAL = "partial"
MAKE_ROOM = "make room, or write elsewhere"
READ_WHOLE = 64 * 1024**2
READ_ENDS = 1024**2
"""Files up to the first size are digested whole, of larger ones so much of both ends."""

WRITE_BACK, FETCH = 32 * 1024**2, 1024**2
"""Bytes of a large file that are sent to the disk at once, and fetched from it."""
CAN_ADVISE = hasattr(os, "posix_fadvise")
"""Not on every system; nothing but time is lost without."""


def digest_files(files: Iterable[Path]) -> str:
    """What files are: their names, sizes and contents, as 16 hexadecimal digits."""
    found = [(file.name, *_size_and_digest(file)) for file in files]
    return hashlib.blake2b(repr(found).encode(), digest_size=8).hexdigest()


def _size_and_digest(file: Path) -> tuple[int, str]:
    size = file.stat().st_size
    with open(file, "rb") as content:
        if size <= READ_WHOLE:
            return size, hashlib.file_digest(content, "blake2b").hexdigest()
        digest = hashlib.blake2b(content.read(READ_ENDS))
        content.seek(-READ_ENDS, os.SEEK_END)
        digest.update(content.read(READ_ENDS))
    return size, digest.hexdigest()


def read_json(file: Path, remedy: str = "restore the file") -> Any:
    """What a JSON file says. Raises CheckpointError for one that cannot be read, with a remedy."""
    with library_boundary(f"{file} cannot be read", remedy):
        return json.loads(file.read_text(encoding="utf-8"))


def write_json(file: Path, content: object) -> None:
    """Writes JSON under a temporary name, then renames it into place. Raises CheckpointError if the
    disk does not take it."""
    write_text(file, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_text(file: Path, text: str) -> None:
    """Writes a text file under a temporary name, then renames it into place. Raises CheckpointError
    if the disk does not take it."""
    with replaced(file) as temporary:
        # A name of a file may hold what is no text; JSON has the same escape for it.
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


@contextmanager
def replaced(file: Path) -> Iterator[Path]:
    """A temporary file that takes the place of `file` when the block ends well, else vanishes."""
    temporary = _temporary(file, "tmp")
    try:
        yield temporary
        _flush(temporary)
        os.replace(temporary, file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} cannot be written ({reason(error)}); {MAKE_ROOM}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def require_writable(out: str | Path, *, as_file: bool = False) -> Path:
    """Where a new directory or file goes, links resolved, if it can be written there: a temporary
    sibling is made and removed. An empty directory may be filled.

    Raises CheckpointError if something is there already, or if nothing can be made there. Commands
    ask before they work, so that nothing is lost for want of a place.
    """
    given, out = out, _resolved(out)
    if out == Path.cwd():
        raise CheckpointError(f"{given or '.'} is the folder you are in; name a new one")
    if os.path.lexists(out) and (as_file or not is_folder(out) or names_in(out)):
        kind = "file" if as_file else "directory"
        raise CheckpointError(f"{out} exists already; name a new {kind} or remove it first")
    if os.path.ismount(out):
        raise CheckpointError(f"{out} is a mount point; name a new directory inside of it")
    if as_file and not is_folder(out.parent):
        raise CheckpointError(f"{out.parent} is not a directory; make it, or name another file")
    _try_to_write(out.parent, _temporary(out, PARTIAL))
    return out


def require_folder(out: str | Path) -> Path:
    """A directory, there or not, that files can be written in, links resolved; nothing stays there.
    Raises CheckpointError otherwise."""
    out = _resolved(out)
    if exists(out) and not is_folder(out):
        raise CheckpointError(f"{out} is not a directory; name another")
    _try_to_write(out, _temporary(out / "written", PARTIAL))
    return out


def _resolved(out: str | Path) -> Path:
    with library_boundary(f"{out} cannot be written", "choose another"):
        return Path(os.path.realpath(out))


def _temporary(out: Path, ending: str) -> Path:
    """A new name beside `out` under which it is written. Process numbers would not do: in a
    container that starts again they are those of the process that was killed there."""
    return out.with_name(f".{out.name}.{secrets.token_hex(4)}.{ending}")


def _tell_unfinished(out: Path) -> None:
    """Tells what processes that were killed have left of writing `out`. It stays: one that runs, on
    another machine perhaps, may be writing it."""
    for path in sorted(out.parent.glob(f".{glob.escape(out.name)}.*.{PARTIAL}")):
        logger.warning("%s is unfinished; remove it, unless it is being written now", path)


def _try_to_write(folder: Path, temporary: Path) -> None:
    """Makes a directory in a folder, and folders that are missing on the way, and removes them."""
    made: list[Path] = []
    try:
        for missing in reversed([folder, *folder.parents]):
            if not exists(missing):
                missing.mkdir()
                made.append(missing)
        temporary.mkdir()
        made.append(temporary)
    except OSError as error:
        raise CheckpointError(_unwritable(folder, error)) from None
    finally:
        for path in reversed(made):
            with suppress(OSError):
                path.rmdir()


def _unwritable(folder: Path, error: OSError) -> str:
    return f"{folder} cannot be written in ({error.strerror or reason(error)}); choose another"


@contextmanager
def new_directory(out: str | Path) -> Iterator[Path]:
    """A temporary directory that becomes `out` when the block ends well, and vanishes otherwise.

    Raises CheckpointError if `out` exists and is not empty, or cannot be written.
    """
    out = require_writable(out)
    _tell_unfinished(out)
    temporary = _temporary(out, PARTIAL)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
    except OSError as error:
        raise CheckpointError(_unwritable(out.parent, error)) from None
    try:
        yield temporary
        flush(temporary)
        if out.exists():
            out.rmdir()
        os.replace(temporary, out)
    except OSError as error:
        raise CheckpointError(
            f"{out} cannot be written ({error.strerror or reason(error)}); {MAKE_ROOM}"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def flush(directory: Path) -> None:
    """Waits until all files under a directory are on the disk, before it gets a name that promises
    them: of a machine that stops now, the name alone might be left."""
    for path in (*directory.rglob("*"), directory):
        if not path.is_symlink() and (path.is_file() or path.is_dir()):
            _flush(path)


def write_back(stream: BinaryIO, begun: int) -> int:
    """Asks the system to begin writing a large file to the disk while the rest of it is still made,
    which it does by itself only when much of the memory is full of it. `begun`: bytes for which it
    was asked before; returns those for which it is now."""
    end = stream.tell()
    if end - begun < WRITE_BACK or not CAN_ADVISE:
        return begun
    stream.flush()
    os.posix_fadvise(stream.fileno(), begun, end - begun, os.POSIX_FADV_DONTNEED)
    return end


def will_read(stream: FileIO, start: int, stop: int) -> None:
    """Asks the system to fetch bytes of a file. Waits for nothing."""
    # In pieces: of one request, a system fetches no more than its own limit.
    for begin in range(start, stop, FETCH) if CAN_ADVISE else ():
        length = min(FETCH, stop - begin)
        os.posix_fadvise(stream.fileno(), begin, length, os.POSIX_FADV_WILLNEED)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # which some file systems cannot be asked to flush
            raise
    finally:
        os.close(descriptor)
