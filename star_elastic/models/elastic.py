"""The elastic model: a sorted parent whose forward runs any size, with gradients to its parameters.

The unit is the block. Inside a block's forward its parent's parameters are whole (sharded training
unshards them first); there they are sliced, gated and given to a skeleton of the small block in a
functional call. So a step costs what the size costs, and every layer may have widths of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from star_elastic.architectures import Family, family_of
from star_elastic.architectures.base import Config
from star_elastic.axes import LAYERS, TOP_K, AxisMap, NormSpec, TensorSpec
from star_elastic.models.documents import DocumentMamba2Mixer
from star_elastic.models.fake_quantisation import FakeQuantisation
from star_elastic.models.modules import (
    ElasticGroupedRMSNorm,
    ElasticRMSNorm,
    ElasticSigmoidRouter,
    Fp32Router,
)
from star_elastic.models.skeleton import build_block, build_skeleton, without_memory
from star_elastic.nesting.gate import (
    Mixtures,
    gate_parameter,
    mixture_at,
    norm_buffers,
    presence_gate,
    widest_slice,
)
from star_elastic.nesting.slice import slice_tensor
from star_elastic.recent import Recent
from star_elastic.widths import Widths

MAX_SKELETONS = 32
"""Skeletons kept per layer, and of the part outside the layers; the least recently used goes."""


@dataclass(frozen=True, slots=True)
class Call:
    """What one forward is asked for: the slice that is computed, and the gates inside it.

    `recompute` keeps no activations inside blocks and computes them again in the backward pass.
    """

    widths: Widths
    mixtures: Mixtures | None
    recompute: bool = False


class _Part(nn.Module):
    """What a block and the part outside the blocks have in common: slicing, gating, skeletons."""

    def __init__(
        self,
        axis_map: AxisMap,
        layer: int | None,
        prefix: str,
        fake: FakeQuantisation | None = None,
    ):
        super().__init__()
        self.axis_map = axis_map
        self.fake = fake
        self.layer = layer
        self.prefix = prefix
        self.specs: tuple[TensorSpec, ...] = tuple(
            spec for spec in axis_map.tensors.values() if spec.layer == layer
        )
        self.norms: tuple[NormSpec, ...] = tuple(n for n in axis_map.norms if n.layer == layer)
        self.skeletons: Recent[Any, Any] = Recent(MAX_SKELETONS)

    def name(self, path: str) -> str:
        """A path of the model, seen from this part."""
        return path.removeprefix(self.prefix)

    def tensors(self, state: Mapping[str, torch.Tensor], call: Call) -> dict[str, torch.Tensor]:
        """This part's parameters, buffers and gates for a call, by their name in its skeleton."""
        sliced = self._sliced(state, call)
        for spec in self.specs:
            if spec.routed and len(spec.dims) == 3:
                name = self.name(spec.name)
                sliced[name] = _as_autocast_would(sliced[name])
        return sliced

    def _sliced(self, state: Mapping[str, torch.Tensor], call: Call) -> dict[str, torch.Tensor]:
        axis_map, widths = self.axis_map, call.widths
        sliced = {
            self.name(spec.name): slice_tensor(state[self.name(spec.name)], spec, axis_map, widths)
            for spec in self.specs
        }
        if call.mixtures is None:
            if self.fake is not None:
                for spec in self.specs:
                    name = self.name(spec.name)
                    sliced[name] = self.fake.weight(spec.name, sliced[name], widths)
            return sliced
        for spec in self.specs:
            name = self.name(spec.name)
            sliced[name] = gate_parameter(sliced[name], spec, axis_map, call.mixtures, widths)
        for norm in self.norms:
            path = self.name(norm.path)
            (segment,) = axis_map.tensors[f"{norm.path}.weight"].dims[0]
            weight = sliced[f"{path}.weight"]
            buffers = norm_buffers(norm, segment.unit, axis_map, call.mixtures, widths) or (
                weight.new_ones(weight.shape), weight.new_tensor(norm.eps), weight.new_tensor(1.0)
            )  # fmt: skip
            names = ("input_gate", "eps", "scale")
            sliced.update({f"{path}.{n}": b for n, b in zip(names, buffers, strict=True)})
        return sliced

    def install_norms(self, skeleton: nn.Module, widths: Widths) -> None:
        """Replaces the norms of a skeleton by those that can be half open."""
        with without_memory():
            for norm in self.norms:
                (size,) = self.axis_map.shape(self.axis_map.tensors[f"{norm.path}.weight"], widths)
                if norm.grouped:
                    groups = self.axis_map.axes[norm.axis].num_groups
                    module: nn.Module = ElasticGroupedRMSNorm(size, norm.eps, num_groups=groups)
                else:
                    module = ElasticRMSNorm(size, norm.eps, fp32_weight=norm.fp32_weight)
                skeleton.set_submodule(self.name(norm.path), module)


