"""The run config explains itself: its reference, its defaults."""

from __future__ import annotations

import dataclasses
import math
import typing
from dataclasses import replace
from pathlib import Path

import pytest

from star_elastic.architectures import architecture_of
from star_elastic.cli import main
from star_elastic.cost.amounts import parse_budget
from star_elastic.cost.count import CostModel
from star_elastic.data.source_config import SourceConfig
from star_elastic.errors import ConfigError
from star_elastic.router.grid import default_choices, make_grid
from star_elastic.router.reach import check_budgets
from star_elastic.router.router import Annealing
from star_elastic.train.check import beyond_positions
from star_elastic.train.config import (
    CalibrationConfig,
    EngineConfig,
    OptimizerConfig,
    QuantConfig,
    RouterConfig,
    RunConfig,
    StageConfig,
    load_run_config,
    parse,
)
from star_elastic.train.reference import keys, reference, sections
from star_elastic.train.stages import Curriculum

ROOT = Path(__file__).parent.parent
SECTIONS = dict(sections(RunConfig))


def test_the_page_is_made_from_the_config(capsys):
    page = (ROOT / "docs" / "run_config.md").read_text(encoding="utf-8")
    assert page == reference(), "run: star-elastic config > docs/run_config.md"
    main(["config"])
    assert capsys.readouterr().out == page


def test_relative_paths_are_relative_to_the_file(tmp_path, monkeypatch):
    """Wherever the command is typed."""
    folder = tmp_path / "configs"
    folder.mkdir()
    file = folder / "run.toml"
    file.write_text("""
parent = "../parent"
family = "../runs/family"
out = "runs/new"
latency = "latency.json"
[sizes.large]
active = 0.5
[[data]]
files = ["rows/a.jsonl", "rows/b.jsonl"]
[[stages]]
tokens = 4096
context = 64
batch_size = 4
[calibration]
scores = "scores.safetensors"
[quant]
format = "fp8"
""")
    monkeypatch.chdir(tmp_path)
    config = load_run_config(file)
    scores, rows = config.calibration.scores, config.data[0].files
    found = (config.parent, config.family, config.out, config.latency, scores, *rows)
    assert found == (
        str(tmp_path / "parent"), str(tmp_path / "runs/family"), str(folder / "runs/new"),
        str(folder / "latency.json"), str(folder / "scores.safetensors"),
        str(folder / "rows/a.jsonl"), str(folder / "rows/b.jsonl"),
    )  # fmt: skip


@pytest.mark.parametrize("title", SECTIONS)
def test_every_key_says_what_it_does(title):
    kind = SECTIONS[title]
    told = keys(kind)
    assert [key.name for key in told] == [field.name for field in dataclasses.fields(kind)]
    for key in told:
        assert key.note.endswith("."), f"{title} {key.name}: say below it what it does"
        if key.default == "must be given":
            assert key.start, f"{title} {key.name}: say what to start with"


def test_every_table_has_its_section():
    assert {"At the top", "`[[data]]`", "`[[stages]]`", "`[router.annealing]`"} <= set(SECTIONS)
    assert len(SECTIONS) == len(set(SECTIONS.values())) == 10


def test_the_commented_config_fits_any_llama():
    """It is valid, its sizes can be met by llamas of several shapes, and its defaults stay right
    when tokens and context are all that is changed. What it says in numbers is so."""
    file = ROOT / "recipes" / "llama_24gb" / "run.toml"
    config = load_run_config(file)
    assert [size["active"] for size in config.sizes.values()] == ["100%", "80%", "60%"]
    (stage,) = config.stages
    assert round(stage.num_steps, -3) == 12_000 and stage.warmup_steps == 60
    assert round(config.router.commit_at * stage.num_steps, -2) == 2_400
    for shape in LLAMAS.values():
        axis_map = architecture_of(shape).axis_map(shape)
        grid, cost = make_grid(default_choices(axis_map), axis_map), CostModel(axis_map)
        assert set(grid.choices) == {"hidden", "ffn"}
        for name, budgets in config.sizes.items():
            share = parse_budget(budgets["active"], "active").value
            check_budgets(name, {"active": share}, cost, grid)
        assert not beyond_positions(config, shape)
    parameters = CostModel(axis_map).full.total
    assert parameters == 361_821_120  # of the last one, which it is written for
    text = file.read_text(encoding="utf-8")
    assert f"360M take {20 * parameters / 1e9:.1f} GB" in text
    assert f"states of {12 * parameters / 1e9:.1f} GB" in text
    short = replace(stage, tokens=100_000, context=256, warmup_steps=None)
    (short,) = replace(config, stages=(short,)).stages
    assert (short.num_steps, short.warmup_steps) == (98, 10)


LLAMAS = {
    "SmolLM2-135M": {
        "model_type": "llama",
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        "tie_word_embeddings": True, "max_position_embeddings": 8192,
    },
    "Llama-3.2-1B": {
        "model_type": "llama",
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
        "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
        "tie_word_embeddings": True, "max_position_embeddings": 131072,
    },
    "SmolLM2-360M": {
        "model_type": "llama",
        "vocab_size": 49152, "hidden_size": 960, "intermediate_size": 2560,
        "num_hidden_layers": 32, "num_attention_heads": 15, "num_key_value_heads": 5,
        "tie_word_embeddings": True, "max_position_embeddings": 8192,
    },
}  # fmt: skip


def run(**stage):
    content = {
        "parent": "p", "out": "o", "sizes": {"large": {"active": 1.0}},
        "data": [{"files": ["rows.jsonl"]}], "stages": [{"context": 64, "batch_size": 2, **stage}],
    }  # fmt: skip
    return parse(RunConfig, content, "")


