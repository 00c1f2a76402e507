"""What benchmarks share: random models, widths at a share of every axis, sides timed in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

from star_elastic.axes import AxisMap
from star_elastic.axes.widths import Widths

LARGE = {
    "model_type": "nemotron_h",
    "hybrid_override_pattern": "ME*EME", "hidden_size": 1024, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 128, "mamba_num_heads": 32, "mamba_head_dim": 64,
    "n_groups": 4, "ssm_state_size": 32, "conv_kernel": 4, "chunk_size": 32,
    "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 768,
    "moe_shared_expert_intermediate_size": 1536, "vocab_size": 2048,
    "max_position_embeddings": 4096,
}  # fmt: skip
TINY = {
    **LARGE, "hidden_size": 64, "head_dim": 16, "mamba_head_dim": 16, "mamba_num_heads": 8,
    "moe_intermediate_size": 64, "moe_shared_expert_intermediate_size": 64, "vocab_size": 128,
}  # fmt: skip
MANY_UNITS = 64
"""An axis of fewer (experts, heads) is cut unit by unit."""


def build_model(config: Mapping[str, Any], seed: int = 0) -> PreTrainedModel:
    """A model of random weights."""
    torch.manual_seed(seed)
    fields = {key: value for key, value in config.items() if key != "model_type"}
    model_config = AutoConfig.for_model(config["model_type"], **fields)
    return AutoModelForCausalLM.from_config(model_config).eval()


def widths_at(
    axis_map: AxisMap, share: float, axes: Collection[str] = (), *, step: int = 1
) -> Widths:
    """The same share of every axis that is named here and there is, in whole units per group; none
    named: of every ranked one but experts and query heads. Axes of many units are cut in multiples
    of `step`."""
    chosen = axes or {
        name for name, axis in axis_map.axes.items()
        if axis.ranked and name not in ("experts", "heads")
    }  # fmt: skip
    cut = {}
    for name, axis in axis_map.axes.items():
        if name not in chosen:
            continue
        unit = axis.num_groups * (step if axis.size >= MANY_UNITS else 1)
        cut[name] = max(round(axis.size * share / unit), 1) * unit
    return axis_map.complete(cut)


def in_turn(sides: Mapping[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each side in each round, after one warm-up each; who comes first moves on from
    round to round."""
    for run in sides.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for number in range(rounds):
        for place in range(len(names)):
            name = names[(number + place) % len(names)]
            begin = now()
            sides[name]()
            seconds[name].append(now() - begin)
    return seconds


def medians_in_turn(sides: Mapping[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """The median of each side's seconds, as `in_turn`."""
    return {name: statistics.median(own) for name, own in in_turn(sides, rounds).items()}


def now() -> float:
    """Seconds, when a GPU (if one is used) has done all that it was asked for."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def decode(model: PreTrainedModel, batch: int, steps: int) -> Callable[[], None]:
    """Reads a short prompt and decodes `steps` tokens."""
    ids = torch.randint(0, model.config.vocab_size, (batch, 16))

    @torch.inference_mode()
    def run() -> None:
        cache = DynamicCache(config=model.config)
        model(input_ids=ids, cache=cache, use_cache=True)
        for _ in range(steps):
            model(input_ids=ids[:, :1], cache=cache, use_cache=True)

    return run
