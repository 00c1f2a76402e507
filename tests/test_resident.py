"""One copy of the weights for all sizes: views in nested order, mapped files, honest counts."""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

import star_elastic
from star_elastic.axes import Segment
from star_elastic.axes.dims import runs
from star_elastic.axes.widths import Widths
from star_elastic.checkpoints.manifest import Manifest, Size, save_manifest
from star_elastic.checkpoints.tensors import save_tensors
from star_elastic.cost.count import CostModel
from star_elastic.generate.family import ElasticFamily
from star_elastic.models.linear import NestedLinear
from star_elastic.models.load import load_parent
from star_elastic.models.resident import count_resident, nest_in_place, nested_names
from star_elastic.models.submodel import build_submodel
from star_elastic.nesting.order import layout_of, nest
from star_elastic.rewrite.stream import slice_checkpoint
from star_elastic.router.grid import make_grid
from star_elastic.router.router import Router
from tests.architectures import AXIS_CASES, DISTINCT, ROWS, configs, fixed_config
from tests.laws.parents import (
    Parent,
    assert_equal,
    assert_stored,
    each,
    examples,
    grids,
    make_parent,
    parents,
    precision,
    relative_error,
    reload,
)

STATELESS = ("hidden", "ffn", "expert_ffn", "shared_ffn", "heads", "top_k")
"""Axes that no decoding state knows."""


def save_family(folder: Path, parent: Parent, sizes) -> Path:
    """An elastic checkpoint of a parent, without tokenizer or router."""
    path = parent.save(folder)
    complete = {name: parent.axis_map.complete(widths) for name, widths in sizes.items()}
    cost = CostModel(parent.axis_map)
    named = sorted(complete, key=lambda name: -cost.count(complete[name]).total)
    manifest = Manifest(
        parent.axis_map.model_type, {}, {name: Size(complete[name]) for name in named}
    )
    save_manifest(manifest, path)
    return path


def load_family(path: Path, dtype=torch.float32) -> ElasticFamily:
    """The family; experts run one by one, because tiny ones do not fit grouped products."""
    family = star_elastic.load(path, dtype=dtype)
    family.parent.set_experts_implementation("eager")
    return family


def greedy(model: nn.Module, ids: torch.Tensor) -> list[list[int]]:
    """Ten tokens by transformers' own loop, with its cache."""
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options).tolist()


def has_own_widths(widths: Widths) -> bool:
    """Whether no plain checkpoint can hold a size of these widths."""
    return any(isinstance(w, tuple) for name, w in widths.items() if name != "layers")


# --- the order -------------------------------------------------------------------------------


@st.composite
def dims(draw) -> tuple[tuple[Segment, ...], int, int]:
    """A dimension with fixed and elastic segments; the units per group and groups of its axis."""
    depth, groups = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    elastic = st.builds(lambda unit: Segment(depth * groups, unit, "a", groups), st.integers(1, 3))
    fixed = st.builds(Segment, st.integers(1, 5), st.integers(1, 2))
    segments = draw(st.lists(st.one_of(elastic, fixed), min_size=1, max_size=5))
    return tuple(segments), depth, groups


@given(drawn=dims())
@examples(100)
def test_what_a_width_keeps_is_a_prefix_of_the_nested_order(drawn):
    dim, depth, groups = drawn
    size = sum(segment.num_units * segment.unit for segment in dim)
    whole = layout_of(dim)
    order = torch.arange(size) if whole is None else whole.order
    assert torch.equal(order.sort().values, torch.arange(size))
    for width in range(groups, depth * groups + 1, groups):
        kept = torch.cat([torch.arange(low, high) for low, high in runs(dim, {"a": width})])
        prefix = order[: len(kept)]
        assert torch.equal(prefix.sort().values, kept)
        at_width = tuple(replace(s, num_units=width) if s.axis else s for s in dim)
        layout = layout_of(at_width)
        nested = torch.stack([prefix, prefix + size])[:, None]
        natural = nested if layout is None else layout.to_natural(nested)
        assert torch.equal(natural, torch.stack([kept, kept + size])[:, None])
        if layout is not None:
            assert torch.equal(layout.to_nested(natural), nested)
            assert not torch.equal(natural, nested)


