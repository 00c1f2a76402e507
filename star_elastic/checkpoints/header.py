"""The header of a safetensors file: what its tensors are and where their bytes lie.

safetensors itself decides whether a header is one (its size, its JSON, the offsets against each
other, the shapes and the file); what is read here is only where things are.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

from star_elastic.errors import library_boundary
from star_elastic.files.paths import is_file, require_content

METADATA = "__metadata__"


@dataclass(frozen=True, slots=True)
class Place:
    """Where one tensor lies: `num_bytes` of `file` from byte `start` on. `dtype` in the words of
    the file, which may name one that no weight of ours has."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int


def read_header(file: Path) -> dict[str, Place]:
    """Every tensor of a safetensors file by its name. Reads nothing but the header. Raises
    CheckpointError for a file that is missing, damaged, or a pointer of Git LFS."""
    if is_file(file):
        require_content(file)
    with library_boundary(f"{file} cannot be read", "restore the file"):
        with safe_open(file, framework="np"):
            pass
        with open(file, "rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
        places = {}
        header.pop(METADATA, None)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            shape = tuple(entry["shape"])
            places[name] = Place(file, entry["dtype"], shape, 8 + length + begin, end - begin)
        return places
