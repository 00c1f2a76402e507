"""A checkpoint on disk seen through the axis map: what its tensors are called, and their values.

Values come from the mapped file where they can stay as they are, so that memory holds only what has
been used and processes share it. Everything else is read into memory of its own.
"""

from __future__ import annotations

import math
import mmap
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path

import torch

from star_elastic.architectures import Architecture
from star_elastic.axes import AxisMap, Piece, TensorSpec
from star_elastic.checkpoints.tensors import CheckpointReader
from star_elastic.errors import CheckpointError, library_boundary

WEIGHT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
ROWS_AT_ONCE = 1024
"""Rows of two tables that are held to compare them."""


class StoredModel:
    """A checkpoint read through the axis map: names resolved, shapes checked."""

    def __init__(self, path: Path, axis_map: AxisMap, architecture: Architecture):
        self.reader = CheckpointReader(path)
        self.axis_map = axis_map
        self._architecture = architecture

    def _stored_name(self, piece: Piece) -> str:
        """The name that the file has for a piece, whoever wrote it."""
        own, name = self._architecture.disk_prefix, piece.name
        if name.startswith(own):
            others = (other + name.removeprefix(own) for other in self._architecture.other_prefixes)
            return next((other for other in others if other in self.reader.names), name)
        return name

    def name_of(self, spec: TensorSpec, piece: Piece) -> str:
        """The stored name of a piece, checked against the shape of the table."""
        name = self._stored_name(piece)
        expected = self.axis_map.shape(spec.on_disk(piece), self.axis_map.full)
        if name not in self.reader.names and name in self._architecture.copies:
            raise CheckpointError(
                f"{self.reader.path} lacks the tensor {name}; set tie_word_embeddings=true in "
                "config.json if its model has none of its own, else restore the file"
            )
        if name not in self.reader.names and piece.index is not None:
            self._require_one_by_one(spec)
        if self.reader.shape(name) != expected:
            raise CheckpointError(
                f"{name} of {self.reader.path} has shape {self.reader.shape(name)} but config.json "
                f"says {expected}; restore the config.json that was saved with these weights"
            )
        return name

    def _require_one_by_one(self, spec: TensorSpec) -> None:
        """Raises CheckpointError for experts that a file holds as memory does: stacked."""
        rest, its = spec.name.removeprefix("model."), self._architecture
        prefixes = {"model.", its.disk_prefix, *its.other_prefixes}
        stack = min({prefix + rest for prefix in prefixes} & self.reader.names, default="")
        if not stack:
            return
        raise CheckpointError(
            f"{self.reader.path} holds its experts stacked in one tensor ({stack}), and they are "
            "read one by one; load its state_dict into a model that transformers makes by "
            "from_config, and save that with save_pretrained"
        )

    def require_whole(self) -> None:
        """Checks from the headers alone that the file holds the model of its config, no less and no
        more. Raises CheckpointError naming the tensor and what to do.

        What a file holds beyond the table would be lost without a word, or be another model than
        the one that is read: a head of its own beside embeddings that the config ties.
        """
        known = set()
        for spec in self.axis_map.tensors.values():
            for piece in spec.pieces:
                name = self.name_of(spec, piece)
                known.add(name)
                if not spec.coded and self.reader.dtype(name) not in WEIGHT_DTYPES:
                    raise CheckpointError(
                        f"{name} of {self.reader.path} is stored as {self.reader.dtype(name)}, "
                        "which no unquantised weight is; store it as BF16"
                    )
        unknown = [
            name
            for name in sorted(self.reader.names - known)
            if not any(part in name for part in self._architecture.ignored)
            and not self._is_copy(name)
        ]
        if unknown:
            raise CheckpointError(
                f"{self.reader.path} holds the tensor {unknown[0]} ({len(unknown)} such), which "
                f"the {self.axis_map.model_type} table does not know and which would be lost; "
                "remove it from the file, or use another model"
            )

    def _is_copy(self, name: str) -> bool:
        """Whether a tensor repeats another one. Raises CheckpointError if it should but does not:
        transformers would load it as a tensor of its own."""
        original = self._architecture.copies.get(name)
        if original is None or original not in self.axis_map.tensors:
            return False
        reader = self.reader
        if reader.shape(name) == reader.shape(original) and all(
            torch.equal(*(reader.read(n, [rows]).float() for n in (name, original)))
            for rows in _ranges(reader.shape(name)[0])
        ):
            return True
        raise CheckpointError(
            f"{reader.path} holds a {name} of its own, but its config.json ties it to {original}; "
            "set tie_word_embeddings=false in config.json, or remove the tensor"
        )

    @cached_property
    def dtypes(self) -> dict[str, torch.dtype]:
        """The dtype that every tensor is stored in, by its name in memory, without those `coded` in
        a format. Of the files' headers: configs may name another one, or none."""
        return {
            spec.name: self.reader.dtype(self.name_of(spec, spec.pieces[0]))
            for spec in self.axis_map.tensors.values()
            if not spec.coded
        }

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that most of the weights are stored in, counted by elements."""
        return most_common_dtype(self.dtypes, self.axis_map)

    def state(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Every tensor by its name in memory, in the dtype that a model of `dtype` has it in.

        Raises CheckpointError for one that is missing or of another shape.
        """
        return {spec.name: self.tensor(spec, dtype) for spec in self.axis_map.tensors.values()}

    def tensor(self, spec: TensorSpec, dtype: torch.dtype) -> torch.Tensor:
        """One tensor in the dtype that a model of `dtype` has it in."""
        names = [self.name_of(spec, piece) for piece in spec.pieces]
        wanted = torch.float32 if spec.keep_fp32 and dtype.itemsize < 4 else dtype
        mapped = None
        if {self.reader.dtype(name) for name in names} == {wanted}:
            mapped = self._map(spec, names)
        return self._copy(spec, names, wanted) if mapped is None else mapped

    def stored(self, spec: TensorSpec) -> torch.Tensor:
        """One tensor in the dtype that it is stored in."""
        return self.tensor(spec, self.reader.dtype(self.name_of(spec, spec.pieces[0])))

    def _map(self, spec: TensorSpec, names: list[str]) -> torch.Tensor | None:
        """A tensor as it lies in the file, if there is one, its pieces stand there in their order
        and where its dtype can be read."""
        shape, dtype = self.axis_map.shape(spec, self.axis_map.full), self.reader.dtype(names[0])
        places = [self.reader.place(name) for name in names]
        file, start = places[0].file, places[0].start
        length = math.prod(shape) * dtype.itemsize
        piece = length // len(names)
        wanted = [(file, start + number * piece) for number in range(len(names))]
        if [(place.file, place.start) for place in places] != wanted:
            return None
        if not length or start % dtype.itemsize:
            return None
        before = start % mmap.ALLOCATIONGRANULARITY
        with (
            library_boundary(f"{names[0]} of {file} cannot be read", "restore the file"),
            open(file, "rb") as stream,
        ):
            mapped = mmap.mmap(
                stream.fileno(), before + length, access=mmap.ACCESS_COPY, offset=start - before
            )
        return torch.frombuffer(mapped, dtype=dtype, count=math.prod(shape), offset=before).reshape(
            shape
        )

    def _copy(self, spec: TensorSpec, names: list[str], dtype: torch.dtype) -> torch.Tensor:
        """A tensor in memory of its own."""
        whole = torch.empty(self.axis_map.shape(spec, self.axis_map.full), dtype=dtype)
        for piece, name in zip(spec.pieces, names, strict=True):
            box, done = whole[spec.box(piece)], 0
            for block in self.reader.blocks(name):
                if not block.dim():
                    box.copy_(block)
                    continue
                box[done : done + len(block)].copy_(block)
                done += len(block)
        return whole


def _ranges(num_rows: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows that cover all."""
    for start in range(0, num_rows, ROWS_AT_ONCE):
        yield start, min(start + ROWS_AT_ONCE, num_rows)


def most_common_dtype(dtypes: Mapping[str, torch.dtype], axis_map: AxisMap) -> torch.dtype:
    """The dtype of most elements, of tensors with a dtype by name, but those that stay in fp32."""
    sizes: Counter[torch.dtype] = Counter()
    for name, dtype in dtypes.items():
        spec = axis_map.tensors[name]
        if not spec.keep_fp32:
            sizes[dtype] += math.prod(axis_map.shape(spec, axis_map.full))
    return sizes.most_common(1)[0][0]