def test_activations_need_not_be_contiguous():
    layout = layout_of((Segment(3), Segment(6, 2, "a", 2), Segment(6, 1, "a", 2)))
    values = torch.randn(layout.size, 4, 2).permute(2, 1, 0)[1:, 1:]
    assert torch.equal(layout.to_nested(values), values[..., layout.order])
    part = torch.randn(5, layout.size)[2:]
    assert torch.equal(layout.to_natural(layout.to_nested(part)), part)


@pytest.mark.parametrize("nested_dims", [(True, False), (False, True), (True, True)])
def test_a_nested_layer_is_the_layer(nested_dims):
    """Outputs, gradients, values asked for, and what is saved and loaded."""
    torch.manual_seed(0)
    both = (
        layout_of((Segment(6, 2, "a", 3), Segment(4), Segment(6, 1, "a", 3))),
        layout_of((Segment(8, 3, "a", 2),)),
    )
    layouts = [layout if on else None for layout, on in zip(both, nested_dims, strict=True)]
    linear = nn.Linear(24, 22)
    nested = NestedLinear(
        nn.Parameter(nest(linear.weight.detach(), layouts)),
        nn.Parameter(nest(linear.bias.detach(), layouts[:1])),
        *layouts,
    )
    assert torch.equal(nested.weight, linear.weight) and torch.equal(nested.bias, linear.bias)
    x = torch.randn(2, 3, 24)
    assert torch.allclose(nested(x), linear(x), atol=1e-6)
    grad = torch.randn(2, 3, 22)
    linear(x).backward(grad)
    nested(x).backward(grad)
    expected = nest(linear.weight.grad, layouts)
    assert torch.allclose(nested.nested_weight.grad, expected, atol=1e-5)
    assert torch.allclose(nested.nested_bias.grad, nest(linear.bias.grad, layouts[:1]), atol=1e-5)
    state = nested.state_dict()
    assert list(state) == ["weight", "bias"]
    other = nn.Linear(24, 22)
    nested.load_state_dict(other.state_dict())
    assert torch.equal(nested.weight, other.weight) and torch.equal(nested.bias, other.bias)
    linear.load_state_dict(state)
    assert torch.allclose(linear(x), F.linear(x, state["weight"], state["bias"]))


# --- every size equals its saved slice -------------------------------------------------------


@pytest.mark.parametrize(("kind", "case"), AXIS_CASES)
@given(data=st.data())
@examples(3)
def test_every_size_equals_its_saved_slice(kind, case, data):
    """Logits and cached decoding, with all axes the full size's, too; sizes that no plain
    checkpoint can hold are compared with copies cut from a plain parent."""
    parent = data.draw(parents(kind, torch.float32))
    grid = data.draw(grids(parent.axis_map, case))
    sizes = {
        name: each(grid, lambda choices: data.draw(st.sampled_from(choices[1:] or choices)))
        for name in ("medium", "small")
    }
    if case == "all":
        sizes["full"] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = save_family(Path(folder), parent, sizes)
        family = load_family(path)
        for name, size in family.sizes.items():
            if has_own_widths(size.widths):
                expected = build_submodel(parent.model, parent.config, size.widths)
            else:
                slice_checkpoint(path, size.widths, Path(folder) / name)
                expected = reload(Path(folder) / name, torch.float32)
            with torch.no_grad():
                logits = family[name](input_ids=parent.ids).logits
                assert_equal(logits, expected(input_ids=parent.ids).logits, what=name)
            assert greedy(family[name], parent.ids) == greedy(expected, parent.ids), name


@pytest.mark.parametrize("kind", DISTINCT)
@given(data=st.data())
@examples(6)
def test_nested_order_changes_rounding_alone(kind, data):
    """In float64 sizes of a nested parent equal those of a plain one to twelve digits."""
    parent = data.draw(parents(kind))
    plain = make_parent(parent.config, parent.seed, torch.float64)
    grid = data.draw(grids(parent.axis_map, "all"))
    sizes = [each(grid, lambda choices: data.draw(st.sampled_from(choices))) for _ in range(2)]
    planned = [parent.axis_map.full, *map(parent.axis_map.complete, sizes)]
    nest_in_place(parent.model, parent.axis_map, planned)
    for widths in planned:
        with torch.no_grad(), precision(torch.float64):
            logits, expected = (
                build_submodel(p.model, p.config, widths)(input_ids=p.ids).logits
                for p in (parent, plain)
            )
        assert_equal(logits, expected)


