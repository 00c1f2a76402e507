"""Law 2, the soft side: widths that have no weight need no computing, and gradients are right.

Gradients are held against central differences in float64, for the probabilities one by one and for
all parameters of the parent at once, along a random direction.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from star_elastic.models.elastic import ElasticModel
from star_elastic.nesting.gate import NEGLIGIBLE, Mixture, widest_slice
from tests.architectures import AXIS_CASES, ROWS
from tests.laws.parents import (
    Parent,
    assert_equal,
    each,
    examples,
    grids,
    parents,
    precision,
    sliced,
    some_widths,
)

STEP = 1e-5
"""Step of central differences; their error is about STEP squared."""


@st.composite
def soft(draw, grid, *, closed: bool = False) -> dict[str, Mixture]:
    """Random mixtures over a grid; `closed` takes all weight from the widest choice."""

    def mixture(choices):
        raw = draw(st.lists(st.floats(0.1, 1), min_size=len(choices), max_size=len(choices)))
        probs = torch.tensor(raw, dtype=torch.float64)
        if closed and len(choices) > 1:
            probs[0] = 0
        return Mixture(choices, probs / probs.sum())

    return each(grid, mixture)


def loss_of(parent: Parent, logits: torch.Tensor) -> torch.Tensor:
    """A scalar to which every logit contributes: next-token loss in nats per token."""
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), parent.ids[:, 1:].flatten()
    )


def central_difference(value: Callable[[float], torch.Tensor]) -> float:
    """d value(t) / dt at 0, of the fourth order: norms over two elements bend much."""
    with torch.no_grad():
        near, far = (value(step) - value(-step) for step in (STEP, 2 * STEP))
        return ((8 * near - far) / (12 * STEP)).item()


@pytest.mark.parametrize(("kind", "case"), AXIS_CASES)
@given(data=st.data())
@examples(4)
def test_choices_without_weight_need_no_computing(kind, case, data):
    parent = data.draw(parents(kind))
    grid = data.draw(grids(parent.axis_map, case))
    mixtures = data.draw(soft(grid, closed=True))
    elastic = ElasticModel(parent.model, parent.config).eval()
    second = each(grid, lambda choices: choices[:2][-1])
    assert widest_slice(mixtures, parent.axis_map) == parent.axis_map.complete(second)
    with torch.no_grad(), precision(torch.float64):
        narrow = elastic(mixtures, input_ids=parent.ids).logits
        full = elastic(mixtures, slice_at=parent.axis_map.full, input_ids=parent.ids).logits
    assert_equal(narrow, full)


@pytest.mark.parametrize(("kind", "case"), AXIS_CASES)
@given(data=st.data())
@examples(4)
def test_gradients_of_probabilities_equal_finite_differences(kind, case, data):
    parent = data.draw(parents(kind))
    grid = data.draw(grids(parent.axis_map, case))
    mixtures = data.draw(soft(grid))
    elastic = ElasticModel(parent.model, parent.config).eval()
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**20)))

    def loss(probs: dict[tuple[str, int], torch.Tensor]) -> torch.Tensor:
        size: dict = {}
        for name, mixture in mixtures.items():
            if isinstance(mixture, tuple):
                size[name] = tuple(
                    Mixture(m.choices, probs[name, i]) for i, m in enumerate(mixture)
                )
            else:
                size[name] = Mixture(mixture.choices, probs[name, 0])
        with precision(torch.float64):
            return loss_of(parent, elastic(size, input_ids=parent.ids).logits)

    probs = {
        (name, i): m.probs.clone().requires_grad_()
        for name, mixture in mixtures.items()
        for i, m in enumerate(mixture if isinstance(mixture, tuple) else (mixture,))
    }
    grads = torch.autograd.grad(
        loss(probs), list(probs.values()), allow_unused=True, materialize_grads=True
    )
    for (name, value), grad in zip(probs.items(), grads, strict=True):
        # One direction through all of its choices: no error of a gradient is at right angles to
        # a random one.
        moved = torch.randn(value.shape, generator=generator, dtype=value.dtype)
        expected = central_difference(
            lambda t, n=name, v=value, m=moved: loss({**probs, n: v + t * m})
        )
        assert (grad @ moved).item() == pytest.approx(expected, rel=1e-5, abs=1e-8), name
        # Weights renormalised over the experts of a token may cancel the gate of all of them.
        if name[0] not in ("experts", "top_k") and len(value) > 1:
            assert grad.abs().max() > 1e-9, f"{name} gives the router no gradient"


@pytest.mark.parametrize("gated", [False, True], ids=["sliced", "gated"])
@pytest.mark.parametrize("kind", ROWS)
@given(data=st.data())
@examples(6)
def test_gradients_reach_the_whole_parent(kind, gated, data):
    parent = data.draw(parents(kind))
    elastic = ElasticModel(parent.model, parent.config)
    if gated:
        size = data.draw(soft(data.draw(grids(parent.axis_map, "all"))))
    else:
        size = parent.axis_map.complete(data.draw(some_widths(parent.axis_map)))
    parameters = list(parent.model.parameters())
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**20)))
    direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]

    def move(step: float) -> None:
        with torch.no_grad():
            for parameter, change in zip(parameters, direction, strict=True):
                parameter += step * change

    def loss() -> torch.Tensor:
        with precision(torch.float64):
            return loss_of(parent, elastic(size, input_ids=parent.ids).logits)

    def loss_at(step: float) -> torch.Tensor:
        move(step)
        value = loss()
        move(-step)
        return value

    grads = torch.autograd.grad(loss(), parameters, allow_unused=True, materialize_grads=True)
    along = sum((g * d).sum().item() for g, d in zip(grads, direction, strict=True))
    assert along == pytest.approx(central_difference(loss_at), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("gated", [False, True], ids=["sliced", "gated"])
@pytest.mark.parametrize("kind", ROWS)
@given(data=st.data())
@examples(4)
def test_recomputing_changes_no_bit_of_a_gradient(kind, gated, data):
    parent = data.draw(parents(kind, torch.float32))
    if gated:
        size = data.draw(soft(data.draw(grids(parent.axis_map, "per layer"))))
    else:
        size = parent.axis_map.complete(data.draw(some_widths(parent.axis_map)))
    parameters = list(parent.model.parameters())
    found = []
    for recompute in (False, True):
        elastic = ElasticModel(parent.model, parent.config, recompute=recompute)
        loss = loss_of(parent, elastic(size, input_ids=parent.ids).logits)
        grads = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        found.append(grads)
    assert all(torch.equal(kept, again) for kept, again in zip(*found, strict=True))
    assert any(gradient.abs().max() > 0 for gradient in found[0])


@pytest.mark.parametrize("kind", ROWS)
@given(data=st.data())
def test_what_is_cut_off_gets_no_gradient(kind, data):
    parent = data.draw(parents(kind))
    widths = parent.axis_map.complete(data.draw(some_widths(parent.axis_map)))
    elastic = ElasticModel(parent.model, parent.config)
    with precision(torch.float64):
        loss_of(parent, elastic(widths, input_ids=parent.ids).logits).backward()
    there = parent.axis_map.names_at(widths)
    for name, parameter in parent.model.named_parameters():
        if name not in there:
            assert parameter.grad is None, name
            continue
        spec = parent.axis_map.tensors[name]
        kept = torch.zeros(parameter.shape)
        sliced(kept.requires_grad_(), spec, parent.axis_map, widths).sum().backward()
        assert kept.grad is not None and parameter.grad is not None
        assert parameter.grad[kept.grad == 0].eq(0).all(), name


# The mixture itself


def test_gates_are_a_staircase_repeated_in_each_group():
    mixture = Mixture((6, 4, 2), torch.tensor([0.5, 0.3, 0.2]))
    assert mixture.unit_gates(6).tolist() == pytest.approx([1, 1, 0.8, 0.8, 0.5, 0.5])
    assert mixture.unit_gates(6, 2).tolist() == pytest.approx([1, 0.8, 0.5] * 2)
    assert mixture.unit_gates(4, 2).tolist() == pytest.approx([1, 0.8] * 2)
    assert mixture.expected().item() == pytest.approx(4.6)


def test_norm_terms_are_relative_to_the_slice():
    mixture = Mixture((8, 4, 2), torch.tensor([0.0, 0.5, 0.5]))
    eps_factor, scale = mixture.norm_terms(8)
    assert eps_factor.item() == pytest.approx(0.5 * 4 / 8 + 0.5 * 2 / 8)
    assert scale.item() == pytest.approx(0.5 * (4 / 8) ** 0.5 + 0.5 * (2 / 8) ** 0.5)
    eps_factor, scale = mixture.norm_terms(4)
    assert eps_factor.item() == pytest.approx(0.5 + 0.5 * 2 / 4)
    assert scale.item() == pytest.approx(0.5 + 0.5 * (2 / 4) ** 0.5)


def test_widest_slice_leaves_out_negligible_choices():
    probs = torch.tensor([NEGLIGIBLE / 2, 1 - NEGLIGIBLE, NEGLIGIBLE / 2])
    assert Mixture((6, 4, 2), probs).widest() == 4
    assert Mixture((6, 4, 2), probs).widest(negligible=0.0) == 6
