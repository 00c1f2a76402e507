"""GPT-OSS: attention with sinks, every second layer with a window, and experts in every layer.

An expert's gate and up projection are interleaved column by column, its matrices lie transposed in
one stack on disk as in memory, and router, experts and attention have biases.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import MappingProxyType

from star_elastic.architectures.config_file import (
    Config,
    get_bool,
    get_int,
    one_name,
    require_at_most,
)
from star_elastic.architectures.parts import Attention, Experts, Part, tensor
from star_elastic.architectures.pre_norm import PreNorm
from star_elastic.architectures.windows import (
    Windows,
    get_window,
    layer_windows,
)
from star_elastic.axes import RMS_FP32, TOP_K, Dim, MoeSpec, TensorSpec, along


@dataclass(frozen=True, kw_only=True)
class TransposedExperts(Experts):
    """Experts whose stacks are (experts, inputs, outputs), with biases, each one tensor on disk."""

    @property
    def moe(self) -> MoeSpec:
        """See `Experts`."""
        return replace(super().moe, router_path=f"{self.path}.router")

    def router(self, hidden: Dim) -> tuple[TensorSpec, ...]:
        """See `Experts`."""
        bias = tensor("routers", f"{self.moe.router_path}.bias", along("experts", self.experts))
        return *super().router(hidden), bias

    def stacks(self, inner: Dim) -> tuple[TensorSpec, ...]:
        """See `Experts`."""
        experts, neurons = along("experts", self.experts), along("expert_ffn", self.neurons)
        pairs, path = along("expert_ffn", self.neurons, 2), self.moe.experts_path

        def stack(name: str, *dims: Dim, **options: int | None) -> TensorSpec:
            return tensor("routed experts", f"{path}.{name}", *dims, routed=True, **options)

        return (
            stack("gate_up_proj", experts, inner, pairs, reads=1),
            stack("gate_up_proj_bias", experts, pairs, reads=None),
            stack("down_proj", experts, neurons, inner, gate_dim=1, reads=1),
            stack("down_proj_bias", experts, inner, reads=None),
        )


class GptOss(PreNorm):
    """The `gpt_oss` architecture. Defaults are those of transformers' GptOssConfig."""

    model_type = "gpt_oss"
    fields = MappingProxyType({
        "hidden": "hidden_size", "heads": "num_attention_heads", "experts": "num_local_experts",
        "expert_ffn": "intermediate_size", TOP_K: "num_experts_per_tok",
    })  # fmt: skip
    attention_keys = ("sliding_window",)
    vocab_size = 201088
    hidden_size = 2880
    intermediate_size = 2880
    num_hidden_layers = 36
    num_attention_heads = 64
    num_key_value_heads = 8
    head_size = 64
    rms_norm_eps = 1e-5
    windows_by_layer = True
    norm_kind = RMS_FP32

    def normalise(self, config: Config) -> Config:
        """See `Architecture.normalise`."""
        return one_name(config, "num_experts", "num_local_experts")

    def attention(self, config: Config, window: int | None) -> Attention:
        """See `PreNorm.attention`."""
        bias = get_bool(config, "attention_bias", True)
        plain = super().attention(config, window)
        return replace(plain, bias=bias, output_bias=bias, sinks=True)

    def windows(self, config: Config) -> Windows:
        """See `PreNorm.windows`."""
        slides = [layer % 2 == 0 for layer in range(self.num_layers(config))]
        return layer_windows(config, len(slides), get_window(config, 128), slides)

    def feed_forward(self, config: Config, layer: int) -> Part:
        """See `PreNorm.feed_forward`."""
        experts = get_int(config, "num_local_experts", 128)
        top_k = get_int(config, "num_experts_per_tok", 4)
        require_at_most("num_experts_per_tok", top_k, "num_local_experts", experts)
        neurons = get_int(config, "intermediate_size", self.intermediate_size)
        return TransposedExperts(path="mlp", experts=experts, neurons=neurons, top_k=top_k)
