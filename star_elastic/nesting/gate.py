"""Soft masks: what a mixture of widths means for parameters, norms and expert routing.

For choices w_1 > w_2 > ... with weights p_i, unit c has the gate `sum of p_i over w_i > c`: a
staircase that is 1 on the innermost band (docs/paper_map.md). Every path through an axis is gated
exactly once: a projection's inputs by its columns; the residual stream where it is read, in the
norms, which is the same as gating the embedding and everything written to the stream; a Mamba
head where the gated norm reads it. With a one-hot mixture the gated model equals the slice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from star_elastic.axes import AxisMap, NormSpec
from star_elastic.widths import Widths

NEGLIGIBLE = 1e-3
"""Choices with less weight than this do not widen the slice that is computed."""


@dataclass(frozen=True, slots=True)
class Mixture:
    """A distribution over the widths of one axis: `choices` descending, `probs` (C,) sums to 1."""

    choices: tuple[int, ...]
    probs: torch.Tensor

    def expected(self) -> torch.Tensor:
        """Expected width, differentiable; a scalar tensor."""
        return self.probs @ self.probs.new_tensor(self.choices)

    def widest(self, negligible: float = NEGLIGIBLE) -> int:
        """The widest choice that still has weight."""
        heavy = (self.probs.detach() > negligible).tolist()
        return max(choice for choice, used in zip(self.choices, heavy, strict=True) if used)

    def unit_gates(self, width: int, num_groups: int = 1) -> torch.Tensor:
        """Gates (width,) of the first `width` units, the staircase repeated in each group."""
        band = torch.arange(width // num_groups, device=self.probs.device)
        ends = torch.tensor([c // num_groups for c in self.choices], device=self.probs.device)
        covers = (ends[:, None] > band).to(self.probs.dtype)
        return (self.probs @ covers).repeat(num_groups)

    def norm_terms(self, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Factors on a norm's epsilon and output inside a slice of `width`.

        With r_i = min(w_i, width) / width: sum p_i r_i and sum p_i sqrt(r_i). A norm over `width`
        channels of which only w_i are non-zero then equals the norm of w_i channels exactly.
        """
        ratios = self.probs.new_tensor([min(c, width) / width for c in self.choices])
        return self.probs @ ratios, self.probs @ ratios.sqrt()


Mixtures = Mapping[str, Mixture]


def widest_slice(mixtures: Mixtures, axis_map: AxisMap, negligible: float = NEGLIGIBLE) -> Widths:
    """The smallest slice that holds every choice with weight; other axes at full width."""
    full = dict(axis_map.full)
    full.update({name: mixture.widest(negligible) for name, mixture in mixtures.items()})
    return Widths(full)


def gate_tensors(
    tensors: Mapping[str, torch.Tensor], axis_map: AxisMap, mixtures: Mixtures, widths: Widths
) -> dict[str, torch.Tensor]:
    """Sliced parameters with their gated dimension multiplied by the axis's unit gates."""
    gated = dict(tensors)
    for name, spec in axis_map.tensors.items():
        if spec.gate_dim is None:
            continue
        (segment,) = spec.dims[spec.gate_dim]
        if segment.axis is None or segment.axis not in mixtures:
            continue
        width = axis_map.width(widths, segment.axis, spec.layer)
        units = mixtures[segment.axis].unit_gates(width, segment.num_groups)
        shape = [1] * len(spec.dims)
        shape[spec.gate_dim] = -1
        gate = units.repeat_interleave(segment.unit).reshape(shape)
        gated[name] = tensors[name] * gate.to(tensors[name].dtype)
    return gated


def norm_buffers(
    norm: NormSpec, unit: int, axis_map: AxisMap, mixtures: Mixtures, widths: Widths
) -> dict[str, torch.Tensor]:
    """Buffers of an elastic norm whose axis has `unit` channels per unit."""
    mixture = mixtures[norm.axis]
    width = axis_map.width(widths, norm.axis, norm.layer)
    eps_factor, scale = mixture.norm_terms(width)
    gate = mixture.unit_gates(width, axis_map.axes[norm.axis].num_groups)
    return {
        f"{norm.path}.input_gate": gate.repeat_interleave(unit),
        f"{norm.path}.eps": norm.eps * eps_factor,
        f"{norm.path}.scale": scale,
    }
