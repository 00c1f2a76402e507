"""Law 4: what is counted is what is built, cost is monotone, and its gradient is exact."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from star_elastic.architectures import architecture_of, read_config
from star_elastic.axes import AxisMap
from star_elastic.axes.widths import Widths
from star_elastic.cost.count import METRICS as ALL_METRICS
from star_elastic.cost.count import CostModel, Workload, count_parts
from star_elastic.errors import BudgetError
from star_elastic.models.load import load_parent
from star_elastic.models.skeleton import build_skeleton
from star_elastic.rewrite.stream import save_model, slice_checkpoint
from tests.architectures import ROWS, configs, fixed_config
from tests.laws.parents import examples, legal_widths, parents, some_widths
from tests.memory import cache_bytes

METRICS = tuple(metric for metric in ALL_METRICS if metric != "ms")
"""What is counted; milliseconds are measured (test_latency.py)."""

NANO_30B = {
    "model_type": "nemotron_h",
    "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    "vocab_size": 131072,
    "hidden_size": 2688,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "mamba_num_heads": 64,
    "mamba_head_dim": 64,
    "n_groups": 8,
    "ssm_state_size": 128,
    "conv_kernel": 4,
    "n_routed_experts": 128,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 1856,
    "moe_shared_expert_intermediate_size": 3712,
    "layer_norm_epsilon": 1e-5,
}
"""The shape of Nemotron 3 Nano 30B-A3B."""


def table(config: dict) -> AxisMap:
    return architecture_of(config).axis_map(config)


@pytest.mark.parametrize("kind", ROWS)
@given(data=st.data())
@examples(20)
def test_counted_is_built(kind, data):
    """Parameters and active parameters against the model that transformers builds."""
    config = data.draw(configs(kind))
    axis_map = table(config)
    widths = axis_map.complete(data.draw(some_widths(axis_map)))
    cost = CostModel(axis_map).count(widths)
    model = build_skeleton(architecture_of(config).config_at(config, widths))
    total = sum(parameter.numel() for parameter in model.parameters())
    active = total
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            unused = parameter.shape[0] - model.config.num_experts_per_tok
            active -= unused * parameter[0].numel()
    assert (cost.total, cost.active) == (total, active)
    assert sum(count_parts(axis_map, widths).values()) == total
    assert all(isinstance(value, int) for value in (cost.total, cost.active, cost.bytes))


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@given(data=st.data())
@examples(6)
def test_counted_bytes_are_those_of_the_loaded_model(kind, dtype, data):
    """Every slice as it is loaded from disk, and its cache when a batch has been read up to the
    context: parameters by dtype, buffers that no file holds, and every kind of state."""
    parent = data.draw(parents(kind, torch.float32))
    widths = parent.axis_map.complete(data.draw(some_widths(parent.axis_map)))
    batch, context = parent.ids.shape
    load = Workload(context=context, batch=batch, dtype_bytes=dtype.itemsize)
    memory = CostModel(parent.axis_map, load).memory(widths)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        save_model(parent.state, parent.config, root, root / "parent", dtype=dtype)
        slice_checkpoint(root / "parent", widths, root / "slice")
        model, _ = load_parent(root / "slice", dtype)
        held: Counter = Counter()
        for name, parameter in model.named_parameters():
            kept = name.endswith("gate.weight") and kind == "moe"  # routers of sigmoids
            held["fp32" if kept else "own"] += parameter.nbytes
        buffers = sum(buffer.nbytes for buffer in model.buffers())
        assert (memory.weights, memory.fp32_weights) == (held["own"], held["fp32"])
        own = read_config(root / "slice").axis_map
        assert CostModel(own, load).memory(own.full).buffers == buffers
        # Layers of one kind alone need one table of positions where the parent has two.
        assert memory.buffers == buffers or own.constants != parent.axis_map.constants
        # As a program reads a long prompt: most at once, the rest token by token.
        first, *rest = parent.ids.split([context - 2, 1, 1], dim=1)
        with torch.no_grad():
            cache = model(input_ids=first, use_cache=True).cache
            for ids in rest:
                cache = model(input_ids=ids, cache=cache, use_cache=True).cache
        assert memory.state_bytes == cache_bytes(cache)
    cost = CostModel(parent.axis_map, load).count(widths)
    assert (memory.weight_bytes, memory.state_bytes) == (cost.weight_bytes, cost.state_bytes)
    assert memory.total == cost.bytes


@pytest.mark.parametrize("scaling", ["default", "linear", "dynamic", "yarn", "llama3"])
def test_rotary_frequencies_are_counted(scaling):
    more = {"linear": {"factor": 2.0}, "dynamic": {"factor": 2.0}, "yarn": {"factor": 2.0},
            "llama3": {"factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                       "original_max_position_embeddings": 64}}  # fmt: skip
    rope = {"rope_type": scaling, "rope_theta": 1e4, **more.get(scaling, {})}
    for kind in ("llama", "qwen3"):
        config = {**fixed_config(kind), "rope_parameters": rope, "max_position_embeddings": 128}
        model = build_skeleton(config)
        held = sum(buffer.nbytes for buffer in model.buffers())
        axis_map = table(config)
        assert CostModel(axis_map).memory(axis_map.full).buffers == held > 0


@pytest.mark.parametrize("kind", ROWS)
@given(data=st.data())
@examples(20)
def test_cost_is_monotone_in_every_axis(kind, data):
    axis_map = table(data.draw(configs(kind)))
    model = CostModel(axis_map, Workload(context=100))
    widths = data.draw(some_widths(axis_map))
    there = widths.pop("layers")
    without, with_it = (
        model.count(axis_map.complete({**widths, "layers": mask}))
        for mask in (there, tuple(max(a, b) for a, b in zip(there, (1,) * len(there), strict=True)))
    )
    assert all(without.metric(metric) <= with_it.metric(metric) for metric in METRICS)
    assert without.total < with_it.total
    for axis in axis_map.axes:
        counts = [
            model.count(axis_map.full.replace(**{**widths, axis: width}))
            for width in legal_widths(axis_map, axis)
        ]
        for metric in METRICS:
            values = [cost.metric(metric) for cost in counts]
            assert values == sorted(values), (axis, metric)
        totals = [cost.active if axis == "top_k" else cost.total for cost in counts]
        assert len(set(totals)) == len(totals), axis


@pytest.mark.parametrize("kind", ROWS)
@given(data=st.data())
@examples(20)
def test_expected_cost_is_exact_and_differentiable(kind, data):
    """Tensors give the integers' counts; gradients equal central differences."""
    axis_map = table(data.draw(configs(kind)))
    model = CostModel(axis_map, Workload(context=7, batch=3))
    widths = axis_map.complete(data.draw(some_widths(axis_map)))
    tensors = {
        name: torch.tensor(float(width), dtype=torch.float64, requires_grad=True)
        for name, width in widths.items()
        if name != "layers"
    }
    presence = [torch.tensor(float(w), requires_grad=True) for w in widths["layers"]]
    tensors["layers"] = tuple(presence)
    counted, expected = model.count(tensors), model.count(widths)
    for metric in METRICS:
        value = counted.metric(metric)
        assert value.item() == expected.metric(metric)
        *grads, of_first = torch.autograd.grad(
            value,
            [*(t for t in tensors.values() if not isinstance(t, tuple)), presence[0]],
            retain_graph=True,
            allow_unused=True,
        )
        with_first, without_first = (
            model.count({**widths, "layers": (there, *widths["layers"][1:])}).metric(metric)
            for there in (1, 0)
        )
        assert of_first.item() == pytest.approx(with_first - without_first)
        for name, grad in zip(tensors, grads, strict=False):
            # Costs are at most quadratic in one width, so a step of 1 leaves no error.
            up, down = (
                model.count({**widths, name: widths[name] + step}).metric(metric)
                for step in (1, -1)
            )
            assert (0.0 if grad is None else grad.item()) == pytest.approx((up - down) / 2), name


