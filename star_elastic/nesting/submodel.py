"""Submodels: the transformers model of the smaller config, holding slices of the parent.

For inference the slices are assigned (views where possible, so sizes share one copy); for
training they are fed through `torch.func.functional_call`, so that gradients reach the parent's
whole parameters and the cost is that of the small size.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from star_elastic.axes import AxisMap
from star_elastic.errors import CheckpointError
from star_elastic.families import Family, family_of, read_config
from star_elastic.families.base import Config
from star_elastic.nesting.gate import Mixtures, gate_tensors, norm_buffers, widest_slice
from star_elastic.nesting.modules import (
    ElasticGroupedRMSNorm,
    ElasticRMSNorm,
    ElasticSigmoidRouter,
)
from star_elastic.nesting.rotate import rotate_state
from star_elastic.nesting.slice import Orders, slice_state, sort_state
from star_elastic.widths import Width, Widths

logger = logging.getLogger(__name__)

MAX_SKELETONS = 32
_BUILDING = threading.Lock()
"""Building a model sets the default dtype and device of the whole process for a moment."""
GROUPED_MM_MULTIPLE = 8
"""PyTorch's grouped product wants strides of whole 16 bytes: 8 elements of bf16."""


def grouped_mm_fits(config: Config) -> bool:
    """Whether the experts of a model (if it has any) can run as grouped matrix products."""
    axis_map = family_of(config).axis_map(config)
    shapes = [axis_map.shape(s, axis_map.full) for s in axis_map.tensors.values() if s.routed]
    return all(size % GROUPED_MM_MULTIPLE == 0 for shape in shapes for size in shape[1:])


def build_skeleton(config: Config, like: PreTrainedModel | None = None) -> PreTrainedModel:
    """The model of a config without memory for its parameters (on the meta device).

    Buffers that no checkpoint holds (rotary frequencies) are real. Kernel choices (attention,
    experts) follow `like`.
    """
    fields = {k: v for k, v in config.items() if k not in ("model_type", "transformers_version")}
    model_config = AutoConfig.for_model(config["model_type"], **fields)
    kinds = {}
    if like is not None:
        kinds["attn_implementation"] = like.config._attn_implementation
        kinds["experts_implementation"] = like.config._experts_implementation
        kinds["dtype"] = like.dtype
    if not grouped_mm_fits(config) and kinds.get("experts_implementation") != "eager":
        kinds["experts_implementation"] = "eager"
        logger.warning(
            "expert widths are not multiples of %d, which grouped matrix products need; "
            "the experts run one by one (slower, same result)",
            GROUPED_MM_MULTIPLE,
        )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config, **kinds)
    for name, module in list(model.named_modules()):
        if any(module._buffers[b].is_meta for b in module._non_persistent_buffers_set):
            model.set_submodule(name, type(module)(config=model_config))
    return model


def build_submodel(
    parent: PreTrainedModel, config: Config, widths: Mapping[str, Width]
) -> PreTrainedModel:
    """A plain transformers model of `widths` that shares the (sorted) parent's memory.

    `config` is the parent's config.json. The parent's parameters are not copied where a prefix
    of each dimension survives. Raises ShapeError for widths the family cannot express.
    """
    family = family_of(config)
    axis_map = family.axis_map(config)
    complete = axis_map.complete(widths)
    submodel = build_skeleton(family.config_at(config, complete), parent)
    state = {**dict(parent.named_parameters()), **dict(parent.named_buffers())}
    sliced = slice_state(state, axis_map, complete)
    missing = submodel.load_state_dict(sliced, strict=False, assign=True).missing_keys
    submodel.tie_weights()
    left = [name for name, value in submodel.named_parameters() if value.is_meta]
    assert not left, (left, missing)
    submodel.generation_config = parent.generation_config
    return submodel.eval()


def load_parent(
    path: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[PreTrainedModel, Config]:
    """A parent (or elastic) checkpoint as a transformers model, and its config.json.

    Raises ConfigError or CheckpointError with one line for anything that cannot be loaded.
    """
    config = read_config(path)
    family = family_of(config)
    family.axis_map(config)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path} cannot be loaded ({first}); check its files") from None
    model, info = loaded
    # transformers only warns here, and fills what is missing with random values.
    unexpected = info["unexpected_keys"]
    extra = sorted(n for n in unexpected if not any(part in n for part in family.ignored))
    for problem, names in (("lacks", sorted(info["missing_keys"])), ("also holds", extra)):
        if names:
            raise CheckpointError(
                f"{path} {problem} the tensor {names[0]} ({len(names)} such); "
                "it is not a checkpoint of its config.json"
            )
    return model.to(device).eval(), config


