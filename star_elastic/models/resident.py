"""One copy of the weights for all sizes: orders in which every size of a tensor is a prefix of it.

What is cut inside groups keeps elements here and there: the first heads of every group. Put rank by
rank instead (fixed elements, then the first unit of every group, then every second one, ...) the
kept elements are a prefix at every width. So a size's weight is a view, and what goes in or comes
out is put from one order into the other, which costs a copy of the activations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from star_elastic.axes import AxisMap, Dim, Segment, TensorSpec
from star_elastic.axes.widths import Widths
from star_elastic.models.native import Fp8Product
from star_elastic.models.quantised_inputs import INPUTS, QuantisedInputs
from star_elastic.quant.formats import E4M3

Place = tuple[tuple[int, ...], int]
"""Where a block of elements lies: strides and start."""
Move = tuple[tuple[int, ...], Place, Place]
"""A block of elements that lie evenly in two orders: its shape, and where it lies in each."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The natural order of a dimension's elements, as modules read them, and the nested one.

    `moves` go from natural to nested order, `back` from nested to natural.
    """

    size: int
    moves: tuple[Move, ...]
    back: tuple[Move, ...]

    def to_nested(self, natural: torch.Tensor) -> torch.Tensor:
        """Puts the last dimension (..., size) from natural into nested order."""
        return _move(natural, self.size, self.moves)

    def to_natural(self, nested: torch.Tensor) -> torch.Tensor:
        """Puts the last dimension (..., size) from nested into natural order."""
        return _move(nested, self.size, self.back)

    @property
    def order(self) -> torch.Tensor:
        """The natural places of the elements, in nested order (size,)."""
        return self.to_nested(torch.arange(self.size))


def _move(source: torch.Tensor, size: int, moves: tuple[Move, ...]) -> torch.Tensor:
    """One strided copy per block: many times as fast as picking element by element."""
    source = source.contiguous()
    target = torch.empty_like(source)
    rows, first = source.numel() // size, source.storage_offset()
    for shape, (strides, start), (new_strides, new_start) in moves:
        block = source.as_strided((rows, *shape), (size, *strides), first + start)
        target.as_strided((rows, *shape), (size, *new_strides), new_start).copy_(block)
    return target


def layout_of(dim: Dim) -> Layout | None:
    """The two orders of a dimension; None if they are the same.

    Units of the same rank in their groups stand together, in the order of segments and groups.
    """
    depths = {s.num_units // s.num_groups for s in dim if s.axis}
    assert len(depths) <= 1, f"groups of different sizes in one dimension: {dim}"
    depth = next(iter(depths), 1)
    stride = sum(s.num_groups * s.unit for s in dim if s.axis)
    start, next_fixed = 0, 0
    next_ranked = sum(s.num_units * s.unit for s in dim if not s.axis)
    moves: list[Move] = []
    for segment in _joined(dim):
        unit, groups = segment.unit, segment.num_groups
        length = segment.num_units * unit
        if segment.axis:
            natural, nested = (depth * unit, unit, 1), (unit, stride, 1)
            moves.append(((groups, depth, unit), (natural, start), (nested, next_ranked)))
            next_ranked += groups * unit
        else:
            moves.append(((length,), ((1,), start), ((1,), next_fixed)))
            next_fixed += length
        start += length
    back = tuple((shape, nested, natural) for shape, natural, nested in moves)
    layout = Layout(start, tuple(moves), back)
    return None if torch.equal(layout.order, torch.arange(start)) else layout


def _joined(dim: Dim) -> list[Segment]:
    """Segments with neighbours that lie alike made one, to move them at once."""
    joined: list[Segment] = []
    for segment in dim:
        last = joined[-1] if joined else None
        if last and (last.axis, last.unit) == (segment.axis, segment.unit):
            groups = last.num_groups + segment.num_groups
            joined[-1] = replace(
                last, num_units=last.num_units + segment.num_units, num_groups=groups
            )
        else:
            joined.append(segment)
    return joined


class NestedLinear(nn.Module):
    """A linear layer whose weight (out, in) is stored in nested order.

    What it reads (..., in) and gives (..., out) is in natural order, and so are `weight`, `bias`
    and its entries of a state dict: copies, made when they are asked for.
    """

    nested_weight: nn.Parameter
    nested_bias: nn.Parameter | None

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
        self._product: Callable[..., torch.Tensor] = F.linear

    def set_product(self, product: Fp8Product) -> None:
        """Multiplies with this product from now on; the weight holds its codes."""
        scale = product.weight_scale
        if self.rows is not None and scale.dim() == 2:
            scale = self.rows.to_nested(scale.t()).t()
        self._product = Fp8Product(scale, product.input_scale)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if self.columns is not None:
            inputs = self.columns.to_nested(inputs)
        outputs = self._product(inputs, self.nested_weight, self.nested_bias)
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


def nest(tensor: torch.Tensor, layouts: Iterable[Layout | None]) -> torch.Tensor:
    """A tensor with its first dimensions put from natural into nested order."""
    if tensor.dtype == E4M3:  # which not every operation takes
        return nest(tensor.view(torch.uint8), layouts).view(E4M3)
    for dim, layout in enumerate(layouts):
        if layout is not None and dim == tensor.ndim - 1:
            tensor = layout.to_nested(tensor)
        elif layout is not None:
            tensor = tensor.index_select(dim, layout.order.to(tensor.device))
    return tensor


def _number_anew(experts: nn.Module, layout: Layout) -> None:
    """Lets a stack of experts in nested order be asked for, saved and loaded in natural order."""
    places = layout.order.argsort().to(next(experts.parameters()).device)
    experts.register_buffer("nested_places", places, persistent=False)
    experts.register_forward_pre_hook(_choose_nested)
    experts.register_state_dict_post_hook(_save_natural)
    experts.register_load_state_dict_pre_hook(_load_natural)


def _choose_nested(experts: Any, inputs: tuple) -> tuple:
    hidden, chosen, *rest = inputs
    return hidden, experts.nested_places[chosen], *rest


def _save_natural(experts: Any, state: dict, prefix: str, _metadata) -> None:
    for name in experts._parameters:
        state[prefix + name] = state[prefix + name].index_select(0, experts.nested_places)


def _load_natural(experts: Any, state: dict, prefix: str, *_args) -> None:
    for name in experts._parameters.keys() & {key.removeprefix(prefix) for key in state}:
        order = experts.nested_places.argsort()
        state[prefix + name] = state[prefix + name].index_select(0, order)


def nest_in_place(parent: PreTrainedModel, axis_map: AxisMap, sizes: Iterable[Widths]) -> None:
    """Stores in nested order what any of the sizes cuts inside groups: weights of linear layers and
    stacks of experts, one after the other, in their own memory. The model's function is unchanged.
    """
    sizes = list(sizes)
    inputs: QuantisedInputs | None = getattr(parent, INPUTS, None)
    quantised = inputs.scheme.quantised(axis_map) if inputs else {}
    for path, module in list(parent.named_modules()):
        spec = axis_map.tensors.get(f"{path}.weight")
        if isinstance(module, nn.Linear) and spec and _is_scattered(spec, axis_map, sizes):
            rows, columns = _layouts(spec, axis_map, axis_map.full)
            weight, bias = module._parameters["weight"], module._parameters["bias"]
            assert weight is not None, path
            _overwrite(weight, (rows, columns))
            if bias is not None:
                _overwrite(bias, (rows,))
            nested = NestedLinear(weight, bias, rows, columns)
            parent.set_submodule(path, nested.train(module.training))
            if inputs is not None and spec.name in quantised:
                inputs.apply_to(parent, spec)
    for path, specs in _expert_stacks(axis_map).items():
        if any(_is_scattered(spec, axis_map, sizes) for spec in specs):
            layout = _layouts(specs[0], axis_map, axis_map.full)[0]
            assert layout is not None, path
            for spec in specs:
                _overwrite(parent.get_parameter(spec.name), (layout,))
            _number_anew(parent.get_submodule(path), layout)
            if inputs is not None and inputs.holds_codes:
                for spec in specs:
                    inputs.apply_to(parent, spec)


def nested_names(parent: PreTrainedModel) -> set[str]:
    """The table's names of what a model holds in nested order."""
    modules = parent.named_modules()
    return {f"{path}.{name}" for path, module in modules for name in _nested_parameters(module)}