@pytest.mark.parametrize(("steps", "warm"), [(4, 0), (28, 3), (150, 15), (600, 60), (5000, 60)])
def test_the_learning_rate_reaches_its_peak_in_short_runs(steps, warm):
    """By default; what is asked for is done."""
    (stage,) = run(tokens=128 * steps, learning_rate=1e-3).stages
    assert (stage.num_steps, stage.warmup_steps) == (steps, warm)
    rates = [Curriculum([stage]).learning_rate(step) for step in range(steps)]
    assert max(rates) > 0.97e-3
    assert run(tokens=128 * steps, warmup_steps=7).stages[0].warmup_steps == 7


# Slips of the pen


@pytest.mark.parametrize("name", ["..", "-x", "a b", "a/b", "$(id)", "", "é", "a" * 65])
def test_names_of_sizes_are_names_of_files(name):
    with pytest.raises(ConfigError, match="sizes has the name .*begin with a letter or a digit"):
        small_run(sizes={name: {"active": 1.0}})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"stages": ({"tokens": 10**30},)}, r"stages\[0\].tokens=1000.* is more than"),
        ({"stages": ({"tokens": 8, "context": 10**18},)}, r"stages\[0\].context="),
        ({"stages": ({"tokens": 8, "batch_size": 10**18},)}, r"stages\[0\].batch_size="),
        (
            {"stages": ({"tokens": 8, "context": 2**24, "batch_size": 2**20},)},
            "make a step of",
        ),
        ({"engine": {"workers": 10**18}}, "engine.workers="),
        ({"engine": {"micro_batch": 10**18}}, "engine.micro_batch="),
        ({"calibration": {"context": 10**18}}, "calibration.context="),
        ({"workload": {"dtype_bytes": 10**18}}, "workload.dtype_bytes="),
        ({"seed": 10**30}, "seed="),
    ],
)
def test_numbers_have_bounds(change, said):
    with pytest.raises(ConfigError, match=said):
        small_run(**change)


PLACES = {
    "data": (SourceConfig, lambda bad: {"data": [{"files": ["a"]}, {"files": ["b"], **bad}]}),
    "stages": (StageConfig, lambda bad: {"stages": [{"tokens": 8}, {"tokens": 8, **bad}]}),
    "calibration": (CalibrationConfig, lambda bad: {"calibration": bad}),
    "router": (RouterConfig, lambda bad: {"router": bad}),
    "router.annealing": (Annealing, lambda bad: {"router": {"annealing": bad}}),
    "optimizer": (OptimizerConfig, lambda bad: {"optimizer": bad}),
    "engine": (EngineConfig, lambda bad: {"engine": bad}),
    "quant": (QuantConfig, lambda bad: {"quant": bad}),
}  # fmt: skip


def numbers_of(kind):
    """Every key that is a number or a list of them, with values that none can take."""
    for key, hint in typing.get_type_hints(kind).items():
        plain = typing.get_args(hint)[0] if typing.get_args(hint) else hint
        for value in {int: [-1], float: [-1.0, math.nan]}.get(plain, []):
            yield key, [value, value] if typing.get_origin(hint) is tuple else value


NUMBERS = [(name, *bad) for name, (kind, _) in PLACES.items() for bad in numbers_of(kind)]


@pytest.mark.parametrize(("section", "key", "value"), NUMBERS)
def test_a_number_out_of_range_is_told_with_its_place_and_what_to_do(section, key, value):
    """Of several stages and sources, too, it is said which."""
    with pytest.raises(ConfigError) as refused:
        small_run(**PLACES[section][1]({key: value}))
    said = str(refused.value)
    where = f"{section}[1]." if section in ("data", "stages") else section
    assert said.startswith(where) and key in said and "; " in said, said


def test_a_file_that_begins_with_a_byte_order_mark_is_read(tmp_path):
    text = 'parent = "p"\nout = "o"\n[sizes.small]\nactive = 0.5\n[[data]]\nfiles = ["a"]\n'
    (tmp_path / "run.toml").write_bytes(
        b"\xef\xbb\xbf" + f"{text}[[stages]]\ntokens = 8\n".encode()
    )
    assert load_run_config(tmp_path / "run.toml").stages[0].tokens == 8


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"data": {"files": ["a"]}},
            r"is not a list; write \[\[data\]\], with two brackets",
        ),
        ({"sizes": [1]}, r"sizes=\[1\] is not a table; write \[sizes\] and its keys below"),
        ({"stages": [{"tokens": 1e6}]}, "is not a whole number; write it without quotes, point or"),
        ({"seed": "x"}, "seed='x' is not a whole number; write it without quotes"),
        ({"parent": 5}, "parent=5 is not a text; write it in quotes"),
        ({"sizes": {"small": {"active": True}}}, "active=True is not a number or a text; write it"),
        ({"engine": {"recompute": 1}}, "recompute=1 is not true or false; write one of the two"),
        ({"data": [{"files": "a"}]}, "files='a' is not a list; write it in brackets"),
    ],
)
def test_a_value_of_another_type_is_told_with_how_to_write_it(change, said):
    with pytest.raises(ConfigError, match=said):
        small_run(**change)


@pytest.mark.parametrize("files", [[], [""], ["a", ""]])
def test_a_file_has_a_name(files):
    with pytest.raises(ConfigError, match=r"data\[0\].files=.* names no file, or one without"):
        small_run(data=[{"files": files}])


def small_run(**changes) -> RunConfig:
    plain = {
        "parent": "p", "out": "o", "sizes": {"small": {"active": 0.5}},
        "data": [{"files": ["rows.jsonl"]}], "stages": [{"tokens": 8}], **changes,
    }  # fmt: skip
    return parse(RunConfig, plain, "")
