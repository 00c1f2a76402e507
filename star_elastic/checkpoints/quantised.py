"""Quantised checkpoints: written tensor by tensor from an unquantised one, and read back.

The model is never held in memory: one weight at a time is read, quantised and written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from star_elastic.architectures import family_of, read_config
from star_elastic.axes import AxisMap, Piece, TensorSpec
from star_elastic.checkpoints.companions import INPUT_SCALES, copy_companions
from star_elastic.checkpoints.stored import StoredModel
from star_elastic.checkpoints.tensors import (
    DEFAULT_SHARD_BYTES,
    Planned,
    is_finite,
    load_tensors,
    new_directory,
    save_tensors,
    write_json,
    write_tensors,
)
from star_elastic.errors import CheckpointError, ConfigError
from star_elastic.export.engines import written_config
from star_elastic.files.paths import has_file
from star_elastic.manifest import Manifest
from star_elastic.quant.formats import Quantised, dequantise, largest_of, quantise
from star_elastic.quant.scheme import (
    CODES,
    COMPRESSED_TENSORS,
    CONFIG_KEY,
    GLOBAL,
    INPUT,
    SCALES,
    Scheme,
    config_entry,
    partners,
    read_scheme,
    stored_dtype,
    stored_map,
    stored_parts,
)

Progress = Callable[[int, int], None]
"""Called with (bytes written so far, bytes in all)."""
Values = Mapping[str, torch.Tensor]


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
        self._inputs, self._largest = inputs, largest
        self._amax: dict[str, torch.Tensor] = {}
        self._last: tuple[str, Quantised] | None = None
        self.entries: dict[str, _Entry] = {}

    def plan(self) -> Iterator[Planned]:
        """Every tensor to write; all that belong to one weight follow each other."""
        axis_map, format = self.source.axis_map, self.scheme.format
        for spec in axis_map.tensors.values():
            stacked = spec.pieces[0].index is not None
            parts: Mapping[str | None, TensorSpec] = {None: spec}
            if spec.name in self.quantised:
                parts = {**stored_parts(spec, format, COMPRESSED_TENSORS)}
            for number, piece in enumerate(spec.pieces):
                name = self.source.name_of(spec, piece)
                for kind, part in parts.items():
                    shape = axis_map.shape(part, axis_map.full)[int(stacked) :]
                    dtype = stored_dtype(kind, format) if kind else self.source.reader.dtype(name)
                    written = part.pieces[number].name
                    self.entries[written] = _Entry(spec, piece, kind)
                    yield Planned(written, shape, dtype)

    def value_of(self, name: str) -> torch.Tensor:
        """The value of a planned tensor."""
        entry = self.entries[name]
        if entry.kind is None:
            return self._read(entry.spec, entry.piece)
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
            return largest if piece.index is None else largest[piece.index]
        if not self.scheme.format.has_one_scale:
            return None
        names = [name for name in partners(spec.name) if name in self.quantised]
        specs = [self.source.axis_map.tensors[name] for name in names]
        together = [other.pieces[piece.index or 0] for other in specs]
        for other, its_piece in zip(specs, together, strict=True):
            if its_piece.name not in self._amax:
                weight = self._read(other, its_piece)
                self._amax[its_piece.name] = largest_of(weight, self.scheme.format)
        return torch.stack([self._amax[p.name] for p in together]).amax(0)


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
    family = family_of(config)
    axis_map = family.axis_map(config)
    source = StoredModel(path, axis_map, family)
    source.require_whole()
    writer = _Writer(source, scheme, input_scales or {}, largest or {})
    lacking = writer.quantised.keys() - (input_scales or {}).keys()
    if scheme.format.is_calibrated and lacking:
        raise ConfigError(
            f"{scheme.format.name} needs a scale for the inputs of {min(lacking)} "
            f"({len(lacking)} such); calibrate it on data"
        )
    plan = list(writer.plan())
    total, written = sum(planned.num_bytes for planned in plan), 0

    def on_tensor(planned: Planned) -> None:
        nonlocal written
        written += planned.num_bytes
        if progress:
            progress(written, total)

    whole = family.config_at(config, axis_map.full)
    whole = written_config(whole, axis_map, source.dtype, scheme)
    with new_directory(out) as directory:
        copy_companions(path, directory)
        write_json(directory / "config.json", {**whole, CONFIG_KEY: config_entry(axis_map, scheme)})
        write_tensors(
            directory, plan, writer.value_of,
            max_shard_bytes=max_shard_bytes, on_tensor=on_tensor,
        )  # fmt: skip
        if finish:
            finish(directory)


def read_weight(source: StoredModel, spec: TensorSpec, scheme: Scheme) -> Quantised:
    """A quantised weight of a checkpoint whose map is that of its stored tensors.

    Raises CheckpointError for scales or codes that are no numbers.
    """
    parts = stored_parts(spec, scheme.format, COMPRESSED_TENSORS)
    found = {kind: source.stored(part) for kind, part in parts.items() if kind != INPUT}
    for kind, value in found.items():
        if value.dtype != stored_dtype(kind, scheme.format):
            raise CheckpointError(
                f"{parts[kind].name} is stored as {value.dtype}, not as "
                f"{stored_dtype(kind, scheme.format)}; it is not of the format {scheme.format.name}"
            )
        if not is_finite(value):
            raise CheckpointError(
                f"{parts[kind].name} holds values that are no numbers; restore it"
            )
    for kind in (SCALES, GLOBAL):
        if kind in found and not (found[kind].float() > 0).all():
            raise CheckpointError(
                f"{parts[kind].name} holds a scale that is not > 0; restore the file"
            )
    global_scale = 1 / found[GLOBAL] if GLOBAL in found else None
    return Quantised(scheme.format, found[CODES], found[SCALES], global_scale)


def read_input_scales(
    source: StoredModel, axis_map: AxisMap, scheme: Scheme
) -> dict[str, torch.Tensor]:
    """Scales of the inputs by weight, fp32 (1,), the largest of a stack of experts; none where
    inputs are not calibrated. Raises CheckpointError for scales that are no positive numbers."""
    scales = {}
    if scheme.format.is_calibrated:
        for name, spec in scheme.quantised(axis_map).items():
            part = stored_parts(spec, scheme.format, COMPRESSED_TENSORS)[INPUT]
            stored = source.stored(part).float()
            if not (torch.isfinite(stored) & (stored > 0)).all():
                raise CheckpointError(f"{part.name} is not > 0; restore the checkpoint")
            scales[name] = (1 / stored if scheme.format.packed else stored).amax().reshape(1)
    return scales


def model_state(
    source: StoredModel, axis_map: AxisMap, scheme: Scheme, dtype: torch.dtype, *, codes: bool
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Every tensor of the model by its name in memory, and scales of weights by name.

    Quantised weights are what they stand for, in `dtype`, or their FP8 `codes`, which need the
    scales.
    """
    quantised = scheme.quantised(axis_map)
    state: dict[str, Any] = {}
    scales = {}
    for name, spec in axis_map.tensors.items():
        if name not in quantised:
            state[name] = source.tensor(spec, dtype)
            continue
        weight = read_weight(source, spec, scheme)
        if codes:
            state[name], scales[name] = weight.codes, weight.scales
        else:
            state[name] = dequantise(weight).to(dtype)
    return state, scales


