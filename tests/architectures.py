"""One row for each kind of parent: all that tests have to know about an architecture.

A model type that the package serves needs at least one row (test_architectures.py says which are
missing). Laws, oracle, checkpoints, counts, resident copies, switching and training run over the
rows by themselves. To add an architecture, write a row: strategies and configs below, the elements
that a slice keeps in `oracle/naive.py`, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from hypothesis import strategies as st

from star_elastic.architectures import architecture_of
from star_elastic.axes import AxisMap
from tests.oracle.naive import (
    Keeps,
    Stores,
    as_it_is,
    gemma3_text_stores,
    gpt_oss_keeps,
    llama_keeps,
    nemotron_h_keeps,
    qwen3_moe_keeps,
)

Config = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Lively:
    """A model of random weights whose greedy text is lively: traces end at different times.

    `config` without what the tokenizer gives; `cut` the widths of its small size; `seed` of the
    weights.
    """

    config: Config
    cut: Mapping[str, int]
    seed: int


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A parent that is trained in seconds.

    `config` without the vocabulary; `choices` of widths, all of them ending on the edges of blocks
    of 16; the small size's share of the `active` parameters.
    """

    config: Config
    choices: Mapping[str, tuple[int, ...]]
    active: float


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What is known about one kind of parent.

    `configs` draws any legal tiny config. `fixed` is one of them, for tests that need a case and
    not a law, and `cut` widths of it that cut every ranked axis; `fields` names the config's field
    of each axis. `bare` names no more than a config must. `wide` is large enough for products of
    FP8 codes, at `wide_cut`. `keeps` lists what a slice keeps, without our tables. `alone` are the
    axes whose laws run one by one on this kind of parent; on the others' they run all together.
    `kinds` are its kinds of layers as a latency table names them, `embedding` the table of
    embeddings on disk; `scatters`: a size has vectors that are cut inside groups. `stores` says
    what a slice holds of what it keeps, if that is another number.
    """

    configs: Callable[[], st.SearchStrategy[Config]]
    fixed: Config
    cut: Mapping[str, int]
    fields: Mapping[str, str]
    bare: Config
    wide: Config
    wide_cut: Mapping[str, int]
    keeps: Keeps
    alone: tuple[str, ...]
    kinds: tuple[str, ...]
    embedding: str
    scatters: bool = False
    stores: Stores = as_it_is
    lively: Lively | None = None
    trained: Trained | None = field(default=None)

    @property
    def model_type(self) -> str:
        """As in config.json."""
        return self.fixed["model_type"]

    @property
    def axis_map(self) -> AxisMap:
        """The table of `fixed`."""
        return architecture_of(self.fixed).axis_map(self.fixed)

    @property
    def axes(self) -> tuple[str, ...]:
        """Every elastic axis."""
        return tuple(self.axis_map.axes)

    @property
    def is_recurrent(self) -> bool:
        """Whether some layers carry a state that does not grow with the text."""
        return any(not state.per_token for state in self.axis_map.states)


# Mamba hybrids


@st.composite
def hybrids(draw, *, moe: bool) -> Config:
    """A config of nemotron_h: Mamba, attention, and experts or a dense MLP."""
    patterns = ("ME*", "*EM", "MEM*E") if moe else ("M*-", "-M*", "M-M*")
    groups, kv_heads = draw(st.sampled_from([(1, 2), (2, 1), (2, 2)]))
    routing_groups = draw(st.sampled_from([1, 2]))
    selected = draw(st.integers(1, routing_groups))
    per_group = draw(st.integers(3, 4))
    return {
        "model_type": "nemotron_h",
        "hybrid_override_pattern": (pattern := draw(st.sampled_from(patterns))),
        "num_hidden_layers": len(pattern),
        "vocab_size": 20,
        "hidden_size": draw(st.sampled_from([10, 12, 16])),
        "layer_norm_epsilon": draw(st.sampled_from([1e-5, 0.1])),
        "num_attention_heads": kv_heads * draw(st.integers(2, 3)),
        "num_key_value_heads": kv_heads,
        "head_dim": draw(st.sampled_from([3, 4])),
        "intermediate_size": draw(st.integers(5, 9)),
        "mamba_num_heads": groups * draw(st.integers(2, 3)),
        "mamba_head_dim": draw(st.integers(2, 3)),
        "n_groups": groups,
        "ssm_state_size": draw(st.integers(2, 4)),
        "conv_kernel": draw(st.integers(2, 4)),
        "chunk_size": draw(st.sampled_from([3, 8])),
        "n_routed_experts": routing_groups * per_group,
        "num_experts_per_tok": draw(st.integers(1, min(3, selected * (per_group - 1)))),
        "n_group": routing_groups,
        "topk_group": selected,
        "norm_topk_prob": draw(st.booleans()),
        "routed_scaling_factor": draw(st.sampled_from([1.0, 2.5])),
        "moe_intermediate_size": draw(st.integers(4, 7)),
        "moe_shared_expert_intermediate_size": draw(st.integers(4, 7)),
        "moe_latent_size": draw(st.sampled_from([None, 5])),
        "mlp_bias": draw(st.booleans()),
        "use_bias": draw(st.booleans()),
        "use_conv_bias": draw(st.booleans()),
    }


def hybrid(pattern: str) -> Config:
    """One config of nemotron_h."""
    return {
        "model_type": "nemotron_h",
        "hybrid_override_pattern": pattern,
        "num_hidden_layers": len(pattern),
        "vocab_size": 20,
        "hidden_size": 12,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "intermediate_size": 7,
        "mamba_num_heads": 6,
        "mamba_head_dim": 2,
        "n_groups": 2,
        "ssm_state_size": 4,
        "conv_kernel": 3,
        "chunk_size": 4,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 2,
        "moe_intermediate_size": 6,
        "moe_shared_expert_intermediate_size": 5,
    }


HYBRID_FIELDS = {
    "hidden": "hidden_size", "ffn": "intermediate_size", "ssm_heads": "mamba_num_heads",
    "heads": "num_attention_heads", "experts": "n_routed_experts",
    "expert_ffn": "moe_intermediate_size", "shared_ffn": "moe_shared_expert_intermediate_size",
}  # fmt: skip
HYBRID_WIDE = {
    "hidden_size": 64, "head_dim": 16, "mamba_head_dim": 16, "intermediate_size": 48,
    "moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 32, "ssm_state_size": 16,
}  # fmt: skip
DENSE = Architecture(
    configs=lambda: hybrids(moe=False),
    fixed=hybrid("M-M*"),
    cut={"hidden": 8, "ffn": 4, "ssm_heads": 4, "heads": 4},
    fields=HYBRID_FIELDS,
    bare={"model_type": "nemotron_h", "hybrid_override_pattern": "M*-"},
    wide={**hybrid("M-M*"), **HYBRID_WIDE},
    wide_cut={"hidden": 32, "ffn": 32, "ssm_heads": 4, "heads": 4},
    keeps=nemotron_h_keeps,
    alone=("ffn",),
    kinds=("mamba", "mlp", "attention"),
    embedding="backbone.embeddings.weight",
    scatters=True,
)
MOE = Architecture(
    configs=lambda: hybrids(moe=True),
    fixed=hybrid("MEM*E"),
    cut={
        "hidden": 8, "experts": 4, "expert_ffn": 4, "shared_ffn": 3, "ssm_heads": 2, "heads": 2,
    },
    fields=HYBRID_FIELDS,
    bare={"model_type": "nemotron_h", "hybrid_override_pattern": "ME*"},
    wide={**hybrid("MEM*E"), **HYBRID_WIDE},
    wide_cut={"hidden": 48, "experts": 6, "expert_ffn": 16, "ssm_heads": 4, "heads": 4},
    keeps=nemotron_h_keeps,
    alone=("hidden", "experts", "expert_ffn", "shared_ffn", "ssm_heads", "layers", "top_k"),
    kinds=("mamba", "routers + routed experts + shared experts", "attention"),
    embedding="backbone.embeddings.weight",
    scatters=True,
    lively=Lively(
        config={
            "model_type": "nemotron_h", "layers_block_type": ["mamba", "moe", "attention", "mamba"],
            "intermediate_size": 32, "mamba_num_heads": 4, "mamba_head_dim": 8, "n_groups": 2,
            "ssm_state_size": 8, "chunk_size": 16, "n_routed_experts": 8, "num_experts_per_tok": 2,
            "moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 32,
            "rescale_prenorm_residual": False,
            # transformers clamps time steps to this in prefill and not in decoding: out of the way
            "time_step_min": 1e-9,
        },
        cut={"hidden": 16, "experts": 4, "expert_ffn": 16, "ssm_heads": 2},
        seed=0,
    ),
    trained=Trained(
        config={
            "model_type": "nemotron_h", "hybrid_override_pattern": "M*E", "hidden_size": 48,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
            "intermediate_size": 64, "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 2,
            "ssm_state_size": 8, "conv_kernel": 4, "chunk_size": 16, "n_routed_experts": 8,
            "num_experts_per_tok": 2, "moe_intermediate_size": 32,
            "moe_shared_expert_intermediate_size": 64, "max_position_embeddings": 512,
        },
        choices={
            "hidden": (48, 32), "expert_ffn": (32, 16), "shared_ffn": (64, 48, 32),
            "ssm_heads": (8, 6, 4),
        },
        active=0.6,
    ),
)  # fmt: skip


# Decoders of attention and a gated MLP


@st.composite
def llamas(draw) -> Config:
    """A config of llama; hidden is a multiple of every number of heads."""
    kv_heads = draw(st.integers(1, 2))
    config = {
        "model_type": "llama",
        "num_hidden_layers": 2,
        "vocab_size": 20,
        "hidden_size": draw(st.sampled_from([24, 48])),
        "rms_norm_eps": draw(st.sampled_from([1e-5, 0.1])),
        "num_attention_heads": kv_heads * draw(st.integers(2, 3)),
        "num_key_value_heads": kv_heads,
        "intermediate_size": draw(st.integers(5, 9)),
        "tie_word_embeddings": draw(st.booleans()),
        "attention_bias": draw(st.booleans()),
        "mlp_bias": draw(st.booleans()),
    }
    return {**config, "head_dim": 4} if draw(st.booleans()) else config


LLAMA_FIXED = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "vocab_size": 20,
    "hidden_size": 24,
    "rms_norm_eps": 1e-5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 7,
    "tie_word_embeddings": True,
}
DECODER_TRAINED = Trained(
    config={
        "model_type": "llama", "num_hidden_layers": 2, "hidden_size": 48,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "intermediate_size": 96, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
        "max_position_embeddings": 512,
    },
    choices={"hidden": (48, 32), "ffn": (96, 80, 64, 48, 32), "heads": (4, 2)},
    active=0.6,
)  # fmt: skip
LLAMA = Architecture(
    configs=llamas,
    fixed=LLAMA_FIXED,
    cut={"hidden": 16, "ffn": 4, "heads": 2},
    fields={"hidden": "hidden_size", "ffn": "intermediate_size", "heads": "num_attention_heads"},
    bare={"model_type": "llama"},
    wide={
        **LLAMA_FIXED, "hidden_size": 96, "head_dim": 16, "intermediate_size": 48,
        "tie_word_embeddings": False,
    },
    wide_cut={"hidden": 48, "ffn": 32, "heads": 2},
    keeps=llama_keeps,
    alone=("hidden", "ffn", "heads"),
    kinds=("attention + mlp",),
    embedding="model.embed_tokens.weight",
    lively=Lively(
        config={"model_type": "llama", "intermediate_size": 32, "num_hidden_layers": 2},
        cut={"hidden": 16, "ffn": 16, "heads": 2},
        seed=2,
    ),
    trained=DECODER_TRAINED,
)  # fmt: skip


def like_llama(
    model_type: str,
    *,
    lively_seed: int,
    kinds: tuple[str, ...] = ("attention + mlp",),
    **changes: Any,
) -> Architecture:
    """A row of a model type whose tensors are laid out as Llama's.

    `changes`: strategies of fields that differ from those that such a config draws; its `fixed`
    config has their first values.
    """

    @st.composite
    def draws(draw) -> Config:
        kv_heads = draw(st.integers(1, 2))
        return {
            "model_type": model_type,
            "num_hidden_layers": 2,
            "vocab_size": 20,
            "hidden_size": draw(st.integers(9, 14)),
            "rms_norm_eps": draw(st.sampled_from([1e-5, 0.1])),
            "num_attention_heads": kv_heads * draw(st.integers(2, 3)),
            "num_key_value_heads": kv_heads,
            "head_dim": draw(st.sampled_from([2, 4])),
            "intermediate_size": draw(st.integers(5, 9)),
            "tie_word_embeddings": draw(st.booleans()),
            **{name: draw(st.sampled_from(values)) for name, values in changes.items()},
        }

    fixed = {
        "model_type": model_type,
        "num_hidden_layers": 2,
        "vocab_size": 20,
        "hidden_size": 13,
        "rms_norm_eps": 1e-5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "intermediate_size": 7,
        "tie_word_embeddings": True,
        **{name: values[0] for name, values in changes.items()},
    }
    kept = ("use_sliding_window", "max_window_layers", "no_rope_layers", "layer_types")
    windows = {name: fixed[name] for name in kept if name in fixed}
    if fixed.get("sliding_window"):
        windows["sliding_window"] = 16
    own = {"model_type": model_type, "pad_token_id": None, **windows}
    lively: Config = {"intermediate_size": 32, "num_hidden_layers": 2}
    return replace(
        LLAMA,
        configs=draws,
        fixed=fixed,
        cut={"hidden": 8, "ffn": 4, "heads": 2},
        bare={"model_type": model_type},
        wide={
            **fixed, "hidden_size": 96, "head_dim": 16, "intermediate_size": 48,
            "tie_word_embeddings": False,
        },
        alone=(),
        kinds=kinds,
        lively=Lively(
            config={**lively, **own}, cut={"hidden": 16, "ffn": 16, "heads": 2},
            seed=lively_seed,
        ),
        trained=replace(
            DECODER_TRAINED, config={**DECODER_TRAINED.config, **own}
        ),
    )  # fmt: skip


WINDOWED = ("attention + mlp", "attention + mlp #2")
QWEN3 = like_llama(
    "qwen3",
    lively_seed=11,
    attention_bias=[False, True],
    sliding_window=[None, 4],  # switched off: says nothing
)
QWEN2 = like_llama(
    "qwen2",
    lively_seed=2,
    kinds=WINDOWED,
    use_sliding_window=[True, True, False],
    sliding_window=[3, 2, 4],
    max_window_layers=[1, 0],
)
MISTRAL = like_llama("mistral", lively_seed=4, sliding_window=[3, 2, None])
SMOLLM3 = like_llama(
    "smollm3",
    lively_seed=11,
    kinds=WINDOWED,
    attention_bias=[False, True],
    mlp_bias=[False, True],
    no_rope_layers=[[1, 0], [0, 1], None],
    pad_token_id=[None],  # its default is no row of so small a vocabulary
    use_sliding_window=[True, True, False],
    sliding_window=[3, 2],
)


GEMMA3_TEXT = like_llama(
    "gemma3_text",
    lively_seed=20,
    kinds=WINDOWED,
    hidden_size=[24, 48],
    attention_bias=[False, True],
    query_pre_attn_scalar=[4, 7],
    layer_types=[["sliding_attention", "full_attention"], ["full_attention", "sliding_attention"]],
    sliding_window=[3, 2],
    pad_token_id=[None],  # whose row would get no gradient
)
GEMMA3_TEXT = replace(GEMMA3_TEXT, cut={**GEMMA3_TEXT.cut, "hidden": 16}, stores=gemma3_text_stores)


# Decoders with experts


@st.composite
def qwen3_moes(draw) -> Config:
    """A config of qwen3_moe: experts in all layers, or an MLP in the first."""
    experts = draw(st.integers(3, 5))
    return {
        **draw(QWEN3.configs()),
        "model_type": "qwen3_moe",
        "num_experts": experts,
        "num_experts_per_tok": draw(st.integers(1, experts - 1)),
        "moe_intermediate_size": draw(st.integers(4, 7)),
        "norm_topk_prob": draw(st.booleans()),
        "mlp_only_layers": draw(st.sampled_from([[], [0]])),
        "use_sliding_window": draw(st.booleans()),
    }


QWEN3_MOE_FIXED = {
    **QWEN3.fixed, "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 6, "norm_topk_prob": True, "mlp_only_layers": [0],
}  # fmt: skip
SMALL_MOE = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True,
}  # fmt: skip
QWEN3_MOE = replace(
    QWEN3,
    configs=qwen3_moes,
    fixed=QWEN3_MOE_FIXED,
    cut={"hidden": 8, "ffn": 4, "heads": 2, "experts": 3, "expert_ffn": 4},
    fields={**QWEN3.fields, "experts": "num_experts", "expert_ffn": "moe_intermediate_size"},
    bare={"model_type": "qwen3_moe"},
    wide={
        **QWEN3_MOE_FIXED, "hidden_size": 96, "head_dim": 16, "intermediate_size": 48,
        "moe_intermediate_size": 32, "tie_word_embeddings": False,
    },
    wide_cut={"hidden": 48, "ffn": 32, "heads": 2, "experts": 3, "expert_ffn": 16},
    keeps=qwen3_moe_keeps,
    alone=("experts", "expert_ffn", "top_k"),
    kinds=("attention + mlp", "attention + routers + routed experts"),
    lively=Lively(
        config={**QWEN3.lively.config, **SMALL_MOE, "model_type": "qwen3_moe"},
        cut={"hidden": 16, "experts": 3, "expert_ffn": 16, "heads": 2},
        seed=2,
    ),
    trained=Trained(
        config={**QWEN3.trained.config, **SMALL_MOE, "model_type": "qwen3_moe"},
        choices={"hidden": (48, 32), "expert_ffn": (32, 16), "heads": (4, 2)},
        active=0.6,
    ),
)  # fmt: skip


@st.composite
def gpt_osses(draw) -> Config:
    """A config of gpt_oss."""
    config = draw(QWEN3_MOE.configs())
    experts = config.pop("num_experts")
    for name in ("norm_topk_prob", "mlp_only_layers", "use_sliding_window"):
        del config[name]
    return {
        **config,
        "model_type": "gpt_oss",
        "num_local_experts": experts,
        "intermediate_size": config.pop("moe_intermediate_size"),
        "tie_word_embeddings": False,
        "swiglu_limit": draw(st.sampled_from([7.0, 0.5])),
        "sliding_window": draw(st.sampled_from([3, 2])),
    }


GPT_OSS_FIXED = {
    "model_type": "gpt_oss", "num_hidden_layers": 2, "vocab_size": 20, "hidden_size": 13,
    "rms_norm_eps": 1e-5, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4,
    "intermediate_size": 6, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 3,
}  # fmt: skip
GPT_OSS = replace(
    QWEN3_MOE,
    configs=gpt_osses,
    fixed=GPT_OSS_FIXED,
    cut={"hidden": 8, "heads": 2, "experts": 3, "expert_ffn": 4},
    fields={
        "hidden": "hidden_size", "heads": "num_attention_heads", "experts": "num_local_experts",
        "expert_ffn": "intermediate_size",
    },
    bare={"model_type": "gpt_oss"},
    wide={**GPT_OSS_FIXED, "hidden_size": 96, "head_dim": 16, "intermediate_size": 32},
    wide_cut={"hidden": 48, "heads": 2, "experts": 3, "expert_ffn": 16},
    keeps=gpt_oss_keeps,
    alone=(),
    kinds=("attention + routers + routed experts", "attention + routers + routed experts #2"),
    scatters=True,
    lively=Lively(
        config={
            "model_type": "gpt_oss", "num_hidden_layers": 2, "num_local_experts": 4,
            "num_experts_per_tok": 2, "intermediate_size": 32, "sliding_window": 16,
        },
        cut={"hidden": 16, "experts": 3, "expert_ffn": 16, "heads": 2},
        seed=24,
    ),
    trained=Trained(
        config={
            **GPT_OSS_FIXED, "hidden_size": 48, "head_dim": 16, "intermediate_size": 32,
            "max_position_embeddings": 512, "sliding_window": 16,
        },
        choices={"hidden": (48, 32), "expert_ffn": (32, 16), "heads": (4, 2)},
        active=0.6,
    ),
)  # fmt: skip


ROWS: Mapping[str, Architecture] = {
    "dense": DENSE, "moe": MOE, "gemma3_text": GEMMA3_TEXT, "gpt_oss": GPT_OSS,
    "llama": LLAMA, "mistral": MISTRAL,
    "qwen2": QWEN2, "qwen3": QWEN3, "qwen3_moe": QWEN3_MOE, "smollm3": SMOLLM3,
}  # fmt: skip
"""Every kind of parent, by the name that tests have in their ids."""
DISTINCT = tuple(kind for kind in ROWS if kind not in ("mistral", "qwen3", "smollm3"))
"""Kinds with code of their own. The others say how their configs are read and have tensors, windows
and biases as these do: they are held to the laws, the oracle, counts, files and training, and what
runs a model does not know them apart."""
LIVELY = {row.model_type: row.lively for row in ROWS.values() if row.lively is not None}
"""One lively model for each model type."""
SHARED_CASES = [(kind, axis) for kind, row in ROWS.items() for axis in (*row.alone, "all")]
"""Axes one by one on the kind of parent that stands for them, all together on every kind; with one
width for all layers."""
AXIS_CASES = [*SHARED_CASES, *((kind, "per layer") for kind in DISTINCT)]
"""The same, and all together with widths of their own in every layer."""


def configs(kind: str) -> st.SearchStrategy[Config]:
    """Any config of one kind of parent."""
    return ROWS[kind].configs()


def fixed_config(kind: str) -> Config:
    """One config of a kind, for tests that need a case and not a law."""
    return dict(ROWS[kind].fixed)
