"""Decoders of Llama's shape: in every layer attention and a gated MLP, each behind a norm."""

from __future__ import annotations

from abc import abstractmethod
from types import MappingProxyType

from star_elastic.architectures.config_file import (
    MOST_LAYERS,
    Config,
    get_bool,
    get_float,
    get_int,
    require_full_layers,
)
from star_elastic.architectures.decoder import Architecture, Decoder
from star_elastic.architectures.parts import Attention, Mlp, Norm


class PreNorm(Architecture):
    """What such model types share; each says its defaults, its attention and its MLP's biases.

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
    rms_norm_eps = 1e-6

    @abstractmethod
    def attention(self, config: Config, hidden: int) -> Attention:
        """The attention of every layer, at `self_attn`. Raises ConfigError."""

    def mlp_bias(self, config: Config) -> bool:
        """Whether the MLP's projections have biases."""
        return False

    def hidden(self, config: Config) -> int:
        """Channels of the residual stream."""
        return get_int(config, "hidden_size", self.hidden_size)

    def decoder(self, config: Config) -> Decoder:
        """See `Architecture.decoder`."""
        num_layers = get_int(config, "num_hidden_layers", self.num_hidden_layers, most=MOST_LAYERS)
        require_full_layers(config, num_layers)
        hidden = self.hidden(config)
        eps = get_float(config, "rms_norm_eps", self.rms_norm_eps)
        tied = get_bool(config, "tie_word_embeddings", False)
        neurons = get_int(config, "intermediate_size", self.intermediate_size)
        parts = (
            self.attention(config, hidden),
            Mlp(path="mlp", neurons=neurons, gated=True, bias=self.mlp_bias(config)),
            Norm(path="input_layernorm", eps=eps, reader="self_attn"),
            Norm(path="post_attention_layernorm", eps=eps, reader="mlp"),
        )
        return Decoder(
            hidden=hidden,
            vocab=get_int(config, "vocab_size", self.vocab_size),
            layers=(parts,) * num_layers,
            final_norm=Norm(path="model.norm", eps=eps, reader="" if tied else "lm_head"),
            tied=tied,
        )
