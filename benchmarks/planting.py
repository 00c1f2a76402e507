"""Random parents with one axis planted half-dead: half of its units do nothing.

Cutting that axis to half is free, and any other cut costs divergence from the parent, so that there
is a right answer to the question what a budget should cut.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from star_elastic import bundled
from star_elastic.architectures import architecture_of
from star_elastic.axes import AxisMap, TensorSpec, axis_keys
from star_elastic.importance.orders import orders_from_scores
from star_elastic.models.submodel import sort_in_place
from star_elastic.models.tokenizer import load_tokenizer
from star_elastic.rewrite.stream import save_model

HYBRID = {
    "model_type": "nemotron_h", "hybrid_override_pattern": "ME*-", "hidden_size": 64,
    "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 128,
    "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 2, "ssm_state_size": 8,
    "conv_kernel": 4, "chunk_size": 16, "n_routed_experts": 8, "num_experts_per_tok": 2,
    "moe_intermediate_size": 64, "moe_shared_expert_intermediate_size": 128,
    "max_position_embeddings": 512, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 512, "tie_word_embeddings": False,
}  # fmt: skip
LIVELY = 1.5
"""Standard deviation of the weights times the root of their inputs: every unit matters."""
NEVER = -100.0
"""Correction bias of an expert that no token selects."""


def random_parent(config: Mapping[str, Any], seed: int = 0) -> PreTrainedModel:
    """A model of random weights in which every unit matters."""
    torch.manual_seed(seed)
    fields = {key: value for key, value in config.items() if key != "model_type"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **fields))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=LIVELY / math.sqrt(parameter.shape[-1]))
    return model.eval()


@torch.no_grad()
def plant_dead_half(model: PreTrainedModel, axis_map: AxisMap, axis: str) -> None:
    """Makes the tail half of `axis` (in each group) free to cut, and nothing else.

    Its weights become zero. A norm over the axis measures it, too, so there the tail is a copy of
    the head, not read by anyone: cutting it leaves every mean square as it was.
    """
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    half = axis_map.full.replace(**{axis: axis_map.axes[axis].size // 2})
    if axis == "experts":
        for moe in axis_map.moe_layers:
            bias = state[f"{moe.router_path}.e_score_correction_bias"]
            bias[axis_map.axes[axis].size // 2 :] = NEVER
        return
    for name, spec in axis_map.tensors.items():
        for dim in range(len(spec.dims)):
            if axis not in {segment.axis for segment in spec.dims[dim]}:
                continue
            tail, fixed = _dead(axis_map, spec, dim, half)
            rows = state[name].movedim(dim, 0)
            if axis == "hidden" or (axis == "ssm_heads" and not name.endswith("out_proj.weight")):
                rows[tail] = rows[~fixed & ~tail]
            else:
                rows[tail] = 0
    for norm in axis_map.norms if axis == "hidden" else ():
        if norm.axis == "hidden":
            state[f"{norm.path}.weight"][axis_map.axes[axis].size // 2 :] = 0


def _dead(axis_map: AxisMap, spec: TensorSpec, dim: int, half) -> tuple[torch.Tensor, torch.Tensor]:
    """Which elements of a dimension are in the tail, and which no axis cuts."""
    fixed = [torch.full((s.num_units * s.unit,), s.axis is None) for s in spec.dims[dim]]
    tail = torch.ones(axis_map.shape(spec, axis_map.full)[dim], dtype=torch.bool)
    for low, high in axis_map.runs(spec, dim, half):
        tail[low:high] = False
    return tail, torch.cat(fixed)


def scatter_units(model: PreTrainedModel, axis_map: AxisMap, seed: int = 0) -> None:
    """Puts the units of every axis into a random order, which changes nothing of what the model
    computes: what is dead has to be found."""
    draw = torch.Generator().manual_seed(seed)
    scores = {
        key: torch.rand(axis_map.axes[axis].size, generator=draw, dtype=torch.float64)
        for key, (axis, _) in axis_keys(axis_map).items()
    }
    sort_in_place(model, axis_map, orders_from_scores(scores, axis_map))


def write_planted_parent(
    config: Mapping[str, Any], axis: str, path: Path, seed: int = 0
) -> AxisMap:
    """Saves a parent with a half-dead axis and the bundled tokenizer; returns its axis map."""
    tokenizer = load_tokenizer(bundled.PARENT)
    whole = {**config, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    model = random_parent(whole, seed)
    axis_map = architecture_of(whole).axis_map(whole)
    plant_dead_half(model, axis_map, axis)
    scatter_units(model, axis_map, seed)
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    save_model(state, whole, bundled.PARENT, path, dtype=torch.float32)
    return axis_map