def share_nested(
    parent: PreTrainedModel, submodel: PreTrainedModel, axis_map: AxisMap, widths: Widths
) -> None:
    """Gives a submodel of `widths` what its parent holds in nested order, as views."""
    names = axis_map.names_at(widths)
    for path, module in parent.named_modules():
        held = _nested_parameters(module)
        kept = {name: names.get(f"{path}.{name}") for name in held}
        specs = {name: axis_map.tensors[f"{path}.{name}"] for name, new in kept.items() if new}
        if not specs:
            continue
        views = {n: _prefix(held[n], axis_map.shape(spec, widths)) for n, spec in specs.items()}
        first, spec = next(iter(specs.items()))
        new_path = names[spec.name].removesuffix(f".{first}")
        layouts = _layouts(spec, axis_map, widths)
        if isinstance(module, NestedLinear):
            linear = NestedLinear(views["weight"], views.get("bias"), layouts[0], layouts[1])
            submodel.set_submodule(new_path, linear)
            continue
        experts = submodel.get_submodule(new_path)
        for name, view in views.items():
            experts.register_parameter(name, view)
        if layouts[0] is not None:
            _number_anew(experts, layouts[0])


def _nested_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """What a module holds in nested order, by its natural name."""
    if isinstance(module, NestedLinear):
        own = module.named_parameters()
        return {name.removeprefix("nested_"): value for name, value in own}
    return dict(module.named_parameters()) if "nested_places" in module._buffers else {}


