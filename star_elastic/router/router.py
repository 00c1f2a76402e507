"""The router: one small network per axis that maps a budget to a distribution over widths.

Shapes: N budgets, C choices of an axis, L layers that decide for themselves (1: all alike). Source
of the architecture: Nemotron Elastic (arXiv 2511.16664), section on the router; deliberate
differences are named where they occur.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from star_elastic.axes import LAYERS
from star_elastic.axes.widths import Width
from star_elastic.errors import CheckpointError
from star_elastic.nesting.gate import Mixture, Mixtures
from star_elastic.router.grid import Grid

HIDDEN_WIDTH = 256
INIT_STD = 0.1
START = 3.0
"""Head start of each axis's full width over the others: the router starts near the parent, so that
an axis on which no budget presses stays whole (the papers start from equal logits)."""
LEAK = 0.1


@dataclass(frozen=True, slots=True)
class Decision:
    """What the router says for one budget.

    `picks` is one mixture for every place of the grid, in its order; `mixtures` the same by axis,
    as a model reads them; `choice` the most likely widths.
    """

    mixtures: Mixtures
    picks: tuple[Mixture, ...]
    choice: Mapping[str, Width]


@dataclass(frozen=True, slots=True)
class Temperature:
    """The router's state of annealing at one step: logits are multiplied by `scale`, noisy logits
    divided by `tau`."""

    tau: float
    scale: float


def seed_for(*parts: int | str) -> int:
    """A 63-bit seed from a key such as (run seed, step, group, axis): equal keys, equal draws.

    Draws of different axes are independent (a shared seed would correlate axes that have equally
    many choices).
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class Router(nn.Module):
    """Maps a budget vector (N,), one-hot at a trained budget, to logits over each axis's widths.

    On axes on which the layers decide for themselves, one network gives the logits of all layers.
    """

    def __init__(
        self,
        grid: Grid | Mapping[str, tuple[int, ...]],
        num_budgets: int,
        seed: int = 0,
        start: float = START,
    ):
        super().__init__()
        self.grid = grid if isinstance(grid, Grid) else Grid(dict(grid))
        self.num_budgets = num_budgets
        self.nets = nn.ModuleDict()
        for axis, choices in self.grid.choices.items():
            assert list(choices) == sorted(set(choices), reverse=True), (axis, choices)
            num_layers = self.grid.per_layer.get(axis, 1)
            net = nn.Sequential(
                nn.Linear(num_budgets, HIDDEN_WIDTH, bias=False),
                nn.LeakyReLU(LEAK),
                nn.Linear(HIDDEN_WIDTH, num_layers * len(choices), bias=False),
            )
            generator = torch.Generator().manual_seed(seed_for(seed, "router", axis))
            for parameter in net.parameters():
                nn.init.normal_(parameter, std=INIT_STD, generator=generator)
            self.nets[axis] = net
            start_C = start * F.one_hot(torch.tensor(0), len(choices))
            self.register_buffer(f"start_{axis}", start_C, persistent=False)

    def one_hot(self, budget: int) -> torch.Tensor:
        """The budget vector of trained budget number `budget`; shape (N,)."""
        device = next(self.parameters()).device
        return F.one_hot(torch.tensor(budget, device=device), self.num_budgets).float()

    def decide(
        self,
        budget_N: torch.Tensor,
        temperature: Temperature,
        *,
        noise_key: tuple[int | str, ...] | None = None,
        hard: bool = False,
    ) -> Decision:
        """The decision for a budget vector.

        `noise_key` draws Gumbel noise keyed by it and the axis; without it there is none (as in
        evaluation). `hard` returns one-hot samples whose gradient is that of the soft ones. Raises
        CheckpointError for a decision that is not finite.
        """
        picks: list[Mixture] = []
        for axis, net in self.nets.items():
            choices = self.grid.choices[axis]
            logits_LC = net(budget_N).unflatten(0, (-1, len(choices)))
            logits_LC = (logits_LC + self.get_buffer(f"start_{axis}")) * temperature.scale
            if noise_key is not None:
                noise = gumbel(logits_LC.numel(), *noise_key, axis).reshape(logits_LC.shape)
                logits_LC = logits_LC + noise.to(logits_LC)
            probs_LC = (logits_LC / temperature.tau).softmax(-1)
            if not torch.isfinite(probs_LC).all():
                raise CheckpointError(
                    f"the router's decision on {axis} is not finite; lower router.learning_rate "
                    "and go on, with --resume if there is a saved state: the last one is intact"
                )
            if hard:
                one_hot_LC = F.one_hot(probs_LC.argmax(-1), len(choices)).to(probs_LC)
                probs_LC = one_hot_LC + (probs_LC - probs_LC.detach())
            picks += [Mixture(choices, probs_C) for probs_C in probs_LC]
        likeliest = [pick.choices[int(pick.probs.detach().argmax())] for pick in picks]
        choice = self.grid.widths(likeliest)
        return Decision(self._by_axis(picks), tuple(picks), choice)

    def _by_axis(self, picks: Sequence[Mixture]) -> dict[str, Mixture | tuple[Mixture, ...]]:
        grouped: dict[str, list[Mixture]] = {}
        for place, pick in zip(self.grid.places, picks, strict=True):
            grouped.setdefault(place.axis, []).append(pick)
        return {
            axis: self._presence(of_axis[0])
            if axis == LAYERS
            else tuple(of_axis)
            if axis in self.grid.per_layer
            else of_axis[0]
            for axis, of_axis in grouped.items()
        }

    def _presence(self, counts: Mixture) -> tuple[Mixture, ...]:
        """Whether each layer is there, from a mixture over how many are: its gate is the weight of
        all counts that reach down to its rank."""
        ranks = {layer: rank for rank, layer in enumerate(self.grid.depth)}
        gates = counts.unit_gates(len(ranks))
        return tuple(
            Mixture((1, 0), torch.stack([gates[ranks[layer]], 1 - gates[ranks[layer]]]))
            for layer in range(len(ranks))
        )


def gumbel(count: int, *key: int | str) -> torch.Tensor:
    """Standard Gumbel noise (count,) from a counter-based generator: the key decides the draw."""
    generator = torch.Generator().manual_seed(seed_for(*key))
    uniform = torch.rand(count, generator=generator, dtype=torch.float64)
    uniform = uniform.clamp(1e-12, 1 - 1e-12)
    return -torch.log(-torch.log(uniform)).float()


@dataclass(frozen=True, kw_only=True)
class Annealing:
    """The temperature step by step, whatever the length of the run. tau falls from `tau_start` by
    the factor `tau_decay` a step, not below `tau_end`; the scale of the logits grows from
    `scale_start` by `scale_growth` a step, not above `scale_end`. The defaults are the papers',
    whose ends are reached after about 10,000 steps. A run of fewer stays soft: ends that are
    squeezed into it freeze the router before it has learned anything.
    """

    tau_start: float = 1.0
    """Temperature that noisy logits are divided by at first."""
    tau_end: float = 0.05
    """The lowest temperature."""
    tau_decay: float = 0.9997
    """What the temperature is multiplied by at every step."""
    scale_start: float = 1.0
    """What logits are multiplied by at first."""
    scale_end: float = 10.0
    """The largest such factor."""
    scale_growth: float = 9e-4
    """What is added to the factor at every step."""

    def at(self, step: int) -> Temperature:
        """The temperature of a step, counted from 0."""
        tau = max(self.tau_start * self.tau_decay**step, self.tau_end)
        return Temperature(tau, min(self.scale_start + self.scale_growth * step, self.scale_end))
