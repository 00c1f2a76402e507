"""NemotronH: hybrids of Mamba-2, attention, MoE and dense MLP layers (Nemotron Nano 2 and 3).

Letters of the layer pattern: M Mamba-2, * attention, E mixture of experts, - dense MLP.
Layouts (docs/design.md): Mamba in_proj rows are [z | x | B | C | dt] and conv channels [x | B | C];
heads are cut inside each SSM group, so that every kept head goes on reading its own B and C.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from star_elastic.architectures.base import (
    MOST_EXPERTS,
    MOST_LAYERS,
    Config,
    cut_by_layer,
    get_bool,
    get_float,
    get_int,
    get_optional_int,
    homogeneous,
    require_multiple,
    require_size,
    require_whole_attention,
    told,
)
from star_elastic.axes import (
    LAYERS,
    TOP_K,
    Axis,
    AxisMap,
    Dim,
    MoeSpec,
    NormSpec,
    Piece,
    Probe,
    Segment,
    StateSpec,
    TensorSpec,
    WorkSpec,
    fewest_experts,
    fixed,
)
from star_elastic.errors import ConfigError

LETTERS = {
    "M": "M", "mamba": "M", "linear_attention": "M",
    "*": "*", "attention": "*", "full_attention": "*",
    "E": "E", "moe": "E",
    "-": "-", "mlp": "-",
}  # fmt: skip
OTHER_NAMES = {
    "mamba_n_groups": "n_groups", "mamba_d_conv": "conv_kernel", "mamba_expand": "expand",
    "mamba_dt_min": "time_step_min", "mamba_dt_max": "time_step_max",
    "mamba_dt_limit": "time_step_limit", "mamba_dt_init_floor": "time_step_floor",
    "mamba_conv_bias": "use_conv_bias", "mamba_chunk_size": "chunk_size",
    "num_local_experts": "n_routed_experts",
}  # fmt: skip
"""Names that transformers' NemotronHConfig reads as others."""
LEGACY_NAMES = {"M": "mamba", "*": "attention", "E": "moe", "-": "mlp"}
LARGEST_CHUNK = 1024
"""Tokens of a chunk of the SSM scan, whose memory grows with their square."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The integers of a NemotronH config, checked."""

    pattern: str
    vocab: int
    hidden: int
    eps: float
    tied: bool
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    ssm_heads: int
    ssm_head_dim: int
    ssm_groups: int
    ssm_state: int
    conv_kernel: int
    experts: int
    top_k: int
    routing_groups: int
    selected_groups: int
    expert_ffn: int
    shared_ffn: int
    latent: int | None
    mlp_bias: bool
    mamba_bias: bool
    conv_bias: bool


def _by_one_name(config: Config) -> Config:
    """A config in which every field has the name that it is known by here (`OTHER_NAMES`). Raises
    ConfigError for one that stands there twice with two values."""
    named = {key: value for key, value in config.items() if key not in OTHER_NAMES}
    for key, name in OTHER_NAMES.items():
        if config.get(key) is not None and named.setdefault(name, config[key]) != config[key]:
            raise ConfigError(
                f"{told(key, config[key])} and {told(name, named[name])} are one field of "
                "nemotron_h with two values; remove one of them from config.json"
            )
    if named.get("num_key_value_heads", 0) is None:
        named["num_key_value_heads"] = named.get("num_attention_heads", 32)
    return named


