"""Llama-type decoders: attention and a gated MLP in every layer, rotary positions, tied or untied.

Query heads are cut inside each KV group, so that every kept head goes on reading its own keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from star_elastic.architectures.base import (
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
    Axis,
    AxisMap,
    Dim,
    NormSpec,
    Piece,
    Probe,
    Segment,
    StateSpec,
    TensorSpec,
    WorkSpec,
    fixed,
)
from star_elastic.errors import ConfigError

FULL = ("full_attention", "attention")
"""How a config names a layer that sees the whole text."""


class Llama:
    """The `llama` family table."""

    model_type = "llama"
    end_of_thinking = "\n</think>\n\n"
    prefix_aliases: Mapping[str, str] = {}
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq",)
    copies: Mapping[str, str] = MappingProxyType({"lm_head.weight": "model.embed_tokens.weight"})

    def axis_map(self, config: Config) -> AxisMap:
        """See `Family.axis_map`. Defaults are those of transformers' LlamaConfig."""
        num_layers = get_int(config, "num_hidden_layers", 32, most=MOST_LAYERS)
        require_whole_attention(config)
        _require_full_layers(config.get("layer_types"), num_layers)
        hidden_size = get_int(config, "hidden_size", 4096)
        ffn_size = get_int(config, "intermediate_size", 11008)
        num_heads = get_int(config, "num_attention_heads", 32)
        num_kv = get_optional_int(config, "num_key_value_heads") or num_heads
        head_dim = get_optional_int(config, "head_dim") or hidden_size // num_heads
        eps = get_float(config, "rms_norm_eps", 1e-6)
        require_multiple("num_attention_heads", num_heads, "num_key_value_heads", num_kv)
        require_multiple("hidden_size", hidden_size, "num_attention_heads", num_heads)

        hidden: Dim = (Segment(hidden_size, axis="hidden"),)
        neurons: Dim = (Segment(ffn_size, axis="ffn"),)
        queries: Dim = (Segment(num_heads, head_dim, "heads", num_kv),)
        keys = fixed(num_kv * head_dim)
        vocab = fixed(get_int(config, "vocab_size", 32000))
        tensors: dict[str, TensorSpec] = {}
        norms: list[NormSpec] = []
        probes: list[Probe] = []

        def add(part: str, name: str, *dims: Dim, **kwargs) -> None:
            tensors[name] = TensorSpec(name, part, dims, (Piece(name),), **kwargs)

        def add_norm(path: str, layer: int | None, reader: str) -> None:
            add("norms", f"{path}.weight", hidden, layer=layer)
            norms.append(NormSpec(path, "hidden", layer, eps, reader=reader))
            probes.append(Probe(path, layer, "output", (hidden,)))

        def add_linear(path: str, layer: int, out: Dim, inner: Dim, bias: bool, gate=None):
            part = "mlp" if ".mlp." in path else "attention"
            add(part, f"{path}.weight", out, inner, layer=layer, gate_dim=gate)
            if bias:
                add(part, f"{path}.bias", out, layer=layer)

        tied = get_bool(config, "tie_word_embeddings", False)
        add("embeddings", "model.embed_tokens.weight", vocab, hidden, lookup=not tied)
        for layer in range(num_layers):
            path = f"model.layers.{layer}"
            bias = get_bool(config, "attention_bias", False)
            for name, out in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
                add_linear(f"{path}.self_attn.{name}", layer, out, hidden, bias)
            add_linear(f"{path}.self_attn.o_proj", layer, hidden, queries, bias, gate=1)
            bias = get_bool(config, "mlp_bias", False)
            add_linear(f"{path}.mlp.gate_proj", layer, neurons, hidden, bias)
            add_linear(f"{path}.mlp.up_proj", layer, neurons, hidden, bias)
            add_linear(f"{path}.mlp.down_proj", layer, hidden, neurons, bias, gate=1)
            add_norm(f"{path}.input_layernorm", layer, f"{path}.self_attn")
            add_norm(f"{path}.post_attention_layernorm", layer, f"{path}.mlp")
            probes.append(
                Probe(f"{path}.self_attn.o_proj", layer, "input", (queries,), written=True)
            )
            probes.append(Probe(f"{path}.mlp.down_proj", layer, "input", (neurons,)))
        add_norm("model.norm", None, "" if tied else "lm_head")
        if not tied:
            add("head", "lm_head.weight", vocab, hidden)

        layers = tuple(range(num_layers))
        axis_map = AxisMap(
            family=self.model_type,
            axes={
                "hidden": Axis("hidden", hidden_size),
                "ffn": Axis("ffn", ffn_size, layers=layers),
                "heads": Axis("heads", num_heads, num_kv, layers, num_kv),
                LAYERS: Axis(LAYERS, 1, layers=layers, minimum=0, ranked=False),
            },
            tensors=tensors,
            states=tuple(
                StateSpec("key_value", layer, (fixed(2), keys), per_token=True) for layer in layers
            ),
            norms=tuple(norms),
            probes=tuple(probes),
            work=tuple(WorkSpec(layer, (queries,), 4, per_context=True) for layer in layers),
            multiples=(("hidden", "heads"),),
        )
        return require_size(axis_map)

    def config_at(self, config: Config, widths: Mapping) -> Config:
        """See `Family.config_at`. `head_dim` is written out, or it would follow hidden_size."""
        axis_map = self.axis_map(config)
        complete = axis_map.complete(widths)
        kept = homogeneous(complete, axis_map)
        num_heads = get_int(config, "num_attention_heads", 32)
        layers = axis_map.kept_layers(complete)
        return {
            **cut_by_layer(config, len(axis_map.axes[LAYERS].layers), layers),
            "hidden_size": kept["hidden"],
            "intermediate_size": kept["ffn"],
            "num_hidden_layers": len(layers),
            "num_attention_heads": kept["heads"],
            "num_key_value_heads": config.get("num_key_value_heads") or num_heads,
            "head_dim": config.get("head_dim") or axis_map.axes["hidden"].size // num_heads,
        }


def _require_full_layers(layer_types: object, num_layers: int) -> None:
    """Raises ConfigError for `layer_types` of which one does not see the whole text, or that are
    not as many as the layers."""
    if layer_types is None:
        return
    if not isinstance(layer_types, list) or any(kind not in FULL for kind in layer_types):
        raise ConfigError(
            f"{told('layer_types', layer_types)} is not known for model_type=llama, whose layers "
            "all see the whole text: caches would obey it; remove it from config.json"
        )
    if len(layer_types) != num_layers:
        raise ConfigError(
            f"layer_types names {len(layer_types)} layers, num_hidden_layers={num_layers}; correct "
            "config.json"
        )
