"""Decoders of Llama's shape: in each layer attention and a feed-forward network, behind norms."""

from __future__ import annotations

from types import MappingProxyType

from star_elastic.architectures.config_file import (
    MOST_LAYERS,
    Config,
    get_bool,
    get_float,
    get_int,
    get_optional_int,
    require_full_layers,
    require_multiple,
)
from star_elastic.architectures.decoder import Architecture, Decoder
from star_elastic.architectures.parts import Attention, Mlp, Norm, Part
from star_elastic.architectures.windows import Windows, written_windows
from star_elastic.axes import RMS, RMS_PLUS_ONE, Follow

PLUS = {RMS: 0.0, RMS_PLUS_ONE: 1.0}
"""What norms of a kind add to their weights."""


class PreNorm(Architecture):
    """What such model types share; each says its defaults, and in what it differs.

    Names of fields and modules are those that transformers gives them all.
    """

    fields = MappingProxyType(
        {"hidden": "hidden_size", "ffn": "intermediate_size", "heads": "num_attention_heads"}
    )
    copies = MappingProxyType({"lm_head.weight": "model.embed_tokens.weight"})
    vocab_size: int
    """Default of the config's field of this name, as are those below."""
    intermediate_size: int
    hidden_size = 4096
    num_hidden_layers = 32
    num_attention_heads = 32
    num_key_value_heads: int | None
    """None: as many as query heads, as where the config says null."""
    rms_norm_eps = 1e-6
    tie_word_embeddings = False
    head_size: int | None = None
    """Default of `head_dim`; None: the hidden size over the heads."""
    head_may_be_null = False
    """Whether null says the same as no `head_dim`; else transformers would take it as it is."""
    head_norms: tuple[str, ...] = ()
    windows_by_layer = False
    """Whether defaults of windows go by the layers' numbers, which a slice then names."""
    norm_kind = RMS
    embed_scale = ""
    """As in `Decoder`."""

    def head_dim(self, config: Config) -> int:
        """Elements of a head. Raises ConfigError."""
        size = self.head_size or self.hidden(config) // self.heads(config)
        if self.head_may_be_null and config.get("head_dim") is None:
            config = {"head_dim": size}
        return get_int(config, "head_dim", size)

    def biases(self, config: Config) -> tuple[bool, bool]:
        """Whether the query, key and value projections have biases, and the output's. Raises
        ConfigError."""
        bias = get_bool(config, "attention_bias", False)
        return bias, bias

    def mlp_bias(self, config: Config) -> bool:
        """Whether the MLP's projections have biases. Raises ConfigError."""
        return False

    def windows(self, config: Config) -> Windows:
        """The window of every layer. Raises ConfigError."""
        num_layers = self.num_layers(config)
        require_full_layers(config, num_layers)
        return (None,) * num_layers

    def num_layers(self, config: Config) -> int:
        """Layers of the model. Raises ConfigError."""
        return get_int(config, "num_hidden_layers", self.num_hidden_layers, most=MOST_LAYERS)

    def hidden(self, config: Config) -> int:
        """Channels of the residual stream. Raises ConfigError."""
        return get_int(config, "hidden_size", self.hidden_size)

    def heads(self, config: Config) -> int:
        """Query heads. Raises ConfigError."""
        heads = get_int(config, "num_attention_heads", self.num_attention_heads)
        if ("hidden", "heads") in self.multiples:
            require_multiple("hidden_size", self.hidden(config), "num_attention_heads", heads)
        return heads

    def kv_heads(self, config: Config) -> int:
        """Key-value heads. Raises ConfigError."""
        stored = {"num_key_value_heads": self.num_key_value_heads, **config}
        heads = self.heads(config)
        kv_heads = get_optional_int(stored, "num_key_value_heads") or heads
        require_multiple("num_attention_heads", heads, "num_key_value_heads", kv_heads)
        return kv_heads

    def attention(self, config: Config, window: int | None) -> Attention:
        """The attention of a layer with that window. Raises ConfigError."""
        bias, output_bias = self.biases(config)
        return Attention(
            path="self_attn", heads=self.heads(config), kv_heads=self.kv_heads(config),
            head_dim=self.head_dim(config), bias=bias, output_bias=output_bias,
            head_norms=self.head_norms, window=window,
        )  # fmt: skip

    def rotary(self, config: Config) -> tuple[int, ...]:
        """See `Decoder`. Raises ConfigError."""
        return (self.head_dim(config),)

    def norms(self, eps: float) -> tuple[Norm, ...]:
        """The norms of the residual stream in a layer."""
        kind = self.norm_kind
        return (
            Norm(path="input_layernorm", eps=eps, reader="self_attn", kind=kind),
            Norm(path="post_attention_layernorm", eps=eps, reader="mlp", kind=kind),
        )

    def feed_forward(self, config: Config, layer: int) -> Part:
        """The feed-forward network of a layer. Raises ConfigError."""
        neurons = get_int(config, "intermediate_size", self.intermediate_size)
        return Mlp(path="mlp", neurons=neurons, gated=True, bias=self.mlp_bias(config))

    def decoder(self, config: Config) -> Decoder:
        """See `Architecture.decoder`."""
        eps = get_float(config, "rms_norm_eps", self.rms_norm_eps)
        tied = get_bool(config, "tie_word_embeddings", self.tie_word_embeddings)
        norms = self.norms(eps)
        # A tied head reads embeddings that are stored larger.
        stored = None
        if self.embed_scale and tied:
            stored = Follow("hidden", inverse=True, offset=PLUS[self.norm_kind])
        layers = (
            (self.attention(config, window), self.feed_forward(config, layer), *norms)
            for layer, window in enumerate(self.windows(config))
        )
        return Decoder(
            hidden=self.hidden(config),
            vocab=get_int(config, "vocab_size", self.vocab_size),
            layers=tuple(layers),
            final_norm=Norm(
                path="model.norm", eps=eps, reader="" if tied else "lm_head", kind=self.norm_kind,
                stored=stored,
            ),
            tied=tied,
            rotary=self.rotary(config),
            embed_scale=self.embed_scale,
        )  # fmt: skip

    def written_out(self, config: Config, layers: tuple[int, ...]) -> Config:
        """See `Architecture.written_out`: both would follow other fields, or may."""
        windows = self.windows(config) if self.windows_by_layer else ()
        return {
            "num_key_value_heads": self.kv_heads(config),
            "head_dim": self.head_dim(config),
            **written_windows(windows, layers),
        }