def layer_pattern(config: Config) -> str:
    """The layer pattern in letters, from either spelling. Raises ConfigError."""
    layers = config.get("layers_block_type") or config.get("layer_types")
    layers = layers or config.get("hybrid_override_pattern") or ""
    if not isinstance(layers, (str, list, tuple)):
        raise ConfigError(
            f"{told('layers_block_type', layers)} is not a list of layer types; correct config.json"
        )
    unknown = [name for name in layers if not isinstance(name, str) or name not in LETTERS]
    if unknown or not layers:
        raise ConfigError(
            f"layer type {reprlib.repr(unknown[0])} is unknown; use {', '.join(LETTERS)}"
            if layers
            else "the config names no layers; set hybrid_override_pattern"
        )
    if len(layers) > MOST_LAYERS:
        raise ConfigError(
            f"the config names {len(layers):,} layers, more than the {MOST_LAYERS:,} that a model "
            "may have here; correct hybrid_override_pattern"
        )
    return "".join(LETTERS[name] for name in layers)


def read_shape(config: Config) -> Shape:
    """A checked `Shape`. Defaults are those of transformers' NemotronHConfig."""
    config = _by_one_name(config)
    shape = Shape(
        pattern=layer_pattern(config),
        vocab=get_int(config, "vocab_size", 131072),
        hidden=get_int(config, "hidden_size", 4096),
        eps=get_float(config, "layer_norm_epsilon", 1e-5),
        tied=get_bool(config, "tie_word_embeddings", False),
        heads=get_int(config, "num_attention_heads", 32),
        kv_heads=get_int(config, "num_key_value_heads", 8),
        head_dim=get_int(config, "head_dim", 128),
        ffn=get_int(config, "intermediate_size", 21504),
        ssm_heads=get_int(config, "mamba_num_heads", 128),
        ssm_head_dim=get_int(config, "mamba_head_dim", 64),
        ssm_groups=get_int(config, "n_groups", 8),
        ssm_state=get_int(config, "ssm_state_size", 128),
        conv_kernel=get_int(config, "conv_kernel", 4),
        experts=get_int(config, "n_routed_experts", 8),
        top_k=get_int(config, "num_experts_per_tok", 2),
        routing_groups=get_int(config, "n_group", 1),
        selected_groups=get_int(config, "topk_group", 1),
        expert_ffn=get_int(config, "moe_intermediate_size", 7688),
        shared_ffn=get_int(config, "moe_shared_expert_intermediate_size", 7688),
        latent=get_optional_int(config, "moe_latent_size"),
        mlp_bias=get_bool(config, "mlp_bias", False),
        mamba_bias=get_bool(config, "use_bias", False),
        conv_bias=get_bool(config, "use_conv_bias", True),
    )
    require_multiple("num_attention_heads", shape.heads, "num_key_value_heads", shape.kv_heads)
    require_multiple("mamba_num_heads", shape.ssm_heads, "n_groups", shape.ssm_groups)
    require_multiple("n_routed_experts", shape.experts, "n_group", shape.routing_groups)
    if "E" in shape.pattern:
        _check_routing(shape)
    if "M" in shape.pattern:  # what the scan pads a sequence to, and clamps its steps at
        get_int(config, "chunk_size", 128, most=LARGEST_CHUNK)
        get_float(config, "time_step_min", 1e-3)
    if shape.tied:
        raise ConfigError(
            "tie_word_embeddings=true is not supported for nemotron_h, whose models in "
            "transformers have a head of their own; untie the checkpoint first"
        )
    return shape


def _check_routing(shape: Shape) -> None:
    """Raises ConfigError for experts that no token could be routed to."""
    if shape.top_k > shape.experts:
        raise ConfigError(
            f"num_experts_per_tok={shape.top_k} exceeds n_routed_experts={shape.experts}; "
            "correct config.json"
        )
    if shape.selected_groups > shape.routing_groups:
        raise ConfigError(
            f"topk_group={shape.selected_groups} exceeds n_group={shape.routing_groups}; "
            "correct config.json"
        )
    # A group's score is the sum of its two best.
    if shape.experts < 2 * shape.routing_groups:
        raise ConfigError(
            f"n_routed_experts={shape.experts} leaves fewer than 2 experts in each of "
            f"n_group={shape.routing_groups} groups; correct config.json"
        )
    stacked = shape.experts * shape.pattern.count("E")
    if stacked > MOST_EXPERTS:
        raise ConfigError(
            f"n_routed_experts={shape.experts} in {shape.pattern.count('E')} layers are more than "
            f"the {MOST_EXPERTS:,} experts that a model may have here; correct config.json"
        )


