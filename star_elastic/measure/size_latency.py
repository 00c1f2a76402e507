"""What every size of a family takes on this machine: prefill and decode, at batches and contexts.

Sizes take turns within every round, so that a machine that slows down slows all of them alike.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from star_elastic.errors import BudgetError
from star_elastic.generate.decode import BatchDecoder
from star_elastic.generate.steps import StepPool, pool_for
from star_elastic.measure.latency_bench import Setting, undisturbed
from star_elastic.models.model_config import longest_context
from star_elastic.progress import Progress, Silent

DECODE_STEPS = 8
Work = tuple[str, int, int]
"""A size, the sequences at once, and the tokens that each of them has."""
_Times = tuple[list[float], list[float]]
"""Seconds of every round, of prefill and of decoding."""


@dataclass(frozen=True, slots=True)
class SizeTime:
    """`prefill_ms` to read `batch` sequences of `context` tokens, `decode_ms` for one more token of
    each of them."""

    size: str
    batch: int
    context: int
    prefill_ms: float
    decode_ms: float

    def to_json(self) -> dict[str, Any]:
        """Everything as plain JSON data."""
        return asdict(self)


def measure_sizes(
    models: Mapping[str, PreTrainedModel],
    batches: Sequence[int],
    contexts: Sequence[int],
    *,
    seconds: float = 60.0,
    progress: Progress | None = None,
) -> list[SizeTime]:
    """Times every size at every batch and context, for about `seconds` in all (at least one round
    after one that warms up). Raises BudgetError for a context that the models do not have."""
    works = list(itertools.product(models, batches, contexts))
    for model in models.values():
        limit = longest_context(model.config)
        needed = max(contexts) + 1 + DECODE_STEPS
        if limit and needed > limit:
            raise BudgetError(
                f"context={max(contexts)} and {1 + DECODE_STEPS} new tokens exceed the model's "
                f"context of {limit}; use {limit - 1 - DECODE_STEPS} or less"
            )
    progress = progress or Silent()
    progress.stage("latency", max(round(seconds), 1))
    # As generation decodes: on a GPU, by captured steps.
    pools = {size: pool_for(model, patience=1) for size, model in models.items()}
    for work in works:
        _run(models, pools, work, ([], []))
    times: dict[Work, _Times] = {work: ([], []) for work in works}
    begin = time.monotonic()
    while not times[works[-1]][0] or time.monotonic() - begin < seconds:
        for work in works:
            _run(models, pools, work, times[work])
            progress.advance(min(round(time.monotonic() - begin), max(round(seconds), 1)))
    return [
        SizeTime(*work, *(1e3 * undisturbed(seconds) for seconds in own))
        for work, own in times.items()
    ]


@torch.inference_mode()
def _run(
    models: Mapping[str, PreTrainedModel],
    pools: Mapping[str, StepPool | None],
    work: Work,
    times: _Times,
) -> None:
    """One round of one size."""
    size, batch, context = work
    model = models[size]
    generator = torch.Generator().manual_seed(context)
    ids_BT = torch.randint(0, model.config.vocab_size, (batch, context), generator=generator)
    decoder = BatchDecoder(model, pools[size])
    rows, tokens = ids_BT.tolist(), ids_BT[:, 0].tolist()
    begin = _now(model)
    decoder.prefill(rows)
    times[0].append(_now(model) - begin)
    decoder.step(tokens)  # may capture, and moves the rows to where captured steps work
    ready = _now(model)
    for _ in range(DECODE_STEPS):
        decoder.step(tokens)
    times[1].append((_now(model) - ready) / DECODE_STEPS)


def _now(model: PreTrainedModel) -> float:
    """Seconds, when the device has done all that it was asked for."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


def describe_machine(dtype: torch.dtype, device: str) -> dict[str, Any]:
    """The machine that the times are of."""
    return asdict(Setting(dtype=dtype, device=device).machine)
