"""Calibration: how large the inputs of layers are that a format will quantise."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from star_elastic.axes import AxisMap, TensorSpec
from star_elastic.errors import ConfigError
from star_elastic.models.linear import ResidentExperts, resident_experts
from star_elastic.quant.formats import E2M1_MAX, E4M3_MAX
from star_elastic.quant.scheme import Scheme

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


class _Watched:
    """Stands where gated experts tell what their second matrix reads, until it is removed."""

    def __init__(self, experts: ResidentExperts, seen: _Magnitudes):
        self._experts, self._seen = experts, seen
        experts.down_reads = self

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        self._seen.add(values)
        return values

    def remove(self) -> None:
        """Leaves the experts as they were."""
        self._experts.down_reads = None


def _watch(model: nn.Module, spec: TensorSpec, seen: _Magnitudes) -> RemovableHandle | _Watched:
    """Lets what a weight's layer reads be seen, by a hook that only reads. The second matrix of a
    stack of experts reads what their activation function gives, and of gated ones what the gate
    leaves."""
    if not spec.is_stacked:
        path = spec.name.removesuffix(".weight")
    else:
        path, _, last = spec.name.rpartition(".")
        experts: Any = model.get_submodule(path)
        if last == "down_proj" and experts.has_gate:
            return _Watched(resident_experts(model, path), seen)
        if last == "down_proj":
            activation = model.get_submodule(f"{path}.act_fn")
            return activation.register_forward_hook(lambda *call: seen.add(call[-1]))
    return model.get_submodule(path).register_forward_pre_hook(lambda _, args: seen.add(args[0]))


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
    watched = [_watch(model, spec, seen[name]) for name, spec in scheme.quantised(axis_map).items()]
    try:
        for batch in batches:
            model(**{name: value.to(device) for name, value in batch.items()}, use_cache=False)
    finally:
        for handle in watched:
            handle.remove()
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
