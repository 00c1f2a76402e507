"""Tensors on disk: streaming reads and writes of safetensors directories.

Knows names and files, not models.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from star_elastic.checkpoints.header import METADATA, Place, read_header
from star_elastic.checkpoints.other_weights import why_no_weights
from star_elastic.errors import CheckpointError, library_boundary
from star_elastic.files.paths import has_file, is_file, require_content
from star_elastic.files.writing import replaced, will_read, write_back, write_json

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
DEFAULT_SHARD_BYTES = 4 * 1024**3
BLOCK_BYTES = 2**20
"""What is held of a tensor while it is read, changed and written: so little that it stays in the
caches of a CPU, where each of these costs a third of what it does in memory."""
NAN_OF_FP8 = 0x7F
"""Of E4M3, without its sign."""
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
Rows = Sequence[tuple[int, int]]
"""Ranges [start, stop) of rows, in the order in which they are wanted."""


class CheckpointReader:
    """Reads tensors, or parts of them, from a safetensors directory without loading the rest.

    What is read is copied into memory of its own: no page of a file is mapped, so that a process
    holds what it has asked for and no more. Raises CheckpointError for whatever is missing or
    damaged.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._files: dict[str, Path] = {}
        self._headers: dict[Path, dict[str, Place]] = {}
        self._spare: list[torch.Tensor] = []
        index = self.path / INDEX_NAME
        single = self.path / SINGLE_NAME
        # With both present, transformers reads the single file: so do we.
        if is_file(single):
            self._files = dict.fromkeys(self._header(single), single)
        elif is_file(index):
            with library_boundary(f"{index} is damaged", "restore the file"):
                weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                self._files = {name: self.path / file for name, file in weight_map.items()}
            # transformers loads whatever the files hold, in the index or not.
            found: dict[str, Path] = {}
            for file in sorted(set(self._files.values())):
                for name in self._header(file):
                    self._require_same(name, found.setdefault(name, file), file)
            self._files = found | self._files
        elif is_file(self.path):
            raise CheckpointError(
                f"{self.path} is a file; name the checkpoint directory that it lies in"
            )
        else:
            raise CheckpointError(why_no_weights(self.path, SINGLE_NAME))

    def _require_same(self, name: str, first: Path, second: Path) -> None:
        """Raises CheckpointError for a tensor that two files hold with different values: which of
        them is the model's, nobody can tell, and transformers takes the last."""
        if first == second:
            return
        one, other = (self._header(file)[name] for file in (first, second))
        same = (one.dtype, one.shape) == (other.dtype, other.shape) and all(
            torch.equal(*blocks)
            for blocks in zip(
                *(_blocks(name, place, _memory()) for place in (one, other)), strict=True
            )
        )
        if not same:
            raise CheckpointError(
                f"{name} is in {first} and in {second} with different values; remove one of the "
                "two, or restore the files"
            )

    def _header(self, file: Path) -> dict[str, Place]:
        if file not in self._headers:
            self._headers[file] = read_header(file)
        return self._headers[file]

    @cached_property
    def names(self) -> frozenset[str]:
        """Names of all tensors."""
        return frozenset(self._files)

    @cached_property
    def _places(self) -> dict[str, Place]:
        """Of all that the files hold of what is asked of them."""
        found = ((name, self._header(file)) for name, file in self._files.items())
        return {name: header[name] for name, header in found if name in header}

    def place(self, name: str) -> Place:
        """Where a tensor lies."""
        if name in self._places:
            return self._places[name]
        if name in self._files:
            raise CheckpointError(
                f"{self._files[name]} lacks the tensor {name} that the index promises; restore "
                "the file"
            )
        raise CheckpointError(
            f"{self.path} lacks the tensor {name}, which its config.json asks for; restore the "
            "weights, or the config.json that was saved with them"
        )

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header alone."""
        return self.place(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor, from the header alone."""
        return _dtype_of(name, self.place(name))

    def read(self, name: str, rows: Rows | None = None) -> torch.Tensor:
        """A tensor, or the rows of its first dimension in these ranges, one after the other."""
        place = self.place(name)
        return _read(name, place, _all_rows(place) if rows is None else rows)

    def blocks(self, name: str, rows: Rows | None = None) -> Iterator[torch.Tensor]:
        """The same, some rows at a time: of at most `BLOCK_BYTES`, unless one row alone is more.

        A block is there until the next one is asked for, which comes to lie in the same memory:
        fresh memory for each costs as much as what is done with it.
        """
        memory = self._spare.pop() if self._spare else _memory()
        try:
            yield from _blocks(name, self.place(name), memory, rows)
        finally:
            self._spare.append(memory)

    def expect(self, name: str, rows: Rows | None = None) -> None:
        """Asks the system to fetch what will be read soon. Waits for nothing."""
        place = self.place(name)
        each = _row_bytes(place)
        with (
            library_boundary(f"{name} of {place.file} cannot be read", "restore the file"),
            open(place.file, "rb", buffering=0) as stream,
        ):
            for start, stop in _all_rows(place) if rows is None else rows:
                will_read(stream, place.start + start * each, place.start + stop * each)


