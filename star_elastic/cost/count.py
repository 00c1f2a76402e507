"""What a submodel costs: parameters, active parameters, bytes, operations, at any widths.

Everything is plain arithmetic over the axis map: exact for integers, differentiable when widths
are tensors (expected widths of the router). Equal rows of the table are counted once and
multiplied, so that a 52-layer model costs as little as a 4-layer one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from star_elastic.axes import LAYERS, TOP_K, AxisMap, Dim, TensorSpec
from star_elastic.errors import BudgetError

METRICS = ("active", "total", "bytes", "flops", "ms")
FP32_BYTES = 4
_STATE = "state of "


@dataclass(frozen=True, slots=True)
class Workload:
    """What the memory and the operations are counted for."""

    context: int = 0
    """Tokens of context of each sequence. Start with those of the longest answers, where budgets
    are in bytes."""
    batch: int = 1
    """Sequences at once."""
    dtype_bytes: int = 2
    """Bytes per parameter, and per element of the decoding states but for the SSM state."""
    ssm_dtype_bytes: int = 4
    """Bytes per element of the SSM state: transformers keeps it in fp32, engines may be told to use
    2."""

    @property
    def fp32_bytes(self) -> int:
        """Bytes per element of what is fp32 in a model of any smaller dtype."""
        return max(FP32_BYTES, self.dtype_bytes)


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes that a loaded model holds while it decodes, as transformers loads it and caches.

    `weights` are the parameters in the model's own dtype, `fp32_weights` those that stay in fp32
    (routers), `buffers` what is no parameter (correction biases of routers, rotary frequencies),
    `states` the caches of all sequences by kind (`key_value`, `ssm`, `conv`). Not in here: the
    activations of a step, what an allocator reserves beyond tensors, and a GPU's own context.
    """

    weights: float
    fp32_weights: float
    buffers: float
    states: Mapping[str, float]

    @property
    def weight_bytes(self) -> float:
        """All but the states."""
        return self.weights + self.fp32_weights + self.buffers

    @property
    def state_bytes(self) -> float:
        """The states of every kind."""
        return sum(self.states.values())

    @property
    def total(self) -> float:
        """All of it."""
        return self.weight_bytes + self.state_bytes


@dataclass(frozen=True, slots=True)
class Cost:
    """Counts of one submodel. `active` and `total` are parameters including both embeddings; `ms`
    milliseconds per token, if they were measured.

    `weight_bytes` and `state_bytes` are those of a model in memory (`Memory`). `flops_per_token`
    are the operations of a decoded token, `head_flops` those among them that make its logits.
    """

    total: float
    active: float
    weight_bytes: float
    state_bytes: float
    flops_per_token: float
    head_flops: float
    ms: float | None = None

    @property
    def bytes(self) -> float:
        return self.weight_bytes + self.state_bytes

    @property
    def prefill_flops_per_token(self) -> float:
        """Operations of a token that is read at once with others: only the last of them goes
        through the LM head, which takes `head_flops` more."""
        return self.flops_per_token - self.head_flops

    def metric(self, name: str) -> float:
        """The count that a budget of this name limits. Raises BudgetError for unknown names."""
        if name not in METRICS:
            raise BudgetError(f"budget {name!r} is unknown; use {', '.join(METRICS)}")
        value = self.flops_per_token if name == "flops" else getattr(self, name)
        if value is None:
            raise BudgetError(
                "a budget in milliseconds needs a latency table; measure one with star-elastic "
                'latency and name it in the run config: latency = "table.json"'
            )
        return value


@dataclass(frozen=True, slots=True)
class _Row:
    """Equal rows of the table, `count` of them."""

    kind: str
    dims: tuple[Dim, ...]
    layer: int | None
    scale: int
    count: int