def _as_autocast_would(stack: torch.Tensor) -> torch.Tensor:
    """A stack of experts in the dtype in which autocast would multiply it.

    Autocast knows linear layers but not grouped products, whose dtype is that of the weights:
    without this the experts would multiply in fp32. The gradient comes back in the stack's dtype.
    """
    device = stack.device.type
    if torch.is_autocast_enabled(device) and stack.dtype == torch.float32:
        return stack.to(torch.get_autocast_dtype(device))
    return stack


class _Handed(torch.autograd.Function):
    """A tensor that leaves the model: the same memory and gradient, but neither a parameter nor a
    view of one. FSDP hangs a hook on every output of a forward, and on a parameter of its own they
    would stay for ever, one more with every forward; about views it warns."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        return value.detach()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        (grad,) = grads
        return grad


def _state_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


class ElasticBlock(_Part):
    """One layer of the parent at the widths of a call. A unit of sharded training.

    `forward` takes and returns the residual stream (B, T, hidden width), with the other inputs that
    transformers gives to a layer.
    """

    def __init__(
        self,
        parent: PreTrainedModel,
        config: Config,
        axis_map: AxisMap,
        layer: int,
        fake: FakeQuantisation | None,
    ):
        family = family_of(config)
        path = f"{axis_map.blocks}.{layer}"
        super().__init__(axis_map, layer, f"{path}.", fake)
        self.block = parent.get_submodule(path)
        self._family, self._config = family, config
        self._like = (parent,)  # in a tuple, so that it is no submodule
        self._kind = type(self.block)
        self.moe = next((m for m in axis_map.moe_layers if m.layer == layer), None)
        self.mixer = next((path for at, path in axis_map.mixers if at == layer), None)

    def forward(self, x_BTD: torch.Tensor, call: Call, **inputs: Any) -> torch.Tensor:
        if call.recompute and torch.is_grad_enabled():
            recomputed: Any = checkpoint(
                self._run, x_BTD, call, inputs, use_reentrant=False, preserve_rng_state=False
            )
            return recomputed
        return self._run(x_BTD, call, inputs)

    def _run(self, x_BTD: torch.Tensor, call: Call, inputs: Mapping[str, Any]) -> torch.Tensor:
        assert self.layer is not None
        tensors = self.tensors(_state_of(self.block), call)
        gated = call.mixtures is not None
        if gated and self.moe is not None:
            tensors |= self._routing_gates(tensors, call)
        skeleton = self.skeleton(self.axis_map.layer_widths(call.widths, self.layer), gated=gated)
        y_BTD = functional_call(skeleton, tensors, (x_BTD,), dict(inputs))
        if call.mixtures is None:
            return y_BTD
        gate = presence_gate(call.mixtures, self.axis_map, self.layer)
        return y_BTD if gate is None else x_BTD + gate.to(x_BTD.dtype) * (y_BTD - x_BTD)

    def _routing_gates(self, tensors: Mapping[str, torch.Tensor], call: Call) -> dict:
        assert self.moe is not None and call.mixtures is not None
        path = self.name(self.moe.router_path)
        bias_E = tensors[f"{path}.e_score_correction_bias"]
        gates = {"expert_gate": torch.ones_like(bias_E)}
        experts = mixture_at(call.mixtures, self.axis_map, "experts", self.layer)
        if experts is not None:
            groups = self.axis_map.axes["experts"].num_groups
            gates["expert_gate"] = experts.unit_gates(bias_E.shape[0], groups)
        top_k = self.axis_map.width(call.widths, TOP_K, self.layer)
        ranks = mixture_at(call.mixtures, self.axis_map, TOP_K, self.layer)
        gates["rank_gate"] = ranks.unit_gates(top_k) if ranks else bias_E.new_ones(top_k)
        return {f"{path}.{name}": gate for name, gate in gates.items()}

    def skeleton(self, widths: Widths, *, gated: bool) -> nn.Module:
        """The memory-less block at the widths that this layer sees."""
        skeleton = self.skeletons.fetch(
            (widths, gated), lambda: self._build_skeleton(widths, gated)
        )
        # A gated or quantised skeleton stays out of training mode, in which fused Mamba kernels
        # would skip the norm's gate and what is done with inputs; nothing else depends on the mode.
        return skeleton.train(self.training and not gated and self.fake is None)

    def _build_skeleton(self, widths: Widths, gated: bool) -> nn.Module:
        assert self.layer is not None
        config = self._family.config_at(self._config, widths)
        skeleton = build_block(self._kind, config, self.layer, self._like[0], deterministic=True)
        if self.mixer is not None:
            path = self.name(self.mixer)
            mixer: Any = skeleton.get_submodule(path)
            with without_memory():
                skeleton.set_submodule(path, DocumentMamba2Mixer(mixer.config, self.layer))
        if self.moe is not None:
            path = self.name(self.moe.router_path)
            plain: Any = skeleton.get_submodule(path)
            around: Any = skeleton.get_submodule(path.rpartition(".")[0])
            with without_memory():
                router = ElasticSigmoidRouter(plain) if gated else Fp32Router(around.config)
            skeleton.set_submodule(path, router)
        if gated:
            self.install_norms(skeleton, widths)
        elif self.fake is not None:
            self.fake.watch(skeleton, self.specs, self.prefix)
        return skeleton.requires_grad_(False)


class _Caller(nn.Module):
    """Stands in a skeleton in place of a layer and calls the parent's block."""

    def __init__(self, block: ElasticBlock):
        super().__init__()
        self._block = (block,)  # in a tuple, so that it is no submodule
        for name, value in vars(block.block).items():
            if not name.startswith("_") and name != "training":
                setattr(self, name, value)  # what a model asks of its layers (block_type, ...)

    def forward(self, x_BTD: torch.Tensor, *, elastic: Call, **inputs: Any) -> torch.Tensor:
        return self._block[0](x_BTD, elastic, **inputs)


