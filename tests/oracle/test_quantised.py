"""Our formats and files against compressed-tensors: values, packed bytes, configs, logits."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from compressed_tensors.compressors.nvfp4.helpers import quantize_and_pack_fp4
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
from compressed_tensors.quantization.utils.helpers import (
    calculate_qparams,
    compute_dynamic_scales_and_zp,
    generate_gparam,
)
from transformers import AutoModelForCausalLM

from star_elastic.checkpoints.layouts import config_entry
from star_elastic.models.calibration import calibrate_inputs
from star_elastic.models.load import load_parent
from star_elastic.quant.formats import FORMATS, dequantise, fake_activation, quantise
from star_elastic.quant.scheme import make_scheme
from star_elastic.rewrite.quantise import quantise_checkpoint
from star_elastic.rewrite.stream import slice_checkpoint
from tests.laws.parents import make_parent, relative_error

PRESETS = {"fp8": "FP8", "fp8-channel": "FP8_DYNAMIC", "fp8-block": "FP8_BLOCK", "nvfp4": "NVFP4"}


def random_weight(seed: int, rows: int = 128, columns: int = 256) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.rand(rows, 1, generator=generator) * 10
    return torch.randn(rows, columns, generator=generator) * spread


def test_nvfp4_of_the_worked_row():
    row = [-0.8 + 0.1 * i for i in range(16)] + [0.01 * (i + 1) for i in range(16)]
    found = quantise(torch.tensor([[round(value, 2) for value in row]]), FORMATS["nvfp4"])
    assert found.global_scale is not None
    assert found.global_scale.item() == pytest.approx(2.976190590e-4, rel=1e-7)
    assert found.scales.float().tolist() == [[448, 88]]
    codes = dequantise(found)[0, :16] / (448 * found.global_scale)
    expected = [-6, -6, -4, -4, -3, -2, -1.5, -1, 0, 1, 1.5, 2, 3, 4, 4, 6]
    assert codes.tolist() == pytest.approx(expected)


def test_fp8_of_the_worked_values():
    found = dequantise(quantise(torch.tensor([[4.0, 3.3]]), FORMATS["fp8"]))
    assert found.tolist()[0] == pytest.approx([4.0, 3.428571])


@pytest.mark.parametrize("seed", range(4))
def test_nvfp4_is_packed_into_the_same_bytes(seed):
    weight = random_weight(seed)
    if seed == 1:
        weight[:, :16] = 0
    ours = quantise(weight, FORMATS["nvfp4"])
    args = preset_name_to_scheme("NVFP4", ["Linear"]).weights
    global_scale = generate_gparam(weight.min(), weight.max())
    blocks = weight.unflatten(-1, (-1, 16))
    scales, _ = calculate_qparams(blocks.amin(-1), blocks.amax(-1), args, global_scale=global_scale)
    packed = quantize_and_pack_fp4(weight, scales, global_scale=global_scale)
    assert torch.equal(ours.codes, packed)
    # A block of zeros has the smallest scale here, and E4M3's epsilon there: 0 either way.
    filled = (blocks != 0).any(-1)
    assert torch.equal(ours.scales.float()[filled], scales.float()[filled])
    assert ours.global_scale is not None
    assert torch.allclose(1 / ours.global_scale, global_scale, rtol=2e-7)


@pytest.mark.parametrize("name", ["fp8", "fp8-channel", "fp8-block"])
def test_fp8_weights_have_the_same_values(name):
    weight = random_weight(7)
    format = FORMATS[name]
    args = preset_name_to_scheme(PRESETS[name], ["Linear"]).weights
    rows, columns = format.block[0] or 128, format.block[1] or 256
    blocks = weight.unflatten(-1, (-1, columns)).unflatten(0, (-1, rows))
    low, high = blocks.amin((1, 3)), blocks.amax((1, 3))
    if name == "fp8":
        low, high = low.flatten(), high.flatten()
    scales, zeros = calculate_qparams(low, high, args)
    theirs = fake_quantize(weight, scales, zeros, args)
    ours = dequantise(quantise(weight, format))
    assert torch.allclose(ours, theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", FORMATS)
def test_inputs_have_the_same_values(name):
    format, values = FORMATS[name], random_weight(3, 24)[None]
    args = preset_name_to_scheme(PRESETS[name], ["Linear"]).input_activations
    largest = values.abs().max()
    if format.activations == "static":
        scale, zero = calculate_qparams(values.min(), values.max(), args)
        theirs = fake_quantize(values, scale, zero, args)
        ours = fake_activation(values, format, largest.reshape(1) / 448)
    else:
        global_scale = generate_gparam(values.min(), values.max())
        shared = global_scale if format.activations == "block" else None
        scale, zero = compute_dynamic_scales_and_zp(values, args, None, global_scale=shared)
        theirs = fake_quantize(values, scale, zero, args, global_scale=shared)
        ours = fake_activation(values, format, largest.reshape(1) / (6 * 448))
    # Multiplying by a reciprocal, as the oracle may, moves exact ties by a code.
    differs = (ours - theirs).abs() > 1e-5 * theirs.abs().max()
    assert differs.float().mean() < 1e-3


@pytest.mark.parametrize("name", FORMATS)
def test_the_config_says_what_the_preset_says(name):
    parent = make_parent(LLAMA, 0, torch.float32)
    entry = config_entry(parent.axis_map, make_scheme(parent.axis_map, name))
    (group,) = QuantizationConfig.model_validate(entry).config_groups.values()
    preset = preset_name_to_scheme(PRESETS[name], ["Linear"])
    for ours, theirs in (
        (group.weights, preset.weights),
        (group.input_activations, preset.input_activations),
    ):
        for field in ("num_bits", "type", "strategy", "dynamic", "symmetric", "group_size"):
            assert getattr(ours, field) == getattr(theirs, field), field
    assert entry["ignore"] == ["lm_head"]


LLAMA = {
    "model_type": "llama", "num_hidden_layers": 2, "vocab_size": 40, "hidden_size": 256,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "intermediate_size": 256,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip
DENSE = {
    "model_type": "nemotron_h", "hybrid_override_pattern": "M-M*", "num_hidden_layers": 4,
    "vocab_size": 40, "hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 64, "intermediate_size": 256, "mamba_num_heads": 8, "mamba_head_dim": 32,
    "n_groups": 2, "ssm_state_size": 16, "conv_kernel": 4, "chunk_size": 8,
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    "config",
    [LLAMA, {**LLAMA, "tie_word_embeddings": True}, DENSE],
    ids=["llama", "tied llama", "dense hybrid"],
)
def test_slices_load_in_plain_transformers_with_our_logits(config, name, tmp_path):
    parent = make_parent(config, 2, torch.float32)
    scheme = make_scheme(parent.axis_map, name)
    batches = [{"input_ids": parent.ids}]
    scales = calibrate_inputs(parent.model, parent.axis_map, scheme, batches)
    quantise_checkpoint(parent.save(tmp_path), scheme, tmp_path / "q", input_scales=scales)
    slice_checkpoint(tmp_path / "q", {"hidden": 128, "ffn": 128}, tmp_path / "cut")
    # compressed-tensors unpacks NVFP4 to bf16 whatever the model's dtype and computes the scales of
    # inputs in it, which puts some of them one step of E4M3 off. So there every layer is compared
    # with what its functions give on the same inputs in fp32.
    dtype = torch.bfloat16 if name == "nvfp4" else torch.float32
    for path in (tmp_path / "q", tmp_path / "cut"):
        ours, _ = load_parent(path)
        theirs, info = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, output_loading_info=True
        )
        assert not info["missing_keys"] and not info["mismatched_keys"], info
        seen = {}
        for module_name, module in theirs.named_modules():
            if hasattr(module, "quantization_scheme"):
                module.register_forward_hook(partial(keep, seen, module_name))
        with torch.no_grad():
            expected = theirs.eval()(input_ids=parent.ids).logits
            logits = ours(input_ids=parent.ids).logits
            unquantised = parent.model(input_ids=parent.ids).logits
            assert len(seen) == sum(
                1 for _ in theirs.modules() if hasattr(_, "quantization_scheme")
            )
            for module_name, (inputs, outputs) in seen.items():
                if name == "nvfp4":
                    outputs = in_fp32(theirs.get_submodule(module_name), inputs)
                found = ours.get_submodule(module_name)(inputs.float())
                assert relative_error(found, outputs) < 1e-2, module_name
        if name != "nvfp4":
            assert relative_error(logits, expected) < 2e-3
        if path.name == "q":
            assert relative_error(logits, unquantised) > 5e-3, "nothing was quantised"


def keep(seen: dict, name: str, module, inputs: tuple, outputs: torch.Tensor) -> None:
    seen[name] = inputs[0], outputs


def in_fp32(module: torch.nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """What an NVFP4 layer, decompressed by its first use, gives with inputs quantised in fp32."""
    stored = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    args = module.quantization_scheme.input_activations
    shared, values, weight = stored["input_global_scale"], inputs.float(), stored["weight"].float()
    scale, zero = compute_dynamic_scales_and_zp(values, args, module, global_scale=shared)
    seen = fake_quantize(values, scale, zero, args, global_scale=shared)
    return torch.nn.functional.linear(seen, weight, stored.get("bias"))
