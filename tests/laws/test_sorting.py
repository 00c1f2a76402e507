"""Law 1: sorting is invisible. Logits of the sorted parent equal the parent's."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from star_elastic.architectures import architecture_of
from star_elastic.errors import ShapeError
from star_elastic.nesting.slice import check_orders, orders_of, sort_state, sort_tensor
from star_elastic.rewrite.stream import sort_checkpoint
from tests.architectures import ROWS, SHARED_CASES, fixed_config
from tests.laws.parents import (
    assert_equal,
    build,
    make_parent,
    parents,
    precision,
    relative_error,
    reload,
)

SEEDS = st.integers(0, 2**20)


@pytest.mark.parametrize(
    ("kind", "case"), [(k, c) for k, c in SHARED_CASES if c not in ("layers", "top_k")]
)
@given(data=st.data(), seed=SEEDS, dtype=st.sampled_from([torch.float64, torch.float32]))
def test_sorted_parent_computes_the_same(kind, case, dtype, data, seed):
    parent = data.draw(parents(kind, dtype))
    orders = parent.orders(seed)
    if case != "all":
        orders = {key: order for key, order in orders.items() if key.endswith(case)}
    state = sort_state(parent.state, parent.axis_map, orders)
    model = build(parent.config, dtype)
    model.load_state_dict(state, strict=False)
    with torch.no_grad(), precision(dtype):
        expected = parent.model(input_ids=parent.ids).logits
        assert_equal(model(input_ids=parent.ids).logits, expected)


@pytest.mark.parametrize("kind", ROWS)
@given(data=st.data(), seed=SEEDS)
def test_sorted_checkpoint_computes_the_same(kind, data, seed):
    parent = data.draw(parents(kind))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "sorted"
        sort_checkpoint(parent.save(Path(folder)), parent.orders(seed), out)
        model = reload(out, torch.float64)
    with torch.no_grad(), precision(torch.float64):
        expected = parent.model(input_ids=parent.ids).logits
        assert_equal(model(input_ids=parent.ids).logits, expected)


@pytest.mark.parametrize("kind", ROWS)
@given(data=st.data(), seed=SEEDS)
def test_inverse_order_restores_every_bit(kind, data, seed):
    parent = data.draw(parents(kind))
    orders = parent.orders(seed)
    back = {key: order.argsort() for key, order in orders.items()}
    there = sort_state(parent.state, parent.axis_map, orders)
    again = sort_state(there, parent.axis_map, back)
    for name in parent.axis_map.tensors:
        assert torch.equal(again[name], parent.state[name]), name


def test_moving_heads_between_groups_would_be_visible():
    """The rule that orders stay inside the groups is needed: broken, the law fails by far."""
    parent = make_parent(fixed_config("dense"), 0, torch.float64)
    axis = parent.axis_map.axes["ssm_heads"]
    orders = {f"layers.{axis.layers[0]}.ssm_heads": torch.arange(axis.size).roll(1)}
    with pytest.raises(ShapeError, match="moves units between the 2 groups of ssm_heads"):
        sort_state(parent.state, parent.axis_map, orders)
    model = build(parent.config, torch.float64)
    model.load_state_dict(
        {
            name: sort_tensor(
                parent.state[name], spec.dims, orders_of(spec.layer, parent.axis_map, orders)
            )
            for name, spec in parent.axis_map.tensors.items()
        },
        strict=False,
    )
    with torch.no_grad(), precision(torch.float64):
        expected = parent.model(input_ids=parent.ids).logits
        assert relative_error(model(input_ids=parent.ids).logits, expected) > 1e-3


@pytest.mark.parametrize(
    ("key", "order", "reason"),
    [
        ("ffn", torch.arange(7), "order 'ffn' belongs to no axis of this nemotron_h model"),
        ("hidden", torch.zeros(12, dtype=torch.int64), "'hidden' is not a permutation of 12"),
        ("hidden", torch.arange(11), "'hidden' is not a permutation of 12 units"),
    ],
)
def test_wrong_orders_are_refused(key, order, reason):
    config = fixed_config("dense")
    with pytest.raises(ShapeError, match=reason):
        check_orders({key: order}, architecture_of(config).axis_map(config))