def _axes(shape: Shape) -> dict[str, Axis]:
    where = {
        letter: tuple(i for i, c in enumerate(shape.pattern) if c == letter) for letter in "M*E-"
    }
    axes = {"hidden": Axis("hidden", shape.hidden)}
    if where["-"]:
        axes["ffn"] = Axis("ffn", shape.ffn, layers=where["-"])
    if where["E"]:
        fewest = fewest_experts(
            shape.top_k, shape.selected_groups, shape.routing_groups, shape.experts
        )
        axes["experts"] = Axis("experts", shape.experts, shape.routing_groups, where["E"], fewest)
        axes["expert_ffn"] = Axis("expert_ffn", shape.expert_ffn, layers=where["E"])
        axes["shared_ffn"] = Axis("shared_ffn", shape.shared_ffn, layers=where["E"])
    if where["M"]:
        groups = shape.ssm_groups
        axes["ssm_heads"] = Axis("ssm_heads", shape.ssm_heads, groups, where["M"], groups)
    if where["*"]:
        kv_heads = shape.kv_heads
        axes["heads"] = Axis("heads", shape.heads, kv_heads, where["*"], kv_heads)
    axes[LAYERS] = Axis(LAYERS, 1, layers=tuple(range(len(shape.pattern))), minimum=0, ranked=False)
    if where["E"]:
        axes[TOP_K] = Axis(TOP_K, shape.top_k, layers=where["E"], ranked=False)
    return axes


