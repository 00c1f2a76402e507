"""Slices written out by hand, without the axis map: the ground truth for what a size keeps.

Every function lists the kept elements of one dimension by plain loops over the layout that
transformers documents for the family; nothing of the package is used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

Keeps = Callable[[str, Mapping[str, Any], Mapping[str, int]], list[list[int]]]
"""Kept elements of every dimension of a tensor, by its name, the parent's config and widths."""


def first_of_each_group(size: int, kept: int, groups: int, unit: int = 1) -> list[int]:
    """Elements of the first kept / groups units of each group of size / groups units."""
    elements = []
    for group in range(groups):
        for unit_index in range(size // groups):
            if unit_index < kept // groups:
                first = (group * (size // groups) + unit_index) * unit
                elements.extend(range(first, first + unit))
    return elements


def after(offset: int, elements: list[int]) -> list[int]:
    return [offset + element for element in elements]


def nemotron_h_keeps(name: str, c: Mapping[str, Any], w: Mapping[str, int]) -> list[list[int]]:
    """Kept elements of every dimension of a nemotron_h parameter or buffer."""
    hidden = list(range(w["hidden"]))
    heads, head_dim, groups = c["mamba_num_heads"], c["mamba_head_dim"], c["n_groups"]
    inner = heads * head_dim
    shared = groups * c["ssm_state_size"]
    kept_heads = w.get("ssm_heads", heads)
    x = first_of_each_group(heads, kept_heads, groups, head_dim)
    per_head = first_of_each_group(heads, kept_heads, groups)
    conv = x + after(inner, list(range(2 * shared)))
    projected = x + after(inner, conv) + after(2 * inner + 2 * shared, per_head)
    q = first_of_each_group(
        c["num_attention_heads"], w.get("heads", 0), c["num_key_value_heads"], c["head_dim"]
    )
    kv = list(range(c["num_key_value_heads"] * c["head_dim"]))
    experts = first_of_each_group(c["n_routed_experts"], w.get("experts", 0), c.get("n_group", 1))
    expert_ffn, shared_ffn = (list(range(w.get(axis, 0))) for axis in ("expert_ffn", "shared_ffn"))
    ffn, vocab = list(range(w.get("ffn", 0))), list(range(c["vocab_size"]))
    latent = list(range(c.get("moe_latent_size") or 0))
    by_suffix = {
        "embeddings.weight": [vocab, hidden],
        "lm_head.weight": [vocab, hidden],
        "mixer.norm.weight": [x],
        "norm.weight": [hidden],
        "norm_f.weight": [hidden],
        "in_proj.weight": [projected, hidden],
        "in_proj.bias": [projected],
        "conv1d.weight": [conv, [0], list(range(c["conv_kernel"]))],
        "conv1d.bias": [conv],
        "dt_bias": [per_head],
        "A_log": [per_head],
        "mixer.D": [per_head],
        "out_proj.weight": [hidden, x],
        "out_proj.bias": [hidden],
        "q_proj.weight": [q, hidden],
        "k_proj.weight": [kv, hidden],
        "v_proj.weight": [kv, hidden],
        "o_proj.weight": [hidden, q],
        "gate.weight": [experts, hidden],
        "gate.e_score_correction_bias": [experts],
        "experts.up_proj": [experts, expert_ffn, latent or hidden],
        "experts.down_proj": [experts, latent or hidden, expert_ffn],
        "fc1_latent_proj.weight": [latent, hidden],
        "fc1_latent_proj.bias": [latent],
        "fc2_latent_proj.weight": [hidden, latent],
        "fc2_latent_proj.bias": [hidden],
        "shared_experts.up_proj.weight": [shared_ffn, hidden],
        "shared_experts.up_proj.bias": [shared_ffn],
        "shared_experts.down_proj.weight": [hidden, shared_ffn],
        "shared_experts.down_proj.bias": [hidden],
        "mixer.up_proj.weight": [ffn, hidden],
        "mixer.up_proj.bias": [ffn],
        "mixer.down_proj.weight": [hidden, ffn],
        "mixer.down_proj.bias": [hidden],
    }
    return by_suffix[longest_suffix(name, by_suffix)]


def llama_keeps(name: str, c: Mapping[str, Any], w: Mapping[str, int]) -> list[list[int]]:
    """Kept elements of every dimension of a llama parameter."""
    hidden, ffn = list(range(w["hidden"])), list(range(w["ffn"]))
    head_dim = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
    q = first_of_each_group(
        c["num_attention_heads"], w["heads"], c["num_key_value_heads"], head_dim
    )
    kv = list(range(c["num_key_value_heads"] * head_dim))
    vocab = list(range(c["vocab_size"]))
    by_suffix = {
        "embed_tokens.weight": [vocab, hidden],
        "lm_head.weight": [vocab, hidden],
        "norm.weight": [hidden],
        "layernorm.weight": [hidden],
        "q_norm.weight": [list(range(head_dim))],
        "k_norm.weight": [list(range(head_dim))],
        "q_proj.weight": [q, hidden],
        "k_proj.weight": [kv, hidden],
        "v_proj.weight": [kv, hidden],
        "o_proj.weight": [hidden, q],
        "gate_proj.weight": [ffn, hidden],
        "up_proj.weight": [ffn, hidden],
        "down_proj.weight": [hidden, ffn],
        "q_proj.bias": [q],
        "k_proj.bias": [kv],
        "v_proj.bias": [kv],
        "o_proj.bias": [hidden],
        "gate_proj.bias": [ffn],
        "up_proj.bias": [ffn],
        "down_proj.bias": [hidden],
    }
    return by_suffix[longest_suffix(name, by_suffix)]


def qwen3_moe_keeps(name: str, c: Mapping[str, Any], w: Mapping[str, int]) -> list[list[int]]:
    """Kept elements of every dimension of a qwen3_moe parameter."""
    hidden, experts = list(range(w["hidden"])), list(range(w["experts"]))
    gate = list(range(w["expert_ffn"]))
    by_suffix = {
        "mlp.gate.weight": [experts, hidden],
        "experts.gate_up_proj": [experts, gate + after(c["moe_intermediate_size"], gate), hidden],
        "experts.down_proj": [experts, hidden, gate],
    }
    if not any(name.endswith(suffix) for suffix in by_suffix):
        return llama_keeps(name, c, {"ffn": 0, **w})
    return by_suffix[longest_suffix(name, by_suffix)]


def gpt_oss_keeps(name: str, c: Mapping[str, Any], w: Mapping[str, int]) -> list[list[int]]:
    """Kept elements of every dimension of a gpt_oss parameter: gate and up take turns."""
    hidden, experts = list(range(w["hidden"])), list(range(w["experts"]))
    gate = list(range(w["expert_ffn"]))
    both = [2 * neuron + half for neuron in gate for half in (0, 1)]
    heads = first_of_each_group(c["num_attention_heads"], w["heads"], c["num_key_value_heads"])
    by_suffix = {
        "self_attn.sinks": [heads],
        "router.weight": [experts, hidden],
        "router.bias": [experts],
        "experts.gate_up_proj": [experts, hidden, both],
        "experts.gate_up_proj_bias": [experts, both],
        "experts.down_proj": [experts, gate, hidden],
        "experts.down_proj_bias": [experts, hidden],
    }
    if not any(name.endswith(suffix) for suffix in by_suffix):
        return llama_keeps(name, c, {"ffn": 0, **w})
    return by_suffix[longest_suffix(name, by_suffix)]


Stores = Callable[[str, torch.Tensor, Mapping[str, Any], Mapping[str, int]], torch.Tensor]
"""A kept tensor as a slice stores it, by its name, the parent's config and widths."""


def as_it_is(name: str, tensor: torch.Tensor, *_: object) -> torch.Tensor:
    """A slice stores what it keeps."""
    return tensor


def gemma3_text_stores(
    name: str, tensor: torch.Tensor, c: Mapping[str, Any], w: Mapping[str, int]
) -> torch.Tensor:
    """Embeddings for a model that multiplies them by a smaller root; what the tied head reads then
    is made that much smaller, by a norm that multiplies with 1 + weight."""
    more = (c["hidden_size"] / w["hidden"]) ** 0.5
    if name.endswith(("embed_tokens.weight", "lm_head.weight")):
        return tensor * more
    return (1 + tensor) / more - 1 if name == "model.norm.weight" else tensor


def longest_suffix(name: str, suffixes: Mapping[str, object]) -> str:
    """The longest of the suffixes that a name ends with."""
    return max((s for s in suffixes if name.endswith(s)), key=len)


def naive_name(name: str, there: Sequence[int]) -> str | None:
    """A tensor's name when only some layers are there; None if its own is not."""
    words = name.split(".")
    if "layers" in words:
        at = words.index("layers") + 1
        layer = int(words[at])
        if not there[layer]:
            return None
        words[at] = str(sum(there[:layer]))
    return ".".join(words)


def naive_slice(
    name: str,
    tensor: torch.Tensor,
    keeps: Keeps,
    config: Mapping[str, Any],
    widths: Mapping[str, int],
) -> torch.Tensor:
    """A tensor cut element by element."""
    every = keeps(name, config, widths)
    assert len(every) == tensor.dim(), name
    for dim, kept in enumerate(every):
        tensor = torch.stack([tensor.select(dim, index) for index in kept], dim)
    return tensor