class ElasticModel(_Part):
    """A sorted parent whose forward runs any submodel, with gradients to the parent's parameters.

    `forward(size, **inputs)` takes the size as an argument: `Widths` for a plain slice, or mixtures
    for the gated forward of the router. Inputs and result are those of the transformers model;
    there is no cache (submodels generate). The parent is `self.parent`; nothing in it is changed.
    `recompute`: activation checkpointing, block by block. `axis_map`: a table other than the
    family's. `fake`: plain slices compute with quantised weights and inputs.
    """

    def __init__(
        self,
        parent: PreTrainedModel,
        config: Config,
        *,
        recompute: bool = False,
        axis_map: AxisMap | None = None,
        fake: FakeQuantisation | None = None,
    ):
        family: Family = family_of(config)
        super().__init__(axis_map or family.axis_map(config), None, "")
        self.parent = parent
        self.model_config = config
        self.family = family
        self.recompute = recompute
        self.fake = fake
        layers = self.axis_map.axes[LAYERS].layers
        self.blocks = nn.ModuleList(
            ElasticBlock(parent, config, self.axis_map, layer, fake) for layer in layers
        )
        by_part = {spec.part: spec.name for spec in self.specs}
        self._head = by_part.get("head", by_part["embeddings"])

    def state(self) -> dict[str, torch.Tensor]:
        """The parent's parameters and buffers by name."""
        return _state_of(self.parent)

    def forward(self, size: Widths | Mixtures, *, slice_at: Widths | None = None, **inputs):
        """Runs the submodel of `size`.

        With mixtures, computes the slice `slice_at` (default: the widest choices with weight).
        """
        call = self._call(size, slice_at)
        tensors = self.tensors(self._own_state(), call)
        inputs = {**inputs, "use_cache": False, "elastic": call}
        return functional_call(self._skeleton(call), tensors, (), inputs)

    def hidden_states(
        self, size: Widths | Mixtures, *, slice_at: Widths | None = None, **inputs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the LM head reads, and the head: states (B, T, hidden width), weight (V, hidden
        width). For losses that never hold all logits at once; else as `forward`."""
        call = self._call(size, slice_at)
        tensors = self.tensors(self._own_state(), call)
        skeleton = self._skeleton(call)
        prefix = f"{skeleton.base_model_prefix}."
        body = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        inputs = {**inputs, "use_cache": False, "elastic": call}
        output = functional_call(skeleton.base_model, body, (), inputs)
        head: Any = _Handed.apply(tensors[self._head])
        return output.last_hidden_state, head

    def _call(self, size: Widths | Mixtures, slice_at: Widths | None) -> Call:
        if isinstance(size, Widths):
            return Call(size, None, self.recompute)
        return Call(slice_at or widest_slice(size, self.axis_map), size, self.recompute)

    def _own_state(self) -> dict[str, torch.Tensor]:
        """The tensors outside the layers."""
        return {spec.name: self.parent.get_parameter(spec.name) for spec in self.specs}

    def _skeleton(self, call: Call) -> PreTrainedModel:
        kept = self.axis_map.kept_layers(call.widths)
        gated = call.mixtures is not None
        key = (call.widths["hidden"], kept, gated)
        skeleton = self.skeletons.fetch(key, lambda: self._build_skeleton(call, kept, gated))
        return skeleton.train(self.training)

    def _build_skeleton(self, call: Call, kept: tuple[int, ...], gated: bool) -> PreTrainedModel:
        """The model around the layers, in which callers stand for the layers themselves."""
        axis_map = self.axis_map
        outside = {"hidden": call.widths["hidden"], LAYERS: call.widths[LAYERS]}
        for first, divisor in axis_map.multiples:
            if first == "hidden":
                outside[divisor] = axis_map.axes[divisor].minimum
        widths = axis_map.complete(outside)
        config = self.family.config_at(self.model_config, widths)
        skeleton = build_skeleton(config, self.parent, deterministic=True)
        if gated:
            self.install_norms(skeleton, widths)
        callers = nn.ModuleList(_Caller(self._block_at(layer)) for layer in kept)
        skeleton.set_submodule(axis_map.at(widths).blocks, callers)
        return skeleton.requires_grad_(False)

    def _block_at(self, layer: int) -> ElasticBlock:
        block = self.blocks[layer]
        assert isinstance(block, ElasticBlock)
        return block
