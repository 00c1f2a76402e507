"""Quantising a family after training: calibration, layouts, what engines read, and bad input."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import star_elastic
from star_elastic.architectures import architecture_of, read_config
from star_elastic.checkpoints.companions import INPUT_SCALES
from star_elastic.checkpoints.elastic import ElasticCheckpoint
from star_elastic.checkpoints.layouts import read_scheme
from star_elastic.checkpoints.manifest import save_manifest
from star_elastic.checkpoints.tensors import save_tensors
from star_elastic.cli.commands import app
from star_elastic.errors import CheckpointError, ConfigError, ShapeError
from star_elastic.export.engines import check_engines
from star_elastic.models.calibration import calibrate_inputs
from star_elastic.models.fake_quantisation import FakeQuantisation
from star_elastic.models.linear import KnownInput
from star_elastic.models.load import load_parent
from star_elastic.quant import formats
from star_elastic.quant.formats import fake_activation, format_of, quantise
from star_elastic.quant.scheme import BEFORE_ATTENTION, make_scheme
from star_elastic.rewrite.family import quantise_family, shared_scales
from star_elastic.rewrite.quantise import quantise_checkpoint
from star_elastic.train.run import train
from tests.architectures import fixed_config
from tests.checkpoints import rewrite
from tests.laws.parents import make_parent
from tests.tiny_run import BLOCKS, config_in


@pytest.fixture
def elastic(blocks):
    return blocks


@pytest.fixture(scope="module")
def nvfp4(blocks, run_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("nvfp4") / "family"
    result = run("quantize", blocks, "--format", "nvfp4", "--out", out,
                 "--data", run_folder / "rows.jsonl", "--samples", 8, "--json")  # fmt: skip
    assert result["bytes"] < result["bytes_before"]
    return out


def run(*arguments, code: int = 0):
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


def refused(*arguments) -> str:
    result = CliRunner().invoke(app, list(map(str, arguments)))
    if result.exception and not isinstance(result.exception, SystemExit):
        return str(result.exception)
    raise AssertionError(result.output)


def test_bytes_follow_the_format(elastic, nvfp4, run_folder, tmp_path):
    """4.5 bits per weight in NVFP4, 8 in FP8, of 32 here; what is kept stays as it is."""
    for name, share in (("nvfp4", 4.5 / 32), ("fp8-channel", 8 / 32)):
        result = run("quantize", elastic, "--format", name, "--out", tmp_path / name,
                     "--data", run_folder / "rows.jsonl", "--samples", 2, "--json")  # fmt: skip
        parts = result["parts"]
        for part in ("embeddings", "head", "norms", "routers"):
            assert parts[part]["after"] == parts[part]["before"]
        for part in ("routed experts", "shared experts", "attention"):
            ratio = parts[part]["after"] / parts[part]["before"]
            assert share < ratio < share + 0.05, (name, part)


def test_every_size_has_the_scales_of_its_own_inputs(elastic, nvfp4, tmp_path):
    family = star_elastic.load(nvfp4)
    own = family.checkpoint.input_scales("small")
    assert own and not family.checkpoint.input_scales("large")
    shared = family.parent.quantised_inputs.scales
    assert all(own[name] <= shared[name] * (1 + 1e-6) for name in own)
    run("slice", nvfp4, "--size", "small", "--out", tmp_path / "small", "--json")
    model, _ = load_parent(tmp_path / "small")
    for name, scale in model.quantised_inputs.scales.items():
        assert torch.allclose(scale, own[name], rtol=1e-6)
    ids = torch.arange(30)[None] + 5
    with torch.no_grad():
        ours, theirs = (m(input_ids=ids).logits for m in (family["small"], model))
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


def test_a_family_may_be_named_by_a_relative_path(nvfp4, elastic, tmp_path, monkeypatch):
    """What is read later is read from where it was loaded."""
    ids = torch.arange(30)[None] + 5
    monkeypatch.chdir(nvfp4.parent)
    family = star_elastic.load(nvfp4.name)
    monkeypatch.chdir(tmp_path)
    expected = star_elastic.load(nvfp4)["small"](input_ids=ids).logits
    assert torch.equal(family["small"](input_ids=ids).logits, expected)
    assert family.tokenizer.encode("1") and family.at(active=0.99)


def test_scales_that_are_gone_are_told(nvfp4, elastic, tmp_path):
    """With the shared ones a size would compute something else, and nothing would show it."""
    lost = shutil.copytree(nvfp4, tmp_path / "lost")
    (lost / INPUT_SCALES).unlink()
    with pytest.raises(CheckpointError, match=rf"{INPUT_SCALES} does not exist"):
        star_elastic.load(lost)["small"]
    star_elastic.load(lost)["large"]
    for command in (("slice", lost, "--size", "small", "--out", tmp_path / "s"), ("check", lost)):
        assert INPUT_SCALES in refused(*command)
    # As a family has it that does not say which sizes have some.
    shutil.copyfile(nvfp4 / INPUT_SCALES, lost / INPUT_SCALES)
    manifest = star_elastic.load(lost).manifest
    save_manifest(replace(manifest, own_input_scales=()), lost)
    unsaid, said = (ElasticCheckpoint(path).input_scales("small") for path in (lost, nvfp4))
    assert unsaid.keys() == said.keys()
    save_manifest(manifest, lost)
    save_tensors(lost / INPUT_SCALES, {"medium/x": torch.ones(1)})
    assert "lacks the scales of size 'small'" in refused("check", lost)


def test_bytes_of_a_quantised_family_are_asked_for_in_shares(nvfp4, tmp_path):
    """Its router counts the bytes that it had before."""
    asked = ("slice", nvfp4, "--out", tmp_path / "out", "--budget")
    assert "give a share of the parent's, like bytes=0.6" in refused(*asked, "bytes=150KB")


def test_a_size_that_cannot_be_quantised_is_named(trained, tmp_path):
    said = refused("quantize", trained.elastic, "--format", "nvfp4", "--out", tmp_path / "q")
    assert "size 'small' cannot be quantised to nvfp4: " in said and "fp8-channel takes any" in said


def test_the_checkpoint_has_the_largest_scales_of_any_size(elastic):
    """The largest size need not have the largest inputs."""
    config = read_config(elastic)
    axis_map = architecture_of(config).axis_map(config)
    scheme = make_scheme(axis_map, "fp8")
    first, second, *others = scheme.quantised(axis_map)
    one, two, three = (torch.tensor([value]) for value in (1.0, 2.0, 3.0))
    scales = {"large": {first: one, second: three}, "small": {first: two, second: one}}
    assert others and shared_scales(scales, scheme, axis_map) == {first: two, second: three}


@pytest.mark.parametrize("name", ["fp8", "nvfp4"])
def test_layers_that_engines_fuse_have_one_scale(name, tmp_path):
    """vLLM makes one layer of q, k and v, and one of gate and up, with the larger scale of all."""
    config = {**fixed_config("llama"), "hidden_size": 32, "intermediate_size": 32}
    parent = make_parent(config, 3, torch.float32)
    scheme = make_scheme(parent.axis_map, name)
    inputs = {weight: torch.ones(1) for weight in scheme.quantised(parent.axis_map)}
    quantise_checkpoint(parent.save(tmp_path), scheme, tmp_path / "q", input_scales=inputs)
    written = load_file(tmp_path / "q" / "model.safetensors")
    last = "weight_global_scale" if name == "nvfp4" else "weight_scale"
    state = {name: value.detach() for name, value in parent.state.items()}
    frozen = FakeQuantisation.of(state, parent.axis_map, scheme, inputs).largest
    for fused in (
        "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
        "mlp.gate_proj mlp.up_proj",
    ):
        layers = [f"model.layers.0.{layer}" for layer in fused.split()]
        magnitudes = {float(state[f"{layer}.weight"].abs().max()) for layer in layers}
        assert len(magnitudes) == len(layers)
        assert len({float(written[f"{layer}.{last}"]) for layer in layers}) == 1
        assert {float(frozen[f"{layer}.weight"]) for layer in layers} == {max(magnitudes)}


def test_modelopt_has_the_same_values_under_its_own_names(nvfp4, tmp_path):
    run("slice", nvfp4, "--size", "small", "--out", tmp_path / "ct", "--json")
    run(
        "slice",
        nvfp4,
        "--size",
        "small",
        "--layout",
        "modelopt",
        "--out",
        tmp_path / "mo",
        "--json",
    )
    ours, theirs = (load_file(tmp_path / n / "model.safetensors") for n in ("ct", "mo"))
    assert len(ours) == len(theirs)
    for name, value in ours.items():
        if name.endswith("weight_packed"):
            other = theirs[name.replace("weight_packed", "weight")]
        elif name.endswith("_global_scale"):
            new = {"weight_global_scale": "weight_scale_2", "input_global_scale": "input_scale"}
            stem, _, last = name.rpartition(".")
            other = theirs[f"{stem}.{new[last]}"]
            assert other.shape == ()
            value = (1 / value).reshape(())
        else:
            other = theirs[name]
        assert torch.equal(value.float(), other.float()), name
    entry = json.loads((tmp_path / "mo" / "hf_quant_config.json").read_text())["quantization"]
    assert entry["quant_algo"] == "NVFP4" and "lm_head" in entry["exclude_modules"]
    assert "quantization_config" not in read_config(tmp_path / "mo")
    with pytest.raises(ConfigError, match="ModelOpt's layout"):
        load_parent(tmp_path / "mo")


def test_check_tells_who_runs_what(elastic, nvfp4, tmp_path):
    run(
        "slice",
        nvfp4,
        "--size",
        "small",
        "--layout",
        "modelopt",
        "--out",
        tmp_path / "mo",
        "--json",
    )
    found = {
        path.name: {v["engine"]: v["runs"] for v in run("check", path, "--json")["engines"]}
        for path in (elastic, nvfp4, tmp_path / "mo")
    }
    assert found["elastic"] == dict.fromkeys(
        ("star-elastic", "transformers", "vLLM", "llama.cpp"), True
    )
    # transformers ignores the global scales of fused NVFP4 experts.
    assert found[nvfp4.name]["star-elastic"] and not found[nvfp4.name]["transformers"]
    assert not found["mo"]["star-elastic"] and found["mo"]["vLLM"]
    notes = " ".join(v.note for v in check_engines(nvfp4))
    assert "no multiple of 128" in notes


def test_parts_are_kept_by_name(elastic):
    config = read_config(elastic)
    axis_map = architecture_of(config).axis_map(config)
    every = make_scheme(axis_map, "fp8").quantised(axis_map)
    kept = make_scheme(axis_map, "fp8", ["attention", BEFORE_ATTENTION]).quantised(axis_map)
    gone = {every[name].part for name in every.keys() - kept.keys()}
    assert gone == {"attention", "mamba"}
    assert {spec.part for spec in kept.values()} == {"routed experts", "shared experts"}
    with pytest.raises(ConfigError, match="nothing is left to quantise"):
        make_scheme(axis_map, "fp8-block")


def test_of_all_mamba_layers_the_last_before_attention_is_kept():
    config = fixed_config("moe")
    assert config["hybrid_override_pattern"] == "MEM*E"
    axis_map = architecture_of(config).axis_map(config)
    kept = make_scheme(axis_map, "fp8", [BEFORE_ATTENTION]).kept
    assert {axis_map.tensors[name].layer for name in kept} == {2}


def test_calibration_by_percentile_and_by_the_largest():
    parent = make_parent({**fixed_config("moe"), "hidden_size": 16}, 5, torch.float32)
    scheme = make_scheme(parent.axis_map, "fp8")
    batches = [{"input_ids": parent.ids}, {"input_ids": parent.ids.flip(1)}]
    name = "model.layers.0.mixer.in_proj.weight"
    seen = []
    module = parent.model.get_submodule(name.removesuffix(".weight"))
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].abs().flatten()))
    largest = calibrate_inputs(parent.model, parent.axis_map, scheme, batches)
    handle.remove()
    values = torch.cat(seen)
    assert largest[name].item() == pytest.approx(values.max().item() / 448, rel=1e-6)
    most = calibrate_inputs(parent.model, parent.axis_map, scheme, batches, percentile=90)
    exact = values.quantile(0.9).item() / 448
    assert exact * 0.999 <= most[name].item() <= exact * 1.05
    # What passes the activation function is what the second matrix of the experts reads.
    experts = parent.model.get_submodule("model.layers.1.mixer.experts")
    through = []
    before = experts.act_fn
    experts.act_fn = torch.nn.Sequential(before, Keep(through))
    parent.model(input_ids=parent.ids)
    experts.act_fn = before
    down = calibrate_inputs(parent.model, parent.axis_map, scheme, batches[:1])
    found = down["model.layers.1.mixer.experts.down_proj"].item() * 448
    assert found == pytest.approx(max(t.abs().max().item() for t in through), rel=1e-6)
    assert experts.act_fn is before


class Keep(torch.nn.Module):
    def __init__(self, into: list):
        super().__init__()
        self.into = into

    def forward(self, values):
        self.into.append(values)
        return values


IN_PARTS = [
    (name, shape)
    for name in ("fp8", "fp8-channel", "fp8-block", "nvfp4")
    for shape in ((512, 256), (3, 384, 128), (300, 256))
    if name != "fp8-block" or shape[-2] % 128 == 0
]


@pytest.mark.parametrize(("name", "shape"), IN_PARTS)
def test_large_weights_are_quantised_in_parts(name, shape, monkeypatch):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    whole = quantise(weight, format_of(name))
    monkeypatch.setattr(formats, "CHUNK", 128 * weight[..., :1, :].numel())
    parts = quantise(weight, format_of(name))
    assert torch.equal(whole.codes.view(torch.uint8), parts.codes.view(torch.uint8))
    assert torch.equal(whole.scales.float(), parts.scales.float())


def test_gradients_pass_quantised_inputs_as_they_are():
    values = torch.randn(3, 32, requires_grad=True)
    weights = torch.randn(3, 32)
    seen = KnownInput(format_of("nvfp4"), torch.tensor([1e-3]))(values)
    (seen * weights).sum().backward()
    assert torch.equal(values.grad, weights)
    exact = fake_activation(values.detach(), format_of("nvfp4"), torch.tensor([1e-3]))
    assert torch.allclose(seen, exact, atol=1e-6)


def test_mistakes_are_told_in_one_line(elastic, nvfp4, run_folder, tmp_path):
    data = ("--data", run_folder / "rows.jsonl")
    out = ("--out", tmp_path / "out")
    for arguments, message in (
        ((elastic, "--format", "int4", *out), "format 'int4' is unknown; use fp8"),
        ((elastic, "--format", "fp8", *out), "fp8 needs data to calibrate inputs on"),
        ((elastic, "--format", "fp8", *data, "--keep", "all", *out), "part 'all' is unknown"),
        ((nvfp4, "--format", "fp8", *data, *out), "is quantised already"),
        ((run_folder / "parent", "--format", "fp8", *data, *out), "holds no elastic.json"),
        ((elastic, "--format", "fp8", *data, "--out", elastic), "exists already"),
        ((elastic, "--format", "fp8", *data, "--percentile", 0, *out), "percentile=0.0 is not in"),
    ):
        assert message in refused("quantize", *arguments)
    assert "layout 'gguf' is unknown" in refused(
        "slice", nvfp4, "--size", "small", "--layout", "gguf", *out
    )
    assert "ModelOpt's layout is written for fp8 and nvfp4" in refused(
        "slice", elastic, "--size", "small", "--layout", "modelopt", *out
    )
    assert "expert_ffn=24 ends inside a block of 16" in refused(
        "slice", nvfp4, "--widths", "expert_ffn=24", *out
    )
    assert not (tmp_path / "out").exists()


STEM = "backbone.layers.0.mixer.in_proj"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.pop(f"{STEM}.weight_scale"), "lacks the tensor"),
        (lambda t: t.pop(f"{STEM}.input_global_scale"), "lacks the tensor"),
        (lambda t: t[f"{STEM}.weight_global_scale"].fill_(float("nan")), "no numbers"),
        (lambda t: t[f"{STEM}.weight_global_scale"].fill_(0), "a scale that is not > 0"),
        (lambda t: t[f"{STEM}.input_global_scale"].fill_(-1), "is not > 0"),
        (lambda t: t[f"{STEM}.weight_scale"].view(torch.uint8).fill_(0x7F), "no numbers"),
        (
            lambda t: t.update({
                f"{STEM}.weight_packed": t[f"{STEM}.weight_packed"][:, :-8].contiguous()
            }),
            "has shape",
        ),
        (
            lambda t: t.update({
                f"{STEM}.weight_scale": t[f"{STEM}.weight_scale"].float()
            }),
            "is stored as torch.float32",
        ),
    ],
)  # fmt: skip
def test_damaged_files_are_told(nvfp4, tmp_path, damage, message):
    path = tmp_path / "damaged"
    shutil.copytree(nvfp4, path)
    tensors = load_file(path / "model.safetensors")
    damage(tensors)
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load_parent(path)


def test_widths_that_differ_between_layers_are_refused(deep_folder, tmp_path):
    per_layer = {'parent = "parent"': 'parent = "parent"\nper_layer = ["ssm_heads"]'}
    text = {**per_layer, **BLOCKS}
    family = train(config_in(deep_folder, "deep-blocks", **text)).elastic
    manifest = json.loads((family / "elastic.json").read_text())
    manifest["sizes"]["small"]["widths"]["ssm_heads"] = [8, 6]
    (family / "elastic.json").write_text(json.dumps(manifest))
    with pytest.raises(ShapeError, match="differs between layers"):
        quantise_family(family, tmp_path / "q", "fp8-channel")


def test_rows_without_tokens_are_left_out(elastic, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": ""}\n{"text": "add 1 2"}\n')
    run("quantize", elastic, "--format", "fp8", "--out", tmp_path / "q",
        "--data", tmp_path / "rows.jsonl", "--json")  # fmt: skip


def test_other_quantisations_are_refused(nvfp4, tmp_path):
    path = tmp_path / "other"
    shutil.copytree(nvfp4, path)
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"] = 32
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="quantised in a way that star-elastic does not read"):
        load_parent(path)
    axis_map = architecture_of(config).axis_map(config)
    assert read_scheme({}, axis_map) is None


def test_weights_that_are_not_finite_are_refused(tmp_path):
    parent = make_parent({**fixed_config("dense"), "hidden_size": 16}, 6, torch.float32)
    scheme = make_scheme(parent.axis_map, "fp8-channel")
    source = parent.save(tmp_path)
    name = "backbone.layers.0.mixer.in_proj.weight"
    rewrite(source, lambda tensors: tensors[name][0, 0].fill_(math.inf))
    with pytest.raises(CheckpointError, match="in_proj.weight is not finite"):
        quantise_checkpoint(source, scheme, tmp_path / "q")
    assert not (tmp_path / "q").exists()
    assert not (tmp_path / "q" / INPUT_SCALES).exists()
