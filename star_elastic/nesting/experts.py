"""What one expert of a stack computes. Shapes: N tokens, D channels, F neurons."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F


def expert_states(experts: Any, number: int, x_ND: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What an expert's neurons give (N, F), and what it writes (N, D).

    `experts` is transformers' module of a stack; how it is laid out (gate, biases, transposed) are
    attributes that transformers gives to every such class.
    """

    def product(values: torch.Tensor, name: str) -> torch.Tensor:
        weight = getattr(experts, name)[number]
        out = values @ weight if experts.is_transposed else F.linear(values, weight)
        return out + getattr(experts, f"{name}_bias")[number] if experts.has_bias else out

    if experts.has_gate:
        hidden_NF = experts._apply_gate(product(x_ND, "gate_up_proj"))
    else:
        hidden_NF = experts.act_fn(product(x_ND, "up_proj"))
    return hidden_NF, product(hidden_NF, "down_proj")
