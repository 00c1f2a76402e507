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

from star_elastic.architectures import ModelConfig
from star_elastic.architectures.config_file import Config
from star_elastic.axes import LAYERS, TOP_K, AxisMap, Block, MoeSpec
from star_elastic.axes.widths import Widths
from star_elastic.models.documents import mask_documents
from star_elastic.models.fake_quantisation import FakeQuantisation
from star_elastic.models.modules import document_mixer, elastic_norm, training_router
from star_elastic.models.skeleton import build_block, build_skeleton, without_memory
from star_elastic.nesting.gate import (
    Mixture,
    Mixtures,
    gate_parameter,
    norm_buffers,
    presence_gate,
    widest_slice,
)
from star_elastic.nesting.slice import slice_tensor
from star_elastic.recent import Recent

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
        rows: Block,
        fake: FakeQuantisation | None = None,
    ):
        super().__init__()
        self.axis_map, self.layer, self.rows, self.fake = axis_map, layer, rows, fake
        self.prefix = "" if layer is None else f"{axis_map.path}.{layer}."
        self.skeletons: Recent[Any, Any] = Recent(MAX_SKELETONS)

    def tensors(self, state: Mapping[str, torch.Tensor], call: Call) -> dict[str, torch.Tensor]:
        """This part's parameters, buffers and gates for a call, by their name in its skeleton."""
        widths = self.axis_map.seen_by(self.layer, call.widths)
        sliced = {
            spec.name: slice_tensor(state[spec.name], spec.dims, widths)
            for spec in self.rows.tensors
        }
        if call.mixtures is not None:
            self._gate(sliced, self.axis_map.seen_by(self.layer, call.mixtures), widths)
        elif self.fake is not None:
            for spec in self.rows.tensors:
                name = self.prefix + spec.name
                sliced[spec.name] = self.fake.weight(name, sliced[spec.name], call.widths)
        for spec in self.rows.tensors:
            if spec.routed and len(spec.dims) == 3:
                sliced[spec.name] = _as_autocast_would(sliced[spec.name])
        return sliced

    def _gate(
        self,
        sliced: dict[str, torch.Tensor],
        mixtures: Mapping[str, Mixture],
        widths: Mapping[str, int],
    ) -> None:
        """Multiplies sliced parameters with their gates, and adds the buffers of gated norms."""
        for spec in self.rows.tensors:
            sliced[spec.name] = gate_parameter(sliced[spec.name], spec, mixtures, widths)
        for norm in self.rows.norms:
            weight = sliced[f"{norm.path}.weight"]
            buffers = norm_buffers(norm, mixtures, widths) or (
                weight.new_ones(weight.shape), weight.new_tensor(norm.eps), weight.new_tensor(1.0)
            )  # fmt: skip
            names = ("input_gate", "eps", "scale")
            sliced.update({f"{norm.path}.{n}": b for n, b in zip(names, buffers, strict=True)})

    def install_norms(self, skeleton: nn.Module, widths: Widths) -> None:
        """Replaces the norms of a skeleton by those that can be half open."""
        here = self.axis_map.seen_by(self.layer, widths)
        with without_memory():
            for norm in self.rows.norms:
                skeleton.set_submodule(norm.path, elastic_norm(norm, here))


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
        config: ModelConfig,
        axis_map: AxisMap,
        layer: int,
        fake: FakeQuantisation | None,
    ):
        super().__init__(axis_map, layer, axis_map.blocks[layer], fake)
        self.block = parent.get_submodule(f"{axis_map.path}.{layer}")
        self._config = config
        self._like = (parent,)  # in a tuple, so that it is no submodule
        self._kind = type(self.block)

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
        widths = self.axis_map.layer_widths(call.widths, self.layer)
        if call.mixtures is None:
            return functional_call(
                self.skeleton(widths, gated=False), tensors, (x_BTD,), dict(inputs)
            )
        mixtures = self.axis_map.seen_by(self.layer, call.mixtures)
        for moe in self.rows.moe:
            tensors |= self._routing_gates(moe, mixtures, widths, x_BTD)
        skeleton = self.skeleton(widths, gated=True)
        y_BTD = functional_call(skeleton, tensors, (x_BTD,), dict(inputs))
        gate = presence_gate(mixtures)
        return y_BTD if gate is None else x_BTD + gate.to(x_BTD.dtype) * (y_BTD - x_BTD)

    def _routing_gates(
        self,
        moe: MoeSpec,
        mixtures: Mapping[str, Mixture],
        widths: Mapping[str, Any],
        like: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """The gates (E,) of experts and (K,) of their ranks in a selection."""

        def gates(axis: str) -> torch.Tensor:
            groups = self.axis_map.axes[axis].num_groups
            if axis in mixtures:
                return mixtures[axis].unit_gates(widths[axis], groups)
            return torch.ones(widths[axis], device=like.device)

        path = moe.router_path
        return {f"{path}.expert_gate": gates("experts"), f"{path}.rank_gate": gates(TOP_K)}

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
        config = self._config.at(widths)
        skeleton = build_block(self._kind, config, self.layer, self._like[0], deterministic=True)
        with without_memory():
            for mixer in self.rows.mixers:
                plain: Any = skeleton.get_submodule(mixer.path)
                skeleton.set_submodule(mixer.path, document_mixer(mixer, plain, self.layer))
            for moe in self.rows.moe:
                plain = skeleton.get_submodule(moe.router_path)
                router = training_router(moe, plain, gated=gated)
                skeleton.set_submodule(moe.router_path, router)
        if gated:
            self.install_norms(skeleton, widths)
        elif self.fake is not None:
            self.fake.watch(skeleton, self.rows.tensors, self.prefix)
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
        config = ModelConfig.of(config)
        axis_map = axis_map or config.axis_map
        super().__init__(axis_map, None, axis_map.outside)
        self.parent = parent
        self.model_config = config
        self.architecture = config.architecture
        self.recompute = recompute
        self.fake = fake
        layers = self.axis_map.axes[LAYERS].layers
        self.blocks = nn.ModuleList(
            ElasticBlock(parent, config, self.axis_map, layer, fake) for layer in layers
        )
        by_part = {spec.part: spec.name for spec in self.rows.tensors}
        self._head = by_part.get("head", by_part["embeddings"])

    def state(self) -> dict[str, torch.Tensor]:
        """The parent's parameters and buffers by name."""
        return _state_of(self.parent)

    def forward(self, size: Widths | Mixtures, *, slice_at: Widths | None = None, **inputs):
        """Runs the submodel of `size`.

        With mixtures, computes the slice `slice_at` (default: the widest choices with weight).
        """
        call = self._call(size, slice_at)
        tensors = self.tensors(self._own_state(), call) | self._width_buffers()
        inputs = {**inputs, "use_cache": False, "elastic": call}
        return functional_call(self._skeleton(call), tensors, (), inputs)

    def hidden_states(
        self, size: Widths | Mixtures, *, slice_at: Widths | None = None, **inputs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the LM head reads, and the head: states (B, T, hidden width), weight (V, hidden
        width). For losses that never hold all logits at once; else as `forward`."""
        call = self._call(size, slice_at)
        tensors = self.tensors(self._own_state(), call) | self._width_buffers()
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
        return {spec.name: self.parent.get_parameter(spec.name) for spec in self.rows.tensors}

    def _width_buffers(self) -> dict[str, torch.Tensor]:
        """Buffers of the part outside the layers that are the parent's at every size."""
        return {name: self.parent.get_buffer(name) for name in self.axis_map.width_buffers}

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
        # This config is of the part outside the layers only, but its class checks it as a whole:
        # the fewest heads divide any hidden width that the real number of heads divides.
        for first, divisor in axis_map.multiples:
            if first == "hidden":
                outside[divisor] = axis_map.axes[divisor].minimum
        widths = axis_map.complete(outside)
        skeleton = build_skeleton(self.model_config.at(widths), self.parent, deterministic=True)
        if gated:
            self.install_norms(skeleton, widths)
        mask_documents(skeleton)
        callers = nn.ModuleList(_Caller(self._block_at(layer)) for layer in kept)
        skeleton.set_submodule(axis_map.path, callers)
        return skeleton.requires_grad_(False)

    def _block_at(self, layer: int) -> ElasticBlock:
        block = self.blocks[layer]
        assert isinstance(block, ElasticBlock)
        return block