@pytest.mark.parametrize("kind", ROWS)
@given(data=st.data())
def test_one_width_per_layer_counts_layer_by_layer(kind, data):
    axis_map = table(data.draw(configs(kind)))
    model = CostModel(axis_map, Workload(context=5))
    widths = axis_map.complete(data.draw(some_widths(axis_map)))
    spread = {
        name: width
        if axis_map.axes[name].is_global or name == "layers"
        else (width,) * len(axis_map.axes[name].layers)
        for name, width in widths.items()
    }
    assert model.count(Widths(spread)) == model.count(widths)
    assert axis_map.complete(spread) == widths
    # Narrowing one layer of the only axis in two steps costs the same as in one.
    for name, axis in axis_map.axes.items():
        if len(axis.layers) < 2 or not axis.ranked:
            continue
        full, narrow = axis.size, legal_widths(axis_map, name)[0]
        mixed = (narrow,) + (full,) * (len(axis.layers) - 1)
        saved = [
            model.count(axis_map.full).total
            - model.count(axis_map.full.replace(**{name: kept})).total
            for kept in (mixed, narrow)
        ]
        assert saved[1] == saved[0] * len(axis.layers)


def test_nemotron_3_nano_30b():
    """31.6B parameters of which a token uses 3.6B, as built by transformers and as published."""
    axis_map = table(NANO_30B)
    cost = CostModel(axis_map).full
    assert (cost.total, cost.active) == (31_577_937_344, 3_580_073_408)
    model = build_skeleton(NANO_30B)
    assert sum(parameter.numel() for parameter in model.parameters()) == cost.total
    # Two bytes a parameter, two more for the routers of 23 layers, which stay in fp32, as does the
    # correction bias of their 128 experts.
    assert cost.weight_bytes == 2 * 31_577_937_344 + 23 * 128 * (2 * 2688 + 4)


