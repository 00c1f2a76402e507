"""Quantises a whole checkpoint, tensor by tensor.

The model is never held in memory: one weight at a time is read, quantised and written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from star_elastic.architectures import read_config
from star_elastic.axes import Piece, TensorSpec, size_of
from star_elastic.checkpoints.layouts import (
    CODES,
    COMPRESSED_TENSORS,
    CONFIG_KEY,
    GLOBAL,
    INPUT,
    config_entry,
    stored_dtype,
    stored_parts,
)
from star_elastic.checkpoints.quantised import Values
from star_elastic.checkpoints.stored import StoredModel
from star_elastic.checkpoints.tensors import (
    DEFAULT_SHARD_BYTES,
    Planned,
    Progress,
    Value,
    is_finite,
)
from star_elastic.checkpoints.write import write_checkpoint
from star_elastic.checkpoints.written_config import written_config
from star_elastic.errors import CheckpointError, ConfigError
from star_elastic.quant.formats import Quantised, largest_of, quantise
from star_elastic.quant.scheme import Scheme, partners


@dataclass(frozen=True, slots=True)
class _Entry:
    """A tensor to write: a weight as it is, or what a quantised one holds."""

    spec: TensorSpec
    piece: Piece
    kind: str | None


class _Writer:
    """The weights of an unquantised checkpoint, quantised one after the other."""

    def __init__(self, source: StoredModel, scheme: Scheme, inputs: Values, largest: Values):
        self.source, self.scheme = source, scheme
        self.quantised = scheme.quantised(source.axis_map)
        # Weights are read on the CPU; what was measured or trained may lie on another device.
        self._inputs = {name: scale.cpu() for name, scale in inputs.items()}
        self._largest = {name: value.cpu() for name, value in largest.items()}
        self._amax: dict[str, torch.Tensor] = {}
        self._last: tuple[str, Quantised] | None = None
        self.entries: dict[str, _Entry] = {}

    def plan(self) -> Iterator[Planned]:
        """Every tensor to write; all that belong to one weight follow each other."""
        axis_map, format = self.source.axis_map, self.scheme.format
        for spec in axis_map.tensors.values():
            parts: Mapping[str | None, TensorSpec] = {None: spec}
            if spec.name in self.quantised:
                parts = {**stored_parts(spec, format, COMPRESSED_TENSORS)}
            for number, piece in enumerate(spec.pieces):
                name = self.source.name_of(spec, piece)
                for kind, part in parts.items():
                    written = part.pieces[number]
                    shape = axis_map.shape(part.on_disk(written), axis_map.full)
                    dtype = stored_dtype(kind, format) if kind else self.source.reader.dtype(name)
                    self.entries[written.name] = _Entry(spec, piece, kind)
                    yield Planned(written.name, shape, dtype)

    def value_of(self, name: str) -> Value:
        """The value of a planned tensor."""
        entry = self.entries[name]
        if entry.kind is None:
            return self.source.reader.blocks(self.source.name_of(entry.spec, entry.piece))
        if entry.kind == INPUT:
            scale = self._inputs[entry.spec.name].float().reshape(1)
            return 1 / scale if self.scheme.format.packed else scale
        weight = self._quantise(entry.spec, entry.piece)
        if entry.kind == GLOBAL:
            assert weight.global_scale is not None
            return 1 / weight.global_scale
        return weight.codes if entry.kind == CODES else weight.scales

    def _read(self, spec: TensorSpec, piece: Piece) -> torch.Tensor:
        return self.source.reader.read(self.source.name_of(spec, piece))

    def _quantise(self, spec: TensorSpec, piece: Piece) -> Quantised:
        if self._last is None or self._last[0] != piece.name:
            largest = self._largest_of(spec, piece)
            weight = self._read(spec, piece)
            if not is_finite(weight):
                raise CheckpointError(
                    f"{piece.name} is not finite; restore the checkpoint it comes from"
                )
            self._last = piece.name, quantise(weight, self.scheme.format, largest)
        return self._last[1]

    def _largest_of(self, spec: TensorSpec, piece: Piece) -> torch.Tensor | None:
        """What the scales of a piece come from, if not from its own values alone: frozen values, or
        those of all weights that engines fuse with it."""
        if spec.name in self._largest:
            largest = self._largest[spec.name]
            if piece.index is not None:
                largest = largest[piece.index]
            if piece.segment is not None and len(largest) > 1:  # by rows, or blocks of rows
                rows, half = size_of(spec.dims[1]), spec.box(piece)[-1]
                assert isinstance(half, slice)
                start, stop = (end * len(largest) // rows for end in (half.start, half.stop))
                largest = largest[start:stop]
            return largest
        if not self.scheme.format.has_one_scale:
            return None
        names = [name for name in partners(spec.name) if name in self.quantised]
        specs = [self.source.axis_map.tensors[name] for name in names]
        together = [(own, p) for own in specs for p in own.pieces if p.index == piece.index]
        for other, its_piece in together:
            if its_piece.name not in self._amax:
                weight = self._read(other, its_piece)
                self._amax[its_piece.name] = largest_of(weight, self.scheme.format)
        return torch.stack([self._amax[p.name] for _, p in together]).amax(0)


def quantise_checkpoint(
    path: str | Path,
    scheme: Scheme,
    out: str | Path,
    *,
    input_scales: Values | None = None,
    largest: Values | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Progress | None = None,
    finish: Callable[[Path], None] | None = None,
) -> None:
    """Writes a checkpoint with the weights of `scheme` quantised to the new directory `out`.

    `input_scales` by weight, for formats whose inputs are calibrated; `largest`: magnitudes frozen
    before in place of the weights' own. `finish(directory)` may add files before the directory gets
    its name. Raises ConfigError for a checkpoint that is quantised already or scales that are
    missing, CheckpointError for a damaged one; nothing is left behind then.
    """
    path = Path(path)
    config = read_config(path)
    if config.get(CONFIG_KEY):
        raise ConfigError(f"{path} is quantised already; quantise the checkpoint it was made from")
    axis_map = config.axis_map
    source = StoredModel(path, axis_map, config.architecture)
    source.require_whole()
    writer = _Writer(source, scheme, input_scales or {}, largest or {})
    lacking = writer.quantised.keys() - (input_scales or {}).keys()
    if scheme.format.is_calibrated and lacking:
        raise ConfigError(
            f"{scheme.format.name} needs a scale for the inputs of {min(lacking)} "
            f"({len(lacking)} such); calibrate it on data"
        )
    plan = list(writer.plan())
    whole = written_config(config.at(axis_map.full), axis_map, source.dtype, scheme)
    write_checkpoint(
        out, {**whole, CONFIG_KEY: config_entry(axis_map, scheme)}, path, plan, writer.value_of,
        max_shard_bytes=max_shard_bytes, progress=progress, finish=finish,
    )  # fmt: skip
