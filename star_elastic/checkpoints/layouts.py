"""The tensors that a quantised checkpoint holds, and what its config files say of them.

A quantised weight is several tensors on disk: codes, scales of blocks, scales of the whole. Each of
them has dimensions that the axes cut, too, some of them in units that only whole blocks fill. So a
quantised checkpoint has an axis map like any other, and is cut by the same code.

Layouts follow what engines read: `compressed-tensors` (its quantization_config in config.json) and
ModelOpt's (`hf_quant_config.json`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from star_elastic.axes import AxisMap, Dim, Segment, TensorSpec, fixed
from star_elastic.errors import ConfigError, reason
from star_elastic.nesting.slice import slice_tensor
from star_elastic.quant.formats import E4M3, FORMATS, Format
from star_elastic.quant.scheme import Scheme, quantisable

CONFIG_KEY = "quantization_config"
COMPRESSED_TENSORS, MODELOPT = "compressed-tensors", "modelopt"
LAYOUTS = (COMPRESSED_TENSORS, MODELOPT)
MODELOPT_FILE = "hf_quant_config.json"
MODELOPT_ALGORITHMS = {"fp8": "FP8", "nvfp4": "NVFP4"}
"""Formats that are written in ModelOpt's layout."""
CODES, SCALES, GLOBAL, INPUT = "codes", "scales", "global", "input"
SUFFIXES = {
    (COMPRESSED_TENSORS, False): {CODES: "weight", SCALES: "weight_scale", INPUT: "input_scale"},
    (COMPRESSED_TENSORS, True): {
        CODES: "weight_packed", SCALES: "weight_scale", GLOBAL: "weight_global_scale",
        INPUT: "input_global_scale",
    },
    (MODELOPT, False): {CODES: "weight", SCALES: "weight_scale", INPUT: "input_scale"},
    (MODELOPT, True): {
        CODES: "weight", SCALES: "weight_scale", GLOBAL: "weight_scale_2", INPUT: "input_scale",
    },
}  # fmt: skip
"""Names of the stored tensors, by layout and whether codes are packed. compressed-tensors stores
global scales as their reciprocals."""


def stored_map(
    axis_map: AxisMap, scheme: Scheme | None, layout: str = COMPRESSED_TENSORS
) -> AxisMap:
    """The axis map of a checkpoint's own tensors; the model's own without a scheme."""
    if scheme is None:
        return axis_map
    quantised = scheme.quantised(axis_map)

    def stored(name: str, spec: TensorSpec) -> Iterable[TensorSpec]:
        return stored_parts(spec, scheme.format, layout).values() if name in quantised else (spec,)

    return axis_map.with_tensors(stored)


def stored_parts(spec: TensorSpec, format: Format, layout: str) -> dict[str, TensorSpec]:
    """The stored tensors of one quantised weight, by what they hold. Of halves that lie apart on
    disk (gate and up), each has its own."""
    *stack, rows, columns = spec.dims
    one = fixed(1) * len({piece.segment for piece in spec.pieces})
    dims = {CODES: (rows, _shared(columns, 2) if format.packed else columns), GLOBAL: (one,)}
    dims[INPUT] = (one,)
    if format.block == (0, 0):
        dims[SCALES] = (one,)
    else:
        by_rows, by_columns = format.block
        scale_columns = _shared(columns, by_columns) if by_columns else fixed(1)
        dims[SCALES] = (_shared(rows, by_rows), scale_columns)
    suffixes = SUFFIXES[layout, format.packed]
    kinds = [CODES, SCALES]
    kinds += [GLOBAL] if format.has_global_scale else []
    kinds += [INPUT] if format.is_calibrated else []
    return {
        kind: replace(
            spec,
            name=f"{spec.name.removesuffix('.weight')}.{suffixes[kind]}",
            dims=(*stack, *dims[kind]),
            pieces=tuple(
                replace(piece, name=f"{piece.name.removesuffix('.weight')}.{suffixes[kind]}")
                for piece in spec.pieces
            ),
            is_buffer=kind != CODES,
            coded=True,
        )
        for kind in kinds
    }


