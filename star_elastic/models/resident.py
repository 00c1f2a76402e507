"""One copy of the weights for all sizes: a parent in nested order, sizes as views of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PreTrainedModel

from star_elastic.axes import AxisMap, TensorSpec
from star_elastic.axes.dims import cut
from star_elastic.axes.widths import Widths
from star_elastic.models.linear import (
    NestedLinear,
    QuantisedLinear,
    ResidentExperts,
    resident_experts,
)
from star_elastic.nesting.order import Layout, layout_of, nest


def nest_in_place(parent: PreTrainedModel, axis_map: AxisMap, sizes: Iterable[Widths]) -> None:
    """Stores in nested order what any of the sizes cuts inside groups: weights of linear layers and
    stacks of experts, one after the other, in their own memory. The model's function is unchanged.
    """
    sizes = list(sizes)
    for path, module in list(parent.named_modules()):
        spec = axis_map.tensors.get(f"{path}.weight")
        if isinstance(module, nn.Linear) and spec and _is_scattered(spec, axis_map, sizes):
            rows, columns = map(layout_of, spec.dims)
            weight, bias = module._parameters["weight"], module._parameters["bias"]
            assert weight is not None, path
            _overwrite(weight, (rows, columns))
            if bias is not None:
                _overwrite(bias, (rows,))
            nested = NestedLinear(weight, bias, rows, columns)
            if isinstance(module, QuantisedLinear):
                nested.reads = module.reads
                nested.product = module.product and module.product.in_order(rows)
            parent.set_submodule(path, nested.train(module.training))
    for path, specs in _expert_stacks(axis_map).items():
        if any(_is_scattered(spec, axis_map, sizes) for spec in specs):
            for spec in specs:
                layouts = [layout_of(dim) for dim in spec.dims]
                _overwrite(parent.get_parameter(spec.name), layouts)
            resident_experts(parent, path).number_anew(*_stack_layouts(specs))


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
        here = axis_map.seen_by(spec.layer, widths)
        cuts = [replace(s, dims=tuple(cut(dim, here) for dim in s.dims)) for s in specs.values()]
        if isinstance(module, NestedLinear):
            rows, columns = map(layout_of, cuts[0].dims)
            linear = NestedLinear(views["weight"], views.get("bias"), rows, columns)
            submodel.set_submodule(new_path, linear)
            continue
        experts = submodel.get_submodule(new_path)
        for name, view in views.items():
            experts.register_parameter(name, view)
        if any(layouts := _stack_layouts(cuts)):
            resident_experts(submodel, new_path).number_anew(*layouts)


def _stack_layouts(specs: Iterable[TensorSpec]) -> tuple[Layout | None, Layout | None]:
    """The orders of the experts and of the rows [gate | up] of a stack's tensors."""
    found = [[layout_of(dim) for dim in spec.dims] for spec in specs]
    return found[0][0], next((rows for _, *inner in found for rows in inner if rows), None)


def _nested_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """What a module holds in nested order, by its natural name."""
    if isinstance(module, NestedLinear):
        own = module.named_parameters()
        return {name.removeprefix("nested_"): value for name, value in own}
    is_nested = isinstance(module, ResidentExperts) and module.is_nested
    return dict(module.named_parameters()) if is_nested else {}


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
