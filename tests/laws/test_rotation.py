"""Law 1 for bases: the residual stream in another orthonormal basis computes the same."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from star_elastic.architectures import architecture_of
from star_elastic.errors import ConfigError, ShapeError
from star_elastic.importance.basis import principal_basis
from star_elastic.models.submodel import build_submodel, sort_in_place
from star_elastic.nesting.rotate import check_rotatable, readers, rotate_state
from star_elastic.rewrite.stream import slice_checkpoint
from tests.architectures import ROWS, fixed_config
from tests.laws.parents import (
    Parent,
    assert_equal,
    build,
    make_parent,
    parents,
    precision,
    relative_error,
    reload,
    some_widths,
)

SEEDS = st.integers(0, 2**20)


def random_basis(size: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]


def rotated(parent: Parent, seed: int) -> dict[str, torch.Tensor]:
    basis = random_basis(parent.axis_map.axes["hidden"].size, seed)
    return rotate_state(parent.state, parent.axis_map, basis)


ROTATED = [kind for kind in ROWS if not any(norm.writes for norm in ROWS[kind].axis_map.norms)]
"""Kinds of parents whose norms all stand before a block."""


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("kind", ROTATED)
@given(data=st.data(), seed=SEEDS)
def test_rotated_parent_computes_the_same(kind, dtype, data, seed):
    parent = data.draw(parents(kind, dtype))
    assume(not parent.config.get("tie_word_embeddings"))
    state = rotated(parent, seed)
    model = build(parent.config, dtype)
    model.load_state_dict(state, strict=False)
    assert any(not torch.equal(state[name], parent.state[name]) for name in state)
    with torch.no_grad(), precision(dtype):
        expected = parent.model(input_ids=parent.ids).logits
        assert_equal(model(input_ids=parent.ids).logits, expected)


@pytest.mark.parametrize("kind", ROTATED)
@given(data=st.data(), seed=SEEDS)
def test_slice_of_a_rotated_parent_is_an_ordinary_checkpoint(kind, data, seed):
    parent = data.draw(parents(kind))
    assume(not parent.config.get("tie_word_embeddings"))
    basis = random_basis(parent.axis_map.axes["hidden"].size, seed)
    with torch.no_grad(), precision(torch.float64):
        before = parent.model(input_ids=parent.ids).logits
        sort_in_place(parent.model, parent.axis_map, parent.orders(seed), basis)
        assert_equal(parent.model(input_ids=parent.ids).logits, before)
    widths = parent.axis_map.complete(data.draw(some_widths(parent.axis_map)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "slice"
        slice_checkpoint(parent.save(Path(folder)), widths, path)
        saved = reload(path, torch.float64)
    with torch.no_grad(), precision(torch.float64):
        submodel = build_submodel(parent.model, parent.config, widths)
        expected = submodel(input_ids=parent.ids).logits
        assert_equal(saved(input_ids=parent.ids).logits, expected)


def test_every_norm_of_the_stream_has_readers():
    for kind in ROWS:
        config = {**fixed_config(kind), "tie_word_embeddings": False}
        axis_map = architecture_of(config).axis_map(config)
        for norm in axis_map.norms:
            assert (norm.axis == "hidden") == bool(norm.reader or norm.writes)
            assert not norm.reader or readers(axis_map, norm.reader), norm
        read = [s.name for n in axis_map.norms if n.reader for s in readers(axis_map, n.reader)]
        assert len(read) == len(set(read))


def test_leaving_a_norm_weight_unfolded_would_be_visible():
    """Folding is needed: with the norm weights left where they are, the law fails by far."""
    parent = make_parent(fixed_config("dense"), 0, torch.float64)
    state = rotated(parent, 0)
    for norm in parent.axis_map.norms:
        if norm.axis == "hidden":
            state[f"{norm.path}.weight"] = parent.state[f"{norm.path}.weight"]
    model = build(parent.config, torch.float64)
    model.load_state_dict(state, strict=False)
    with torch.no_grad(), precision(torch.float64):
        expected = parent.model(input_ids=parent.ids).logits
        assert relative_error(model(input_ids=parent.ids).logits, expected) > 1e-3


def test_principal_basis_finds_the_subspace_that_the_stream_lives_in():
    parent = make_parent(fixed_config("dense"), 0, torch.float64)
    size = parent.axis_map.axes["hidden"].size
    kept = size // 2
    with torch.no_grad():
        for name, spec in parent.axis_map.tensors.items():
            if spec.lookup:
                parent.state[name][:, kept:] = 0
            elif spec.axis_of(0) == "hidden" and spec.part != "norms":
                parent.state[name][kept:] = 0
    basis = random_basis(size, 1)
    sort_in_place(parent.model, parent.axis_map, {}, basis)
    ids = parent.ids
    with precision(torch.float64):
        found = principal_basis(parent.model, parent.axis_map, [(ids, torch.ones_like(ids))])
    assert torch.allclose(found.mT @ found, torch.eye(size, dtype=torch.float64), atol=1e-12)
    state = rotate_state(parent.state, parent.axis_map, found)
    for name, spec in parent.axis_map.tensors.items():
        if spec.lookup:
            assert state[name][:, kept:].abs().max() < 1e-8 < state[name][:, :kept].abs().max()


def test_every_token_and_norm_weighs_the_same_in_the_principal_basis():
    """However large the stream is there: in plain code, the second moment of unit vectors."""
    parent = make_parent(fixed_config("dense"), 0, torch.float64)
    mask = torch.ones_like(parent.ids)
    mask[0, 5:] = 0
    seen = []
    for norm in parent.axis_map.norms:
        if norm.axis == "hidden":
            module = parent.model.get_submodule(norm.path)
            module.register_forward_pre_hook(lambda _, args: seen.append(args[0][mask.bool()]))
    with precision(torch.float64):
        found = principal_basis(parent.model, parent.axis_map, [(parent.ids, mask)])
    units = [x / x.norm(dim=-1, keepdim=True) for x in seen]
    assert max(x.norm(dim=-1).max() for x in seen) > 2 * min(x.norm(dim=-1).min() for x in seen)
    moment = found.mT @ sum(x.mT @ x for x in units) @ found
    strengths = moment.diagonal()
    assert (moment - strengths.diag()).abs().max() < 1e-10 * strengths[0]
    assert (strengths.diff() < 1e-10).all()


def test_what_cannot_be_rotated_is_refused():
    tied = fixed_config("llama")
    assert tied["tie_word_embeddings"]
    with pytest.raises(ShapeError, match=r"tied embedding.*use calibration\.basis = .channels."):
        check_rotatable(architecture_of(tied).axis_map(tied))
    behind = {**fixed_config("gemma3_text"), "tie_word_embeddings": False}
    with pytest.raises(ShapeError, match=r"stand behind a block.*calibration\.basis = .channels."):
        check_rotatable(architecture_of(behind).axis_map(behind))
    parent = make_parent(fixed_config("dense"), 0, torch.float64)
    size = parent.axis_map.axes["hidden"].size
    for wrong in (2 * torch.eye(size), torch.eye(size + 1)):
        with pytest.raises(ShapeError, match="not orthonormal over"):
            rotate_state(parent.state, parent.axis_map, wrong)
    nothing = torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(ConfigError, match="no tokens"):
        principal_basis(parent.model, parent.axis_map, [(nothing, nothing)])