@pytest.mark.parametrize("kind", DISTINCT)
def test_the_nested_parent_is_the_parent(kind, tmp_path):
    parent = make_parent(fixed_config(kind), 0, torch.float32)
    family = load_family(save_family(tmp_path, parent, {"full": {}, "small": ROWS[kind].cut}))
    assert nested_names(family.parent)
    plain = reload(family.path, torch.float32)
    with torch.no_grad():
        logits = family.parent(input_ids=parent.ids).logits
        assert_equal(logits, plain(input_ids=parent.ids).logits)
    nested, state = family.parent.state_dict(), plain.state_dict()
    assert nested.keys() == state.keys()
    assert all(torch.equal(nested[name], value) for name, value in state.items())
    changed = {name: value + 1 for name, value in state.items()}
    family.parent.load_state_dict(changed)
    assert all(torch.equal(v, changed[name]) for name, v in family.parent.state_dict().items())


@pytest.mark.parametrize("kind", DISTINCT)
def test_a_size_in_bfloat16(kind, tmp_path):
    """Equal to the saved slice in the same dtype, and rounded like it."""
    parent = make_parent(fixed_config(kind), 1, torch.float32)
    path = save_family(tmp_path, parent, {"full": {}, "small": ROWS[kind].cut})
    family = load_family(path, torch.bfloat16)
    slice_checkpoint(path, family.sizes["small"].widths, tmp_path / "small")
    expected = reload(tmp_path / "small", torch.bfloat16)
    assert dtypes_of(family["small"]) == dtypes_of(expected)
    with torch.no_grad():
        logits = family["small"](input_ids=parent.ids).logits
        assert_stored(kind, logits, expected(input_ids=parent.ids).logits)


def test_grouped_products_over_experts_in_nested_order(tmp_path):
    """Experts cut inside two routing groups, run as grouped matrix products."""
    wide = {"hidden_size": 16, "moe_intermediate_size": 16}
    parent = make_parent({**fixed_config("moe"), **wide}, 12, torch.float32)
    widths = {"hidden": 8, "experts": 4, "expert_ffn": 8}
    path = save_family(tmp_path, parent, {"full": {}, "small": widths})
    family = star_elastic.load(path)
    assert family["small"].config._experts_implementation == "grouped_mm"
    ends = {name.split(".", 3)[-1] for name in nested_names(family.parent)}
    assert ends == {"mixer.experts.up_proj", "mixer.experts.down_proj"}
    slice_checkpoint(path, widths, tmp_path / "small")
    for name, folder in (("small", tmp_path / "small"), ("full", path)):
        expected = reload(folder, torch.float32)
        with torch.no_grad():
            logits = family[name](input_ids=parent.ids).logits
            assert_equal(logits, expected(input_ids=parent.ids).logits, what=name)


@pytest.mark.parametrize("kind", DISTINCT)
def test_a_size_saves_as_a_plain_checkpoint(kind, tmp_path):
    config = {**fixed_config(kind), "tie_word_embeddings": False}
    parent = make_parent(config, 2, torch.float32)
    family = load_family(save_family(tmp_path, parent, {"full": {}, "small": ROWS[kind].cut}))
    family["small"].save_pretrained(tmp_path / "saved")
    saved = reload(tmp_path / "saved", torch.float32)
    with torch.no_grad():
        logits = family["small"](input_ids=parent.ids).logits
        assert_equal(saved(input_ids=parent.ids).logits, logits)


# --- views -----------------------------------------------------------------------------------


def is_small(name: str) -> bool:
    """Tensors of several dimensions that are copied when they are cut inside groups."""
    return name.endswith(("conv1d.weight", "gate.weight"))


