"""Quantised checkpoints read back: weights, scales of inputs, and what they save."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from star_elastic.architectures import read_config
from star_elastic.axes import AxisMap, Segment, TensorSpec
from star_elastic.checkpoints.layouts import (
    CODES,
    COMPRESSED_TENSORS,
    GLOBAL,
    INPUT,
    SCALES,
    read_scheme,
    stored_dtype,
    stored_map,
    stored_parts,
)
from star_elastic.checkpoints.stored import StoredModel
from star_elastic.checkpoints.tensors import (
    is_finite,
)
from star_elastic.errors import CheckpointError
from star_elastic.quant.formats import Quantised, dequantise
from star_elastic.quant.scheme import Scheme

Values = Mapping[str, torch.Tensor]


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
    for kind in (SCALES, GLOBAL):  # of halves that share a scale in memory
        if kind in found and parts[kind].dims[-1] == (Segment(1), Segment(1)):
            first, second = found[kind].split(1, -1)
            if not torch.equal(first, second):
                raise CheckpointError(
                    f"{parts[kind].pieces[0].name} and {parts[kind].pieces[1].name} are not equal "
                    "for every expert, which engines that fuse the two need; quantise it anew"
                )
            found[kind] = first
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
        stored = stored_map(config.axis_map, read_scheme(config, config.axis_map))
        source = StoredModel(path, stored, config.architecture)
        for spec in stored.tensors.values():
            for piece in spec.pieces:
                name = source.name_of(spec, piece)
                size = math.prod(source.reader.shape(name)) * source.reader.dtype(name).itemsize
                sums.setdefault(spec.part, [0, 0])[place] += size
    return {part: PartBytes(*both) for part, both in sums.items()}