class _Builder:
    """Collects the rows of the table, layer by layer."""

    def __init__(self, shape: Shape):
        self.shape = shape
        self.tensors: dict[str, TensorSpec] = {}
        self.norms: list[NormSpec] = []
        self.states: list[StateSpec] = []
        self.work: list[WorkSpec] = []
        self.moe: list[MoeSpec] = []
        self.mixers: list[tuple[int, str]] = []
        self.probes: list[Probe] = []
        self.hidden: Dim = (Segment(shape.hidden, axis="hidden"),)

    def add(
        self, part: str, name: str, *dims: Dim, stacked: int = 0, disk: str | None = None, **kwargs
    ):
        disk = disk or name.replace("model.", "backbone.", 1)
        pieces = (Piece(disk),)
        if stacked:
            stem, last = disk.rsplit(".", 1)
            pieces = tuple(Piece(f"{stem}.{i}.{last}.weight", i) for i in range(stacked))
        self.tensors[name] = TensorSpec(name, part, dims, pieces, **kwargs)

    def add_norm(self, path: str, layer: int | None, reader: str) -> None:
        self.add("norms", f"{path}.weight", self.hidden, layer=layer)
        eps = self.shape.eps
        self.norms.append(NormSpec(path, "hidden", layer, eps, fp32_weight=True, reader=reader))
        self.probes.append(Probe(path, layer, "output", (self.hidden,)))

    def add_mlp(self, path: str, axis: str, size: int, layer: int) -> None:
        part = "mlp" if axis == "ffn" else "shared experts"
        neurons: Dim = (Segment(size, axis=axis),)
        self.add(part, f"{path}.up_proj.weight", neurons, self.hidden, layer=layer)
        self.add(part, f"{path}.down_proj.weight", self.hidden, neurons, layer=layer, gate_dim=1)
        if self.shape.mlp_bias:
            self.add(part, f"{path}.up_proj.bias", neurons, layer=layer)
            self.add(part, f"{path}.down_proj.bias", self.hidden, layer=layer)
        self.probes.append(Probe(f"{path}.down_proj", layer, "input", (neurons,)))

    def add_moe(self, path: str, layer: int) -> None:
        s = self.shape
        experts: Dim = (Segment(s.experts, axis="experts", num_groups=s.routing_groups),)
        neurons: Dim = (Segment(s.expert_ffn, axis="expert_ffn"),)
        inner = fixed(s.latent) if s.latent else self.hidden
        self.add("routers", f"{path}.gate.weight", experts, self.hidden, layer=layer)
        self.add(
            "routers", f"{path}.gate.e_score_correction_bias", experts,
            layer=layer, is_buffer=True, keep_fp32=True,
        )  # fmt: skip
        fused = {"layer": layer, "routed": True, "stacked": s.experts}
        self.add("routed experts", f"{path}.experts.up_proj", experts, neurons, inner, **fused)
        self.add(
            "routed experts",
            f"{path}.experts.down_proj",
            experts,
            inner,
            neurons,
            gate_dim=2,
            **fused,
        )
        if s.latent:
            latent = fixed(s.latent)
            self.add(
                "routed experts", f"{path}.fc1_latent_proj.weight", latent, self.hidden, layer=layer
            )
            self.add(
                "routed experts", f"{path}.fc2_latent_proj.weight", self.hidden, latent, layer=layer
            )
            if s.mlp_bias:
                self.add("routed experts", f"{path}.fc1_latent_proj.bias", latent, layer=layer)
                self.add("routed experts", f"{path}.fc2_latent_proj.bias", self.hidden, layer=layer)
        self.add_mlp(f"{path}.shared_experts", "shared_ffn", s.shared_ffn, layer)
        self.moe.append(MoeSpec(layer, f"{path}.gate", f"{path}.experts", s.selected_groups))

    def add_mamba(self, path: str, layer: int) -> None:
        s = self.shape

        def heads(unit: int) -> Segment:
            return Segment(s.ssm_heads, unit, "ssm_heads", s.ssm_groups)

        inner, per_head = heads(s.ssm_head_dim), heads(1)
        shared = Segment(s.ssm_groups * s.ssm_state)
        conv: Dim = (inner, shared, shared)
        self.add("mamba", f"{path}.dt_bias", (per_head,), layer=layer)
        self.add("mamba", f"{path}.A_log", (per_head,), layer=layer)
        self.add("mamba", f"{path}.D", (per_head,), layer=layer)
        self.add(
            "mamba", f"{path}.conv1d.weight", conv, fixed(1), fixed(s.conv_kernel), layer=layer
        )
        if s.conv_bias:
            self.add("mamba", f"{path}.conv1d.bias", conv, layer=layer)
        projected: Dim = (inner, *conv, per_head)
        self.add("mamba", f"{path}.in_proj.weight", projected, self.hidden, layer=layer)
        self.add("mamba", f"{path}.norm.weight", (inner,), layer=layer)
        self.add("mamba", f"{path}.out_proj.weight", self.hidden, (inner,), layer=layer)
        if s.mamba_bias:
            self.add("mamba", f"{path}.in_proj.bias", projected, layer=layer)
            self.add("mamba", f"{path}.out_proj.bias", self.hidden, layer=layer)
        self.mixers.append((layer, path))
        self.norms.append(NormSpec(f"{path}.norm", "ssm_heads", layer, s.eps, grouped=True))
        self.probes.append(Probe(f"{path}.out_proj", layer, "input", ((inner,),), written=True))
        state = fixed(s.ssm_state)
        self.states.append(StateSpec("ssm", layer, ((inner,), state), own_dtype=True))
        self.states.append(StateSpec("conv", layer, (conv, fixed(s.conv_kernel))))
        # Per element of the state: decay, two for the outer product and its sum, two to read.
        self.work.append(WorkSpec(layer, ((inner,), state), flops=5))

    def add_attention(self, path: str, layer: int) -> None:
        s = self.shape
        queries: Dim = (Segment(s.heads, s.head_dim, "heads", s.kv_heads),)
        keys = fixed(s.kv_heads * s.head_dim)
        self.add("attention", f"{path}.q_proj.weight", queries, self.hidden, layer=layer)
        self.add("attention", f"{path}.k_proj.weight", keys, self.hidden, layer=layer)
        self.add("attention", f"{path}.v_proj.weight", keys, self.hidden, layer=layer)
        self.add(
            "attention", f"{path}.o_proj.weight", self.hidden, queries, layer=layer, gate_dim=1
        )
        self.probes.append(Probe(f"{path}.o_proj", layer, "input", (queries,), written=True))
        self.states.append(StateSpec("key_value", layer, (fixed(2), keys), per_token=True))
        self.work.append(WorkSpec(layer, (queries,), flops=4, per_context=True))