def cut_scales(
    values: torch.Tensor, spec: TensorSpec, scheme: Scheme, widths: Mapping
) -> torch.Tensor:
    """What is left at `widths`, as the weight's layer sees them, of values in the shape of its
    outermost scales."""
    kind = GLOBAL if scheme.format.has_global_scale else SCALES
    # In memory halves share a scale, if there is one for all rows.
    whole = replace(spec, pieces=tuple(replace(piece, segment=None) for piece in spec.pieces))
    part = stored_parts(whole, scheme.format, COMPRESSED_TENSORS)[kind]
    return slice_tensor(values, part.dims, widths)


def stored_dtype(kind: str, format: Format) -> torch.dtype:
    """The dtype of a stored tensor."""
    if kind == CODES:
        return torch.uint8 if format.packed else E4M3
    return E4M3 if kind == SCALES and format.packed else torch.float32


def _shared(dim: Dim, block: int) -> Dim:
    """A dimension of which `block` neighbours share one element."""
    return tuple(_shared_segment(segment, block) for segment in dim)


def _shared_segment(segment: Segment, block: int) -> Segment:
    if block == 1:
        return segment
    if segment.axis is None:
        return Segment(segment.size // block)
    if segment.unit % block == 0:
        return replace(segment, unit=segment.unit // block)
    return replace(segment, per=block)


def config_entry(axis_map: AxisMap, scheme: Scheme) -> dict[str, Any]:
    """`quantization_config` of config.json, in the schema of compressed-tensors."""
    format = scheme.format
    kind: dict[str, Any] = {"num_bits": 4 if format.packed else 8, "type": "float"}
    kind |= {"symmetric": True}
    weights = {**kind, "dynamic": False, **_strategy(format.block)}
    inputs = {
        "static": {**kind, "strategy": "tensor", "dynamic": False},
        "token": {**kind, "strategy": "token", "dynamic": True},
        "group": {**kind, "strategy": "group", "group_size": format.block[1], "dynamic": True},
        "block": {**kind, "strategy": "tensor_group", "group_size": 16, "dynamic": "local"},
    }[format.activations]
    if format.packed:
        weights["scale_dtype"] = inputs["scale_dtype"] = "torch.float8_e4m3fn"
    stored = "nvfp4-pack-quantized" if format.packed else "float-quantized"
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": COMPRESSED_TENSORS,
        "format": stored,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {**group, "output_activations": None, "format": stored}},
        "ignore": ignored(axis_map, scheme),
        "kv_cache_scheme": None,
    }


def _strategy(block: tuple[int, int]) -> dict[str, Any]:
    match block:
        case (0, 0):
            return {"strategy": "tensor"}
        case (1, 0):
            return {"strategy": "channel"}
        case (1, 16):
            return {"strategy": "tensor_group", "group_size": 16}
        case _:
            return {"strategy": "block", "block_structure": list(block)}


def ignored(axis_map: AxisMap, scheme: Scheme) -> list[str]:
    """Paths of the layers with matrices that are not quantised. Convolutions and routers are no
    `Linear` in transformers, but are in engines."""
    quantised = scheme.quantised(axis_map)
    tied = all(spec.part != "head" for spec in axis_map.tensors.values())
    paths = ["lm_head"] if tied else []  # a layer of its own in transformers all the same
    for name, spec in axis_map.tensors.items():
        if name in quantised or spec.lookup or spec.is_buffer or not spec.is_matrix:
            continue
        paths += ignored_paths(spec)
    return paths


