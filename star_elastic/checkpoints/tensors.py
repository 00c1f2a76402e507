"""Tensors on disk: streaming reads and writes of safetensors directories.

Knows names and files, not models.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from star_elastic.checkpoints.other_weights import why_no_weights
from star_elastic.errors import CheckpointError, library_boundary
from star_elastic.files.paths import has_file, is_file, require_content
from star_elastic.files.writing import replaced, write_json

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
DEFAULT_SHARD_BYTES = 4 * 1024**3
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


class CheckpointReader:
    """Reads tensors, or parts of them, from a safetensors directory without loading the rest.

    Raises CheckpointError for whatever is missing or damaged.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._files: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}
        index = self.path / INDEX_NAME
        single = self.path / SINGLE_NAME
        # With both present, transformers reads the single file: so do we.
        if is_file(single):
            self._files = dict.fromkeys(self._handle(single).keys(), single)
        elif is_file(index):
            with library_boundary(f"{index} is damaged", "restore the file"):
                weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                self._files = {name: self.path / file for name, file in weight_map.items()}
            # transformers loads whatever the files hold, in the index or not.
            found: dict[str, Path] = {}
            for file in sorted(set(self._files.values())):
                for name in list(self._handle(file).keys()):
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
        with library_boundary(f"{name} of {second} cannot be read", "restore the file"):
            one, other = (self._handle(file).get_tensor(name) for file in (first, second))
            same = one.dtype == other.dtype and torch.equal(one, other)
        if not same:
            raise CheckpointError(
                f"{name} is in {first} and in {second} with different values; remove one of the "
                "two, or restore the files"
            )

    def _handle(self, file: Path):
        if file not in self._open:
            if is_file(file):
                require_content(file)
            with library_boundary(f"{file} cannot be read", "restore the file"):
                self._open[file] = safe_open(file, framework="pt")
        return self._open[file]

    @property
    def names(self) -> frozenset[str]:
        """Names of all tensors."""
        return frozenset(self._files)

    @property
    def files(self) -> frozenset[Path]:
        """The files that hold them."""
        return frozenset(self._files.values())

    def _require(self, name: str):
        if name not in self._files:
            raise CheckpointError(
                f"{self.path} lacks the tensor {name}, which its config.json asks for; restore "
                "the weights, or the config.json that was saved with them"
            )
        file = self._files[name]
        handle = self._handle(file)
        with library_boundary(
            f"{file} lacks the tensor {name} that the index promises", "restore it"
        ):
            return handle.get_slice(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header alone."""
        return tuple(self._require(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor, from the header alone."""
        stored = self._require(name).get_dtype()
        if stored not in DTYPES:
            raise CheckpointError(
                f"{name} has dtype {stored}, which is not supported; store the weights as BF16"
            )
        return DTYPES[stored]

    def read(self, name: str, rows: tuple[int, int] | None = None) -> torch.Tensor:
        """A tensor, or rows [start, stop) of its first dimension."""
        part = self._require(name)
        with library_boundary(f"{name} of {self._files[name]} cannot be read", "restore the file"):
            if rows is not None:
                return part[rows[0] : rows[1]]
            if part.get_shape():
                return part[:]
            return self._handle(self._files[name]).get_tensor(name)


Progress = Callable[[int, int], None]
"""Called with (bytes written so far, bytes in all)."""


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
    value_of: Callable[[str], torch.Tensor],
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Progress | None = None,
) -> None:
    """Writes a safetensors model one tensor at a time, in shards with an index if it is large.

    The header needs only shapes and dtypes, so one tensor is in memory at a time. `progress` is
    told after each. Raises CheckpointError for values that are not finite, which no model computes
    with, and AssertionError if one does not have its planned shape and dtype.
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
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
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
    with open(file, "wb") as stream:
        stream.write(struct.pack("<Q", len(encoded)))
        stream.write(encoded)
        for entry in shard:
            value = value_of(entry.name).detach().to("cpu").contiguous()
            assert tuple(value.shape) == entry.shape, (entry, value.shape)
            assert value.dtype == entry.dtype, (entry, value.dtype)
            if not is_finite(value):
                raise CheckpointError(
                    f"{entry.name} holds values that are not finite; restore the checkpoint that "
                    "they come from"
                )
            stream.write(value.reshape(-1).view(torch.uint8).numpy().data)
            on_tensor(entry)


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all values of a tensor are numbers. Needs no memory of the tensor's size, unless it
    is FP8, which has no infinity, but a NaN."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    if tensor.dtype == torch.float8_e4m3fn:
        return not ((tensor.view(torch.uint8) & NAN_OF_FP8) == NAN_OF_FP8).any()
    # A NaN is both the least and the largest.
    return all(bool(end.isfinite()) for end in torch.aminmax(tensor))


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