class NemotronH:
    """The `nemotron_h` family table."""

    model_type = "nemotron_h"
    end_of_thinking = "\n</think>\n"
    prefix_aliases: Mapping[str, str] = MappingProxyType({"model.": "backbone."})
    ignored: tuple[str, ...] = ("mtp.",)
    copies: Mapping[str, str] = MappingProxyType({})

    def axis_map(self, config: Config) -> AxisMap:
        """See `Family.axis_map`."""
        shape = read_shape(config)
        require_whole_attention(config)
        table = _Builder(shape)
        vocab = fixed(shape.vocab)
        table.add("embeddings", "model.embeddings.weight", vocab, table.hidden, lookup=True)
        for layer, letter in enumerate(shape.pattern):
            path = f"model.layers.{layer}"
            table.add_norm(f"{path}.norm", layer, f"{path}.mixer")
            if letter == "M":
                table.add_mamba(f"{path}.mixer", layer)
            elif letter == "*":
                table.add_attention(f"{path}.mixer", layer)
            elif letter == "E":
                table.add_moe(f"{path}.mixer", layer)
            else:
                table.add_mlp(f"{path}.mixer", "ffn", shape.ffn, layer)
        table.add_norm("model.norm_f", None, "lm_head")
        table.add("head", "lm_head.weight", vocab, table.hidden, disk="lm_head.weight")
        axis_map = AxisMap(
            family=self.model_type,
            axes=_axes(shape),
            tensors=table.tensors,
            states=tuple(table.states),
            norms=tuple(table.norms),
            moe_layers=tuple(table.moe),
            probes=tuple(table.probes),
            work=tuple(table.work),
            mixers=tuple(table.mixers),
        )
        return require_size(axis_map)

    def config_at(self, config: Config, widths: Mapping) -> Config:
        """See `Family.config_at`.

        Layers are written as `hybrid_override_pattern` with the legacy names beside it, which
        every reader so far loads; newer names alone are rejected by older engines.
        """
        config = _by_one_name(config)
        axis_map = self.axis_map(config)
        complete = axis_map.complete(widths)
        kept = homogeneous(complete, axis_map)
        fields = {
            "hidden": "hidden_size",
            "ffn": "intermediate_size",
            "experts": "n_routed_experts",
            "expert_ffn": "moe_intermediate_size",
            "shared_ffn": "moe_shared_expert_intermediate_size",
            "ssm_heads": "mamba_num_heads",
            "heads": "num_attention_heads",
            TOP_K: "num_experts_per_tok",
        }
        letters = layer_pattern(config)
        layers = axis_map.kept_layers(complete)
        pattern = "".join(letters[layer] for layer in layers)
        cut = cut_by_layer(config, len(letters), layers)
        return {
            **{key: value for key, value in cut.items() if key != "layer_types"},
            **{fields[axis]: width for axis, width in kept.items()},
            "head_dim": get_int(config, "head_dim", 128),
            "hybrid_override_pattern": pattern,
            "layers_block_type": [LEGACY_NAMES[letter] for letter in pattern],
            "num_hidden_layers": len(pattern),
            "num_nextn_predict_layers": 0,
        }
