"""Law 6: quantising a slice with the scales of the full width == slicing what was quantised."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from star_elastic.architectures import architecture_of, read_config
from star_elastic.checkpoints.layouts import (
    CODES,
    COMPRESSED_TENSORS,
    SCALES,
    read_scheme,
    stored_map,
    stored_parts,
)
from star_elastic.checkpoints.quantised import read_weight
from star_elastic.checkpoints.stored import StoredModel
from star_elastic.checkpoints.tensors import CheckpointReader
from star_elastic.errors import ShapeError
from star_elastic.models.load import load_parent
from star_elastic.models.submodel import build_submodel
from star_elastic.quant.formats import (
    FORMATS,
    Quantised,
    dequantise,
    largest_of,
    quantise,
    requantise,
)
from star_elastic.quant.scheme import make_scheme, partners, quantisable
from star_elastic.rewrite.quantise import quantise_checkpoint
from star_elastic.rewrite.stream import slice_checkpoint
from tests.laws.parents import assert_equal, examples, make_parent, sliced

BLOCKS = {"fp8": 1, "fp8-channel": 1, "fp8-block": 128, "nvfp4": 16}
HYBRID = {
    "model_type": "nemotron_h", "vocab_size": 20, "num_attention_heads": 4,
    "num_key_value_heads": 2, "n_groups": 2, "conv_kernel": 3, "chunk_size": 4,
    "num_experts_per_tok": 2, "layer_norm_epsilon": 1e-5,
}  # fmt: skip


@st.composite
def cases(draw, block: int):
    """A parent whose every axis has widths on the edges of blocks, and such widths."""
    unit = max(block, 8)  # of which grouped products of experts want multiples

    def size() -> int:
        return unit * draw(st.integers(2, 3 if unit < 100 else 2))

    config = {
        **HYBRID,
        "hybrid_override_pattern": draw(st.sampled_from(["ME*", "*EM"] if block else ["ME*"])),
        "num_hidden_layers": 3,
        "hidden_size": size(),
        "head_dim": 2 * unit if unit < 100 else 64,
        "mamba_num_heads": 4,
        "mamba_head_dim": unit if unit < 100 else 64,
        "ssm_state_size": 8,
        "n_routed_experts": 4,
        "moe_intermediate_size": size(),
        "moe_shared_expert_intermediate_size": size(),
    }
    if unit >= 100:  # two heads in a group make a block, and cannot be parted
        config |= {"mamba_num_heads": 8, "num_attention_heads": 8, "n_groups": 2}
    parent = make_parent(config, draw(st.integers(0, 2**20)), torch.float32)
    widths = {}
    for name in ("hidden", "expert_ffn", "shared_ffn"):
        full = parent.axis_map.axes[name].size
        widths[name] = unit * draw(st.integers(1, full // unit))
    widths["experts"] = draw(st.integers(2, 4))
    for name in ("ssm_heads", "heads"):
        axis = parent.axis_map.axes[name]
        step = axis.num_groups * (2 if unit >= 100 else 1)
        widths[name] = step * draw(st.integers(1, axis.size // step))
    return parent, parent.axis_map.complete(widths)


@pytest.mark.parametrize("name", FORMATS)
@given(data=st.data())
@examples(4)
def test_quantising_a_slice_is_slicing_what_was_quantised(name, data):
    parent, widths = data.draw(cases(BLOCKS[name]))
    format, axis_map = FORMATS[name], parent.axis_map
    scheme = make_scheme(axis_map, name)
    for spec in scheme.quantised(axis_map).values():
        whole = quantise(parent.state[spec.name], format)
        parts = stored_parts(spec, format, COMPRESSED_TENSORS)
        stored = stored_map(axis_map, scheme)
        cut = {
            kind: sliced(value, parts[kind], stored, widths)
            for kind, value in ((CODES, whole.codes), (SCALES, whole.scales))
        }
        globally = whole.global_scale
        if globally is not None and globally.dim() > 1:
            globally = globally[: cut[CODES].shape[0]]
        small = sliced(parent.state[spec.name], spec, axis_map, widths)
        again = requantise(small, Quantised(format, cut[CODES], cut[SCALES], globally))
        assert torch.equal(again.codes.view(torch.uint8), cut[CODES].view(torch.uint8))
        if format.packed:  # block scales, too, come out the same from the slice's own blocks
            largest = largest_of(parent.state[spec.name], format)
            largest = largest if largest.dim() == 1 else largest[: small.shape[0]]
            own = quantise(small, format, largest)
            assert torch.equal(own.codes, cut[CODES])
            assert torch.equal(own.scales.view(torch.uint8), cut[SCALES].view(torch.uint8))


@pytest.mark.parametrize("name", FORMATS)
@given(data=st.data())
@examples(2)
def test_a_quantised_checkpoint_is_cut_without_dequantising(name, data):
    """A slice on disk holds the parent's codes and scales, and computes what its submodel does."""
    parent, widths = data.draw(cases(BLOCKS[name]))
    axis_map = parent.axis_map
    scheme = make_scheme(axis_map, name)
    scales = {n: torch.rand(1) + 0.01 for n in scheme.quantised(axis_map)}
    with tempfile.TemporaryDirectory() as folder:
        source, out, cut = parent.save(Path(folder)), Path(folder) / "q", Path(folder) / "slice"
        quantise_checkpoint(source, scheme, out, input_scales=scales)
        slice_checkpoint(out, widths, cut)
        whole, config = load_parent(out)
        ours = build_submodel(whole, config, widths)
        theirs, small_config = load_parent(cut)
        with torch.no_grad():
            assert_equal(
                theirs(input_ids=parent.ids).logits, ours(input_ids=parent.ids).logits, what=name
            )
        small = architecture_of(small_config).axis_map(read_config(cut))
        small_scheme = read_scheme(small_config, small)
        assert small_scheme == scheme.at(axis_map, widths)
        stored = StoredModel(cut, stored_map(small, small_scheme), architecture_of(small_config))
        names = axis_map.names_at(widths)
        for spec in scheme.quantised(axis_map).values():
            if spec.name in names:
                kept = read_weight(stored, small.tensors[names[spec.name]], small_scheme)
                largest = None  # one scale for the layers that engines fuse
                if scheme.format.has_one_scale:
                    fused = [parent.state[n] for n in partners(spec.name) if n in names]
                    largest = torch.stack([largest_of(w, scheme.format) for w in fused]).amax(0)
                dense = dequantise(quantise(parent.state[spec.name], scheme.format, largest))
                assert_equal(dequantise(kept), sliced(dense, spec, axis_map, widths))
        StoredModel(cut, stored_map(small, small_scheme), architecture_of(config)).require_whole()
        assert CheckpointReader(cut).names


