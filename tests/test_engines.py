"""What `check` says of transformers is tried: every yes loads and runs there, and says the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from star_elastic.architectures import architecture_of, read_config
from star_elastic.export.engines import Verdict, check_engines
from star_elastic.models.calibration import calibrate_inputs
from star_elastic.models.load import load_parent
from star_elastic.quant.scheme import make_scheme
from star_elastic.rewrite.quantise import quantise_checkpoint
from star_elastic.rewrite.stream import slice_checkpoint
from tests.checkpoints import edit_json, plain_checkpoint

IDS = (torch.arange(24)[None] % 20) + 5
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FORMATS = (None, "fp8", "fp8-channel", "nvfp4")
KEEPS = {"llama": ((),), "nemotron_h": ((), ("routed experts",))}
CASES = [
    (model_type, dtype, name, keep)
    for model_type, keeps in KEEPS.items()
    for dtype in DTYPES
    for name in FORMATS
    for keep in (keeps if name else keeps[:1])
]
ALIKE = 0.9
"""Cosine of logits: NVFP4 is computed in BF16 there, and rounding moves inputs to other codes."""


@pytest.fixture(scope="module")
def parents(tmp_path_factory):
    """Checkpoints of both types in every dtype, by name."""
    folder, made = tmp_path_factory.mktemp("parents"), {}

    def parent(model_type: str, dtype: str) -> Path:
        key = f"{model_type}-{dtype}"
        if key not in made:
            made[key] = plain_checkpoint(
                folder / key, model_type, DTYPES[dtype], initializer_range=0.05
            )
        return made[key]

    return parent


def quantised(path: Path, name: str, keep: tuple[str, ...], out: Path) -> Path:
    """A checkpoint with its weights in a format, and inputs calibrated on a few tokens."""
    config = read_config(path)
    axis_map = architecture_of(config).axis_map(config)
    scheme = make_scheme(axis_map, name, keep)
    scales = {}
    if scheme.format.is_calibrated:
        model, _ = load_parent(path)
        scales = calibrate_inputs(model, axis_map, scheme, [{"input_ids": IDS}])
    quantise_checkpoint(path, scheme, out, input_scales=scales)
    return out


def of_transformers(path: Path) -> Verdict:
    return next(v for v in check_engines(path) if v.engine == "transformers")


def logits_there(path: Path, **options) -> torch.Tensor:
    """What plain transformers computes, loaded as anybody would."""
    model = AutoModelForCausalLM.from_pretrained(path, **options).eval()
    with torch.no_grad():
        return model(IDS).logits.float()


def alike(path: Path, **options) -> bool:
    """Whether transformers computes what we do."""
    model, _ = load_parent(path)
    with torch.no_grad():
        ours = model(IDS).logits.flatten()
    theirs = logits_there(path, **options).flatten()
    return torch.cosine_similarity(ours, theirs, 0).item() > ALIKE


@pytest.mark.parametrize(("model_type", "dtype", "name", "keep"), CASES)
def test_transformers_runs_what_it_is_said_to_run(parents, tmp_path, model_type, dtype, name, keep):
    path = parents(model_type, dtype)
    if name:
        path = quantised(path, name, keep, tmp_path / "quantised")
    narrow = {"hidden": 16} | ({"ffn": 16} if model_type == "llama" else {})
    slice_checkpoint(path, narrow, tmp_path / "slice")
    for checkpoint in (path, tmp_path / "slice"):
        assert of_transformers(checkpoint).runs == alike(checkpoint)


def test_a_no_comes_with_a_way_that_works(parents, tmp_path):
    path = quantised(parents("llama", "fp32"), "nvfp4", (), tmp_path / "q")
    for named in ("float32", ...):  # as older versions of this package wrote it
        edit_json(path / "config.json", dtype=named)
        verdict = of_transformers(path)
        assert not verdict.runs and "dtype=torch.bfloat16" in verdict.note
        with pytest.raises(RuntimeError, match="same dtype"):
            logits_there(path)
        assert alike(path, dtype=torch.bfloat16)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_experts_of_any_width_run_where_the_config_says_how(parents, tmp_path, dtype):
    parent = parents("nemotron_h", dtype)
    slice_checkpoint(parent, {"expert_ffn": 13}, tmp_path / "ours")
    verdict = of_transformers(tmp_path / "ours")
    assert verdict.runs and "slowly" in verdict.note and alike(tmp_path / "ours")
    edit_json(tmp_path / "ours" / "config.json", experts_implementation=...)  # from elsewhere
    verdict = of_transformers(tmp_path / "ours")
    assert not verdict.runs and 'experts_implementation="eager"' in verdict.note
    with pytest.raises(RuntimeError, match="strides"):
        logits_there(tmp_path / "ours")
    assert alike(tmp_path / "ours", experts_implementation="eager")
