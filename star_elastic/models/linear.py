"""Linear layers and stacks of experts of resident models: quantised, in nested order, or both.

They stand in a model in the place of transformers' own and hold the very same parameters. Shapes:
N tokens, K experts of each, H channels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from star_elastic.checkpoints.written_config import EAGER
from star_elastic.models.native import Fp8Experts, Fp8Product
from star_elastic.nesting.experts import expert_states
from star_elastic.nesting.order import Layout, nest
from star_elastic.quant.formats import Format, fake_activation, straight_through

Front = TypeVar("Front", bound=nn.Module)


class KnownInput:
    """Values as a format with this scale knows them; gradients do not see it."""

    def __init__(self, format: Format, scale: torch.Tensor | None):
        self.format, self.scale = format, scale

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        if self.scale is not None and self.scale.device != values.device:
            self.scale = self.scale.to(values.device)
        changed = fake_activation(values.detach(), self.format, self.scale)
        return straight_through(values, changed) if values.requires_grad else changed


class QuantisedLinear(nn.Linear):
    """A linear layer whose inputs are made what a format knows of them (`reads`), or whose weight
    holds codes that are multiplied as they are (`product`)."""

    reads: KnownInput | None = None
    product: Fp8Product | None = None

    @classmethod
    def of(cls, plain: nn.Linear) -> QuantisedLinear:
        """The same layer over the parameters of a plain one."""
        new = cls.__new__(cls)
        nn.Module.__init__(new)
        new.in_features, new.out_features = plain.in_features, plain.out_features
        for name, value in plain._parameters.items():
            new.register_parameter(name, value)
        return new.train(plain.training)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        known = input if self.reads is None else self.reads(input)
        return (self.product or F.linear)(known, self.weight, self.bias)


class NestedLinear(nn.Module):
    """A linear layer whose weight (out, in) is stored in nested order.

    What it reads (..., in) and gives (..., out) is in natural order, and so are `weight`, `bias`
    and its entries of a state dict: copies, made when they are asked for. `reads` and `product` as
    in `QuantisedLinear`; the product's scales are in nested order, too.
    """

    nested_weight: nn.Parameter
    nested_bias: nn.Parameter | None
    reads: KnownInput | None = None
    product: Fp8Product | None = None

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        rows: Layout | None,
        columns: Layout | None,
    ):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.rows, self.columns = rows, columns
        self.nested_weight = weight
        self.register_parameter("nested_bias", bias)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if self.reads is not None:  # before they are moved: blocks that share a scale lie together
            inputs = self.reads(inputs)
        if self.columns is not None:
            inputs = self.columns.to_nested(inputs)
        outputs = (self.product or F.linear)(inputs, self.nested_weight, self.nested_bias)
        return outputs if self.rows is None else self.rows.to_natural(outputs)

    def extra_repr(self) -> str:
        has_bias = self.nested_bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={has_bias}"

    @property
    def weight(self) -> torch.Tensor:
        """The weight in natural order, a copy (out, in)."""
        weight = self.nested_weight
        if self.rows is not None:
            weight = weight.index_select(0, self.rows.order.argsort().to(weight.device))
        return weight if self.columns is None else self.columns.to_natural(weight)

    @property
    def bias(self) -> torch.Tensor | None:
        """The bias in natural order, a copy (out,)."""
        bias = self.nested_bias
        return bias if bias is None or self.rows is None else self.rows.to_natural(bias)

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        for name, value in (("weight", self.weight), ("bias", self.bias)):
            if value is not None:
                destination[prefix + name] = value if keep_vars else value.detach()

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        nested = {}
        for name, dims in (("weight", (self.rows, self.columns)), ("bias", (self.rows,))):
            if prefix + name in state_dict:
                nested[f"{prefix}nested_{name}"] = nest(state_dict[prefix + name], dims)
        super()._load_from_state_dict(nested, prefix, *args)


class ResidentExperts(nn.Module):
    """What `resident_experts` puts before transformers' class of a stack of experts.

    In nested order `order` tells how experts lie (`nested_places` (E,): where each of them does),
    and `rows` how the rows [gate | up] do; experts are asked for, saved and loaded in natural order
    all the same.
    `reads` and `product` as in `QuantisedLinear`; `down_reads` for what the second matrix of gated
    experts reads (without a gate it is what the activation function gives).
    """

    reads: KnownInput | None = None
    down_reads: Callable[[torch.Tensor], torch.Tensor] | None = None
    product: Fp8Experts | None = None
    order: Layout | None = None
    rows: Layout | None = None
    nested_places: torch.Tensor | None

    def forward(
        self, hidden_NH: torch.Tensor, chosen_NK: torch.Tensor, weights_NK: torch.Tensor
    ) -> torch.Tensor:
        if self.nested_places is not None:
            chosen_NK = self.nested_places[chosen_NK]
        if self.reads is not None:
            hidden_NH = self.reads(hidden_NH)
        if self.product is not None:
            return self.product.forward(self, hidden_NH, chosen_NK, weights_NK)
        own: Any = self
        if own.has_gate and own.config._experts_implementation == EAGER:
            return self._one_by_one(hidden_NH, chosen_NK, weights_NK)
        plain: Any = super()
        return plain.forward(hidden_NH, chosen_NK, weights_NK)

    def _one_by_one(
        self, hidden_NH: torch.Tensor, chosen_NK: torch.Tensor, weights_NK: torch.Tensor
    ) -> torch.Tensor:
        """Expert by expert, as transformers does, but by `_apply_gate`, which some of its classes
        pass by there."""
        out_NH = torch.zeros_like(hidden_NH)
        for number in chosen_NK.unique().tolist():
            rank, token = torch.where(number == chosen_NK.T)
            _, states = expert_states(self, number, hidden_NH[token])
            out_NH.index_add_(0, token, (states * weights_NK[token, rank, None]).to(out_NH.dtype))
        return out_NH

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        if self.rows is not None:
            gate_up = self.rows.to_natural(gate_up)
        plain: Any = super()
        hidden = plain._apply_gate(gate_up)
        return hidden if self.down_reads is None else self.down_reads(hidden)

    def number_anew(self, order: Layout | None, rows: Layout | None) -> None:
        """Says that the stack is in nested order, experts and rows [gate | up], and puts the scales
        of codes in it, too."""
        self.order, self.rows = order, rows
        if order is not None:
            self.nested_places = order.order.argsort().to(next(self.parameters()).device)
        if self.product is not None:
            self.product = self.product.in_order(order, rows)

    @property
    def is_nested(self) -> bool:
        """Whether anything is in nested order."""
        return self.order is not None or self.rows is not None

    def _places(self, name: str) -> list[torch.Tensor | None]:
        """Where the elements of the first dimensions of a parameter lie."""
        rows = self.rows if name.startswith("gate_up") else None
        return [self.nested_places, rows and rows.order.argsort()]

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self._parameters if self.is_nested else ():
            for dim, places in enumerate(self._places(name)):
                if places is not None:
                    saved = destination[prefix + name]
                    destination[prefix + name] = saved.index_select(dim, places.to(saved.device))

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        state = dict(state_dict)
        for name in self._parameters if self.is_nested else ():
            for dim, places in enumerate(self._places(name)):
                if places is not None and prefix + name in state:
                    given = state[prefix + name]
                    order = places.argsort().to(given.device)
                    state[prefix + name] = given.index_select(dim, order)
        super()._load_from_state_dict(state, prefix, *args)


@cache
def _joined(front: type[nn.Module], kind: type[nn.Module]) -> type[nn.Module]:
    return type(f"{front.__name__} of {kind.__name__}", (front, kind), {})


def put_before(front: type[Front], plain: nn.Module) -> Front:
    """A module of transformers with the methods of `front` before its own; the very same parameters
    and submodules."""
    kind: Any = _joined(front, type(plain))
    module = kind.__new__(kind)
    module.__dict__.update(plain.__dict__)
    return module


def resident_experts(model: nn.Module, path: str) -> ResidentExperts:
    """The stack of experts at a path of a model, as one that may be quantised and nested: put there
    in the place of transformers' own, with its parameters and submodules."""
    plain = model.get_submodule(path)
    if isinstance(plain, ResidentExperts):
        return plain
    experts = put_before(ResidentExperts, plain)
    experts.register_buffer("nested_places", None, persistent=False)
    model.set_submodule(path, experts)
    return experts


class KnownActivation(nn.Module):
    """An activation function whose result is made what a format knows of it."""

    def __init__(self, function: nn.Module, reads: KnownInput):
        super().__init__()
        self.function, self.reads = function, reads

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return self.reads(self.function(values))
