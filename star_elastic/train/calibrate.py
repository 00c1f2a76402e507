"""Before training: what the parent's units are worth, and in which basis its stream is cut.

Scores and basis are estimated on the first rows of the training data, once; a run directory keeps
them, so that a run that is started again does not repeat the work.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from star_elastic.architectures.config_file import Config
from star_elastic.axes import LAYERS, AxisMap
from star_elastic.checkpoints.companions import BASIS
from star_elastic.checkpoints.tensors import load_tensors, save_tensors
from star_elastic.data.sources import Batch, Source, calibration_batches
from star_elastic.files.paths import has_file
from star_elastic.importance.basis import principal_basis
from star_elastic.importance.depth import rank_layers
from star_elastic.importance.estimate import estimate_scores
from star_elastic.importance.files import ScoreInfo, load_scores, save_scores
from star_elastic.importance.orders import orders_from_scores
from star_elastic.models.submodel import build_submodel
from star_elastic.progress import Progress
from star_elastic.train.config import RunConfig
from star_elastic.train.fingerprint import digest_weights

SCORES, DEPTH = "scores.safetensors", "depth.safetensors"
DEPTH_SAMPLES = 32
"""Rows on which layers are left out one by one, as often as there are layers."""


class Calibration:
    """What is known about a parent: orders of its units, basis, depth. Kept in a run directory."""

    def __init__(
        self,
        config: RunConfig,
        run: Path,
        model: PreTrainedModel,
        model_config: Config,
        axis_map: AxisMap,
        sources: Sequence[Source],
        progress: Progress,
    ):
        self.config, self.run = config, run
        self.model, self.model_config, self.axis_map = model, model_config, axis_map
        self.sources, self.progress = sources, progress

    def batches(self, num_samples: int) -> Iterator[Batch]:
        """The first rows of the data, padded, in batches."""
        options = self.config.calibration
        return calibration_batches(
            self.sources,
            [source.weight for source in self.config.data],
            num_samples=num_samples,
            batch_size=options.batch_size,
            context=options.context,
        )

    @property
    def _count(self) -> int:
        """Rows to read, of those that are not held out."""
        there = sum(source.num_used for source in self.sources)
        return min(self.config.calibration.num_samples, there)

    def orders(self, *, write: bool) -> dict[str, torch.Tensor]:
        """The permutation of every axis, best unit first; scores are estimated if need be."""
        own = self.run / SCORES
        if has_file(own):
            scores = load_scores(own, self.axis_map)[0]
        else:
            count = self._count
            scores, info = rank(
                self.model,
                self.axis_map,
                self.batches(count),
                num_samples=count,
                name=", ".join(source.name for source in self.sources),
                weights=digest_weights(self.config.parent),
                progress=self.progress,
            )
            if write:
                save_scores(own, scores, self.axis_map, info)
        return orders_from_scores(scores, self.axis_map)

    def basis(self, *, write: bool) -> torch.Tensor | None:
        """The principal basis (H, H) of the residual stream, if the run asks for it."""
        if self.config.calibration.basis == "channels":
            return None
        own = self.run / BASIS
        if has_file(own):
            return load_tensors(own)["hidden"]
        count = self._count
        batches = watched(self.batches(count), "basis", count, self.progress)
        basis = find_basis(self.model, self.axis_map, batches)
        if write:
            save_tensors(own, {"hidden": basis})
        return basis

    def depth(self, *, write: bool) -> tuple[int, ...]:
        """The layers, most important first, if the run cuts layers."""
        if LAYERS not in self.config.choices:
            return ()
        own = self.run / DEPTH
        if has_file(own):
            return tuple(load_tensors(own)["layers"].tolist())
        samples = min(DEPTH_SAMPLES, self.config.calibration.num_samples)
        batches = list(self.batches(samples))
        layers = range(len(self.axis_map.axes[LAYERS].layers))

        def without(kept: Sequence[int]) -> PreTrainedModel:
            mask = tuple(int(layer in kept) for layer in layers)
            return build_submodel(self.model, self.model_config, {LAYERS: mask})

        ranking = rank_layers(self.model, self.model_config, batches, self.progress, without)
        if write:
            save_tensors(own, {"layers": torch.tensor(ranking)})
        return ranking


def given_scores(
    config: RunConfig, axis_map: AxisMap
) -> tuple[dict[str, torch.Tensor], ScoreInfo] | None:
    """The scores that a run config names, until the run has its own copy of them. Raises
    CheckpointError for those that cannot be read or are another model's."""
    if not config.calibration.scores or has_file(Path(config.out) / SCORES):
        return None
    return load_scores(Path(config.calibration.scores), axis_map)


def find_basis(model: PreTrainedModel, axis_map: AxisMap, batches: Iterable[Batch]) -> torch.Tensor:
    """Principal basis (H, H) of the residual stream."""
    return principal_basis(model, axis_map, ((b.input_ids, b.attention_mask) for b in batches))


def rank(
    model: PreTrainedModel,
    axis_map: AxisMap,
    batches: Iterable[Batch],
    *,
    num_samples: int,
    name: str,
    weights: str,
    progress: Progress,
) -> tuple[dict[str, torch.Tensor], ScoreInfo]:
    """Importance scores on rows in batches, at most `num_samples`, and what they were measured
    on: data of a `name`, and a model whose `weights` have a digest."""
    num_rows = num_tokens = 0

    def counted() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        nonlocal num_rows, num_tokens
        for batch in watched(batches, "rank", num_samples, progress):
            num_rows += len(batch.input_ids)
            num_tokens += batch.num_tokens
            yield batch.input_ids, batch.attention_mask

    scores = estimate_scores(model, axis_map, counted())
    return scores, ScoreInfo(
        num_samples=num_rows, num_tokens=num_tokens, source=name, weights=weights
    )


def watched(
    batches: Iterable[Batch], stage: str, num_samples: int, progress: Progress
) -> Iterator[Batch]:
    """The same batches; tells how many of the rows have been worked on."""
    progress.stage(stage, num_samples)
    seen = 0
    for batch in batches:
        yield batch
        seen += len(batch.input_ids)
        progress.advance(seen)
