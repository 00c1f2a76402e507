"""Axis maps: what they read from a config, what they write, and what they refuse."""

from __future__ import annotations

import inspect
import json
import math
import re

import pytest
from transformers import AutoConfig

from star_elastic.architectures import ARCHITECTURES, architecture_of, read_config
from star_elastic.architectures.nemotron_h import OTHER_NAMES
from star_elastic.axes import AxisMap
from star_elastic.axes.widths import Widths, default_step, parse_widths
from star_elastic.cost.count import CostModel
from star_elastic.errors import ConfigError, ShapeError
from star_elastic.models.skeleton import build_skeleton
from tests.architectures import ROWS, fixed_config

BARE_HYBRID = AutoConfig.for_model("nemotron_h").to_dict()


def table(config: dict) -> AxisMap:
    return architecture_of(config).axis_map(config)


# Reading configs


@pytest.mark.parametrize("kind", ROWS)
def test_defaults_are_those_of_transformers(kind):
    """A config that names nothing but its layers counts as the model transformers builds."""
    config = dict(ROWS[kind].bare)
    model = build_skeleton(config)
    axis_map = table(config)
    built = sum(parameter.numel() for parameter in model.parameters())
    assert CostModel(axis_map).full.total == built


@pytest.mark.parametrize("kind", ROWS)
def test_the_table_names_every_parameter_and_buffer(kind):
    config = fixed_config(kind)
    model = build_skeleton(config)
    persistent = set(model.state_dict()) - {"lm_head.weight"} | set(table(config).tensors)
    assert persistent == set(table(config).tensors)
    for name, spec in table(config).tensors.items():
        shape = table(config).shape(spec, table(config).full)
        assert tuple(model.state_dict()[name].shape) == shape, name


@pytest.mark.parametrize(
    "layers",
    [
        {"hybrid_override_pattern": "M-M*"},
        {"layers_block_type": ["mamba", "mlp", "mamba", "attention"]},
        {"layers_block_type": ["linear_attention", "mlp", "linear_attention", "full_attention"]},
        {"layer_types": ["linear_attention", "mlp", "linear_attention", "full_attention"]},
    ],
)
def test_every_spelling_of_the_layers_is_read(layers):
    config = fixed_config("dense")
    expected = table(config)
    del config["hybrid_override_pattern"]
    assert table({**config, **layers}) == expected


def test_a_config_saved_by_transformers_is_read(tmp_path):
    for kind in ROWS:
        config = fixed_config(kind)
        fields = {name: value for name, value in config.items() if name != "model_type"}
        AutoConfig.for_model(config["model_type"], **fields).save_pretrained(tmp_path / kind)
        assert table(read_config(tmp_path / kind)) == table(config)
        assert table(read_config(tmp_path / kind / "config.json")) == table(config)


def test_encoded_infinities_are_decoded(tmp_path):
    file = tmp_path / "config.json"
    file.write_text('{"time_step_limit": [0.0, {"__float__": "Infinity"}]}')
    assert read_config(file) == {"time_step_limit": [0.0, math.inf]}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "holds no config.json; name a Hugging Face checkpoint"),
        ("{", "is not valid JSON"),
        ("\xff\xfe", "is not valid JSON"),
        ("[1]", "is not a JSON object"),
    ],
)
def test_unreadable_configs_are_refused(tmp_path, text, reason):
    if text is not None:
        (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=reason):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("kind", "change", "reason"),
    [
        ("dense", {"model_type": "gpt2"}, "model_type='gpt2' is not served; supported: "),
        ("dense", {"model_type": None}, "model_type=None is not served"),
        ("dense", {"hidden_size": "12"}, "hidden_size='12' is not a positive integer"),
        ("dense", {"hidden_size": 0}, "hidden_size=0 is not a positive integer"),
        ("dense", {"hybrid_override_pattern": "MX"}, "layer type 'X' is unknown; use M, mamba"),
        ("dense", {"hybrid_override_pattern": ""}, "names no layers; set hybrid_override_pattern"),
        ("dense", {"layers_block_type": 4}, "layers_block_type=4 is not a list of layer types"),
        ("dense", {"mamba_num_heads": 5}, "mamba_num_heads=5 is not a multiple of n_groups=2"),
        ("dense", {"num_attention_heads": 5}, "not a multiple of num_key_value_heads=2"),
        ("dense", {"tie_word_embeddings": True}, "is not supported for nemotron_h"),
        ("dense", {"layer_norm_epsilon": None}, "layer_norm_epsilon=None is not a positive num"),
        ("moe", {"n_routed_experts": 7}, "n_routed_experts=7 is not a multiple of n_group=2"),
        ("moe", {"num_experts_per_tok": 9}, "num_experts_per_tok=9 exceeds n_routed_experts=8"),
        ("moe", {"moe_latent_size": "5"}, "moe_latent_size='5' is not a positive integer"),
        ("llama", {"hidden_size": 26}, "hidden_size=26 is not a multiple of num_attention_heads=4"),
        ("llama", {"num_key_value_heads": 3}, "not a multiple of num_key_value_heads=3"),
        ("llama", {"head_dim": "4"}, "head_dim='4' is not a positive integer"),
        ("llama", {"rms_norm_eps": "small"}, "rms_norm_eps='small' is not a positive number"),
    ],
)
def test_impossible_configs_are_refused(kind, change, reason):
    with pytest.raises(ConfigError, match=reason):
        table({**fixed_config(kind), **change})


