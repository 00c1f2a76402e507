"""Products of FP8 weights and FP8 inputs, for devices that multiply FP8 themselves.

The codes stay as they are in memory: a family in FP8 takes half the memory of one in BF16, and its
sizes are views of the codes. PyTorch has the products (`_scaled_mm`, `_scaled_grouped_mm`); they
want numbers of rows and columns that are multiples of 16; other slices are unpacked at every use.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from star_elastic.nesting.order import Layout
from star_elastic.quant.formats import E4M3, E4M3_MAX, Format, fp8_scales

_products: Any = torch  # which does not list them among its public functions
MULTIPLE = 16
CAPABILITY = (8, 9)
"""The first GPUs that multiply FP8."""
GROUPED = ((9, 0), (10, 0))
"""Those on which PyTorch has the products of experts."""
FORMATS = ("fp8", "fp8-channel")
"""Formats whose scales the products take."""


def multiplies_fp8(
    device: str | torch.device, dtype: torch.dtype, format: Format, *, experts: bool
) -> bool:
    """Whether a device multiplies weights and inputs of a format as they are, for results of a
    dtype; `experts`: stacks of them, too."""
    if torch.device(device).type != "cuda" or format.name not in FORMATS:
        return False
    capability = torch.cuda.get_device_capability(device)
    able = capability in GROUPED if experts else capability >= CAPABILITY
    return able and dtype == torch.bfloat16


@dataclass
class Fp8Product:
    """Inputs (..., in) times a weight (out, in) in E4M3, transposed; the result has the inputs'
    dtype. `weight_scale` (1,) or per channel (out, 1), `input_scale` (1,) or None: per token."""

    weight_scale: torch.Tensor
    input_scale: torch.Tensor | None

    def __call__(
        self, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        codes, scale = quantise_inputs(inputs.reshape(-1, inputs.shape[-1]), self.input_scale)
        by_channel = self.weight_scale
        # What the product does not take: a few last rows, or all if the columns do not fit.
        whole = len(weight) // MULTIPLE * MULTIPLE if weight.shape[1] % MULTIPLE == 0 else 0
        parts = []
        if whole:
            scale_b = by_channel[:whole].t() if by_channel.dim() == 2 else by_channel
            parts.append(
                _products._scaled_mm(
                    codes, weight[:whole].t(), scale_a=scale, scale_b=scale_b,
                    out_dtype=inputs.dtype,
                )
            )  # fmt: skip
        if whole < len(weight):
            known = (codes.float() * scale).to(inputs.dtype)
            rest = by_channel[whole:] if by_channel.dim() == 2 else by_channel
            parts.append(F.linear(known, (weight[whole:].float() * rest).to(inputs.dtype)))
        out = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        out = out if bias is None else out + bias
        return out.unflatten(0, inputs.shape[:-1])

    def in_order(self, rows: Layout | None) -> Fp8Product:
        """The same for a weight whose rows are in nested order."""
        scale = self.weight_scale
        if rows is None or scale.dim() == 1:
            return self
        return replace(self, weight_scale=rows.to_nested(scale.t()).t())


def quantise_inputs(
    rows: torch.Tensor, scale: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of inputs (N, in), and their scale: the one that is given (1,), or one per row
    (N, 1)."""
    if scale is None:
        scale = fp8_scales(rows.float().abs().amax(-1, keepdim=True))
    return (rows.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3), scale


@dataclass
class Fp8Experts:
    """The products of a stack of experts: E4M3 weights (E, neurons, in), or (E, 2 neurons, in) with
    a gate, and (E, in, neurons), scales (E, 1) or (E, out, 1) of each, and of the inputs of both.
    """

    up_scale: torch.Tensor
    down_scale: torch.Tensor
    up_input: torch.Tensor | None
    down_input: torch.Tensor | None

    def in_order(self, order: Layout | None, rows: Layout | None) -> Fp8Experts:
        """The same for stacks whose experts, and rows [gate | up], are in nested order."""
        up_scale, down_scale = self.up_scale, self.down_scale
        if order is not None:
            place = order.order.to(up_scale.device)
            up_scale, down_scale = up_scale[place], down_scale[place]
        if rows is not None and up_scale.dim() == 3:
            up_scale = up_scale.index_select(1, rows.order.to(up_scale.device))
        return replace(self, up_scale=up_scale, down_scale=down_scale)

    def forward(
        self,
        experts: Any,
        hidden_NH: torch.Tensor,
        chosen_NK: torch.Tensor,
        weights_NK: torch.Tensor,
    ) -> torch.Tensor:
        """Weighted sum over each token's experts; pairs of token and expert in the experts' order.
        N tokens, K experts of each, H channels."""
        num_chosen = chosen_NK.shape[-1]
        order = chosen_NK.flatten().argsort(stable=True)
        into = experts.gate_up_proj if experts.has_gate else experts.up_proj
        counts = torch.zeros(len(into), dtype=torch.int32, device=order.device)
        counts.scatter_add_(
            0, chosen_NK.flatten(), torch.ones_like(chosen_NK.flatten(), dtype=torch.int32)
        )
        ends = counts.cumsum(0, dtype=torch.int32)
        token = order // num_chosen
        codes_NH, scale = quantise_inputs(hidden_NH, self.up_input)
        scale = scale if self.up_input is not None else scale[token]
        dtype = hidden_NH.dtype
        up = grouped_product(
            codes_NH.view(torch.uint8)[token].view(E4M3), scale, into, self.up_scale, ends, dtype
        )  # fmt: skip
        hidden = experts._apply_gate(up) if experts.has_gate else experts.act_fn(up)
        codes, scale = quantise_inputs(hidden, self.down_input)
        down = grouped_product(codes, scale, experts.down_proj, self.down_scale, ends, dtype)
        down = down * weights_NK.flatten()[order][:, None]
        out = torch.empty_like(down).index_copy_(0, order, down)
        return out.unflatten(0, (-1, num_chosen)).sum(1).to(hidden_NH.dtype)


def grouped_product(
    codes: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    ends: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Codes of rows (N, in) in groups that end at `ends` (E,), each times its expert's weight
    (out, in); one scale (1,) for all rows or one each (N, 1)."""
    by_row = scale.reshape(-1).expand(len(codes)).contiguous()
    by_channel = weight_scale.reshape(len(weight), -1).expand(-1, weight.shape[1]).contiguous()
    if codes.is_cuda and fits(weight):
        return _products._scaled_grouped_mm(
            codes, weight.transpose(1, 2), by_row, by_channel, offs=ends, out_dtype=dtype
        )
    known = (codes.float() * by_row[:, None]).to(dtype)
    parts, start = [], 0
    for expert, end in enumerate(ends.tolist()):
        dense = weight[expert].float() * by_channel[expert][:, None]
        parts.append(F.linear(known[start:end], dense.to(dtype)))
        start = end
    return torch.cat(parts)


def fits(weight: torch.Tensor) -> bool:
    """Whether the products take a weight (..., out, in)."""
    return weight.shape[-1] % MULTIPLE == 0 and weight.shape[-2] % MULTIPLE == 0
