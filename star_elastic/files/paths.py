"""What is at a path, or one line about why nobody can tell.

`pathlib` and `os.path` answer "no" for a link that leads nowhere, and raise or answer "no", as it
comes, for folders that may not be searched. Whoever asks about a file of the user's asks here.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from star_elastic.errors import CheckpointError, reason

FILE, FOLDER, OTHER, NOTHING = "file", "folder", "other", ""
LFS_POINTER = b"version https://git-lfs"
"""How the file begins that git leaves in place of a large one."""
ABSENT = (errno.ENOENT, errno.ENOTDIR)


def kind_of(path: str | Path) -> str:
    """`FILE`, `FOLDER`, `OTHER` (a device, a pipe) or `NOTHING`. Raises CheckpointError for a link
    that leads nowhere and for what may not be looked at, naming the reason."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in ABSENT:
            if os.path.islink(path):
                raise CheckpointError(
                    f"{path} is a link to {os.readlink(path)}, which is not there; restore that "
                    "file (of a hub's cache: download the model again), or remove the link"
                ) from None
            return NOTHING
        raise CheckpointError(
            f"{path} cannot be read ({getattr(error, 'strerror', None) or reason(error)}); allow "
            "it, or name another"
        ) from None
    if stat.S_ISREG(mode):
        return FILE
    return FOLDER if stat.S_ISDIR(mode) else OTHER


def is_file(path: str | Path) -> bool:
    """Whether a file is there. Raises CheckpointError, see `kind_of`."""
    return kind_of(path) == FILE


def is_folder(path: str | Path) -> bool:
    """Whether a folder is there. Raises CheckpointError, see `kind_of`."""
    return kind_of(path) == FOLDER


def exists(path: str | Path) -> bool:
    """Whether anything is there. Raises CheckpointError, see `kind_of`."""
    return kind_of(path) != NOTHING


def has_file(path: str | Path) -> bool:
    """Whether a file is there. Raises CheckpointError for anything else of that name."""
    kind = kind_of(path)
    if kind not in (FILE, NOTHING):
        raise CheckpointError(f"{path} is not a file; remove it, or put the file in its place")
    return kind == FILE


def no_file(path: str | Path) -> str:
    """What is wrong with a path at which there is neither a file nor a folder."""
    return "is a device or a pipe" if exists(path) else "does not exist"


def require_content(file: str | Path) -> None:
    """Raises CheckpointError for what git leaves in place of a file that it has not fetched."""
    try:
        with open(file, "rb") as stream:
            begin = stream.read(len(LFS_POINTER))
    except OSError as error:
        raise CheckpointError(
            f"{file} cannot be read ({error.strerror}); allow it, or restore the file"
        ) from None
    if begin == LFS_POINTER:
        raise CheckpointError(
            f"{file} is a pointer of Git LFS, not the file itself; fetch it with git lfs pull"
        )


def names_in(folder: str | Path) -> list[str]:
    """The names in a folder, sorted. Raises CheckpointError for one that may not be listed."""
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise CheckpointError(
            f"{folder} cannot be read ({error.strerror}); allow it, or name another"
        ) from None