def test_formulas_by_hand():
    """The counts of the paper's formulas, written out once more without the table."""
    c = NANO_30B
    d, heads, kv, dh = 2688, 32, 2, 128
    n, p, g, s, k = 64, 64, 8, 128, 4
    attention = d + (heads + 2 * kv) * dh * d + heads * dh * d
    conv = n * p + 2 * g * s
    mamba = d + d * (2 * n * p + 2 * g * s + n) + (k + 1) * conv + 3 * n + n * p + n * p * d

    def moe(experts: int) -> int:
        return d + 128 * d + 2 * 1856 * d * experts + 2 * 3712 * d

    rest = 2 * c["vocab_size"] * d + d + 23 * mamba + 6 * attention
    cost = CostModel(table(c), Workload(context=1000, batch=2)).count(table(c).full)
    assert cost.total == rest + 23 * moe(128)
    assert cost.active == rest + 23 * moe(6)
    assert cost.state_bytes == 2 * (
        6 * 2 * kv * dh * 2 * 1000 + 23 * (n * p * s * 4 + conv * k * 2)
    )
    # Two operations per active parameter; the embedding table is looked up, not multiplied.
    used = cost.active - c["vocab_size"] * d
    assert cost.flops_per_token == 2 * used + 23 * 5 * n * p * s + 6 * 4 * heads * dh * 1000


def test_tied_embeddings_are_counted_once():
    config = fixed_config("llama")
    tied, untied = table(config), table({**config, "tie_word_embeddings": False})
    difference = CostModel(untied).count(untied.full).total - CostModel(tied).count(tied.full).total
    assert difference == config["vocab_size"] * config["hidden_size"]
    # Either way the head is multiplied once per token.
    flops = {CostModel(m).count(m.full).flops_per_token for m in (tied, untied)}
    assert len(flops) == 1


def test_unknown_budget_is_refused():
    axis_map = table(fixed_config("dense"))
    with pytest.raises(BudgetError, match="budget 'speed' is unknown; use active, total, bytes"):
        CostModel(axis_map).full.metric("speed")
