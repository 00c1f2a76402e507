"""Scores on disk: one safetensors file whose metadata says which data they were measured on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from star_elastic.axes import AxisMap, axis_keys
from star_elastic.checkpoints.tensors import load_tensors, save_tensors
from star_elastic.errors import CheckpointError, library_boundary
from star_elastic.importance.orders import Scores, check_scores

FORMAT = "star_elastic scores 2"


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreInfo:
    """What scores were measured on: samples, unmasked tokens, a name of the text, and a digest of
    the model's files (empty if that is not known)."""

    num_samples: int
    num_tokens: int
    source: str
    weights: str


def save_scores(file: str | Path, scores: Scores, axis_map: AxisMap, info: ScoreInfo) -> None:
    """Writes scores atomically. Raises CheckpointError if they do not fit the map or the disk."""
    file = Path(file)
    _check_complete(scores, axis_map, "the set")
    metadata = {
        "format": FORMAT,
        "family": axis_map.model_type,
        "num_samples": str(info.num_samples),
        "num_tokens": str(info.num_tokens),
        "source": info.source,
        "weights": info.weights,
    }
    save_tensors(file, scores, metadata)


def load_scores(file: str | Path, axis_map: AxisMap) -> tuple[dict[str, torch.Tensor], ScoreInfo]:
    """Scores of every order of the axis map, and what they were measured on.

    Raises CheckpointError if the file is missing, damaged, no score file, or of another model.
    """
    file = Path(file)
    scores = load_tensors(file)
    with safe_open(file, framework="pt") as handle:
        metadata = handle.metadata() or {}
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{file} holds no importance scores; make some with star-elastic rank"
        )
    if metadata.get("family") != axis_map.model_type:
        raise CheckpointError(
            f"{file} holds scores of a {metadata.get('family')} model, this one is "
            f"{axis_map.model_type}; rank the model that is to be sorted"
        )
    _check_complete(scores, axis_map, str(file))
    with library_boundary(f"{file} has damaged metadata", "restore the file"):
        info = ScoreInfo(
            num_samples=int(metadata["num_samples"]),
            num_tokens=int(metadata["num_tokens"]),
            source=metadata["source"],
            weights=metadata.get("weights", ""),
        )
    return {key: scores[key] for key in axis_keys(axis_map)}, info


def _check_complete(scores: Scores, axis_map: AxisMap, where: str) -> None:
    check_scores(scores, axis_map)
    missing = [key for key in axis_keys(axis_map) if key not in scores]
    if missing:
        raise CheckpointError(
            f"{where} lacks the score {missing[0]!r} ({len(missing)} such); rank the model that is "
            "to be sorted"
        )
