"""Families whose FP8 weights stay codes: products as PyTorch has them, on any device that does."""

from __future__ import annotations

import pytest
import torch

from star_elastic.models.calibration import calibrate_inputs
from star_elastic.models.load import load_parent
from star_elastic.models.resident import count_resident, nest_in_place
from star_elastic.models.submodel import build_submodel
from star_elastic.quant.formats import E4M3
from star_elastic.quant.scheme import make_scheme
from star_elastic.rewrite.quantise import quantise_checkpoint
from tests.architectures import DISTINCT, ROWS
from tests.laws.parents import make_parent, relative_error

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["fp8", "fp8-channel"])
@pytest.mark.parametrize("kind", DISTINCT)
def test_codes_are_multiplied_as_what_they_stand_for(kind, name, device, tmp_path):
    """Whole and cut inside groups, nested in one copy or not, against the dequantised model."""
    parent = make_parent(dict(ROWS[kind].wide), 3, torch.float32)
    scheme = make_scheme(parent.axis_map, name)
    batches = [{"input_ids": parent.ids}]
    scales = calibrate_inputs(parent.model, parent.axis_map, scheme, batches)
    quantise_checkpoint(parent.save(tmp_path), scheme, tmp_path / "q", input_scales=scales)
    # In fp32 both are equal up to the order of sums; products on a GPU come in bf16.
    dtype, tolerance = (torch.float32, 1e-4) if device == "cpu" else (torch.bfloat16, 0.1)
    native, stored = load_parent(tmp_path / "q", dtype, device, native=True)
    dense, _ = load_parent(tmp_path / "q", dtype, device, native=False)
    full, widths = parent.axis_map.full, parent.axis_map.complete(ROWS[kind].wide_cut)
    codes = [p for p in native.parameters() if p.dtype == E4M3]
    assert len(codes) == len(scheme.quantised(parent.axis_map))
    ids = parent.ids.to(device)
    with torch.no_grad():
        expected = {
            size: build_submodel(dense, stored, size)(input_ids=ids).logits
            for size in (full, widths)
        }
        for nested in (False, True):
            if nested:
                nest_in_place(native, parent.axis_map, [widths])
            for size, logits in expected.items():
                model = native if size == full else build_submodel(native, stored, size)
                found = model(input_ids=ids).logits
                off = (found - logits).float().norm() / logits.float().norm()
                assert off < tolerance, (nested, size)
                again = model(input_ids=ids).logits
                assert torch.equal(found, again)
    small = build_submodel(native, stored, widths)
    counted = count_resident(native, {"small": small})
    assert counted.copies["small"] < 0.1 * counted.shared  # vectors; the codes are views


def test_widths_that_the_products_do_not_take_are_unpacked(tmp_path):
    parent = make_parent(dict(ROWS["moe"].wide), 4, torch.float32)
    scheme = make_scheme(parent.axis_map, "fp8")
    scales = calibrate_inputs(parent.model, parent.axis_map, scheme, [{"input_ids": parent.ids}])
    quantise_checkpoint(parent.save(tmp_path), scheme, tmp_path / "q", input_scales=scales)
    native, stored = load_parent(tmp_path / "q", native=True)
    dense, _ = load_parent(tmp_path / "q")
    widths = {"hidden": 40, "expert_ffn": 24}
    with torch.no_grad():
        ours, theirs = (
            build_submodel(m, stored, widths)(input_ids=parent.ids).logits for m in (native, dense)
        )
    assert relative_error(ours, theirs) < 1e-4
