"""Laws 2, 3 and 9: all roads to a size agree, slices nest, and full width is the parent."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from star_elastic.architectures import architecture_of, read_config
from star_elastic.axes import AxisMap, TensorSpec
from star_elastic.checkpoints.tensors import CheckpointReader
from star_elastic.models.elastic import ElasticModel
from star_elastic.models.submodel import build_submodel
from star_elastic.nesting.gate import Mixture
from star_elastic.rewrite.stream import slice_checkpoint
from tests.architectures import AXIS_CASES, ROWS, configs, fixed_config
from tests.laws.parents import (
    Parent,
    assert_equal,
    each,
    examples,
    grids,
    make_parent,
    one_hot,
    parents,
    precision,
    relative_error,
    reload,
    sliced,
    some_widths,
)


def roads(parent: Parent, grid, widths, dtype) -> dict[str, torch.Tensor]:
    """Logits of one size by every road: gated at two widths, sliced three ways, and reloaded."""
    elastic = ElasticModel(parent.model, parent.config).eval()
    complete = parent.axis_map.complete(widths)
    mixtures = one_hot(grid, widths, dtype)
    ids = parent.ids
    exported = {}
    if not any(isinstance(w, tuple) for name, w in complete.items() if name != "layers"):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "slice"
            slice_checkpoint(parent.save(Path(folder)), widths, out)
            model = reload(out, dtype)
        with torch.no_grad(), precision(dtype):
            exported["plain transformers on the saved slice"] = model(input_ids=ids).logits
    with torch.no_grad(), precision(dtype):
        submodel = build_submodel(parent.model, parent.config, widths)
        return {
            **exported,
            "submodel of views": submodel(input_ids=ids).logits,
            "functional slice": elastic(complete, input_ids=ids).logits,
            "gated at the widest slice": elastic(mixtures, input_ids=ids).logits,
            "gated at full width": elastic(
                mixtures, slice_at=parent.axis_map.full, input_ids=ids
            ).logits,
        }


@pytest.mark.parametrize(("kind", "case"), AXIS_CASES)
@given(data=st.data(), dtype=st.sampled_from([torch.float64, torch.float32]))
@examples(6)
def test_all_roads_to_a_size_agree(kind, case, dtype, data):
    parent = data.draw(parents(kind, dtype))
    grid = data.draw(grids(parent.axis_map, case))
    widths = each(grid, lambda choices: data.draw(st.sampled_from(choices[1:] or choices)))
    logits = roads(parent, grid, widths, dtype)
    expected = logits.pop("submodel of views")
    for road, result in logits.items():
        assert_equal(result, expected, what=road)
    with torch.no_grad(), precision(dtype):
        parent_logits = parent.model(input_ids=parent.ids).logits
    # Experts that no token was routed to may go unnoticed.
    cut = parent.axis_map.complete(widths) != parent.axis_map.full
    if cut and case != "experts":
        assert relative_error(parent_logits, expected) > 1e-6, "nothing was cut"


@pytest.mark.parametrize(
    ("kind", "case"), [(kind, case) for kind in ROWS for case in ("all", "per layer")]
)
@given(data=st.data())
@examples(6)
def test_decoding_with_a_cache_equals_computing_anew(kind, case, data):
    parent = data.draw(parents(kind))
    grid = data.draw(grids(parent.axis_map, case))
    widths = each(grid, lambda choices: data.draw(st.sampled_from(choices)))
    submodel = build_submodel(parent.model, parent.config, widths)
    ids, start = parent.ids, parent.ids.shape[1] // 2
    with torch.no_grad(), precision(torch.float64):
        expected = submodel(input_ids=ids, use_cache=False).logits
        output = submodel(input_ids=ids[:, :start], use_cache=True)
        cached = [output.logits]
        for token in ids[:, start:].split(1, dim=1):
            output = submodel(input_ids=token, cache=output.cache, use_cache=True)
            cached.append(output.logits)
    assert_equal(torch.cat(cached, dim=1), expected, what="cached")


@pytest.mark.parametrize("kind", ROWS)
@given(data=st.data())
@examples(6)
def test_full_widths_are_the_parent_bit_for_bit(kind, data):
    parent = data.draw(parents(kind))
    full = parent.axis_map.full
    elastic = ElasticModel(parent.model, parent.config).eval()
    with tempfile.TemporaryDirectory() as folder:
        source, out = parent.save(Path(folder)), Path(folder) / "full"
        slice_checkpoint(source, {}, out)
        before, after = (load_file(path / "model.safetensors") for path in (source, out))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name
    with torch.no_grad(), precision(torch.float64):
        expected = parent.model(input_ids=parent.ids).logits
        submodel = build_submodel(parent.model, parent.config, full)
        assert torch.equal(elastic(full, input_ids=parent.ids).logits, expected)
        assert torch.equal(submodel(input_ids=parent.ids).logits, expected)
        mixtures = one_hot({name: (width,) for name, width in full.items()}, full)
        del mixtures["layers"]
        assert_equal(elastic(mixtures, input_ids=parent.ids).logits, expected, what="gated")
        assert_equal(elastic({}, input_ids=parent.ids).logits, expected, what="no axis gated")


@given(data=st.data())
def test_views_share_the_memory_of_the_parent(data):
    """Whatever is one prefix of each dimension is a view; only grouped cuts are gathered."""
    parent = data.draw(parents("moe"))
    widths = data.draw(some_widths(parent.axis_map, "hidden"))
    submodel = build_submodel(parent.model, parent.config, widths)
    for name, value in submodel.named_parameters():
        assert value.data_ptr() == parent.state[name].data_ptr(), name


# Law 3


def filled(spec: TensorSpec, axis_map: AxisMap) -> torch.Tensor:
    """A full-width tensor whose elements are all different."""
    shape = axis_map.shape(spec, axis_map.full)
    return torch.arange(torch.Size(shape).numel()).reshape(shape)


def narrower(axis_map: AxisMap, wide, other) -> tuple[dict, dict]:
    """A size inside `wide`, legal in both tables: its widths in the parent's and in `wide`'s."""
    narrow = {name: min(width, wide[name]) for name, width in other.items() if name != "layers"}
    kept = axis_map.kept_layers(axis_map.complete(wide))
    both = tuple(
        int(layer in kept and other["layers"][layer]) for layer in range(len(wide["layers"]))
    )
    narrow["layers"] = both if any(both) else wide["layers"]
    middle = axis_map.at(wide)
    inner = {name: width for name, width in narrow.items() if name in middle.axes}
    inner["layers"] = tuple(narrow["layers"][layer] for layer in kept)
    return narrow, inner


@pytest.mark.parametrize("kind", ROWS)
@given(data=st.data())
@examples(40)
def test_slices_nest_and_tables_agree(kind, data):
    config = data.draw(configs(kind))
    architecture = architecture_of(config)
    axis_map = architecture.axis_map(config)
    wide = data.draw(some_widths(axis_map))
    middle = axis_map.at(wide)
    smaller = architecture.axis_map(architecture.config_at(config, wide))
    assert but_constants(smaller) == but_constants(middle)
    narrow, narrow_in_middle = narrower(axis_map, wide, data.draw(some_widths(axis_map)))
    direct, inner = axis_map.complete(narrow), middle.complete(narrow_in_middle)
    twice_cut = architecture.config_at(architecture.config_at(config, wide), narrow_in_middle)
    assert but_constants(architecture.axis_map(twice_cut)) == but_constants(axis_map.at(narrow))
    names, inner_names = axis_map.names_at(wide), middle.names_at(inner)
    assert {n: inner_names[m] for n, m in names.items() if m in inner_names} == (
        axis_map.names_at(narrow)
    )
    for name, new in names.items():
        spec = axis_map.tensors[name]
        tensor = filled(spec, axis_map)
        once = sliced(tensor, spec, axis_map, axis_map.complete(wide))
        assert once.shape == middle.shape(middle.tensors[new], middle.full), name
        if new in inner_names:
            twice = sliced(once, middle.tensors[new], middle, inner)
            assert torch.equal(twice, sliced(tensor, spec, axis_map, direct)), name


def but_constants(axis_map: AxisMap) -> AxisMap:
    """A table without the tables of positions, of which a model whose layers are of one kind needs
    one where its parent has two."""
    return replace(axis_map, before=replace(axis_map.before, constants=()))


@pytest.mark.parametrize("kind", ROWS)
@given(data=st.data())
def test_slices_nest_on_disk(kind, data):
    parent = data.draw(parents(kind))
    wide, other = (data.draw(some_widths(parent.axis_map)) for _ in range(2))
    narrow, narrow_in_wide = narrower(parent.axis_map, wide, other)
    with tempfile.TemporaryDirectory() as folder:
        source, root = parent.save(Path(folder)), Path(folder)
        slice_checkpoint(source, narrow, root / "direct")
        slice_checkpoint(source, wide, root / "wide")
        slice_checkpoint(root / "wide", narrow_in_wide, root / "nested")
        tables = [
            parent.architecture.axis_map(read_config(root / name)) for name in ("direct", "nested")
        ]
        assert tables[0] == tables[1]
        direct, nested = (CheckpointReader(root / name) for name in ("direct", "nested"))
        assert direct.names == nested.names
        follows = {
            piece.name
            for spec in parent.axis_map.tensors.values()
            for piece in spec.pieces
            if spec.follows
        }
        for name in direct.names:
            once, twice = direct.read(name), nested.read(name)
            if name in follows:  # multiplied twice
                assert torch.allclose(once, twice, rtol=1e-14, atol=1e-14), name
            else:
                assert torch.equal(once, twice), name


# Wrong turns that the laws must catch


class Uncorrected(Mixture):
    """Gates a norm's input but leaves its epsilon and scale as they are."""

    def norm_terms(self, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.probs.sum(), self.probs.sum()


def ungrouped(axis_map: AxisMap) -> AxisMap:
    """The table with Mamba heads cut as one prefix instead of inside each SSM group."""

    def flatten(specs: tuple) -> tuple:
        return tuple(
            replace(
                spec,
                dims=tuple(
                    tuple(replace(s, num_groups=1) if s.axis == "ssm_heads" else s for s in dim)
                    for dim in spec.dims
                ),
            )
            for spec in specs
        )

    axes = dict(axis_map.axes)
    axes["ssm_heads"] = replace(axes["ssm_heads"], num_groups=1)
    blocks = tuple(
        replace(block, tensors=flatten(block.tensors), norms=flatten(block.norms))
        for block in axis_map.blocks
    )
    return replace(axis_map, axes=axes, blocks=blocks)


def gap(parent: Parent, elastic: ElasticModel, mixtures, widths) -> float:
    """How far the gated forward at full width is from the sliced forward of the same table."""
    with torch.no_grad(), precision(torch.float64):
        expected = elastic(parent.axis_map.complete(widths), input_ids=parent.ids)
        gated = elastic(mixtures, slice_at=parent.axis_map.full, input_ids=parent.ids)
    return relative_error(gated.logits, expected.logits)


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_an_ungrouped_mamba_prefix_breaks_the_law(kind):
    parent = make_parent(fixed_config(kind), 1, torch.float64)
    elastic = ElasticModel(parent.model, parent.config).eval()
    widths, grid = {"ssm_heads": 4}, {"ssm_heads": (6, 4)}
    mixtures = one_hot(grid, widths)
    assert gap(parent, elastic, mixtures, widths) < 1e-12
    elastic = ElasticModel(parent.model, parent.config, axis_map=ungrouped(parent.axis_map)).eval()
    assert gap(parent, elastic, mixtures, widths) > 1e-3


@pytest.mark.parametrize(
    ("kind", "axis"), [("dense", "hidden"), ("moe", "ssm_heads"), ("llama", "hidden")]
)
def test_an_uncorrected_norm_breaks_the_law(kind, axis):
    parent = make_parent(fixed_config(kind), 2, torch.float64)
    elastic = ElasticModel(parent.model, parent.config).eval()
    size = parent.axis_map.axes[axis].size
    width = max(w for w in range(1, size) if size % w == 0 and w % 2 == 0)
    mixtures = one_hot({axis: (size, width)}, {axis: width})
    assert gap(parent, elastic, mixtures, {axis: width}) < 1e-12
    wrong = {axis: Uncorrected(mixtures[axis].choices, mixtures[axis].probs)}
    assert gap(parent, elastic, wrong, {axis: width}) > 1e-3


@pytest.mark.parametrize("kind", ROWS)
def test_an_unmasked_final_norm_breaks_the_law(kind):
    parent = make_parent(fixed_config(kind), 3, torch.float64)
    elastic = ElasticModel(parent.model, parent.config).eval()
    size = parent.axis_map.axes["hidden"].size
    mixtures = one_hot({"hidden": (size, size // 2)}, {"hidden": size // 2})
    assert gap(parent, elastic, mixtures, {"hidden": size // 2}) < 1e-12
    unmasked = replace(parent.axis_map, after=replace(parent.axis_map.after, norms=()))
    elastic = ElasticModel(parent.model, parent.config, axis_map=unmasked).eval()
    assert gap(parent, elastic, mixtures, {"hidden": size // 2}) > 1e-3
