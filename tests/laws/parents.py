"""Tiny random parents of every architecture, and what can be asked of them.

A parent is small enough that all of its sizes run in milliseconds, and random enough that nothing
is zero, symmetric or equal by accident: norm weights, biases, epsilons, decay rates and the
experts' correction biases included. Values are drawn in fp32, so that a checkpoint's fp32 buffers
hold them exactly; `Float64` then runs the whole model in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from star_elastic.architectures import Architecture, architecture_of
from star_elastic.axes import AxisMap, TensorSpec, Widths
from star_elastic.nesting.gate import Mixture
from star_elastic.nesting.slice import axis_keys, slice_tensor
from star_elastic.rewrite.stream import save_model
from tests.architectures import (  # noqa: F401
    AXIS_CASES,
    ROWS,
    SHARED_CASES,
    configs,
    fixed_config,
    hybrids,
)

AXES = ROWS
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
"""Allowed difference, relative to the largest logit."""


def examples(count: int) -> settings:
    """So many examples in the suite's profile, and in proportion in any other."""
    return settings(max_examples=max(1, count * settings().max_examples // 10))


class Float64(TorchFunctionMode):
    """Runs in float64 what transformers casts to fp32 (norms, SSM scan, routing, softmax)."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        named = (kwargs or {}).items()
        return func(*args, **{k: torch.float64 if a is torch.float32 else a for k, a in named})


def precision(dtype: torch.dtype) -> AbstractContextManager:
    """The context in which a model of `dtype` really computes in `dtype`."""
    return Float64() if dtype == torch.float64 else nullcontext()


@dataclass(frozen=True, repr=False)
class Parent:
    """A model with its config and table, and token ids (2, T) to feed it."""

    seed: int
    config: dict[str, Any]
    model: PreTrainedModel
    architecture: Architecture
    axis_map: AxisMap
    ids: torch.Tensor

    def __repr__(self) -> str:
        dtype = next(self.model.parameters()).dtype
        return f"make_parent({self.config}, {self.seed}, {dtype})"

    def _repr_pretty_(self, printer, cycle: bool) -> None:
        """Lets hypothesis report a parent by how to make it again."""
        printer.text(repr(self))

    @property
    def state(self) -> dict[str, torch.Tensor]:
        return {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}

    def save(self, directory: Path) -> Path:
        """Writes the parent as a checkpoint; float64 values are stored as they are."""
        out, dtype = directory / "parent", next(self.model.parameters()).dtype
        save_model(self.state, self.config, directory, out, dtype=dtype)
        return out

    def orders(self, seed: int) -> dict[str, torch.Tensor]:
        """Random orders of all axes that stay inside the groups."""
        generator = torch.Generator().manual_seed(seed)
        orders = {}
        for key, (name, _) in axis_keys(self.axis_map).items():
            axis = self.axis_map.axes[name]
            per_group = axis.size // axis.num_groups
            orders[key] = torch.cat(
                [
                    torch.randperm(per_group, generator=generator) + group * per_group
                    for group in range(axis.num_groups)
                ]
            )
        return orders


def build(config: Mapping[str, Any], dtype: torch.dtype, **kinds: str) -> PreTrainedModel:
    """A freshly initialised transformers model of a config."""
    fields = {name: value for name, value in config.items() if name != "model_type"}
    model_config = AutoConfig.for_model(config["model_type"], **fields)
    kinds = {"experts_implementation": "eager", **kinds}
    with precision(dtype):
        model = AutoModelForCausalLM.from_config(model_config, dtype=dtype, **kinds)
    return model.to(dtype).eval()


def reload(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    """A checkpoint in plain transformers, which must find every tensor and no other."""
    with precision(dtype):
        model, info = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, experts_implementation="eager", output_loading_info=True
        )
    assert not any(info.values()), info
    return model.eval()


def randomise(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Gives every parameter and buffer of a checkpoint a value of its own."""
    stored = model.state_dict()
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, tensor in named.items():
        if name not in stored:  # tables of positions, roots of widths
            continue
        last = name.rsplit(".", 1)[-1]
        normal = torch.randn(tensor.shape, generator=generator)
        if last == "A_log":
            value = torch.log(1 + 3 * torch.rand(tensor.shape, generator=generator))
        elif last == "dt_bias":
            value = -3 + 2.5 * torch.rand(tensor.shape, generator=generator)
        elif last == "D" or "norm" in name:
            value = 1 + 0.4 * normal
        elif last in ("bias", "e_score_correction_bias"):
            value = 0.4 * normal
        elif "embed" in name:
            value = normal
        else:
            value = normal / math.sqrt(tensor.shape[-1])
        with torch.no_grad():
            tensor.copy_(value)


def make_parent(config: dict[str, Any], seed: int, dtype: torch.dtype) -> Parent:
    """The parent of a config, with random weights."""
    generator = torch.Generator().manual_seed(seed)
    model = build(config, dtype)
    randomise(model, generator)
    ids = torch.randint(config["vocab_size"], (2, 7), generator=generator)
    architecture = architecture_of(config)
    axis_map = architecture.axis_map(config)
    return Parent(seed, config, model, architecture, axis_map, ids)


@st.composite
def parents(draw, kind: str, dtype: torch.dtype = torch.float64) -> Parent:
    """Random parents of one kind."""
    return make_parent(draw(configs(kind)), draw(st.integers(0, 2**20)), dtype)


Grid = Mapping[str, tuple[int, ...] | tuple[tuple[int, ...], ...]]
"""Choices of each axis, widest first; or such choices for each layer that has the axis."""


def legal_widths(axis_map: AxisMap, name: str) -> list[int]:
    """Widths of an axis that go with any legal widths of the other axes, ascending."""
    axis = axis_map.axes[name]
    step = axis.num_groups
    for first, divisor in axis_map.multiples:
        if first == name:
            step = math.lcm(step, *legal_widths(axis_map, divisor))
    return [w for w in range(step, axis.size + 1, step) if w >= axis.minimum]


@st.composite
def grids(draw, axis_map: AxisMap, case: str) -> Grid:
    """Choices of the axes of a case: full width first, then narrower ones, if there are any.

    A case is one axis, "all", or "per layer". Layers always have choices of their own: to be there
    or not; an attention layer always is (transformers' caches need one).
    """
    everything = case in ("all", "per layer")
    grid: dict[str, Any] = {}
    for name, axis in axis_map.axes.items():
        if not everything and name != case:
            continue
        if name == "layers":
            others = [layer for layer in axis.layers if layer != axis_map.axes["heads"].layers[0]]
            gone = draw(st.sets(st.sampled_from(others), min_size=1))
            grid[name] = tuple((1, 0) if layer in gone else (1,) for layer in axis.layers)
        else:
            legal = legal_widths(axis_map, name)
            narrower = st.just(set())
            if len(legal) > 1:
                narrower = st.sets(st.sampled_from(legal[:-1]), min_size=1, max_size=2)
            choices = narrower.map(lambda few, w=legal[-1]: (w, *sorted(few, reverse=True)))
            per_layer = case == "per layer" and not axis.is_global
            grid[name] = tuple(draw(choices) for _ in axis.layers) if per_layer else draw(choices)
    return grid


def each(grid: Grid, choose: Callable[[tuple[int, ...]], Any]) -> dict[str, Any]:
    """`choose(choices)` for every axis, or for each of its layers."""
    return {
        name: tuple(map(choose, choices)) if isinstance(choices[0], tuple) else choose(choices)
        for name, choices in grid.items()
    }


@st.composite
def some_widths(draw, axis_map: AxisMap, case: str = "all") -> dict[str, Any]:
    """Legal widths of the axes of a case, each narrower than full where it can be."""
    return each(draw(grids(axis_map, case)), lambda choices: choices[-1])


def one_hot(
    grid: Grid, widths: Mapping[str, Any], dtype: torch.dtype = torch.float64
) -> dict[str, Any]:
    """Mixtures that have all their weight on `widths`."""

    def mixture(choices, width):
        return Mixture(choices, torch.tensor([c == width for c in choices], dtype=dtype))

    return {
        name: tuple(map(mixture, choices, widths[name]))
        if isinstance(choices[0], tuple)
        else mixture(choices, widths[name])
        for name, choices in grid.items()
    }


def assert_equal(logits: torch.Tensor, expected: torch.Tensor, *, what: str = "") -> None:
    """Equal up to rounding: the tolerance of the dtype, relative to the largest logit."""
    assert logits.shape == expected.shape
    assert logits.isfinite().all() and expected.isfinite().all(), what
    error = relative_error(logits, expected)
    assert error <= TOLERANCE[expected.dtype], f"{what}: {error:.2e}"


STORED = {**TOLERANCE, torch.bfloat16: 5e-2}


def assert_stored(kind: str, logits: torch.Tensor, expected: torch.Tensor) -> None:
    """Logits of a stored size and of one in memory: equal bit for bit, but up to rounding where
    slices store other numbers than the parent (`TensorSpec.follows`)."""
    if ROWS[kind].axis_map.width_buffers:
        assert relative_error(logits.float(), expected.float()) <= STORED[expected.dtype]
    else:
        assert torch.equal(logits, expected)


def relative_error(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference relative to the largest logit."""
    return ((logits - expected).abs().max() / expected.abs().max()).item()


def sliced(
    tensor: torch.Tensor, spec: TensorSpec, axis_map: AxisMap, widths: Widths
) -> torch.Tensor:
    """What is left at `widths` of a full-width tensor of the whole model's table."""
    return slice_tensor(tensor, spec.dims, axis_map.seen_by(spec.layer, widths))