def _prefix(whole: nn.Parameter, shape: tuple[int, ...]) -> nn.Parameter:
    """The first elements of every dimension, as a view."""
    part = whole.detach()[tuple(slice(length) for length in shape)]
    return nn.Parameter(part, requires_grad=whole.requires_grad)


def _overwrite(tensor: nn.Parameter, layouts: Iterable[Layout | None]) -> None:
    with torch.no_grad():
        tensor.copy_(nest(tensor, layouts))


def _expert_stacks(axis_map: AxisMap) -> dict[str, list[TensorSpec]]:
    """The stacked tensors of every experts module, by its path."""
    stacks: dict[str, list[TensorSpec]] = {moe.experts_path: [] for moe in axis_map.moe_layers}
    for spec in axis_map.tensors.values():
        path = spec.name.rpartition(".")[0]
        if path in stacks:
            stacks[path].append(spec)
    return stacks


def _layouts(spec: TensorSpec, axis_map: AxisMap, widths: Widths) -> list[Layout | None]:
    """The layout of every dimension of a tensor at `widths`."""
    return [
        layout_of(
            tuple(
                replace(s, num_units=axis_map.width(widths, s.axis, spec.layer)) if s.axis else s
                for s in dim
            )
        )
        for dim in spec.dims
    ]


def _is_scattered(spec: TensorSpec, axis_map: AxisMap, sizes: Iterable[Widths]) -> bool:
    """Whether any size keeps several runs of elements in a dimension of a tensor."""
    return any(
        len(axis_map.runs(spec, dim, widths)) > 1
        for widths in sizes
        for dim in range(len(spec.dims))
    )


@dataclass(frozen=True, slots=True)
class ResidentBytes:
    """Memory of the weights: of the copy that all sizes share, and beside it of each size that has
    been built (vectors and small tensors cut inside groups, tables of positions)."""

    shared: int
    copies: Mapping[str, int]

    @property
    def total(self) -> int:
        return self.shared + sum(self.copies.values())


def count_resident(parent: nn.Module, sizes: Mapping[str, nn.Module]) -> ResidentBytes:
    """Counts the distinct tensors of a parent, and the storages of sizes that lie beside them."""
    shared = {tensor.data_ptr(): tensor.nbytes for tensor in _tensors(parent)}
    copies = {}
    for name, model in sizes.items():
        own = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for tensor in _tensors(model)
            if not any(low <= tensor.data_ptr() < low + n for low, n in shared.items())
        }
        copies[name] = sum(own.values())
    return ResidentBytes(sum(shared.values()), copies)


def _tensors(model: nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]