class CostModel:
    """Counts any widths of one axis map; built once, asked often.

    `milliseconds(widths, axis_map)` is what a latency table says (latency.py).
    """

    def __init__(
        self,
        axis_map: AxisMap,
        workload: Workload = Workload(),
        milliseconds: Callable[[Mapping, AxisMap], Any] | None = None,
    ):
        self.axis_map = axis_map
        self.workload = workload
        self._milliseconds = milliseconds
        self._rows = {True: self._group(merge=True), False: self._group(merge=False)}

    def _group(self, *, merge: bool) -> list[_Row]:
        rows: Counter = Counter()
        load = self.workload

        def add(kind: str, dims, layer: int | None, scale: int = 1) -> None:
            rows[(kind, dims, None if merge else layer, scale)] += 1

        for spec in self.axis_map.tensors.values():
            add(_kind(spec), spec.dims, spec.layer)
            if spec.keep_fp32 and not spec.is_buffer:
                add("fp32", spec.dims, spec.layer)
        for state in self.axis_map.states:
            num_bytes = load.ssm_dtype_bytes if state.own_dtype else load.dtype_bytes
            num_bytes *= state.copies(load.context) * load.batch
            add(_STATE + state.name, state.dims, state.layer, num_bytes)
        for work in self.axis_map.work:
            add("work", work.dims, work.layer, work.flops * work.times(load.context))
        return [_Row(*key, count=count) for key, count in rows.items()]

    def at(self, workload: Workload) -> CostModel:
        """The same for another workload. A latency table goes on saying what it was measured at."""
        return CostModel(self.axis_map, workload, self._milliseconds)

    @cached_property
    def full(self) -> Cost:
        """The cost of the parent itself, of which budgets are fractions."""
        return self.count(self.axis_map.full)

    def count(self, widths: Mapping) -> Cost:
        """The cost at `widths` (integers, per-layer tuples, or tensors of expected widths)."""
        sums = self._sums(widths)
        memory = self._memory(sums)
        parameters = sums["weight"] + sums["head"] + sums["lookup"]
        used = sums["weight"] + sums["head"] + sums["routed_active"]
        return Cost(
            total=parameters + sums["routed"],
            active=parameters + sums["routed_active"],
            weight_bytes=memory.weight_bytes,
            state_bytes=memory.state_bytes,
            flops_per_token=2 * used + sums["work"],
            head_flops=2 * sums["head"],
            ms=self._milliseconds(widths, self.axis_map) if self._milliseconds else None,
        )

    def memory(self, widths: Mapping) -> Memory:
        """The bytes at `widths` (as `count` takes them), one by one."""
        return self._memory(self._sums(widths))

    def _memory(self, sums: Counter) -> Memory:
        load, kept = self.workload, sums["fp32"]
        parameters = sums["weight"] + sums["head"] + sums["lookup"] + sums["routed"]
        constants = sum(
            spec.size * (FP32_BYTES if spec.fp32 else load.dtype_bytes)
            for spec in self.axis_map.constants
        )
        return Memory(
            weights=(parameters - kept) * load.dtype_bytes,
            fp32_weights=kept * load.fp32_bytes,
            buffers=sums["buffer"] * load.fp32_bytes + constants,
            states={
                kind.removeprefix(_STATE): held
                for kind, held in sums.items()
                if kind.startswith(_STATE)
            },
        )

    def _sums(self, widths: Mapping) -> Counter:
        """Elements of all tensors and operations of all work, and bytes of all states, by kind."""
        merge = not any(isinstance(width, tuple) for width in widths.values())
        sums: Counter = Counter()
        for row in self._rows[merge]:
            size = row.count * row.scale
            if row.layer is not None:
                size = size * self._width(widths, LAYERS, row.layer)
            active = size
            for position, dim in enumerate(row.dims):
                length = sum(
                    (self._width(widths, s.axis, row.layer) if s.axis else s.num_units) * s.unit
                    for s in dim
                )
                size = size * length
                routed = row.kind == "routed" and position == 0
                active = active * (self._width(widths, TOP_K, row.layer) if routed else length)
            sums[row.kind] += size
            if row.kind == "routed":
                sums["routed_active"] += active
        return sums

    def _width(self, widths: Mapping, axis: str, layer: int | None):
        return self.axis_map.width(widths, axis, layer)


def _kind(spec: TensorSpec) -> str:
    """What a tensor counts as."""
    if spec.is_buffer:
        return "buffer"
    if spec.routed:
        return "routed"
    if spec.lookup:
        return "lookup"
    return "head" if spec.is_head else "weight"


def count_parts(axis_map: AxisMap, widths: Mapping) -> dict[str, int]:
    """Parameters of each part of the model (embeddings, norms, mamba, ...) at integer widths."""
    parts: Counter = Counter()
    there = axis_map.names_at(widths)
    for spec in axis_map.tensors.values():
        if not spec.is_buffer and spec.name in there:
            parts[spec.part] += math.prod(axis_map.shape(spec, widths))
    return dict(parts)