def read_scheme(config: Mapping[str, Any], axis_map: AxisMap) -> Scheme | None:
    """The scheme of a checkpoint by its config; None if it is not quantised.

    Raises ConfigError for a quantisation that this package does not write.
    """
    entry = config.get(CONFIG_KEY)
    if not entry:
        return None
    refusal = ConfigError(
        "the checkpoint is quantised in a way that star-elastic does not read; use its unquantised "
        "original, or one that star-elastic quantize has made"
    )
    try:
        (group,) = entry["config_groups"].values()
        paths = set(entry["ignore"])
        kept = frozenset(
            spec.name for spec in quantisable(axis_map) if not paths.isdisjoint(ignored_paths(spec))
        )
        for format in FORMATS.values():
            scheme = Scheme(format, kept)
            expected = config_entry(axis_map, scheme)
            (own,) = expected["config_groups"].values()
            if entry["format"] == expected["format"] and all(
                _agree(group[side], own[side]) for side in ("weights", "input_activations")
            ):
                return scheme
    except (KeyError, TypeError, ValueError, AttributeError):
        raise refusal from None
    raise refusal


def ignored_paths(spec: TensorSpec) -> list[str]:
    """The paths under which a weight would stand among those that are ignored."""
    if not spec.is_stacked:
        return [spec.name.removesuffix(".weight")]
    stem = spec.name.rpartition(".")[0]
    names = (piece.name.removesuffix(".weight").rpartition(".")[2] for piece in spec.pieces)
    return [f"{stem}.{p.index}.{name}" for p, name in zip(spec.pieces, names, strict=True)]


def _agree(found: Mapping[str, Any], own: Mapping[str, Any]) -> bool:
    """Whether what we would write is said there, whatever else is."""
    return all(found.get(key) == value for key, value in own.items() if key != "scale_dtype")


def require_layout(scheme: Scheme | None, layout: str) -> None:
    """Raises ConfigError for a layout that is unknown, or in which the scheme is not written."""
    if layout not in LAYOUTS:
        raise ConfigError(f"layout {layout!r} is unknown; use {' or '.join(LAYOUTS)}")
    if layout == MODELOPT and (scheme is None or scheme.format.name not in MODELOPT_ALGORITHMS):
        what = "an unquantised family" if scheme is None else scheme.format.name
        raise ConfigError(
            f"ModelOpt's layout is written for {' and '.join(MODELOPT_ALGORITHMS)}, not for "
            f"{what}; leave --layout out"
        )


def modelopt_entry(axis_map: AxisMap, scheme: Scheme) -> dict[str, Any]:
    """`hf_quant_config.json` of ModelOpt."""
    details: dict[str, Any] = {
        "quant_algo": MODELOPT_ALGORITHMS[scheme.format.name],
        "kv_cache_quant_algo": None,
        "exclude_modules": ignored(axis_map, scheme),
    }
    if scheme.format.packed:
        details["group_size"] = 16
    # Engines know the layout by the producer's name.
    return {"producer": {"name": MODELOPT, "version": "star-elastic"}, "quantization": details}


def scheme_of_modelopt(path: Path, axis_map: AxisMap) -> Scheme:
    """The scheme of a checkpoint in ModelOpt's layout. Raises ConfigError."""
    file = path / MODELOPT_FILE
    try:
        details = json.loads(file.read_text(encoding="utf-8"))["quantization"]
        names = {algorithm: name for name, algorithm in MODELOPT_ALGORITHMS.items()}
        format, paths = FORMATS[names[details["quant_algo"]]], set(details["exclude_modules"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{file} is not one that star-elastic writes ({reason(error)}); remove it if the "
            "weights are not in ModelOpt's layout, or use the unquantised original"
        ) from None
    kept = (s.name for s in quantisable(axis_map) if not paths.isdisjoint(ignored_paths(s)))
    return Scheme(format, frozenset(kept))


def in_modelopt(axis_map: AxisMap, scheme: Scheme) -> dict[str, str]:
    """Names on disk in the layout of compressed-tensors -> those in ModelOpt's.

    Scalars have no dimension there, and global scales are no reciprocals.
    """
    renamed = {}
    for spec in scheme.quantised(axis_map).values():
        ours, theirs = (stored_parts(spec, scheme.format, layout) for layout in LAYOUTS)
        for kind, part in ours.items():
            for before, after in zip(part.pieces, theirs[kind].pieces, strict=True):
                renamed[before.name] = after.name
    return renamed
