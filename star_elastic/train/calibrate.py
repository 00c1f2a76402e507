"""Before training: what the parent's units are worth, and in which basis its stream is cut.

Scores and basis are estimated on the first rows of the training data, once; a run directory keeps
them, so that a run that is started again does not repeat the work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
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
from star_elastic.train.check import ranking_context
from star_elastic.train.config import RunConfig
from star_elastic.train.fingerprint import digest_weights

SCORES, DEPTH = "scores.safetensors", "depth.safetensors"
DEPTH_SAMPLES = 32
"""Rows on which layers are left out one by one, as often as there are layers."""


class Calibration:
    """What is known about a parent: orders of its units, basis, depth. With `keep` it is written
    into the run's directory; what lies there is read in any case."""

    def __init__(
        self,
        config: RunConfig,
        run: Path,
        model: PreTrainedModel,
        model_config: Config,
        axis_map: AxisMap,
        sources: Sequence[Source],
        progress: Progress,
        *,
        keep: bool = False,
    ):
        self.config, self.run, self.keep = config, run, keep
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
            context=ranking_context(self.config, self.model_config),
        )

    @property
    def _count(self) -> int:
        """Rows to read, of those that are not held out."""
        there = sum(source.num_used for source in self.sources)
        return min(self.config.calibration.num_samples, there)

    def _measured(self, file: str, name: str, measure: Callable[[], torch.Tensor]) -> torch.Tensor:
        """A tensor that is measured once."""
        own = self.run / file
        if has_file(own):
            return load_tensors(own)[name]
        found = measure()
        if self.keep:
            save_tensors(own, {name: found})
        return found

    def orders(self) -> dict[str, torch.Tensor]:
        """The permutation of every axis, best unit first; scores are estimated if need be."""
        own = self.run / SCORES
        if has_file(own):
            return orders_from_scores(load_scores(own, self.axis_map)[0], self.axis_map)
        count = self._count
        scores, info = rank(
            self.model, self.axis_map, self.batches(count),
            num_samples=count, name=", ".join(source.name for source in self.sources),
            weights=digest_weights(self.config.parent), progress=self.progress,
        )  # fmt: skip
        if self.keep:
            save_scores(own, scores, self.axis_map, info)
        return orders_from_scores(scores, self.axis_map)

    def basis(self) -> torch.Tensor | None:
        """The principal basis (H, H) of the residual stream, if the run asks for it."""
        if self.config.calibration.basis == "channels":
            return None

        def measure() -> torch.Tensor:
            count = self._count
            batches = _watch(self.batches(count), "basis", count, self.progress)
            inputs = ((batch.input_ids, batch.attention_mask) for batch in batches)
            return principal_basis(self.model, self.axis_map, inputs)

        return self._measured(BASIS, "hidden", measure)

    def depth(self) -> tuple[int, ...]:
        """The layers, most important first, if the run cuts layers."""
        if LAYERS not in self.config.choices:
            return ()

        def measure() -> torch.Tensor:
            samples = min(DEPTH_SAMPLES, self.config.calibration.num_samples)
            batches = list(self.batches(samples))
            ranking = rank_layers(self.model, self.model_config, batches, self.progress, without)
            return torch.tensor(ranking)

        def without(kept: Sequence[int]) -> PreTrainedModel:
            layers = range(len(self.axis_map.axes[LAYERS].layers))
            mask = tuple(int(layer in kept) for layer in layers)
            return build_submodel(self.model, self.model_config, {LAYERS: mask})

        return tuple(self._measured(DEPTH, "layers", measure).tolist())


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
        for batch in _watch(batches, "rank", num_samples, progress):
            num_rows += len(batch.input_ids)
            num_tokens += batch.num_tokens
            yield batch.input_ids, batch.attention_mask

    scores = estimate_scores(model, axis_map, counted())
    return scores, ScoreInfo(
        num_samples=num_rows, num_tokens=num_tokens, source=name, weights=weights
    )


def _watch(
    batches: Iterable[Batch], stage: str, num_samples: int, progress: Progress
) -> Iterator[Batch]:
    """The same batches; tells how many of the rows have been worked on."""
    progress.stage(stage, num_samples)
    seen = 0
    for batch in batches:
        yield batch
        seen += len(batch.input_ids)
        progress.advance(seen)
