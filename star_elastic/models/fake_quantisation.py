"""Quantisation-aware training: weights and inputs pass through a format, gradients do not see it.

The largest magnitudes of the weights and the scales of the inputs are those of the start and stay
as they are, so that every size trains with the scales that its slice will have.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from star_elastic.axes import AxisMap, TensorSpec
from star_elastic.axes.widths import Widths
from star_elastic.checkpoints.layouts import cut_scales
from star_elastic.checkpoints.tensors import load_tensors, save_tensors
from star_elastic.models.linear import KnownInput
from star_elastic.models.quantised_inputs import know_inputs
from star_elastic.quant.formats import dequantise, largest_of, quantise, straight_through
from star_elastic.quant.scheme import Scheme, partners

FILE_NAME = "quant.safetensors"


@dataclass(frozen=True)
class FakeQuantisation:
    """A scheme with what is frozen of it: `largest` magnitudes of the full-width weights, in the
    shape of their outermost scales, and scales of `inputs`, by weight."""

    scheme: Scheme
    axis_map: AxisMap
    largest: Mapping[str, torch.Tensor]
    inputs: Mapping[str, torch.Tensor]
    stored: torch.dtype = torch.float32

    @classmethod
    def of(
        cls,
        state: Mapping[str, torch.Tensor],
        axis_map: AxisMap,
        scheme: Scheme,
        inputs: Mapping[str, torch.Tensor],
    ) -> FakeQuantisation:
        """Freezes the magnitudes of a model's weights; those that engines fuse have one."""
        quantised = scheme.quantised(axis_map)
        own = {name: largest_of(state[name].detach(), scheme.format) for name in quantised}
        largest = dict(own)
        if scheme.format.has_one_scale:
            for name in own:
                fused = [own[other] for other in partners(name) if other in own]
                largest[name] = torch.stack(fused).amax(0)
        largest = {name: value.cpu() for name, value in largest.items()}
        return cls(scheme, axis_map, largest, {n: scale.cpu() for n, scale in inputs.items()})

    def on(self, device: torch.device, stored: torch.dtype) -> FakeQuantisation:
        """The same on a device, for weights that are stored in a dtype before they are
        quantised."""
        largest, inputs = (
            {name: value.to(device) for name, value in own.items()}
            for own in (self.largest, self.inputs)
        )
        return replace(self, largest=largest, inputs=inputs, stored=stored)

    def weight(self, name: str, sliced: torch.Tensor, widths: Widths) -> torch.Tensor:
        """A weight at `widths` as its format knows it, with the gradient of the weight; others as
        they are."""
        if name not in self.largest:
            return sliced
        spec = self.axis_map.tensors[name]
        here = self.axis_map.seen_by(spec.layer, widths)
        largest = cut_scales(self.largest[name], spec, self.scheme, here)
        weight = sliced.detach().to(self.stored)
        known = dequantise(quantise(weight, self.scheme.format, largest))
        return straight_through(sliced, known)

    def watch(self, block: nn.Module, specs: tuple[TensorSpec, ...], prefix: str) -> None:
        """Quantises what the layers of a block read; `prefix` stands before its names in the
        model."""
        for spec in specs:
            name = prefix + spec.name
            if name in self.largest:
                know_inputs(block, spec, KnownInput(self.scheme.format, self.inputs.get(name)))

    def save(self, directory: Path) -> None:
        """Writes what is frozen."""
        tensors = {f"largest/{name}": value for name, value in self.largest.items()}
        tensors |= {f"inputs/{name}": value for name, value in self.inputs.items()}
        save_tensors(directory / FILE_NAME, tensors)

    @classmethod
    def load(cls, directory: Path, axis_map: AxisMap, scheme: Scheme) -> FakeQuantisation:
        """Reads what `save` wrote. Raises CheckpointError."""
        found: dict[str, dict[str, Any]] = {"largest": {}, "inputs": {}}
        for name, value in load_tensors(directory / FILE_NAME).items():
            kind, _, weight = name.partition("/")
            found[kind][weight] = value
        return cls(scheme, axis_map, found["largest"], found["inputs"])