@pytest.mark.parametrize("kind", DISTINCT)
@given(data=st.data())
@examples(20)
def test_weights_of_every_size_lie_inside_the_parents(kind, data):
    parent = data.draw(parents(kind, torch.float32))
    grid = data.draw(grids(parent.axis_map, data.draw(st.sampled_from(["all", "per layer"]))))
    sizes = [each(grid, lambda choices: data.draw(st.sampled_from(choices))) for _ in range(2)]
    planned = [parent.axis_map.complete(widths) for widths in sizes]
    nest_in_place(parent.model, parent.axis_map, planned)
    inside = {
        name: (p.data_ptr(), p.data_ptr() + p.numel() * p.element_size())
        for name, p in parent.model.named_parameters()
    }
    for widths in planned:
        submodel = build_submodel(parent.model, parent.config, widths)
        new_names = {new: old for old, new in parent.axis_map.names_at(widths).items()}
        weights = {n: p for n, p in submodel.named_parameters() if p.ndim > 1 and not is_small(n)}
        assert sum(p.numel() for p in submodel.parameters()) == sum(
            torch.Size(parent.axis_map.shape(spec, widths)).numel()
            for name, spec in parent.axis_map.tensors.items()
            if name in new_names.values() and not spec.is_buffer
        )
        for name, weight in weights.items():
            old = new_names[name.replace("nested_", "")]
            low, high = inside[old if old in inside else old.replace(".weight", ".nested_weight")]
            last = sum((n - 1) * s for n, s in zip(weight.shape, weight.stride(), strict=True))
            end = weight.data_ptr() + (last + 1) * weight.element_size()
            assert weight.data_ptr() == low and end <= high, name


@pytest.mark.parametrize("kind", DISTINCT)
def test_nothing_is_nested_where_no_size_cuts_in_groups(kind, tmp_path):
    parent = make_parent(fixed_config(kind), 3, torch.float32)
    whole = {"hidden", "ffn", "expert_ffn"}
    if "gate_up_proj" in str(list(parent.axis_map.tensors)):  # whose halves are cut one by one
        whole.remove("expert_ffn")
    widths = {name: width for name, width in ROWS[kind].cut.items() if name in whole}
    family = load_family(save_family(tmp_path, parent, {"full": {}, "small": widths}))
    assert not nested_names(family.parent)
    kinds = {type(module) for size in family for module in family[size].modules()}
    assert NestedLinear not in kinds


def test_a_family_holds_only_what_it_needs_in_nested_order(tmp_path):
    parent = make_parent(fixed_config("moe"), 3, torch.float32)
    family = load_family(save_family(tmp_path, parent, {"full": {}, "small": {"heads": 4}}))
    ends = {name.split(".", 3)[-1] for name in nested_names(family.parent)}
    assert ends == {"mixer.q_proj.weight", "mixer.o_proj.weight"}


def test_widths_nobody_planned_for_are_gathered():
    """On a parent that holds heads in nested order, Mamba heads and experts are copied as ever."""
    parent = make_parent(fixed_config("moe"), 4, torch.float32)
    plain = make_parent(fixed_config("moe"), 4, torch.float32)
    nest_in_place(parent.model, parent.axis_map, [parent.axis_map.complete({"heads": 4})])
    for widths in (ROWS["moe"].cut, {"ssm_heads": 4}, {"experts": 4}, {"heads": 2}, {}):
        submodel = build_submodel(parent.model, parent.config, widths)
        expected = build_submodel(plain.model, plain.config, widths)
        with torch.no_grad():
            logits = submodel(input_ids=parent.ids).logits
            assert_equal(logits, expected(input_ids=parent.ids).logits)


