"""Submodels for inference: transformers models that hold slices of the (sorted) parent.

The slices are assigned, as views where possible, so that all sizes share one copy.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from transformers import (
    PreTrainedModel,
)

from star_elastic.architectures import ModelConfig
from star_elastic.architectures.config_file import Config
from star_elastic.axes import AxisMap
from star_elastic.axes.widths import Width, Widths
from star_elastic.checkpoints.layouts import stored_map
from star_elastic.models.quantised_inputs import INPUTS, QuantisedInputs
from star_elastic.models.resident import nested_names, share_nested
from star_elastic.models.skeleton import (
    build_skeleton_at,
)
from star_elastic.nesting.rotate import rotate_state
from star_elastic.nesting.slice import Orders, follow, slice_state, sort_state


def build_submodel(
    parent: PreTrainedModel,
    config: Config,
    widths: Mapping[str, Width],
    *,
    input_scales: Mapping[str, torch.Tensor] | None = None,
) -> PreTrainedModel:
    """A plain transformers model of `widths` that shares the (sorted) parent's memory.

    `config` is the parent's config.json. The parent's parameters are not copied where a prefix
    of each dimension survives, in nested order if the parent holds them so (`nest_in_place`).
    `input_scales`: of a quantised model, by the parent's weights, in place of the parent's. Raises
    ShapeError for widths the family cannot express.
    """
    parent_config = ModelConfig.of(config)
    axis_map = parent_config.axis_map
    complete = axis_map.complete(widths)
    inputs: QuantisedInputs | None = getattr(parent, INPUTS, None)
    if inputs is not None:
        stored_map(axis_map, inputs.scheme).require_edges(complete)
        inputs = inputs.with_scales(input_scales or {})
    submodel = build_skeleton_at(config, complete, parent)
    state = {**dict(parent.named_parameters()), **dict(parent.named_buffers())}
    sliced = slice_state(state, axis_map, complete, leave=nested_names(parent))
    missing = submodel.load_state_dict(sliced, strict=False, assign=True).missing_keys
    share_nested(parent, submodel, axis_map, complete)
    submodel.tie_weights()
    for name, buffer in submodel.named_buffers():  # those that no checkpoint holds
        if buffer.device != parent.device:
            owner, _, own = name.rpartition(".")
            submodel.get_submodule(owner)._buffers[own] = buffer.to(parent.device)
    left = [name for name, value in submodel.named_parameters() if value.is_meta]
    assert not left, (left, missing)
    for name in axis_map.width_buffers:
        owner, _, own = name.rpartition(".")
        submodel.get_submodule(owner)._buffers[own] = parent.get_buffer(name)
    _save_as_stored(submodel, axis_map, complete, parent_config.architecture.copies)
    submodel.generation_config = parent.generation_config
    if inputs is not None:
        inputs.at(axis_map, complete).install(submodel, axis_map.at(complete))
    return submodel.eval()


def _save_as_stored(
    submodel: PreTrainedModel, axis_map: AxisMap, widths: Widths, copies: Mapping[str, str]
) -> None:
    """Lets the state dict of a submodel hold what a checkpoint of its config does: a width that the
    model makes a number of is its own there, while in memory it has its parent's number."""
    names = axis_map.names_at(widths)
    specs = {names[n]: axis_map.tensors[n] for n in names if axis_map.tensors[n].follows}
    if not specs or widths == axis_map.full:
        return

    tied = {n: other for n, other in copies.items() if n not in names.values() and other in specs}

    def stored(_module, state, *_) -> None:
        for name, spec in specs.items():
            state[name] = follow(state[name], spec, axis_map, widths)
        for name, other in tied.items():
            state[name] = state[other]

    def loaded(_module, state, *_) -> None:
        for name, spec in specs.items():
            if name in state:
                state[name] = follow(state[name], spec, axis_map, widths, back=True)

    submodel.register_state_dict_post_hook(stored)
    submodel.register_load_state_dict_pre_hook(loaded)


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
