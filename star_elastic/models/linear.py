"""Linear layers and stacks of experts of resident models: quantised, in nested order, or both.

They stand in a model in the place of transformers' own and hold the very same parameters. Shapes:
N tokens, K experts of each, H channels.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from star_elastic.models.native import Fp8Experts, Fp8Product
from star_elastic.nesting.order import Layout, nest
from star_elastic.quant.formats import Format, fake_activation, straight_through


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

    `nested_places` (E,): where each expert lies if the stack is in nested order; experts are asked
    for, saved and loaded in natural order all the same. `reads` and `product` as in
    `QuantisedLinear`; what the second matrix reads is known where the activation function gives it.
    """

    reads: KnownInput | None = None
    product: Fp8Experts | None = None
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
        plain: Any = super()
        return plain.forward(hidden_NH, chosen_NK, weights_NK)

    def number_anew(self, layout: Layout) -> None:
        """Says that the stack is in nested order, and puts the scales of codes in it, too."""
        self.nested_places = layout.order.argsort().to(next(self.parameters()).device)
        if self.product is not None:
            self.product = self.product.in_order(layout.order)

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self._parameters if self.nested_places is not None else ():
            saved = destination[prefix + name]
            destination[prefix + name] = saved.index_select(0, self.nested_places)

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        state = dict(state_dict)
        order = None if self.nested_places is None else self.nested_places.argsort()
        for name in self._parameters if order is not None else ():
            if prefix + name in state:
                state[prefix + name] = state[prefix + name].index_select(0, order)
        super()._load_from_state_dict(state, prefix, *args)


@cache
def _resident(kind: type[nn.Module]) -> type[ResidentExperts]:
    return type(f"Resident{kind.__name__}", (ResidentExperts, kind), {})


def resident_experts(model: nn.Module, path: str) -> ResidentExperts:
    """The stack of experts at a path of a model, as one that may be quantised and nested: put there
    in the place of transformers' own, with its parameters and submodules."""
    plain = model.get_submodule(path)
    if isinstance(plain, ResidentExperts):
        return plain
    kind = _resident(type(plain))
    experts = kind.__new__(kind)
    experts.__dict__.update(plain.__dict__)
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
