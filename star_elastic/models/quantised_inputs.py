"""The inputs of quantised layers: where they pass, how they are measured and how they are changed.

Linear layers and stacks of experts in memory hold weights as their format knows them; what they
read goes through the format, too, by hooks on transformers' own modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from star_elastic.axes import AxisMap, TensorSpec
from star_elastic.axes.widths import Widths
from star_elastic.checkpoints.layouts import cut_scales
from star_elastic.errors import ConfigError
from star_elastic.models.native import Fp8Experts, Fp8Product
from star_elastic.quant.formats import (
    E2M1_MAX,
    E4M3_MAX,
    Format,
    fake_activation,
    straight_through,
)
from star_elastic.quant.scheme import Scheme

INPUTS = "quantised_inputs"
"""Attribute of models with quantised layers."""
Change = Callable[[torch.Tensor], torch.Tensor | None]
"""Sees the input of a layer, and may return another in its place."""


def attach(model: nn.Module, spec: TensorSpec, change: Change) -> Callable[[], None]:
    """Lets `change` see and replace what a weight's layer reads; returns how to take it away.

    The second matrix of a stack of experts reads what their activation function gives.
    """
    if not spec.is_stacked:
        module = model.get_submodule(spec.name.removesuffix(".weight"))
    else:
        path, _, last = spec.name.rpartition(".")
        module = model.get_submodule(path)
        if last == "down_proj":
            experts: Any = module
            before = experts.act_fn
            experts.act_fn = _Then(before, change)
            return partial(setattr, experts, "act_fn", before)
    return module.register_forward_pre_hook(partial(_change_first, change)).remove


def _change_first(change: Change, module: nn.Module, inputs: tuple) -> tuple | None:
    changed = change(inputs[0])
    return None if changed is None else (changed, *inputs[1:])


class _Then(nn.Module):
    """An activation function, and what is done with its result."""

    def __init__(self, function: nn.Module, change: Change):
        super().__init__()
        self.function, self.change = function, change

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        result = self.function(values)
        changed = self.change(result)
        return result if changed is None else changed


@dataclass(frozen=True, slots=True)
class QuantisedInputs:
    """The inputs of a model's quantised layers: the scheme, and scales by weight (fp32 (1,)) where
    they are calibrated. With `weight_scales` the weights in memory hold codes, and are multiplied
    as they are; without, they are dense, and inputs are made what the format knows of them."""

    scheme: Scheme
    scales: Mapping[str, torch.Tensor]
    weight_scales: Mapping[str, torch.Tensor] | None = None

    @property
    def holds_codes(self) -> bool:
        """Whether weights in memory are codes."""
        return self.weight_scales is not None

    def apply(self, model: nn.Module, axis_map: AxisMap) -> None:
        """Lets every quantised layer of a model work so."""
        for spec in self.scheme.quantised(axis_map).values():
            self.apply_to(model, spec)

    def apply_to(self, model: nn.Module, spec: TensorSpec) -> None:
        """Lets one layer work so."""
        scale = self.scales.get(spec.name)
        if self.weight_scales is None:
            attach(model, spec, FakeInput(self.scheme.format, scale))
        elif not spec.is_stacked:
            module = model.get_submodule(spec.name.removesuffix(".weight"))
            Fp8Product(self.weight_scales[spec.name], scale).install(module)
        else:
            path, _, last = spec.name.rpartition(".")
            if last == "up_proj":
                down = f"{path}.down_proj"
                weights = self.weight_scales[spec.name], self.weight_scales[down]
                Fp8Experts(*weights, scale, self.scales.get(down)).install(
                    model.get_submodule(path)
                )

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


class FakeInput:
    """Values as a format with this scale knows them."""

    def __init__(self, format: Format, scale: torch.Tensor | None):
        self.format, self.scale = format, scale

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        if self.scale is not None and self.scale.device != values.device:
            self.scale = self.scale.to(values.device)
        changed = fake_activation(values.detach(), self.format, self.scale)
        return straight_through(values, changed) if values.requires_grad else changed


# Calibration

BINS_PER_OCTAVE = 64
OCTAVES = 64
LOWEST = -32
"""Histograms of log2 |x| from 2^-32 to 2^32: a percentile is found to within 1.1 %."""


class _Magnitudes:
    """Largest magnitude and histogram of everything that passed, in constant memory."""

    def __init__(self, device: torch.device):
        self.largest = torch.zeros((), device=device)
        self.counts = torch.zeros(OCTAVES * BINS_PER_OCTAVE, dtype=torch.long, device=device)

    def add(self, values: torch.Tensor) -> None:
        """Counts the elements of a tensor; zeros are the smallest."""
        magnitude = values.detach().float().abs().flatten()
        if magnitude.numel():
            self.largest = torch.maximum(self.largest, magnitude.max())
            place = (magnitude.log2() - LOWEST) * BINS_PER_OCTAVE
            place = place.clamp(0, len(self.counts) - 1).long()
            self.counts += torch.bincount(place, minlength=len(self.counts))

    def percentile(self, percent: float) -> torch.Tensor:
        """The magnitude that so many percent of the elements do not exceed, rounded up to a bin."""
        if percent == 100:
            return self.largest
        total = int(self.counts.sum())
        place = int(torch.searchsorted(self.counts.cumsum(0), percent / 100 * total))
        edge = 2.0 ** ((min(place, len(self.counts) - 1) + 1) / BINS_PER_OCTAVE + LOWEST)
        return self.largest.clamp(max=edge)


@torch.inference_mode()
def calibrate_inputs(
    model: nn.Module,
    axis_map: AxisMap,
    scheme: Scheme,
    batches: Iterable[Mapping[str, torch.Tensor]],
    *,
    percentile: float = 100.0,
) -> dict[str, torch.Tensor]:
    """Scales of the inputs of every layer of a scheme, fp32 (1,) by weight, from data.

    `batches` of inputs of the model, read once; nothing of them is kept but one histogram per
    layer. The scale maps the given percentile of magnitudes (100: the largest) to the largest
    number of the format. Empty for formats that are not calibrated. Raises ConfigError if a layer
    saw nothing.
    """
    if not scheme.format.is_calibrated:
        return {}
    if not 0 < percentile <= 100:
        raise ConfigError(f"percentile={percentile} is not in (0, 100]; use 99.99")
    device = next(model.parameters()).device
    seen = {name: _Magnitudes(device) for name in scheme.quantised(axis_map)}
    undo = [
        attach(model, spec, seen[name].add)
        for name, spec in reversed(scheme.quantised(axis_map).items())
    ]
    try:
        for batch in batches:
            model(**{name: value.to(device) for name, value in batch.items()}, use_cache=False)
    finally:
        for remove in reversed(undo):
            remove()
    span = E4M3_MAX * (E2M1_MAX if scheme.format.packed else 1)
    scales = {}
    for name, magnitudes in seen.items():
        found = magnitudes.percentile(percentile)
        if not found > 0:
            raise ConfigError(
                f"the inputs of {name} were never anything but 0; calibrate on more data"
            )
        scales[name] = (found / span).reshape(1).cpu()
    return scales
