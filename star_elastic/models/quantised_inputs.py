"""The inputs of a model's quantised layers: what is known of them, at any size.

Linear layers and stacks of experts in memory hold weights as their format knows them, or its codes.
What they read goes through the format, too, in modules that take the place of transformers' own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from star_elastic.axes import AxisMap, TensorSpec
from star_elastic.axes.widths import Widths
from star_elastic.checkpoints.layouts import cut_scales
from star_elastic.models.linear import (
    KnownActivation,
    KnownInput,
    NestedLinear,
    QuantisedLinear,
    resident_experts,
)
from star_elastic.models.native import Fp8Experts, Fp8Product
from star_elastic.quant.scheme import Scheme

INPUTS = "quantised_inputs"
"""Attribute of models with quantised layers."""


def quantised_linear(model: nn.Module, path: str) -> QuantisedLinear | NestedLinear:
    """The linear layer at a path of a model, as one that may be quantised: put there in the place
    of a plain one."""
    layer = model.get_submodule(path)
    if isinstance(layer, (QuantisedLinear, NestedLinear)):
        return layer
    assert isinstance(layer, nn.Linear), (path, layer)
    new = QuantisedLinear.of(layer)
    model.set_submodule(path, new)
    return new


def know_inputs(model: nn.Module, spec: TensorSpec, reads: KnownInput) -> None:
    """Makes what a weight's layer reads what its format knows of it. The second matrix of a stack
    of experts reads what their activation function gives, times the other half where they have a
    gate."""
    if not spec.is_stacked:
        quantised_linear(model, spec.name.removesuffix(".weight")).reads = reads
        return
    path, _, last = spec.name.rpartition(".")
    experts: Any = model.get_submodule(path)
    if last == "down_proj" and experts.has_gate:
        resident_experts(model, path).down_reads = reads
    elif last == "down_proj":
        function = model.get_submodule(f"{path}.act_fn")
        model.set_submodule(f"{path}.act_fn", KnownActivation(function, reads))
    else:
        resident_experts(model, path).reads = reads


@dataclass(frozen=True, slots=True)
class QuantisedInputs:
    """The inputs of a model's quantised layers: the scheme, and scales by weight (fp32 (1,)) where
    they are calibrated. With `weight_scales` the weights in memory hold codes, and are multiplied
    as they are; without, they are dense, and inputs are made what the format knows of them."""

    scheme: Scheme
    scales: Mapping[str, torch.Tensor]
    weight_scales: Mapping[str, torch.Tensor] | None = None

    def install(self, model: PreTrainedModel, axis_map: AxisMap) -> None:
        """Lets every quantised layer of a model work so; its submodels will, too."""
        here = self.to(model.device)
        for spec in self.scheme.quantised(axis_map).values():
            here._install(model, spec)
        setattr(model, INPUTS, here)

    def _install(self, model: nn.Module, spec: TensorSpec) -> None:
        scale = self.scales.get(spec.name)
        if self.weight_scales is None:
            know_inputs(model, spec, KnownInput(self.scheme.format, scale))
        elif not spec.is_stacked:
            layer = quantised_linear(model, spec.name.removesuffix(".weight"))
            product = Fp8Product(self.weight_scales[spec.name], scale)
            rows = layer.rows if isinstance(layer, NestedLinear) else None
            layer.product = product.in_order(rows)
        elif spec.name.endswith("up_proj"):
            path = spec.name.rpartition(".")[0]
            down = f"{path}.down_proj"
            weights = self.weight_scales[spec.name], self.weight_scales[down]
            experts = resident_experts(model, path)
            product = Fp8Experts(*weights, scale, self.scales.get(down))
            experts.product = product.in_order(experts.order, experts.rows)

    def at(self, axis_map: AxisMap, widths: Widths) -> QuantisedInputs:
        """Those of the model that is cut from this one at `widths`."""
        names = axis_map.names_at(widths)
        scales = {names[name]: scale for name, scale in self.scales.items() if name in names}
        weights = self.weight_scales
        if weights is not None:
            specs, scheme = axis_map.tensors, self.scheme
            weights = {
                names[name]: cut_scales(
                    scale, specs[name], scheme, axis_map.seen_by(specs[name].layer, widths)
                )
                for name, scale in weights.items()
                if name in names
            }
        return QuantisedInputs(self.scheme.at(axis_map, widths), scales, weights)

    def to(self, device: torch.device | str) -> QuantisedInputs:
        """The same with its scales on a device."""
        scales = {name: scale.to(device) for name, scale in self.scales.items()}
        weights = self.weight_scales
        if weights is not None:
            weights = {name: scale.to(device) for name, scale in weights.items()}
        return QuantisedInputs(self.scheme, scales, weights)

    def with_scales(self, scales: Mapping[str, torch.Tensor]) -> QuantisedInputs:
        """The same with other scales of inputs, those of one size."""
        return replace(self, scales={**self.scales, **scales})
