"""Soft masks: what a mixture of widths means for parameters, norms and expert routing.

For choices w_1 > w_2 > ... with weights p_i, unit c has the gate `sum of p_i over w_i > c`: a
staircase that is 1 on the innermost band (docs/paper_map.md). Every path through an axis is gated
exactly once: a projection's inputs by its columns; the residual stream where it is read, in the
norms, which is the same as gating the embedding and everything written to the stream; a Mamba
head where the gated norm reads it; a layer where it is added to the stream. With a one-hot mixture
the gated model equals the slice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from star_elastic.axes import LAYERS, AxisMap, NormSpec, TensorSpec
from star_elastic.axes.widths import Width, Widths

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
        # Row i is 1 as far as choice i reaches; weighted by the probabilities, the rows add up to
        # the staircase.
        covers = (ends[:, None] > band).to(self.probs.dtype)
        return (self.probs @ covers).repeat(num_groups)

    def norm_terms(self, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Factors on a norm's epsilon and output inside a slice of `width`.

        With r_i = min(w_i, width) / width: sum p_i r_i and sum p_i sqrt(r_i). A norm over `width`
        channels of which only w_i are non-zero then equals the norm of w_i channels exactly.
        """
        # Over `width` channels the mean square is r times that over w of them. With r * eps beside
        # it, the norm divides by sqrt(r) times what the smaller norm divides by.
        ratios = self.probs.new_tensor([min(c, width) / width for c in self.choices])
        return self.probs @ ratios, self.probs @ ratios.sqrt()


Mixtures = Mapping[str, Mixture | tuple[Mixture, ...]]
"""One mixture per axis, or one per layer that has the axis, as in `Widths`."""


def widest_slice(mixtures: Mixtures, axis_map: AxisMap, negligible: float = NEGLIGIBLE) -> Widths:
    """The smallest slice that holds every choice with weight; other axes at full width."""
    widest: dict[str, Width] = {
        name: tuple(mixture.widest(negligible) for mixture in value)
        if isinstance(value, tuple)
        else value.widest(negligible)
        for name, value in mixtures.items()
    }
    return axis_map.complete(widest)


def expected_widths(mixtures: Mixtures, axis_map: AxisMap) -> dict[str, Any]:
    """Expected width per axis (tensors, or tuples of them), full width for axes without a choice.

    What a layer does not have, it does not cost: `layers` is its expected presence.
    """
    expected: dict[str, Any] = dict(axis_map.full)
    for name, value in mixtures.items():
        per_layer = value if isinstance(value, tuple) else (value,)
        widths = tuple(mixture.expected() for mixture in per_layer)
        expected[name] = widths if isinstance(value, tuple) else widths[0]
    return expected


def gate_parameter(
    tensor: torch.Tensor, spec: TensorSpec, mixtures: Mapping[str, Mixture], widths: Mapping
) -> torch.Tensor:
    """A sliced parameter with its gated dimension, if it has one, multiplied by the unit gates.
    `mixtures` and `widths` as its layer sees them."""
    if spec.gate_dim is None:
        return tensor
    (segment,) = spec.dims[spec.gate_dim]
    if segment.axis is None or segment.axis not in mixtures:
        return tensor
    units = mixtures[segment.axis].unit_gates(widths[segment.axis], segment.num_groups)
    shape = [1] * len(spec.dims)
    shape[spec.gate_dim] = -1
    gate = units.repeat_interleave(segment.unit).reshape(shape)
    return tensor * gate.to(tensor.dtype)


def norm_buffers(
    norm: NormSpec, mixtures: Mapping[str, Mixture], widths: Mapping
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """Input gate, epsilon and output scale of an elastic norm; None if its axis has no mixture.
    `mixtures` and `widths` as its layer sees them."""
    if norm.axis not in mixtures:
        return None
    ((segment,),) = norm.dims
    width, mixture = widths[norm.axis], mixtures[norm.axis]
    eps_factor, scale = mixture.norm_terms(width)
    gate = mixture.unit_gates(width, segment.num_groups).repeat_interleave(segment.unit)
    return gate, norm.eps * eps_factor, scale


def presence_gate(mixtures: Mapping[str, Mixture]) -> torch.Tensor | None:
    """How far a layer's contribution to the residual stream is open (a scalar); None: fully."""
    return mixtures[LAYERS].expected() if LAYERS in mixtures else None
