"""Our path against plain transformers and against slices written out by hand, per family."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from star_elastic.models.elastic import ElasticModel
from star_elastic.models.submodel import build_submodel
from star_elastic.nesting.slice import slice_state
from star_elastic.rewrite.stream import slice_checkpoint
from tests.architectures import ROWS, fixed_config
from tests.laws.parents import (
    assert_stored,
    build,
    examples,
    make_parent,
    one_hot,
    parents,
    relative_error,
    reload,
    some_widths,
)
from tests.oracle.naive import naive_name, naive_slice


@pytest.mark.parametrize("kind", ROWS)
@given(data=st.data())
@examples(15)
def test_slices_are_those_written_out_by_hand(kind, data):
    parent = data.draw(parents(kind, torch.float32))
    widths = parent.axis_map.complete(data.draw(some_widths(parent.axis_map)))
    sliced = slice_state(parent.state, parent.axis_map, widths)
    there = widths["layers"] if isinstance(widths["layers"], tuple) else [1] * 9
    for name, value in parent.state.items():
        if name not in parent.axis_map.tensors:
            continue
        new = naive_name(name, there)
        if new is None:
            continue
        expected = naive_slice(name, value, ROWS[kind].keeps, parent.config, widths)
        assert torch.equal(sliced.pop(new), expected), name
    assert not sliced


@pytest.mark.parametrize("kind", ROWS)
def test_hand_made_slices_in_a_plain_model_give_our_logits(kind):
    """The whole road without any of our code but the names of the widths."""
    parent = make_parent(fixed_config(kind), 0, torch.float32)
    row = ROWS[kind]
    widths = parent.axis_map.complete(row.cut)
    config = {**parent.config, **{row.fields[axis]: width for axis, width in row.cut.items()}}
    # Or it would follow from what is cut.
    whole = parent.config["hidden_size"] // parent.config["num_attention_heads"]
    config["head_dim"] = parent.config.get("head_dim", whole)
    plain = build(config, torch.float32)
    state = {
        name: row.stores(
            name, naive_slice(name, value, row.keeps, parent.config, widths), parent.config, widths
        )
        for name, value in parent.model.state_dict().items()
    }
    plain.load_state_dict(state)
    with torch.no_grad():
        expected = plain(input_ids=parent.ids).logits
        submodel = build_submodel(parent.model, parent.config, widths)
        elastic = ElasticModel(parent.model, parent.config).eval()
        assert_stored(kind, submodel(input_ids=parent.ids).logits, expected)
        assert_stored(kind, elastic(widths, input_ids=parent.ids).logits, expected)


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_exported_sizes_generate_the_same_tokens(kind, dtype, tmp_path):
    parent = make_parent(fixed_config(kind), 1, dtype)
    parent.model.generation_config.save_pretrained(tmp_path)
    slice_checkpoint(parent.save(tmp_path), ROWS[kind].cut, tmp_path / "slice")
    submodel = build_submodel(parent.model, parent.config, ROWS[kind].cut)
    exported = reload(tmp_path / "slice", dtype)
    ask = {"do_sample": False, "min_new_tokens": 8, "max_new_tokens": 8, "pad_token_id": 0}
    ask = {**ask, "input_ids": parent.ids, "attention_mask": torch.ones_like(parent.ids)}
    with torch.no_grad():
        ours, theirs = (model(input_ids=parent.ids).logits for model in (submodel, exported))
        assert_stored(kind, ours, theirs)
        if dtype == torch.float32 or not parent.axis_map.width_buffers:
            assert torch.equal(submodel.generate(**ask), exported.generate(**ask))


@pytest.mark.parametrize("kind", ROWS)
def test_checkpoints_written_by_transformers_are_sources(kind, tmp_path):
    """Names and layer types as transformers writes them, and a slice written by it once more."""
    parent = make_parent(fixed_config(kind), 2, torch.float32)
    parent.model.save_pretrained(tmp_path / "theirs")
    slice_checkpoint(tmp_path / "theirs", ROWS[kind].cut, tmp_path / "slice")
    submodel = build_submodel(parent.model, parent.config, ROWS[kind].cut)
    model = reload(tmp_path / "slice", torch.float32)
    model.save_pretrained(tmp_path / "again")
    again = reload(tmp_path / "again", torch.float32)
    with torch.no_grad():
        expected = submodel(input_ids=parent.ids).logits
        assert_stored(kind, model(input_ids=parent.ids).logits, expected)
        assert_stored(kind, again(input_ids=parent.ids).logits, expected)


@pytest.mark.parametrize("prefix", ["model.", "backbone."])
def test_both_prefixes_of_names_on_disk_are_read(prefix, tmp_path):
    from safetensors.torch import load_file, save_file

    parent = make_parent(fixed_config("dense"), 3, torch.float32)
    saved = parent.save(tmp_path)
    file = saved / "model.safetensors"
    renamed = {
        name.replace("backbone.", prefix, 1): value for name, value in load_file(file).items()
    }
    save_file(renamed, file, metadata={"format": "pt"})
    slice_checkpoint(saved, {}, tmp_path / "slice")
    written = load_file(tmp_path / "slice" / "model.safetensors")
    assert {name.split(".")[0] for name in written} == {"backbone", "lm_head"}
    for name, value in written.items():
        assert torch.equal(value, renamed[name.replace("backbone.", prefix, 1)]), name


def test_config_json_serves_old_and_new_readers(tmp_path):
    parent = make_parent(fixed_config("moe"), 4, torch.float32)
    slice_checkpoint(parent.save(tmp_path), ROWS["moe"].cut, tmp_path / "slice")
    file = tmp_path / "slice" / "config.json"
    config = json.loads(file.read_text())
    expected = reload(tmp_path / "slice", torch.float32)(input_ids=parent.ids).logits
    for spelling in ({"hybrid_override_pattern"}, {"layers_block_type"}):
        left = {k: v for k, v in config.items() if k not in spelling}
        file.write_text(json.dumps(left))
        model = reload(tmp_path / "slice", torch.float32)
        assert torch.equal(model(input_ids=parent.ids).logits, expected)


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
def test_every_way_of_running_experts_gives_the_same_size(implementation, tmp_path):
    """Widths that suit grouped matrix products, and the gated forward beside the slice."""
    config = {**fixed_config("moe"), "hidden_size": 16, "moe_intermediate_size": 16}
    parent = make_parent(config, 5, torch.float32)
    parent.model.set_experts_implementation(implementation)
    widths = {"hidden": 8, "experts": 6, "expert_ffn": 8}
    grid = {name: (parent.axis_map.axes[name].size, width) for name, width in widths.items()}
    slice_checkpoint(parent.save(tmp_path), widths, tmp_path / "slice")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "slice").eval()
    elastic = ElasticModel(parent.model, config).eval()
    with torch.no_grad():
        expected = exported(input_ids=parent.ids).logits
        for size in (parent.axis_map.complete(widths), one_hot(grid, widths, torch.float32)):
            assert relative_error(elastic(size, input_ids=parent.ids).logits, expected) < 1e-5
        submodel = build_submodel(parent.model, config, widths)
        assert relative_error(submodel(input_ids=parent.ids).logits, expected) < 1e-5
        assert submodel.config._experts_implementation == implementation