@pytest.mark.parametrize("key", OTHER_NAMES)
def test_fields_may_have_the_names_that_transformers_reads(key):
    """By either name the model of transformers; with both and two values, neither."""
    plain = fixed_config("moe")
    name = OTHER_NAMES[key]
    value = plain.get(name, BARE_HYBRID[name])
    config = {k: v for k, v in plain.items() if k != name}
    named = {**config, key: value}
    assert table(named) == table({**config, name: value})
    written = ARCHITECTURES["nemotron_h"].config_at(named, {"hidden": 8})
    assert key not in written and written[name] == value
    shapes = {n: p.shape for n, p in build_skeleton(named).named_parameters()}
    assert shapes == {
        n: p.shape for n, p in build_skeleton({**config, name: value}).named_parameters()
    }
    other = (
        (not value)
        if isinstance(value, bool)
        else [value]
        if isinstance(value, list)
        else value * 2
    )
    with pytest.raises(ConfigError, match=f"{key}=.* and {name}=.* are one field"):
        table({**config, name: value, key: other})


def test_every_name_of_transformers_is_known():
    """Those that it maps; and those that its config class takes in place of others."""
    hybrid = AutoConfig.for_model("nemotron_h")
    renamed = {old: new for old, new in hybrid.attribute_map.items() if new != "layers_block_type"}
    assert renamed.items() <= OTHER_NAMES.items()
    source = inspect.getsource(type(hybrid).__post_init__)
    assert set(re.findall(r'"(mamba_\w+)" in kwargs', source)) <= OTHER_NAMES.keys()
    assert not AutoConfig.for_model("llama").attribute_map


# Writing configs


def test_slices_name_their_layers_for_every_reader():
    config = {
        **fixed_config("moe"),
        "num_nextn_predict_layers": 1,
        "num_local_experts": 8,
        "layer_types": ["linear_attention", "moe", "linear_attention", "full_attention", "moe"],
    }
    family = ARCHITECTURES["nemotron_h"]
    written = family.config_at(config, {"experts": 4})
    assert written["hybrid_override_pattern"] == "MEM*E"
    assert written["layers_block_type"] == ["mamba", "moe", "mamba", "attention", "moe"]
    assert written["n_routed_experts"] == 4
    assert written["num_nextn_predict_layers"] == 0
    assert "layer_types" not in written and "num_local_experts" not in written
    assert config["n_routed_experts"] == 8, "the parent's config was changed"


def test_head_size_is_written_out_or_it_would_follow_the_hidden_size():
    config = fixed_config("llama")
    written = ARCHITECTURES["llama"].config_at(config, {"hidden": 12, "heads": 2})
    assert (written["hidden_size"], written["num_attention_heads"]) == (12, 2)
    assert (written["head_dim"], written["num_key_value_heads"]) == (6, 2)
    del config["num_key_value_heads"]
    assert ARCHITECTURES["llama"].config_at(config, {"hidden": 12})["num_key_value_heads"] == 4


@pytest.mark.parametrize("kind", ROWS)
def test_every_other_field_is_carried_over(kind):
    config = {**fixed_config(kind), "initializer_range": 0.5, "of_a_later_version": [1]}
    written = architecture_of(config).config_at(config, {})
    kept = {"hybrid_override_pattern", "layers_block_type"}
    for field, value in config.items():
        assert field in kept or written[field] == value, field


