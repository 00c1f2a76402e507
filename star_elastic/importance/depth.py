"""Importance of whole layers: the change of the logits when a layer is left out, again and again.

Source: Nemotron Elastic (arXiv 2511.16664): s_j = sum (M - M_without_j)^2 / sum M^2 with M the
parent's logits; the least important layer is removed, and the others are measured anew without it.
Shapes: B samples, T tokens, N unmasked tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Protocol

import torch
from transformers import PreTrainedModel

from star_elastic.architectures import ModelConfig
from star_elastic.architectures.config_file import Config
from star_elastic.axes import LAYERS
from star_elastic.errors import ConfigError, ShapeError, not_finite
from star_elastic.progress import Progress


class Padded(Protocol):
    """Calibration rows: ids and mask (B, T), padded on the right."""

    @property
    def input_ids(self) -> torch.Tensor: ...

    @property
    def attention_mask(self) -> torch.Tensor: ...


class LayerRemover(Protocol):
    """Makes the model that is left when only some layers are kept."""

    def __call__(self, kept: Sequence[int]) -> PreTrainedModel:
        """The model of these layers, in their order."""
        ...


@torch.no_grad()
def rank_layers(
    model: PreTrainedModel,
    config: Config,
    batches: Sequence[Padded],
    progress: Progress,
    without: LayerRemover,
) -> tuple[int, ...]:
    """The layers, most important first: the reverse of the sequence in which they are removed.

    Costs a forward pass over the batches per layer and rank, L (L + 1) / 2 in all. The last layer
    left is the most important one; what may not be removed (`without` raises ShapeError) stays.
    Raises ConfigError without a token, CheckpointError for logits that are not finite.
    """
    layers = list(ModelConfig.of(config).axis_map.axes[LAYERS].layers)
    if not any(batch.attention_mask.any() for batch in batches):
        raise ConfigError("the calibration data has no tokens; name a file with text in it")
    count = len(layers)
    progress.stage("rank layers", (count * (count + 1) // 2 - 1) * len(batches))
    removed: list[int] = []
    done, note = 0, ""
    while len(layers) > 1:
        candidates = {}
        for layer in layers:
            with suppress(ShapeError):  # the last attention layer stays
                candidates[layer] = without([other for other in layers if other != layer])
        scores = _changes(model, candidates, batches, partial(_advance, progress, done, note))
        done += len(layers) * len(batches)
        least = min(scores, key=lambda layer: (scores[layer], -layer))
        layers.remove(least)
        removed.append(least)
        note = f"layer {least} changes the logits by {scores[least]:.3g}"
        progress.advance(done, note)
    return (*layers, *reversed(removed))


def _advance(progress: Progress, done: int, note: str, more: int) -> None:
    progress.advance(done + more, note)


def _changes(
    model: PreTrainedModel,
    candidates: Mapping[int, PreTrainedModel],
    batches: Iterable[Padded],
    advance: Callable[[int], None],
) -> dict[int, float]:
    """Squared distance of each candidate's logits from the model's, relative to their square.
    `advance` is told the forward passes of candidates so far."""
    done = 0
    squares, changes = 0.0, dict.fromkeys(candidates, 0.0)
    for batch in batches:
        whole_NV = _logits(model, batch)
        squares += float(whole_NV.square().sum(dtype=torch.float64))
        for layer, candidate in candidates.items():
            difference_NV = whole_NV - _logits(candidate, batch)
            changes[layer] += float(difference_NV.square().sum(dtype=torch.float64))
            done += 1
            advance(done)
    if not 0 < squares < float("inf"):
        raise not_finite("the model's logits are")
    return {layer: change / squares for layer, change in changes.items()}


def _logits(model: PreTrainedModel, batch: Padded) -> torch.Tensor:
    """Logits (N, V) of the unmasked tokens. Right padding never reaches a real token."""
    logits_BTV = model(input_ids=batch.input_ids.to(model.device), use_cache=False).logits
    return logits_BTV[batch.attention_mask.bool().to(logits_BTV.device)].float()
