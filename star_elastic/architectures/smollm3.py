"""SmolLM3: some layers turn no positions; windows, where they are on, in those layers."""

from __future__ import annotations

from star_elastic.architectures.config_file import Config, get_bool, get_int, told
from star_elastic.architectures.pre_norm import PreNorm
from star_elastic.architectures.windows import Windows, get_window, layer_windows
from star_elastic.errors import ConfigError


class SmolLM3(PreNorm):
    """The `smollm3` architecture. Defaults are those of transformers' SmolLM3Config."""

    model_type = "smollm3"
    attention_keys = ("sliding_window",)
    vocab_size = 128256
    hidden_size = 2048
    intermediate_size = 11008
    num_hidden_layers = 36
    num_attention_heads = 16
    num_key_value_heads = 4
    tie_word_embeddings = True
    windows_by_layer = True

    def mlp_bias(self, config: Config) -> bool:
        """See `PreNorm.mlp_bias`."""
        return get_bool(config, "mlp_bias", False)

    def turns(self, config: Config) -> list[int]:
        """For every layer 1 if it turns positions, else 0. Raises ConfigError."""
        num_layers = self.num_layers(config)
        interval = get_int(config, "no_rope_layer_interval", 4)
        default = [int((layer + 1) % interval != 0) for layer in range(num_layers)]
        turned = default if config.get("no_rope_layers") is None else config["no_rope_layers"]
        if (
            not isinstance(turned, list)
            or len(turned) < num_layers
            or any(own not in (0, 1) for own in turned)
        ):
            raise ConfigError(
                f"{told('no_rope_layers', turned)} is not a list with 1 (positions are turned) or "
                f"0 for each of num_hidden_layers={num_layers}; correct config.json"
            )
        return turned[:num_layers]

    def windows(self, config: Config) -> Windows:
        """See `PreNorm.windows`."""
        is_on, turned = get_bool(config, "use_sliding_window", False), self.turns(config)
        window = get_window(config, None) if is_on else None
        slides = [window is not None and not own for own in turned]
        return layer_windows(config, len(turned), window, slides)

    def written_out(self, config: Config, layers: tuple[int, ...]) -> Config:
        """See `Architecture.written_out`."""
        turned = self.turns(config)
        return {
            **super().written_out(config, layers),
            "no_rope_layers": [turned[layer] for layer in layers],
        }
