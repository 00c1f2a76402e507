"""The router's optimiser: Adam with one second moment for all of its networks.

Adam divides every parameter's gradient by its own size. But how large the gradients of one axis are
beside those of another is what the router has to learn from. On the bundled parent those of the net
that chooses the number of experts are sixty times below those of the one for hidden channels,
because experts hardly cost active parameters. Divided one by one, both would move alike, and
experts would be cut for nothing. Divided by one and the same number they keep their proportions,
and how fast the router learns does not depend on how large the losses are.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


class SharedAdam(torch.optim.Optimizer):
    """Adam without weight decay, in which the root mean square of the gradients is taken over all
    parameters: `p -= lr * m / sqrt(mean(v))`, with bias-corrected running means m of the gradients
    and v of their squares."""

    def __init__(
        self, parameters: Iterable[nn.Parameter], *, lr: float, betas: tuple[float, float]
    ):
        super().__init__(list(parameters), {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step; parameters without a gradient stay as they are."""
        assert closure is None, "this optimiser takes one gradient per step"
        for group in self.param_groups:
            first, second = group["betas"]
            moved = [p for p in group["params"] if p.grad is not None]
            squares = []
            for parameter in moved:
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.zeros((), device=parameter.device)
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
                state["step"] += 1
                state["exp_avg"].lerp_(parameter.grad, 1 - first)
                state["exp_avg_sq"].lerp_(parameter.grad.square(), 1 - second)
                squares.append(state["exp_avg_sq"].flatten() / (1 - second ** state["step"]))
            if not moved:
                continue
            size = torch.cat(squares).mean().sqrt().clamp_min(torch.finfo(torch.float32).tiny)
            for parameter in moved:
                state = self.state[parameter]
                mean = state["exp_avg"] / (1 - first ** state["step"])
                parameter -= group["lr"] * mean / size