def _dtype_of(name: str, place: Place) -> torch.dtype:
    if place.dtype not in DTYPES:
        raise CheckpointError(
            f"{name} has dtype {place.dtype}, which is not supported; store the weights as BF16"
        )
    return DTYPES[place.dtype]


def _all_rows(place: Place) -> Rows:
    return [(0, place.shape[0] if place.shape else 1)]


def _row_bytes(place: Place) -> int:
    return place.num_bytes // max(place.shape[0], 1) if place.shape else place.num_bytes


def _memory() -> torch.Tensor:
    return torch.empty(BLOCK_BYTES, dtype=torch.uint8)


def _read(name: str, place: Place, rows: Rows, memory: torch.Tensor | None = None) -> torch.Tensor:
    """Rows of a tensor; of a scalar, its one row. They lie in `memory` if it is large enough."""
    num_rows, each = sum(stop - start for start, stop in rows), _row_bytes(place)
    shape, dtype = (num_rows, *place.shape[1:]) if place.shape else (), _dtype_of(name, place)
    if memory is not None and 0 < num_rows * each <= len(memory):
        tensor = memory[: num_rows * each].view(dtype).view(shape)
    else:
        tensor = torch.empty(shape, dtype=dtype)
    view, filled = memoryview(bytes_of(tensor)), 0
    with (
        library_boundary(f"{name} of {place.file} cannot be read", "restore the file"),
        open(place.file, "rb", buffering=0) as stream,
    ):
        for start, stop in rows:
            stream.seek(place.start + start * each)
            end = filled + (stop - start) * each
            while filled < end:
                count = stream.readinto(view[filled:end])
                if not count:
                    raise EOFError("the file has become shorter")
                filled += count
    return tensor


def _blocks(
    name: str, place: Place, memory: torch.Tensor, rows: Rows | None = None
) -> Iterator[torch.Tensor]:
    """Each block lies in `memory` if it is large enough."""
    most = rows_at_once(_row_bytes(place))
    held: list[tuple[int, int]] = []
    room = most
    for start, stop in _all_rows(place) if rows is None else rows:
        while stop - start > room:
            yield _read(name, place, [*held, (start, start + room)], memory)
            start, held, room = start + room, [], most
        held.append((start, stop))
        room -= stop - start
    yield _read(name, place, held, memory)