def sort_in_place(
    parent: PreTrainedModel,
    axis_map: AxisMap,
    orders: Orders,
    basis: torch.Tensor | None = None,
) -> None:
    """Permutes a model's own weights, best units first, in another basis of the residual stream
    if one is given (which then takes the place of an order of `hidden`). Its function is unchanged.
    """
    state = {**dict(parent.named_parameters()), **dict(parent.named_buffers())}
    changed: Mapping[str, torch.Tensor] = state
    if basis is not None:
        changed = rotate_state(state, axis_map, basis)
        orders = {key: order for key, order in orders.items() if key != "hidden"}
    with torch.no_grad():
        for name, value in sort_state(changed, axis_map, orders).items():
            state[name].copy_(value)


class ElasticModel(nn.Module):
    """A sorted parent whose forward runs any submodel, with gradients to the parent's parameters.

    `forward(size, **inputs)` takes the size as an argument: `Widths` for a plain slice, or a
    mixture per axis for the gated forward of the router. Inputs and result are those of the
    transformers model. The parent is `self.parent`; nothing in it is changed.
    """

    def __init__(self, parent: PreTrainedModel, config: Config):
        super().__init__()
        self.parent = parent
        self.model_config = config
        self.family: Family = family_of(config)
        self.axis_map: AxisMap = self.family.axis_map(config)
        self._skeletons: OrderedDict[tuple[Widths, bool], PreTrainedModel] = OrderedDict()

    def skeleton(self, widths: Widths, *, gated: bool) -> PreTrainedModel:
        """The memory-less model of `widths`; built once per widths, least recently used dropped."""
        key = (widths, gated)
        if key not in self._skeletons:
            config = self.family.config_at(self.model_config, widths)
            with _BUILDING:
                skeleton = build_skeleton(config, self.parent)
                if gated:
                    self._install_gates(skeleton, widths)
            skeleton.requires_grad_(False)
            self._skeletons[key] = skeleton
            while len(self._skeletons) > MAX_SKELETONS:
                self._skeletons.popitem(last=False)
        self._skeletons.move_to_end(key)
        # A gated skeleton stays out of training mode, in which fused Mamba kernels would read the
        # norm's weight and skip its gate; nothing else depends on the mode.
        return self._skeletons[key].train(self.training and not gated)

    def _install_gates(self, skeleton: PreTrainedModel, widths: Widths) -> None:
        with torch.device("meta"):
            for norm in self.axis_map.norms:
                size = self._norm_channels(norm.path, widths)
                if norm.grouped:
                    groups = self.axis_map.axes[norm.axis].num_groups
                    module = ElasticGroupedRMSNorm(size, norm.eps, num_groups=groups)
                else:
                    module = ElasticRMSNorm(size, norm.eps, fp32_weight=norm.fp32_weight)
                skeleton.set_submodule(norm.path, module)
            for moe in self.axis_map.moe_layers:
                router = skeleton.get_submodule(moe.router_path)
                skeleton.set_submodule(moe.router_path, ElasticSigmoidRouter(router))

    def _norm_channels(self, path: str, widths: Widths) -> int:
        spec = self.axis_map.tensors[f"{path}.weight"]
        return self.axis_map.shape(spec, widths)[0]

    def state(self) -> dict[str, torch.Tensor]:
        """The parent's parameters and buffers by name."""
        return {**dict(self.parent.named_parameters()), **dict(self.parent.named_buffers())}

    def forward(self, size: Widths | Mixtures, *, slice_at: Widths | None = None, **inputs):
        """Runs the submodel of `size`.

        With mixtures, computes the slice `slice_at` (default: the widest choices with weight).
        """
        if isinstance(size, Widths):
            tensors = slice_state(self.state(), self.axis_map, size)
            skeleton = self.skeleton(size, gated=False)
        else:
            widths = slice_at or widest_slice(size, self.axis_map)
            tensors = self._gated_state(size, widths)
            skeleton = self.skeleton(widths, gated=True)
        return torch.func.functional_call(skeleton, tensors, (), inputs)

    def _gated_state(self, mixtures: Mixtures, widths: Widths) -> dict[str, torch.Tensor]:
        state = self.state()
        tensors = slice_state(state, self.axis_map, widths)
        tensors = gate_tensors(tensors, self.axis_map, mixtures, widths)
        for norm in self.axis_map.norms:
            (segment,) = self.axis_map.tensors[f"{norm.path}.weight"].dims[0]
            weight = tensors[f"{norm.path}.weight"]
            if norm.axis in mixtures:
                buffers = norm_buffers(norm, segment.unit, self.axis_map, mixtures, widths)
            else:
                buffers = {
                    f"{norm.path}.input_gate": weight.new_ones(weight.shape),
                    f"{norm.path}.eps": weight.new_tensor(norm.eps),
                    f"{norm.path}.scale": weight.new_tensor(1.0),
                }
            tensors.update(buffers)
        for moe in self.axis_map.moe_layers:
            bias = tensors[f"{moe.router_path}.e_score_correction_bias"]
            gate = torch.ones_like(bias)
            if "experts" in mixtures:
                groups = self.axis_map.axes["experts"].num_groups
                gate = mixtures["experts"].unit_gates(bias.shape[0], groups)
            tensors[f"{moe.router_path}.expert_gate"] = gate
        return tensors