# Widths a family cannot express


@pytest.mark.parametrize(
    ("kind", "widths", "reason"),
    [
        (
            "dense",
            {"experts": 4},
            "axis 'experts' does not exist in this nemotron_h model; use hidden, ffn, ssm_heads, h",
        ),
        ("dense", {"ssm_heads": 5}, "ssm_heads=5 is not a multiple of its 2 groups; use 4 or 6"),
        ("dense", {"ssm_heads": 1}, "ssm_heads=1 is not a multiple of its 2 groups; use 2 or 4"),
        ("dense", {"ssm_heads": 99}, "ssm_heads=99 is not a multiple of its 2 groups; use 6$"),
        ("dense", {"heads": 3}, "heads=3 is not a multiple of its 2 groups; use 2 or 4"),
        ("dense", {"hidden": 13}, "hidden=13 is outside 1 to 12; choose a width in that range"),
        ("dense", {"hidden": 0}, "hidden=0 is outside 1 to 12"),
        ("dense", {"ffn": -1}, "ffn=-1 is outside 1 to 7"),
        ("dense", {"ffn": 2.0}, "ffn=2.0 is not a whole number; give a number of units"),
        ("dense", {"ffn": (3, 4)}, "ffn has 2 widths for 1 layers; give one width, or one per"),
        ("dense", {"hidden": (6, 6)}, "hidden has 2 widths for 0 layers; give one width"),
        ("moe", {"experts": 2}, "experts=2 is outside 4 to 8"),
        ("moe", {"experts": 5}, "experts=5 is not a multiple of its 2 groups; use 4 or 6"),
        ("llama", {"hidden": 22}, "hidden=22 is not a multiple of heads=4, which the llama config"),
        ("llama", {"hidden": 2}, "config requires; use hidden=4"),
    ],
)
def test_impossible_widths_are_refused(kind, widths, reason):
    with pytest.raises(ShapeError, match=reason):
        table(fixed_config(kind)).complete(widths)


@pytest.mark.parametrize("kind", ["moe", "llama"])
def test_widths_that_differ_between_layers_are_not_exported(kind):
    config = fixed_config(kind)
    family = architecture_of(config)
    axis = "expert_ffn" if kind == "moe" else "ffn"
    reason = f"{axis} differs between layers, which {family.model_type}'s config.json cannot expr"
    mixed, alike = {axis: (3, 4)}, {axis: (4, 4)}
    with pytest.raises(ShapeError, match=reason):
        family.config_at(config, mixed)
    assert family.config_at(config, alike) == family.config_at(config, {axis: 4})
    with pytest.raises(ShapeError, match=rf"that it can: .*{axis}=4"):
        family.config_at(config, mixed)
    with pytest.raises(ShapeError, match="a table of its own needs one width per axis"):
        table(config).at(mixed)


# Widths


def test_widths_are_values():
    one, two = Widths({"hidden": 4, "ffn": [2, 3]}), Widths({"ffn": (2, 3), "hidden": 4})
    assert one == two and hash(one) == hash(two) and one == {"hidden": 4, "ffn": (2, 3)}
    assert one.replace(hidden=2) == {"hidden": 2, "ffn": (2, 3)} and one["hidden"] == 4
    assert str(one.replace(ffn=2)) == "hidden=4,ffn=2" and str(one) == "hidden=4,ffn=2/3"
    assert json.loads(json.dumps(dict(one))) == {"hidden": 4, "ffn": [2, 3]}


def test_widths_on_the_command_line():
    assert parse_widths(" hidden=1920, expert_ffn = 960 ,") == {"hidden": 1920, "expert_ffn": 960}
    for text in ("hidden", "hidden=", "hidden=-4", "hidden=1.5", "hidden=4=5"):
        with pytest.raises(ConfigError, match="is not of the form axis=number; write for example"):
            parse_widths(text)


@pytest.mark.parametrize(
    ("size", "groups", "step"),
    [(2688, 1, 128), (1856, 1, 16), (1857, 1, 1), (64, 8, 16), (8, 2, 2), (24, 1, 1), (128, 1, 16)],
)
def test_default_steps(size, groups, step):
    assert default_step(size, groups) == step
