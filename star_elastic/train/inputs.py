"""All that a run config names, checked and opened: what training and `--check` both begin with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from star_elastic.data.sources import Source, open_sources
from star_elastic.files.paths import has_file
from star_elastic.importance.files import ScoreInfo, load_scores
from star_elastic.models.tokenizer import load_tokenizer, stop_tokens
from star_elastic.train.calibrate import SCORES
from star_elastic.train.check import RunSpec, check
from star_elastic.train.config import RunConfig
from star_elastic.train.directory import begun_files


@dataclass(frozen=True, slots=True)
class RunInputs:
    """A run's config, what it means for its parent, its rows, and the token ids at which generation
    stops. `scores`: those that the config names, until the run has its own copy of them."""

    config: RunConfig
    spec: RunSpec
    sources: list[Source]
    stops: frozenset[int]
    scores: tuple[dict[str, torch.Tensor], ScoreInfo] | None

    @property
    def folder(self) -> Path:
        """The run's directory."""
        return Path(self.config.out)

    @property
    def contexts(self) -> dict[int, int]:
        """The tokens of a window, by the number of the stage."""
        return {number: stage.context for number, stage in enumerate(self.config.stages)}


def open_inputs(config: RunConfig, world_size: int = 1) -> RunInputs:
    """Checks a run config and opens what it names, as the run began with it.

    Raises what `check` raises, and ConfigError or CheckpointError for a tokenizer, rows or scores
    that cannot be used.
    """
    spec = check(config, world_size)
    tokenizer = load_tokenizer(config.parent)
    folder, scores = Path(config.out), None
    sources = open_sources(
        config.data, tokenizer, spec.axis_map.num_embeddings, config.seed, begun_files(folder)
    )
    if config.calibration.scores and not has_file(folder / SCORES):
        scores = load_scores(Path(config.calibration.scores), spec.axis_map)
    return RunInputs(config, spec, sources, stop_tokens(config.parent, tokenizer), scores)
