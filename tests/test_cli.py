"""The command line as its users type it, and every command and snippet of the README."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, LlamaConfig

from star_elastic import bundled
from star_elastic.architectures import architecture_of, read_config
from star_elastic.axes.widths import parse_widths
from star_elastic.checkpoints.manifest import Manifest, Size, save_manifest
from star_elastic.cli import main
from star_elastic.cli.commands import program
from star_elastic.cli.terminal import LONGEST_ERROR
from star_elastic.demo import shallow_parent
from star_elastic.errors import ConfigError
from star_elastic.evaluate.run import Settings, evaluate_family
from star_elastic.train.check import check
from star_elastic.train.config import RunConfig, parse
from tests.processes import ROOT, answer, refusal, run_code, run_command, run_script
from tests.tiny_run import RUN

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_command_is_installed_and_a_module(tmp_path):
    """As a user starts it: the script, and `python -m`, in an interpreter of their own."""
    script = Path(sys.executable).parent / "star-elastic"
    module = [sys.executable, "-W", "error", "-m", "star_elastic.cli"]
    for command in ([script], module):
        done = subprocess.run(
            [*command, "count", bundled.PARENT, "--json"],
            capture_output=True, text=True, check=False, cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert done.returncode == 0 and not done.stderr, done.stderr
        assert json.loads(done.stdout)["total"] == answer("count", bundled.PARENT)["total"]
    done = subprocess.run([*module, "slice", "x"], capture_output=True, check=False, cwd=tmp_path)
    assert done.returncode == 2 and not done.stdout


def test_scores_that_rank_has_written_train_a_family(run_folder):
    scores = run_folder / "scores.safetensors"
    ranked = answer(
        "rank", run_folder / "parent", "--data", run_folder / "rows.jsonl", "--out", scores,
        "--samples", 8,
    )  # fmt: skip
    assert ranked["samples"] == 8 and scores.is_file()
    config = RUN.replace('out = "run"', 'out = "cli"').replace(
        "num_samples = 16", 'scores = "scores.safetensors"'
    )
    (run_folder / "cli.toml").write_text(config)
    elastic = run_folder / "cli" / "elastic"
    assert answer("train", run_folder / "cli.toml")["elastic"] == str(elastic)
    listed = answer("sizes", elastic)["sizes"]
    assert list(listed) == ["large", "small"]
    cut = run_folder / "cut"
    assert answer("slice", elastic, "--size", "small", "--out", cut)["size"] == "small"
    counted = answer("count", cut)
    assert counted["total"] == listed["small"]["total"]
    assert counted["active"] == listed["small"]["active"]


def test_turns_of_a_given_length(trained):
    turns = answer(
        "generate", trained.elastic, "--phases", "large:budget:3,small:end_of_thinking:4,large",
        "--switch", "catch-up", "--max-new-tokens", 110, "--temperature", 0.7, "--top-p", 0.9,
        "add 12 34",
    )  # fmt: skip
    assert turns["token_sizes"][:3] == ["large"] * 3
    hows = [h["how"] for phase in turns["phases"] for h in phase["handed"]]
    assert hows[:2] == ["fresh", "reprefill"] and set(hows[2:]) <= {"catch-up"}
    assert turns["phases"][-1]["name"] == "answering" and hows[-1] == "catch-up"


def test_mistakes_are_one_line(trained, tmp_path):
    elastic = trained.elastic
    assert "has small" not in refusal("slice", elastic, "--size", "x", "--out", tmp_path / "x")
    assert "lies outside the range of active" in refusal(
        "slice", elastic, "--budget", "active=0.2", "--out", tmp_path / "x"
    )
    assert "name one of --size, --budget and --widths" in refusal(
        "slice", elastic, "--out", tmp_path / "x"
    )
    assert not (tmp_path / "x").exists()
    assert "is not an elastic checkpoint" in refusal("sizes", elastic.parents[1] / "parent")
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "file").touch()
    assert "exists already" in refusal("slice", elastic, "--size", "small", "--out", taken)
    assert "holds no config.json" in refusal("count", tmp_path)
    assert "hidden=7000" in refusal("count", elastic, "--widths", "hidden=7000")
    assert "does not exist" in refusal("train", tmp_path / "none.toml")
    assert "--size is one size for all" in refusal(
        "generate", elastic, "--size", "small", "--think", "x", "p"
    )
    assert "-1" in refusal("generate", elastic, "--thinking-budget", "-1", "add 1 2")
    assert "empty" in refusal("generate", elastic, "")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--stream", "--json"], "use one of them"),
        (["--unsure", "1.0", "--think", "small"], "--unsure needs --think"),
        (["--phases", "small:budget"], "has no end; give it a budget"),
        (["--phases", "small:line:7"], "the plan has no end"),
        (["--phases", "small:line:x,large"], "not of the form size:until:budget"),
        (["--phases", "small", "--grace", "3"], "gives every phase a budget of its own"),
        (["--phases", "huge"], "'huge' is not in this family"),
        (["--switch", "magic"], "switch='magic' is unknown"),
        (["--max-new-tokens", "1000000"], "use max_new_tokens="),
        (["--thinking-budget", "1000000"], "leaves no token for an answer"),
    ],
)
def test_mistakes_in_plans_are_one_line(trained, capsys, options, said):
    with pytest.raises(SystemExit) as ended:
        main(["generate", str(trained.elastic), *options, "add 1 2"])
    shown = capsys.readouterr()
    assert ended.value.code == 2 and not shown.out
    assert said in shown.err and shown.err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--sizes", "--context", "600"], "use 503 or less"),
        (["--batch", "1", "--batch", "2"], "holds one batch and one context"),
        (["--sizes", "--dtype", "int8"], "dtype='int8' is not supported"),
        (["--out", __file__], "exists already"),
    ],
)
def test_mistakes_in_what_to_measure_are_one_line(trained, tmp_path, options, said):
    table = tmp_path / "x.json"
    assert said in refusal("latency", trained.elastic, "--out", table, *options)
    assert not table.exists()


def test_demo_refuses_a_directory_that_is_not_its_own(tmp_path):
    (tmp_path / "file").touch()
    assert "is not empty" in refusal("demo", "--out", tmp_path)


def test_readme_names_every_command():
    listed = set(re.findall(r"^\| `star-elastic (\w+)", README, re.M))
    helped = set(re.findall(r"^\W*(\w+)  ", run_command("--help").stdout, re.M))
    assert listed and listed <= helped
    for command in listed:
        assert run_command(command, "--help").returncode == 0


def test_readme_quick_start_runs():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(code.strip().splitlines()) <= 17
    done = run_code(code)
    assert done.returncode == 0, done.stderr
    assert "\n14592\n[('thinking', 'small', 68, 'natural')" in done.stdout


@pytest.mark.parametrize("parent", ["nemotron_h", "llama", "tied llama"])
def test_readme_run_config_fits_every_parent(parent, run_folder, tmp_path):
    """With nothing changed but its paths."""
    run, quantised = map(tomllib.loads, re.findall(r"```toml\n(.*?)```", README, re.S))
    path = run_folder / "parent"
    if parent != "nemotron_h":
        shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512}
        tied = {"tie_word_embeddings": parent == "tied llama"}
        model = AutoModelForCausalLM.from_config(LlamaConfig(**shape, **heads, **tied))
        model.save_pretrained(path := tmp_path / "llama")
    config = parse(RunConfig, run, "")
    rows = replace(config.data[0], files=(str(run_folder / "rows.jsonl"),))
    config = replace(config, parent=str(path), out=str(tmp_path / "out"), data=(rows,))
    assert check(config).budgets["small"] == {"active": 0.6}
    healed = parse(RunConfig, {**run, **quantised, "family": "runs/mine/elastic"}, "")
    assert healed.quant.format == "nvfp4"


@pytest.mark.long
@pytest.mark.parametrize(
    "command",
    [
        ["recipes/hour/run.py", "--out", "{out}", "--smoke", "--json"],
        ["recipes/hour/axes_alone.py", "--out", "{out}", "--smoke"],
        ["recipes/nested/nested_vs_separate.py", "--out", "{out}", "--smoke"],
        ["recipes/nested/ablations.py", "--out", "{out}", "--smoke"],
        ["benchmarks/size_cost.py", "--smoke"],
        ["benchmarks/training_cost.py", "--smoke"],
        ["benchmarks/kl_memory.py", "--smoke"],
        ["benchmarks/latency_table.py", "--smoke"],
        ["benchmarks/switching.py", "--smoke"],
        ["benchmarks/resident.py", "--smoke"],
        ["benchmarks/nano_v3.py", "--smoke"],
        ["benchmarks/quantize.py", "--smoke"],
        ["benchmarks/big_checkpoint.py", "--smoke"],
        ["benchmarks/nested_run.py", "--smoke"],
        ["benchmarks/planted_axes.py", "--smoke"],
        ["recipes/quantised/formats.py", "--out", "{out}", "--smoke"],
    ],
    ids=lambda command: Path(command[0]).stem,
)
def test_long_recipes_have_a_smoke_form(command, tmp_path):
    arguments = [part.format(out=tmp_path / "out") for part in command]
    done = run_script(*arguments)
    assert done.returncode == 0, done.stderr
    if "--json" in arguments:
        report = json.loads(done.stdout)
        assert list(report["sizes"]) == ["large", "medium", "small"]
        assert (tmp_path / "out" / "pareto.png").stat().st_size < 300_000
        assert (tmp_path / "out" / "slices" / "small" / "model.safetensors").is_file()


@pytest.mark.long
def test_plans_are_replayed_by_a_larger_model(tmp_path):
    family, out = tmp_path / "family", tmp_path / "out"
    shallow_parent(family)
    axis_map = architecture_of(read_config(family)).axis_map(read_config(family))
    widths = {"large": axis_map.full, "small": axis_map.complete({"hidden": 128})}
    sizes = {name: Size(own) for name, own in widths.items()}
    save_manifest(Manifest("nemotron_h", {}, sizes), family)
    settings = Settings(
        num_validation=1, num_test=1, budgets=(None,), dials=(0.05,), max_new_tokens=12
    )
    evaluate_family(family, settings, out)
    command = ["benchmarks/replay.py", "--evaluation", out, "--smoke", "--out", tmp_path / "r.json"]
    done = run_script(*command)
    assert done.returncode == 0, done.stderr
    plans = json.loads((tmp_path / "r.json").read_text())["plans"]
    assert {plan["label"] for plan in plans} == {
        "large", "small", "small>large", "small~large 5%", "small~large 5% lines",
    }  # fmt: skip


# Outputs, mistakes in arguments, places to write


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["count", "x", "--context", "-1"], "--context"),
        (["count", "x", "--context", str(10**18)], "--context"),
        (["rank", "x", "--data", "y", "--out", "z", "--samples", "1e3"], "--samples"),
        (["latency", "x", "--out", "z", "--seconds", "inf"], "--seconds"),
        (["latency", "x", "--out", "z", "--batch", str(10**18)], "--batch"),
        (["count", "x", "--colour"], "No such option: --colour"),
        (["slice", "x"], "Missing option '--out'"),
        (["nonsense"], "No such command 'nonsense'"),
    ],
)
def test_mistakes_in_arguments_are_one_line(arguments, said):
    line = refusal(*arguments)
    assert line.startswith("error: ") and said in line and "--help" in line


@pytest.mark.parametrize(
    ("widths", "said"),
    [
        ("hidden=16,hidden=24", "name hidden twice"), (",", "name no axis"),
        ("ffn=" + "9" * 5000, "is not of the form"), ("ffn=٣", "is not of the form"),
    ],
)  # fmt: skip
def test_widths_that_say_nothing_or_two_things(widths, said):
    with pytest.raises(ConfigError, match=said) as refused:
        parse_widths(widths)
    assert len(str(refused.value)) < 200


@pytest.mark.parametrize(
    "arguments",
    [
        ["slice", "--size", "small"], ["rank", "--data", "rows.jsonl"], ["latency"],
        ["latency", "--sizes"], ["quantize", "--format", "fp8", "--data", "rows.jsonl"], ["eval"],
        ["adopt", "--size", "small:hidden=8"],
    ],
)  # fmt: skip
def test_a_place_that_takes_nothing_is_told_before_the_work(arguments, tmp_path):
    """Before anything else: neither the checkpoint nor the rows are there."""
    command, *options = arguments
    line = refusal(command, tmp_path / "none", *options, "--out", "/proc/none/x")
    assert "/proc/none" in line and str(tmp_path) not in line


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_an_output_that_is_full_or_closed_is_one_line(options):
    command = [sys.executable, "-m", "star_elastic.cli", "count", str(bundled.PARENT), *options]
    for where, code, said in (
        (">/dev/full", 1, "No space left"),
        (">&-", 0, ""),
        ("| true", 0, ""),
    ):
        done = subprocess.run(
            ["sh", "-c", f'"$@" {where}', "sh", *command],
            capture_output=True, text=True, check=False, cwd=ROOT,
        )  # fmt: skip
        assert done.returncode == code, (where, done.stderr)
        assert done.stderr.count("\n") == bool(said) and said in done.stderr, done.stderr


def test_what_an_encoding_lacks_is_written_as_escapes(tmp_path):
    """As in the C locale; JSON has escapes of its own."""
    checkpoint = tmp_path / "größe.json"
    shutil.copyfile(bundled.PARENT / "config.json", checkpoint)
    code = (
        "import sys; from star_elastic.cli import main; "
        "main(['check', sys.argv[1]]); main(['check', sys.argv[1], '--json'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, checkpoint],
        capture_output=True, check=False, cwd=ROOT,
        env={**os.environ, "PYTHONIOENCODING": "ascii", "COLUMNS": "500"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    shown, brace, rest = done.stdout.decode("ascii").partition("{")
    assert "gr\\xf6\\xdfe" in shown and "gr\\u00f6\\u00dfe" in rest
    assert json.loads(brace + rest)["checkpoint"] == str(checkpoint)


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize("command", ["count", "latency"])
def test_weights_that_others_have_quantised_are_not_counted(tmp_path, method, command):
    config = json.loads((bundled.PARENT / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    options = [] if command == "count" else ["--out", tmp_path / "l.json"]
    assert "quantised in a way that" in refusal(command, tmp_path, *options)


def test_a_line_end_in_a_name_stays_on_the_line(capsys):
    """And what a terminal would obey is written out."""
    with pytest.raises(SystemExit) as ended:
        main(["sizes", "no\npe\x1b[31m é"])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "no\\npe\\x1b[31m é" in line


OPTIONS = [
    (name, parameter.opts[0])
    for name, command in program.commands.items()
    for parameter in command.params
    if parameter.opts[0].startswith("--") and not getattr(parameter, "is_flag", False)
]


@pytest.mark.parametrize(("command", "option"), OPTIONS)
def test_a_value_that_is_empty_is_not_taken_for_none(command, option, capsys):
    """As `--size "$SIZE"` without a SIZE: it would choose otherwise than was asked."""
    with pytest.raises(SystemExit) as ended:
        main([command, option, ""])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {option} is empty; give it a value")


def test_an_error_line_has_an_end(tmp_path):
    """However long what a file holds is: what is wrong and what to do can still be read."""
    shutil.copy(bundled.FAMILY / "config.json", tmp_path)
    family = json.loads((bundled.FAMILY / "elastic.json").read_text(encoding="utf-8"))
    family["sizes"]["small"]["widths"]["experts"] = "a" * 100_000
    (tmp_path / "elastic.json").write_text(json.dumps(family), encoding="utf-8")
    line = refusal("sizes", tmp_path)
    assert len(line) < LONGEST_ERROR + 100
    assert "is damaged (sizes.small.widths: experts='aaa" in line
    assert "a ... a" in line and line.endswith("restore the file\n")


@pytest.mark.parametrize("own", [None, "ACTIVE"])
def test_threads_wait_without_spinning_unless_told_otherwise(own, monkeypatch):
    """They would be fifty times as slow beside another busy process; torch reads it when loaded."""
    code = (
        "import os, sys; from star_elastic.cli.terminal import at_the_command_line\n"
        "with at_the_command_line(): print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    )
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if own:
        monkeypatch.setenv("OMP_WAIT_POLICY", own)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"{own or 'PASSIVE'} False\n"


def test_a_mistake_in_an_option_names_the_help_of_its_command():
    assert refusal("generate", "bundled", "--size").endswith("see star-elastic generate --help\n")
    assert refusal("generat").endswith("see star-elastic --help\n")