def rows_at_once(row_bytes: int) -> int:
    """How many rows of so many bytes are held at once."""
    return max(BLOCK_BYTES // max(row_bytes, 1), 1)


def bytes_of(tensor: torch.Tensor) -> Any:
    """The memory of a contiguous tensor on the CPU as a numpy array of bytes."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy()


Progress = Callable[[int, int], None]
"""Called with (bytes written so far, bytes in all)."""
Value = torch.Tensor | Iterable[torch.Tensor]
"""A tensor, or blocks of its rows that follow each other."""


@dataclass(frozen=True, slots=True)
class Planned:
    """A tensor that will be written: known by name, shape and dtype before its values exist."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        size = self.dtype.itemsize
        for length in self.shape:
            size *= length
        return size


def write_tensors(
    directory: Path,
    plan: Iterable[Planned],
    value_of: Callable[[str], Value],
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Progress | None = None,
) -> None:
    """Writes a safetensors model one tensor at a time, in shards with an index if it is large.

    The header needs only shapes and dtypes, so one tensor is in memory at a time, or one block of
    one that comes in blocks. `progress` is told after each tensor. Raises CheckpointError for
    values that are not finite, which no model computes with, and AssertionError if one does not
    have its planned shape and dtype.
    """
    plan = list(plan)
    total, written = sum(entry.num_bytes for entry in plan), 0

    def on_tensor(entry: Planned) -> None:
        nonlocal written
        written += entry.num_bytes
        if progress:
            progress(written, total)

    shards: list[list[Planned]] = [[]]
    filled = 0
    for entry in plan:
        if shards[-1] and filled + entry.num_bytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += entry.num_bytes
    count = len(shards)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = SINGLE_NAME if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
        _write_shard(directory / name, shard, value_of, on_tensor)
        weight_map.update({entry.name: name for entry in shard})
    if count > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(directory / INDEX_NAME, index)


def _write_shard(file: Path, shard: list[Planned], value_of, on_tensor) -> None:
    header: dict[str, object] = {METADATA: {"format": "pt"}}
    offset = 0
    for entry in shard:
        header[entry.name] = {
            "dtype": DTYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.num_bytes],
        }
        offset += entry.num_bytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    begun = 0
    with open(file, "wb") as stream:
        stream.write(struct.pack("<Q", len(encoded)))
        stream.write(encoded)
        for entry in shard:
            written = 0
            for block in _blocks_of(entry, value_of(entry.name)):
                if not is_finite(block):
                    raise CheckpointError(
                        f"{entry.name} holds values that are not finite; restore the checkpoint "
                        "that they come from"
                    )
                written += stream.write(bytes_of(block).data)
                begun = write_back(stream, begun)
            assert written == entry.num_bytes, (entry, written)
            on_tensor(entry)


def _blocks_of(entry: Planned, value: Value) -> Iterator[torch.Tensor]:
    """A value as contiguous blocks on the CPU."""
    if isinstance(value, torch.Tensor):
        assert tuple(value.shape) == entry.shape, (entry, value.shape)
        most = rows_at_once(entry.num_bytes // max(entry.shape[0], 1)) if entry.shape else 1
        value = value.detach().split(most) if entry.shape else (value,)
    for block in value:
        assert block.shape[1:] == entry.shape[1:], (entry, block.shape)
        assert block.dtype == entry.dtype, (entry, block.dtype)
        yield block.detach().to("cpu").contiguous()


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all values of a tensor are numbers. Needs no memory of the tensor's size, unless it
    is FP8, which has no infinity, but a NaN."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    if tensor.dtype == torch.float8_e4m3fn:
        return int((tensor.view(torch.uint8) & NAN_OF_FP8).amax()) != NAN_OF_FP8
    # A NaN is both the least and the largest.
    return all(math.isfinite(end.item()) for end in torch.aminmax(tensor))


def save_tensors(file: Path, tensors: Mapping[str, torch.Tensor], metadata=None) -> None:
    """A small safetensors file, written under a temporary name and renamed into place. Raises
    CheckpointError if the disk does not take it."""
    from safetensors.torch import save

    contiguous = {name: value.detach().contiguous() for name, value in tensors.items()}
    with replaced(file) as temporary:
        # Not by `save_file`, which gives files to their owner alone, whatever the umask.
        temporary.write_bytes(save(contiguous, metadata))


def load_tensors(file: Path) -> dict[str, torch.Tensor]:
    """All tensors of a small safetensors file. Raises CheckpointError."""
    from safetensors.torch import load_file

    if not has_file(file):
        raise CheckpointError(f"{file} does not exist; name an existing safetensors file")
    require_content(file)
    with library_boundary(f"{file} cannot be read", "restore the file"):
        return load_file(file)
