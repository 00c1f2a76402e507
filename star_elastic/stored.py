"""A checkpoint on disk seen through the axis map: what its tensors are called, and their values.

Values come from the mapped file where they can stay as they are, so that memory holds only what has
been used and processes share it. Everything else is copied from a mapping that goes away with it.
"""

from __future__ import annotations

import json
import math
import mmap
import struct
from functools import cached_property
from pathlib import Path

import torch

from star_elastic.axes import AxisMap, Piece, TensorSpec
from star_elastic.checkpoint import CheckpointReader
from star_elastic.errors import CheckpointError
from star_elastic.families.base import Family


class StoredModel:
    """A checkpoint read through the axis map: names resolved, shapes checked."""

    def __init__(self, path: Path, axis_map: AxisMap, family: Family):
        self.reader = CheckpointReader(path)
        self.axis_map = axis_map
        self._family = family
        self._aliases = {new: old for old, new in family.prefix_aliases.items()}
        known = {piece.name for spec in axis_map.tensors.values() for piece in spec.pieces}
        known |= {self._alias(name) for name in known}
        self.others = sorted(self.reader.names - known)
        """Names of the tensors that the table does not know."""

    def _alias(self, name: str) -> str:
        for new, old in self._aliases.items():
            if name.startswith(new):
                return old + name.removeprefix(new)
        return name

    def name_of(self, spec: TensorSpec, piece: Piece) -> str:
        """The stored name of a piece, checked against the shape of the table."""
        alias = self._alias(piece.name)
        name = alias if alias in self.reader.names else piece.name
        expected = self.axis_map.shape(spec, self.axis_map.full)
        if piece.index is not None:
            expected = expected[1:]
        if self.reader.shape(name) != expected:
            raise CheckpointError(
                f"{name} has shape {self.reader.shape(name)} but config.json says {expected}; "
                "the two do not belong together"
            )
        return name

    def require_known(self) -> None:
        """Raises CheckpointError if a tensor would be lost by writing those of the table only."""
        extra = [n for n in self.others if not any(part in n for part in self._family.ignored)]
        if extra:
            raise CheckpointError(
                f"{self.reader.path} holds the tensor {extra[0]} ({len(extra)} such), which the "
                f"{self.axis_map.family} table does not know; nothing was written"
            )

    def state(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Every tensor by its name in memory, in the dtype that a model of `dtype` has it in.

        Tensors that the table does not know keep their names. Raises CheckpointError for one that
        is missing or of another shape.
        """
        state = {name: self.reader.read(name) for name in self.others}
        return state | {
            spec.name: self.tensor(spec, dtype) for spec in self.axis_map.tensors.values()
        }

    def tensor(self, spec: TensorSpec, dtype: torch.dtype) -> torch.Tensor:
        """One tensor in the dtype that a model of `dtype` has it in."""
        names = [self.name_of(spec, piece) for piece in spec.pieces]
        wanted = torch.float32 if spec.keep_fp32 else dtype
        mapped = None
        if {self.reader.dtype(name) for name in names} == {wanted}:
            is_stacked = spec.pieces[0].index is not None
            mapped = self._map(spec, names) if is_stacked else self.reader.read(names[0])
        return self._copy(spec, names, wanted) if mapped is None else mapped

    def stored(self, spec: TensorSpec) -> torch.Tensor:
        """One tensor in the dtype that it is stored in."""
        return self.tensor(spec, self.reader.dtype(self.name_of(spec, spec.pieces[0])))

    def _map(self, spec: TensorSpec, names: list[str]) -> torch.Tensor | None:
        """A stacked tensor as it lies in the file, if its pieces stand there in their order."""
        shape, dtype = self.axis_map.shape(spec, self.axis_map.full), self.reader.dtype(names[0])
        places = [self._places[name] for name in names]
        file, start = places[0]
        length = math.prod(shape) * dtype.itemsize
        piece = length // len(names)
        if places != [(file, start + number * piece) for number in range(len(names))]:
            return None
        before = start % mmap.ALLOCATIONGRANULARITY
        with open(file, "rb") as stream:
            mapped = mmap.mmap(
                stream.fileno(), before + length, access=mmap.ACCESS_COPY, offset=start - before
            )
        return torch.frombuffer(mapped, dtype=dtype, count=math.prod(shape), offset=before).reshape(
            shape
        )

    @cached_property
    def _places(self) -> dict[str, tuple[Path, int]]:
        """File and first byte of every tensor."""
        places = {}
        for file in self.reader.files:
            with open(file, "rb") as stream:
                (length,) = struct.unpack("<Q", stream.read(8))
                header = json.loads(stream.read(length))
            for name in header.keys() - {"__metadata__"}:
                places[name] = (file, 8 + length + header[name]["data_offsets"][0])
        return places

    def _copy(self, spec: TensorSpec, names: list[str], dtype: torch.dtype) -> torch.Tensor:
        """A tensor in memory of its own; no page of the file stays resident for it."""
        reader = CheckpointReader(self.reader.path)
        whole = torch.empty(self.axis_map.shape(spec, self.axis_map.full), dtype=dtype)
        parts = [whole] if spec.pieces[0].index is None else whole
        for part, name in zip(parts, names, strict=True):
            part.copy_(reader.read(name))
        return whole