def test_sizes_between_the_trained_ones(tmp_path):
    """Widths that no named size has are views too, where the named sizes cut the same axes."""
    parent = make_parent(fixed_config("dense"), 5, torch.float32)
    axis_map = parent.axis_map
    choices = {"ssm_heads": (6, 4, 2), "heads": (6, 4, 2)}
    small = axis_map.complete({"ssm_heads": 2, "heads": 2})
    full_cost, cost = (CostModel(axis_map).count(w).total for w in (axis_map.full, small))
    share = cost / full_cost
    sizes = {"large": Size(axis_map.full, {"total": 1.0}), "small": Size(small, {"total": share})}
    path = parent.save(tmp_path)
    save_manifest(Manifest("nemotron_h", choices, sizes), path)
    router = Router(make_grid(choices, axis_map), len(sizes))
    save_tensors(path / "router.safetensors", router.state_dict())
    family = load_family(path)
    between = family.at(total=(1 + share) / 2)
    config = between.config
    widths = {"ssm_heads": config.mamba_num_heads, "heads": config.num_attention_heads}
    assert widths["ssm_heads"] == 4 or widths["heads"] == 4
    slice_checkpoint(path, widths, tmp_path / "between")
    expected = reload(tmp_path / "between", torch.float32)
    with torch.no_grad():
        logits = between(input_ids=parent.ids).logits
        assert_equal(logits, expected(input_ids=parent.ids).logits)
    plain, _ = load_parent(path)
    gathered = build_submodel(plain, family.config, widths)
    counts = [
        count_resident(model, {"at": size}).copies["at"]
        for model, size in ((family.parent, between), (plain, gathered))
    ]
    weights = [
        axis_map.shape(spec, complete)
        for name in nested_names(family.parent)
        for spec, complete in [(axis_map.tensors[name], axis_map.complete(widths))]
        if any(len(axis_map.runs(spec, dim, complete)) > 1 for dim in range(2))
    ]
    assert counts[1] - counts[0] == 4 * sum(torch.Size(shape).numel() for shape in weights) > 0


# --- counts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DISTINCT)
def test_resident_bytes(kind, tmp_path):
    """The shared copy is the checkpoint; a size adds its vectors and small tensors cut in groups,
    positions of experts, and the rotary frequencies that no checkpoint holds."""
    parent = make_parent(fixed_config(kind), 6, torch.float32)
    family = load_family(save_family(tmp_path, parent, {"full": {}, "small": ROWS[kind].cut}))
    before = family.resident_bytes()
    stored = load_file(family.path / "model.safetensors")
    buffers = dict(family.parent.named_buffers()).items()
    own = sum(b.nbytes for n, b in buffers if n not in parent.axis_map.tensors)
    assert before.shared == sum(t.nbytes for t in stored.values()) + own
    assert before.copies == {} and before.total == before.shared
    assert family["full"] is family.parent
    small = family["small"]
    axis_map, widths = family.axis_map, family.sizes["small"].widths
    scattered = [
        axis_map.shape(spec, widths)
        for name, spec in axis_map.tensors.items()
        if name not in nested_names(family.parent)
        and any(len(axis_map.runs(spec, dim, widths)) > 1 for dim in range(len(spec.dims)))
    ]
    copied = 4 * sum(torch.Size(shape).numel() for shape in scattered)
    own = sum(b.nbytes for n, b in small.named_buffers() if "inv_freq" in n or "nested_" in n)
    after = family.resident_bytes()
    assert after.copies == {"full": 0, "small": copied + own}
    assert (copied > 0) == ROWS[kind].scatters
    assert after.total == before.shared + copied + own


@pytest.mark.parametrize("kind", DISTINCT)
def test_cache_compatibility(kind, tmp_path):
    parent = make_parent(fixed_config(kind), 7, torch.float32)
    layers, cut = parent.axis_map.axes["layers"].layers, ROWS[kind].cut

    def without(gone: int) -> dict:
        return {"layers": tuple(int(layer != gone) for layer in layers)}

    remembering = {state.layer for state in parent.axis_map.states}
    forgetting = [layer for layer in layers if layer not in remembering]
    stateless = {name: w for name, w in cut.items() if name in STATELESS}
    states = {name: w for name, w in cut.items() if name not in (*STATELESS, "experts")}
    sizes = {"full": {}, "narrow": stateless, "short": without(min(remembering))}
    if states:
        sizes["states"] = states
    if forgetting:
        sizes["as deep"] = without(forgetting[0])
    family = load_family(save_family(tmp_path, parent, sizes))
    compatible = [name for name in sizes if family.is_cache_compatible("full", name)]
    assert compatible == [name for name in sizes if name in ("full", "narrow", "as deep")]
    assert family.is_cache_compatible(*compatible)
    assert not family.is_cache_compatible()
    assert family.is_cache_compatible("short")
    assert bool(states) == ROWS[kind].is_recurrent
    if states:
        assert not family.is_cache_compatible("narrow", "states")