# Scales of every size's own inputs


def save_input_scales(directory: Path, scales: Mapping[str, Values]) -> None:
    """Writes the scales of every size, by the names of the weights in the parent."""
    flat = {f"{size}/{n}": scale for size, own in scales.items() for n, scale in own.items()}
    save_tensors(directory / INPUT_SCALES, flat)


def load_input_scales(directory: Path, manifest: Manifest, size: str) -> dict[str, torch.Tensor]:
    """The scales of one size's inputs; empty if it has those of the checkpoint itself.

    Raises CheckpointError if the size has some of its own and they are not there: with the shared
    ones its outputs would be others, and nothing would show it.
    """
    file = directory / INPUT_SCALES
    is_named = size in manifest.own_input_scales
    if not is_named and not has_file(file):
        return {}
    start = f"{size}/"
    found = load_tensors(file)
    scales = {n.removeprefix(start): scale for n, scale in found.items() if n.startswith(start)}
    if is_named and not scales:
        raise CheckpointError(f"{file} lacks the scales of size {size!r}; restore the file")
    return scales


def stored_input_scales(
    scales: Values, axis_map: AxisMap, scheme: Scheme
) -> dict[str, torch.Tensor]:
    """Scales as a checkpoint holds them, by the names of the stored tensors in memory."""
    found = {}
    for name, scale in scales.items():
        part = stored_parts(axis_map.tensors[name], scheme.format, COMPRESSED_TENSORS)[INPUT]
        found[part.name] = (1 / scale if scheme.format.packed else scale).float().reshape(1)
    return found


# What it saves


@dataclass(frozen=True, slots=True)
class PartBytes:
    """Bytes of one part of a model before and after."""

    before: int
    after: int


def count_bytes(before: Path, after: Path) -> dict[str, PartBytes]:
    """Bytes of every part of a checkpoint and of its quantised form, from the files' headers."""
    sums: dict[str, list[int]] = {}
    for place, path in enumerate((before, after)):
        config = read_config(path)
        family = family_of(config)
        axis_map = family.axis_map(config)
        stored = stored_map(axis_map, read_scheme(config, axis_map))
        source = StoredModel(path, stored, family)
        for spec in stored.tensors.values():
            for piece in spec.pieces:
                name = source.name_of(spec, piece)
                size = math.prod(source.reader.shape(name)) * source.reader.dtype(name).itemsize
                sums.setdefault(spec.part, [0, 0])[place] += size
    return {part: PartBytes(*both) for part, both in sums.items()}