@pytest.mark.parametrize(
    ("name", "widths", "near"),
    [
        ("nvfp4", {"hidden": 40}, "hidden=40 ends inside a block of 16 .* use 32 or 48"),
        ("nvfp4", {"expert_ffn": 24}, "expert_ffn=24 .* use 16 or 32"),
        ("nvfp4", {"ssm_heads": 2}, "ssm_heads=2 .* use 4"),
        ("nvfp4", {"ssm_heads": 4}, None),
        ("fp8", {"hidden": 41, "expert_ffn": 3, "ssm_heads": 2}, None),
    ],
)
def test_widths_inside_a_block_are_refused_with_the_rule(name, widths, near, tmp_path):
    config = {
        **HYBRID, "hybrid_override_pattern": "ME*", "num_hidden_layers": 3, "hidden_size": 48,
        "head_dim": 16, "mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8,
        "n_routed_experts": 4, "moe_intermediate_size": 32,
        "moe_shared_expert_intermediate_size": 32,
    }  # fmt: skip
    parent = make_parent(config, 1, torch.float32)
    scheme = make_scheme(parent.axis_map, name)
    scales = {n: torch.ones(1) for n in scheme.quantised(parent.axis_map)}
    source = parent.save(tmp_path)
    quantise_checkpoint(source, scheme, tmp_path / "q", input_scales=scales)
    model, config = load_parent(tmp_path / "q")
    complete = parent.axis_map.complete(widths)
    if near is None:
        slice_checkpoint(tmp_path / "q", complete, tmp_path / "out")
        build_submodel(model, config, complete)
        return
    with pytest.raises(ShapeError, match=near):
        slice_checkpoint(tmp_path / "q", complete, tmp_path / "out")
    with pytest.raises(ShapeError, match=near):
        build_submodel(model, config, complete)
    assert not (tmp_path / "out").exists()


def test_what_blocks_do_not_fit_stays_as_it_is():
    config = {
        **HYBRID, "hybrid_override_pattern": "ME*", "num_hidden_layers": 3, "hidden_size": 32,
        "head_dim": 16, "mamba_num_heads": 4, "mamba_head_dim": 4, "ssm_state_size": 8,
        "n_routed_experts": 4, "moe_intermediate_size": 24,
        "moe_shared_expert_intermediate_size": 32,
    }  # fmt: skip
    axis_map = architecture_of(config).axis_map(config)
    kept = make_scheme(axis_map, "nvfp4").kept
    # 2 heads of 4 channels in a group, and 24 neurons, are not whole blocks of 16 columns.
    assert kept == {
        "model.layers.0.mixer.out_proj.weight",
        "model.layers.1.mixer.experts.down_proj",
    }
    assert len(list(quantisable(axis_map))) - len(kept) == 8