# --- the file --------------------------------------------------------------------------------


def dtypes_of(model) -> dict[str, torch.dtype]:
    """Of every parameter, by its name in an ordinary model."""
    named = model.named_parameters()
    return {name.replace("nested_", ""): value.dtype for name, value in named}


def is_mapped(tensor: torch.Tensor) -> bool:
    """Whether a tensor's memory is that of a safetensors file."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        low, high = (int(end, 16) for end in line.split()[0].split("-"))
        if low <= tensor.data_ptr() < high:
            return line.endswith(".safetensors")
    raise AssertionError("this address belongs to no mapping")


linux = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="/proc tells")


@linux
@pytest.mark.parametrize("kind", DISTINCT)
def test_parameters_stay_in_the_file(kind, tmp_path):
    parent = make_parent(fixed_config(kind), 8, torch.float32)
    path = parent.save(tmp_path)
    model, _ = load_parent(path)
    assert all(map(is_mapped, model.parameters()))
    other, _ = load_parent(path, torch.bfloat16)
    dtypes = dtypes_of(reload(path, torch.bfloat16))
    assert dtypes_of(other) == dtypes
    for name, value in other.named_parameters():
        assert is_mapped(value) == (dtypes[name] == torch.float32), name


@linux
@pytest.mark.parametrize("shards", ["one file", "several files"])
def test_experts_in_another_order_are_copied(shards, tmp_path):
    parent = make_parent(fixed_config("moe"), 8, torch.float32)
    path = parent.save(tmp_path)
    if shards == "one file":
        tensors = load_file(path / "model.safetensors")
        backwards = dict(reversed(list(tensors.items())))
        save_tensors(path / "model.safetensors", backwards, {"format": "pt"})
    else:
        whole = path.rename(tmp_path / "whole")
        slice_checkpoint(whole, {}, path, max_shard_bytes=500)
    model, _ = load_parent(path)
    for name, value in model.named_parameters():
        assert is_mapped(value) == (".experts." not in name), name
        assert torch.equal(value, parent.state[name]), name


def test_a_file_replaced_by_another_changes_nothing(tmp_path):
    """Checkpoints are written under another name and renamed: the mapped file stays what it was."""
    parent = make_parent(fixed_config("dense"), 9, torch.float32)
    path = save_family(tmp_path, parent, {"full": {}, "small": ROWS["dense"].cut})
    family = load_family(path)
    (tmp_path / "shorter").write_bytes(b"\0" * 64)
    os.replace(tmp_path / "shorter", path / "model.safetensors")
    expected = build_submodel(parent.model, parent.config, ROWS["dense"].cut)
    with torch.no_grad():
        logits = family["small"](input_ids=parent.ids).logits
        assert_equal(logits, expected(input_ids=parent.ids).logits)
        cut = relative_error(logits, parent.model(input_ids=parent.ids).logits)
    assert cut > 1e-3


def test_nesting_writes_nothing_to_the_file(tmp_path):
    parent = make_parent(fixed_config("moe"), 10, torch.float32)
    path = save_family(tmp_path, parent, {"full": {}, "small": ROWS["moe"].cut})
    before = (path / "model.safetensors").read_bytes()
    assert nested_names(load_family(path).parent)
    assert (path / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("kind", DISTINCT)
@given(data=st.data())
@examples(10)
def test_loading_equals_plain_transformers(kind, data):
    """Tensor by tensor, in both dtypes, the generation settings included."""
    parent = make_parent(data.draw(configs(kind)), 11, torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        path = parent.save(Path(folder))
        parent.model.generation_config.max_new_tokens = 17
        parent.model.generation_config.save_pretrained(path)
        for dtype in (torch.float32, torch.bfloat16):
            expected = reload(path, dtype)
            model, _ = load_parent(path, dtype)
            assert model.state_dict().keys() == expected.state_dict().keys()
            for name, value in expected.state_dict().items():
                assert torch.equal(model.state_dict()[name], value), name
            assert model.generation_config.to_dict() == expected.generation_config.to_dict()
            assert model.generation_config.max_new_tokens == 17
            assert model.config.to_dict().keys() == expected.config.to_dict().keys()
            assert model.name_or_path == str(path) and not model.training
