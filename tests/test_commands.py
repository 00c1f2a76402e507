"""Wiring and print: every option of every command changes what the command does, in the way that it
says, and what is printed for people has the numbers of the JSON, in the units that it names.

Each test names the options that it watches; the last one fails for an option that nobody watches.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import groupby
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import star_elastic
from star_elastic import bundled, demo
from star_elastic.architectures import architecture_of, read_config
from star_elastic.axes import axis_keys
from star_elastic.checkpoints.elastic import ElasticCheckpoint
from star_elastic.checkpoints.manifest import load_manifest, save_manifest
from star_elastic.checkpoints.tensors import save_tensors
from star_elastic.cli import main
from star_elastic.cli.commands import program
from star_elastic.cost.count import CostModel, Workload
from star_elastic.cost.latency import load_table, save_table
from star_elastic.data import sources
from star_elastic.evaluate import run as evaluation
from star_elastic.generate import family as generate_family
from star_elastic.generate.decode import BatchDecoder
from star_elastic.generate.engine import Generator
from star_elastic.generate.family import load
from star_elastic.generate.phases import Plan, parse_phases
from star_elastic.importance.files import ScoreInfo, load_scores, save_scores
from star_elastic.importance.orders import random_orders
from star_elastic.measure import size_latency
from star_elastic.models import load as loading
from star_elastic.models.load import load_parent
from star_elastic.rewrite import family as quantise
from star_elastic.router.grid import make_grid
from star_elastic.train.check import require_covered
from tests.latencies import made_up
from tests.processes import run_command
from tests.tiny_family import PROMPTS, make_checkpoint
from tests.tiny_run import config_in

WATCHED: set[tuple[str, str]] = set()


def hears(command: str, *options: str) -> Callable:
    """Marks a test as the one that watches these options of a command."""
    WATCHED.update((command, option) for option in options)
    return lambda test: test


@pytest.fixture
def printed(capsys) -> Callable[..., str]:
    """What a command prints for people."""

    def run(*arguments) -> str:
        main(list(map(str, arguments)))
        return capsys.readouterr().out

    return run


@pytest.fixture
def told(printed) -> Callable[..., dict]:
    """The JSON object that a command prints, and nothing else."""
    return lambda *arguments: json.loads(printed(*arguments, "--json"))


def current_umask() -> int:
    os.umask(mask := os.umask(0))
    return mask


def numbers(text: str) -> list[float]:
    """Every number of a text, without separators of thousands."""
    found = re.findall(r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d+)?", text)
    return [float(number.replace(",", "")) for number in found]


@pytest.fixture(scope="module")
def writer(tmp_path_factory):
    """A llama family that writes lively text."""
    return make_checkpoint(tmp_path_factory.mktemp("writer"), "llama")


@pytest.fixture(scope="module")
def question(writer) -> str:
    """The prompt that its small size thinks about for longest."""
    results = star_elastic.load(writer).generate(PROMPTS, think="small", thinking_budget=20)
    return max(zip(PROMPTS, results, strict=True), key=lambda pair: pair[1].phases[0].tokens)[0]


# count


@hears(
    "count", "model", "widths", "context", "batch", "dtype_bytes", "ssm_dtype_bytes", "as_json"
)  # fmt: skip
def test_count(told, printed):
    model = bundled.PARENT
    axis_map = architecture_of(read_config(model)).axis_map(read_config(model))
    options = {"context": 100, "batch": 3, "dtype_bytes": 4, "ssm_dtype_bytes": 8}
    flags = [x for k, v in options.items() for x in (f"--{k.replace('_', '-')}", v)]
    result = told("count", model, "--widths", "hidden=96", *flags)
    widths = axis_map.complete({"hidden": 96})
    cost = CostModel(axis_map, Workload(**options)).count(widths)
    assert result["widths"]["hidden"] == 96 and result["total"] == cost.total
    for key in ("active", "weight_bytes", "state_bytes", "flops_per_token"):
        assert result[key] == getattr(cost, key)
    plain = told("count", model)
    assert plain["total"] > result["total"]
    for option, value in options.items():  # each by itself
        one = told("count", model, f"--{option.replace('_', '-')}", value)
        load = Workload(**{option: value})
        assert one["state_bytes"] == CostModel(axis_map, load).full.state_bytes
        assert (one["weight_bytes"], one["state_bytes"]) != (
            plain["weight_bytes"], plain["state_bytes"],
        )  # fmt: skip
    text = printed("count", model, "--widths", "hidden=96", *flags)
    assert "hidden=96" in text
    for value in (*result["parts"].values(), *options.values()):
        assert value in numbers(text) or value in options.values()
    for key in ("total", "active", "weight_bytes", "state_bytes", "flops_per_token"):
        assert result[key] in numbers(text), key
    shares = [float(share) for share in re.findall(r"([\d.]+)%", text)]
    assert sum(shares) == pytest.approx(100, abs=1)


# plan


@hears("plan", "model", "memory", "context", "batch", "dtype_bytes", "ssm_dtype_bytes", "as_json")
def test_plan(told, printed):
    """Every option is in the count, and the tables have the numbers of the JSON."""
    model = bundled.PARENT
    axis_map = read_config(model).axis_map
    options = {"context": 100, "batch": 3, "dtype_bytes": 4, "ssm_dtype_bytes": 8}
    cost = CostModel(axis_map, Workload(**options))
    flags = [x for k, v in options.items() for x in (f"--{k.replace('_', '-')}", v)]
    asked = ("plan", model, "--memory", f"{0.6 * cost.full.bytes / 1024:.3f}KiB", *flags)
    result, text = told(*asked), printed(*asked)
    found = cost.count(axis_map.complete(result["widths"]))
    assert result["workload"] == options and result["total"] == found.total
    assert result["memory"]["total"] == found.bytes <= 0.6 * cost.full.bytes
    memory, seen = result["memory"], numbers(text)
    for held in (memory["weights"], memory["fp32_weights"], memory["buffers"], memory["total"],
                 memory["left"], *memory["states"].values()):  # fmt: skip
        assert held in seen
    for axis, row in result["given_up"].items():
        (line,) = re.findall(rf"^ *{axis} .*$", text, re.M)
        assert numbers(line)[:2] == [row["parent"], row["plan"]]
        assert f"{row['kept']:.1%}" in line
        assert row["lost"] is None or f"{row['lost']:.2%} (assumed)" in line
    for row in result["neighbours"]:
        plan = row["plan"]
        said = "nothing fits" if plan is None else f"{plan['lost']:.2%}"
        (line,) = re.findall(rf"^ *{re.escape(row['name'])} .*$", text, re.M)
        assert said in line
    plain = told("plan", model, "--memory", "1GB")  # the parent, whatever the workload
    positions = read_config(model)["max_position_embeddings"]
    assert plain["is_parent"] and plain["workload"]["context"] == min(positions, 4096)
    for option, value in options.items():  # each by itself
        one = told("plan", model, "--memory", "1GB", f"--{option.replace('_', '-')}", value)
        load = Workload(**{"context": plain["workload"]["context"], option: value})
        assert one["memory"]["total"] == CostModel(axis_map, load).full.bytes
        assert one["memory"]["total"] != plain["memory"]["total"]


@hears("plan", "latency", "tokens_per_second", "importance")
def test_plan_by_speed_and_importance(run_folder, tmp_path, told, printed):
    parent = run_folder / "parent"
    axis_map = read_config(parent).axis_map
    table = made_up(axis_map)
    save_table(table, tmp_path / "table.json")
    asked = ("plan", parent, "--memory", "1GB", "--latency", tmp_path / "table.json")
    whole = told(*asked)
    assert whole["is_parent"] and whole["ms"] == table.milliseconds(axis_map.full, axis_map)
    speed = 1.02 * whole["tokens_per_second"]
    fast, text = (tell(*asked, "--tokens-per-second", speed) for tell in (told, printed))
    assert fast["tokens_per_second"] >= speed and not fast["is_parent"]
    assert fast["ms"] == table.milliseconds(axis_map.complete(fast["widths"]), axis_map)
    assert f"{fast['tokens_per_second']:.4g}" in text and "tokens/s" in text
    (note,) = [note for note in fast["notes"] if note.startswith("milliseconds")]
    assert "batch 2 at context 16" in note and note in text
    scores = {
        key: torch.ones(axis_map.axes[axis].size).double()
        for key, (axis, _) in axis_keys(axis_map).items()
    }
    info = ScoreInfo(num_samples=5, num_tokens=50, source="rows", weights="")
    save_scores(tmp_path / "flat.safetensors", scores, axis_map, info)
    asked = ("plan", parent, "--memory", f"{whole['memory']['total'] * 0.8 / 1000}KB")
    flat, text = (tell(*asked, "--importance", tmp_path / "flat.safetensors")
                  for tell in (told, printed))  # fmt: skip
    assert flat["objective"]["measured"] and "5 rows of rows" in text
    for axis in flat["objective"]["measured"]:  # all units alike: what is lost is what is cut
        row = flat["given_up"][axis]
        assert row["lost"] == pytest.approx(1 - row["kept"])
    assert told(*asked)["objective"]["measured"] == []


# rank


@hears("rank", "model", "data", "out", "samples", "context", "batch_size", "as_json")
def test_rank(run_folder, tmp_path, told, printed, monkeypatch):
    seen, batches = [], sources.calibration_batches

    def watched(*arguments, **options):
        for batch in batches(*arguments, **options):
            seen.append(tuple(batch.attention_mask.sum(1).tolist()))
            yield batch

    monkeypatch.setattr(sources, "calibration_batches", watched)
    parent, out = run_folder / "parent", tmp_path / "scores.safetensors"
    data = ["rank", parent, "--data", run_folder / "rows.jsonl"]
    result = told(
        *data, "--out", out, "--samples", 5, "--context", 20, "--batch-size", 2
    )  # fmt: skip
    assert [len(batch) for batch in seen] == [2, 2, 1] and max(map(max, seen)) == 20
    table = architecture_of(read_config(parent)).axis_map(read_config(parent))
    scores, info = load_scores(out, table)
    assert (info.num_samples, info.source) == (5, "rows.jsonl")
    assert result == {
        "scores": str(out), "samples": 5, "tokens": info.num_tokens,
    }  # fmt: skip
    assert info.num_tokens == sum(map(sum, seen))
    text = printed(*data, "--out", tmp_path / "more.safetensors", "--samples", 3)
    assert str(tmp_path / "more.safetensors") in text
    said = numbers(text.rpartition(".safetensors")[2])
    assert said == [len(scores), 3, sum(map(sum, seen[3:]))]


# latency


@hears("latency", "model", "out", "phase", "dtype", "as_json")
@pytest.mark.parametrize(
    ("phase", "dtype"), [("decode", "float32"), ("prefill", "bfloat16")], ids=["decode", "prefill"]
)
def test_latency_of_any_widths(writer, tmp_path, told, printed, phase, dtype):
    """The table is of what was asked, in milliseconds per token, as the model itself takes them."""
    out, other = tmp_path / "table.json", tmp_path / "other.json"
    options = ["--phase", phase, "--batch", 2, "--context", 7, "--dtype", dtype, "--seconds", 0]
    result = told("latency", writer, "--out", out, *options)
    table = json.loads(out.read_text())
    assert (table["phase"], table["batch"], table["context"]) == (phase, 2, 7)
    assert table["dtype"] == dtype and result["table"] == str(out)
    own = own_milliseconds(writer, 2, 7, dtype)[phase] / (7 if phase == "prefill" else 1)
    assert own / 30 < result["ms_per_token"] < 30 * own
    assert result["median_error"] <= result["worst_error"]
    text = printed("latency", writer, "--out", other, *options)
    (full,) = re.findall(r"other\.json: ([\d.]+) ms per token at full width", text)
    assert own / 30 < float(full) < 30 * own
    assert f"({phase}, batch 2, context 7, {dtype})" in text
    assert len(re.findall(r"[-+][\d.]+%", text)) == len(result["checks"]) == 6


def own_milliseconds(elastic, batch: int, context: int, dtype="float32") -> dict[str, float]:
    """What the full size takes to read prompts, and for one token of each of them; the least of
    several."""
    model = load(elastic, dtype=dtype).parent
    found: dict[str, list[float]] = {"prefill": [], "decode": []}
    with torch.inference_mode():
        for _ in range(5):
            decoder = BatchDecoder(model)
            begin = time.perf_counter()
            decoder.prefill([[5] * context] * batch)
            middle = time.perf_counter()
            decoder.step([5] * batch)
            found["prefill"].append(1e3 * (middle - begin))
            found["decode"].append(1e3 * (time.perf_counter() - middle))
    return {phase: min(times) for phase, times in found.items()}


@hears("latency", "sizes", "batch", "context", "seconds")
def test_latency_of_the_sizes(writer, tmp_path, told, printed, monkeypatch):
    """Prefill and decode in milliseconds, at every batch and context; longer, in more rounds."""
    rounds, run = [], size_latency._run
    monkeypatch.setattr(
        size_latency, "_run", lambda *given: (rounds.append(given[2]), run(*given))
    )  # fmt: skip
    options = ["--sizes", "--batch", 1, "--batch", 3, "--context", 8, "--context", 40]
    out = tmp_path / "sizes.json"
    result = told("latency", writer, "--out", out, *options, "--seconds", 0)
    works = [(size, b, c) for size in ("large", "small") for b in (1, 3) for c in (8, 40)]
    assert [(row["size"], row["batch"], row["context"]) for row in result["sizes"]] == works
    assert rounds == 2 * works  # one that warms up, one that counts
    assert json.loads(out.read_text())["sizes"] == result["sizes"]
    for row in result["sizes"][:4]:
        own = own_milliseconds(writer, row["batch"], row["context"])
        for phase in ("prefill", "decode"):
            assert own[phase] / 30 < row[f"{phase}_ms"] < 30 * own[phase]
    rounds.clear()
    ticks = iter(range(1000))  # a clock that moves on by a second whenever it is read
    clock = SimpleNamespace(perf_counter=time.perf_counter, monotonic=lambda: next(ticks))
    monkeypatch.setattr(size_latency, "time", clock)
    text = printed(
        "latency", writer, "--out", tmp_path / "more.json", *options, "--seconds", 10,
        "--dtype", "bfloat16",
    )  # fmt: skip
    assert len(rounds) == 3 * len(works)
    again = json.loads((tmp_path / "more.json").read_text())
    assert again["dtype"] == "bfloat16" and "bfloat16" in text
    for row in again["sizes"]:
        cells = [row["size"], str(row["batch"]), f"{row['context']:,}",
                 f"{row['prefill_ms']:,.2f}", f"{row['decode_ms']:,.2f}",
                 f"{1e3 * row['batch'] / row['decode_ms']:,.0f}"]  # fmt: skip
        assert re.search(r"\s+".join(map(re.escape, cells)), text), cells


@hears("latency", "run")
def test_latency_for_a_run(run_folder, tmp_path, told):
    """The parent, the choices and the workload are those of the run, which takes the table."""
    load = {"[engine]": "[workload]\ncontext = 9\nbatch = 3\n[engine]"}
    config = config_in(run_folder, "measured", **load)
    out = tmp_path / "table.json"
    told("latency", "--for", run_folder / "measured.toml", "--out", out, "--seconds", 0)
    axis_map = architecture_of(parent := read_config(config.parent)).axis_map(parent)
    require_covered(load_table(out, axis_map), make_grid(config.choices, axis_map))
    table = json.loads(out.read_text())
    assert (table["batch"], table["context"]) == (3, 9)
    widths = dict(zip(table["fixed"]["axes"], table["fixed"]["points"], strict=True))
    assert [widths["hidden"][0], widths["hidden"][-1]] == [24, 48]


def test_the_reference_of_the_run_config(printed):
    assert "| `learning_rate` |" in printed("config")


# Files and paths as people have them


def test_files_have_the_modes_of_the_umask(blocks, tmp_path):
    """Others than their maker read them, too."""
    family = shutil.copytree(blocks, tmp_path / "family")
    modes = {file.name: file.stat().st_mode & 0o777 for file in family.iterdir()}
    assert set(modes.values()) == {0o666 & ~current_umask()}, modes
    before = os.umask(0o027)
    try:
        save_tensors(tmp_path / "one.safetensors", {"a": torch.ones(1)})
    finally:
        os.umask(before)
    assert (tmp_path / "one.safetensors").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("name", ["m[/x]", "model[v2]", "a[bold]b", "two words"])
def test_paths_are_printed_as_they_are(blocks, tmp_path, name, printed):
    out = tmp_path / name
    printed("slice", blocks, "--size", "small", "--out", out)
    assert str(out) in printed("check", out).replace("\n", "")
    family = shutil.copytree(blocks, tmp_path / "families" / name)
    assert str(family) in printed("sizes", family).replace("\n", "")


# train, sizes, slice


@hears("train", "check_only")
def test_train_reads_every_row_and_trains_nothing(run_folder, printed, told, capsys):
    config_in(run_folder, "only-read")
    counted = len((run_folder / "rows.jsonl").read_text().splitlines())
    main(["train", str(run_folder / "only-read.toml"), "--check"])
    shown = capsys.readouterr()
    assert f"{counted} rows" in shown.out and "size small: " in shown.err
    found = told("train", run_folder / "only-read.toml", "--check")
    (few_steps,) = found["warnings"]
    assert found["rows"] == counted and f"warning: {few_steps}" in shown.out
    config_in(run_folder, "only-read", **{"warmup_steps = 2": "warmup_steps = 400"})
    more = told("train", run_folder / "only-read.toml", "--check")["warnings"]
    assert few_steps in more and any("warmup_steps=400" in line for line in more)
    # What the run itself would refuse at once, and what it would refuse on ranks.
    (run_folder / "only-file").touch()
    config_in(run_folder, "only-file")
    config_in(run_folder, "only-three", **{"batch_size = 4": "batch_size = 3"})
    with pytest.raises(SystemExit):
        main(["train", str(run_folder / "only-file.toml"), "--check"])
    assert "is not a directory" in capsys.readouterr().err
    check = ("train", run_folder / "only-three.toml", "--check")
    first, second = (run_command(*check, env={"WORLD_SIZE": "2", "RANK": n}) for n in "01")
    assert first.returncode == 2 and "cannot be shared by 2 ranks" in first.stderr
    assert second.returncode == 0 and not second.stdout  # one rank speaks
    scored = {"num_samples = 16": 'scores = "nowhere.safetensors"'}
    config_in(run_folder, "only-scores", **scored)
    with pytest.raises(SystemExit) as ended:
        printed("train", run_folder / "only-scores.toml", "--check")
    assert ended.value.code == 2
    assert not (run_folder / "only-read").exists()


@hears("train", "run", "resume", "as_json")
def test_train(run_folder, printed, told):
    steps = {"tokens = 15360": "tokens = 768"}
    config_in(run_folder, "printed", **steps)
    config_in(run_folder, "told", **steps)
    text = printed("train", run_folder / "printed.toml")
    elastic = run_folder / "printed" / "elastic"
    assert f"{elastic}: 2 steps" in text
    result = told("train", run_folder / "told.toml")
    assert result["elastic"] == str(run_folder / "told" / "elastic") and result["steps"] == 2
    assert result["tokens"] in numbers(text) and 0 < result["seconds"] < 300
    logged = (run_folder / "told" / "metrics.jsonl").read_text().splitlines()
    assert result["tokens"] == sum(json.loads(row)["num_tokens"] for row in logged)
    said = {}
    for option in ([], ["--resume"]):
        with pytest.raises(SystemExit) as ended:
            printed("train", run_folder / "told.toml", *option)
        assert ended.value.code == 2
        said[len(option)] = run_folder
    # What each would say is in test_train.py; here, that the two are not the same.


@hears("sizes", "elastic", "as_json")
def test_sizes(trained, told, printed):
    result, text = told("sizes", trained.elastic), printed("sizes", trained.elastic)
    family = load(trained.elastic)
    full = result["sizes"]["large"]
    assert list(result["sizes"]) == ["large", "small"]
    for name, size in result["sizes"].items():
        cost = family.cost(name)
        assert (size["active"], size["total"]) == (cost.active, cost.total)
        assert size["weight_bytes"] == cost.weight_bytes
        (line,) = re.findall(rf"^ *{name} .*$", text, re.M)
        cut = [
            f"{size[key]:,} ({size[key] / full[key]:.1%})" for key in ("active", "total")
        ]  # fmt: skip
        assert all(cell in line for cell in cut), line
        axes = re.search(r"^ *size +active +total +(.*)$", text, re.M)[1].split()
        *axes, _, _ = axes  # but for "widths from"
        assert size["widths_from"] in ("data", "budget")
        assert line.split()[-1] == size["widths_from"]
        assert numbers(line)[4:] == [size["widths"][axis] for axis in axes]
        assert {"hidden", "ssm_heads", "expert_ffn"} <= set(axes)


@hears("slice", "elastic", "out", "size", "budget", "widths", "as_json")
def test_slice(trained, tmp_path, told, printed):
    sizes = told("sizes", trained.elastic)["sizes"]
    result = told("slice", trained.elastic, "--size", "small", "--out", tmp_path / "small")
    assert result["widths"] == sizes["small"]["widths"]
    assert read_config(tmp_path / "small")["hidden_size"] == sizes["small"]["widths"]["hidden"]
    text = printed("slice", trained.elastic, "--widths", "hidden=40", "--out", tmp_path / "own")
    assert text.startswith(f"{tmp_path / 'own'}: hidden=40 (") and "hidden=40," in text
    assert read_config(tmp_path / "own")["hidden_size"] == 40
    for asked in ("active=0.8", f"active={0.8 * sizes['large']['active'] / 1e3:.2f}K"):
        out = tmp_path / asked
        told("slice", trained.elastic, "--budget", asked, "--out", out)
        share = told("count", out)["active"] / sizes["large"]["active"]
        assert share == pytest.approx(0.8, rel=0.02), asked


# adopt, quantize, check


@hears("adopt", "model", "size", "out", "full", "data", "as_json")
def test_adopt(blocks, run_folder, tmp_path, told, printed):
    parent, sizes = run_folder / "parent", ["--size", "b:hidden=32", "--size", "a:expert_ffn=16"]
    result = told("adopt", parent, *sizes, "--out", tmp_path / "told")
    costs = told("sizes", tmp_path / "told")
    assert result == {**costs, "out": str(tmp_path / "told"), "verdict": None}
    full = told("count", parent)
    assert list(costs["sizes"]) == ["full", "a", "b"]
    for name, own in (("a", "expert_ffn=16"), ("b", "hidden=32")):
        counted = told("count", parent, "--widths", own)
        assert costs["sizes"][name]["active"] == counted["active"] < full["active"]
        assert costs["sizes"][name]["widths"] == counted["widths"]
    options = ["--full", "whole", "--data", run_folder / "rows.jsonl"]
    text = printed("adopt", parent, *sizes, *options, "--out", tmp_path / "shown")
    for name in ("whole", "a", "b"):
        size = costs["sizes"][name if name != "whole" else "full"]
        line = next(line for line in text.splitlines() if line.split()[:1] == [name])
        assert f"{size['active']:,} ({size['active'] / full['active']:.1%})" in line
        assert line.split()[-1] == "adopt"
    verdict = json.loads((tmp_path / "shown" / "verdict.json").read_text())
    for name, size in verdict["sizes"].items():
        assert re.search(rf"^ *{name} +{size['kl']:.4f} ", text, re.M), name
    assert f"{verdict['held_out_rows']} held-out rows" in text


@hears(
    "quantize", "elastic", "out", "format_name", "data", "samples", "context", "percentile",
    "keep", "as_json",
)  # fmt: skip
@hears("slice", "layout")
def test_quantize(blocks, run_folder, tmp_path, told, printed):
    data = ["--data", run_folder / "rows.jsonl"]

    def quantize(name: str, *options, format_name: str = "fp8") -> dict:
        common = ["quantize", blocks, "--format", format_name, "--out", tmp_path / name]
        return told(*common, *data, *options)

    def scale(name: str) -> torch.Tensor:
        family = star_elastic.load(tmp_path / name)
        scales = family.parent.quantised_inputs.scales
        return torch.cat([scales[key].flatten() for key in sorted(scales)])

    base = quantize("base", "--samples", 4)
    assert base["format"] == "fp8" and base["bytes"] < base["bytes_before"]
    four = quantize("four", "--samples", 4, format_name="nvfp4")
    assert four["bytes"] < base["bytes"]
    quantize("one", "--samples", 1)
    quantize("short", "--samples", 4, "--context", 5)
    quantize("most", "--samples", 4, "--percentile", 90)
    for name in ("one", "short", "most"):
        assert (scale(name) <= scale("base")).all() and (scale(name) < scale("base")).any(), name
    assert (scale("most") < scale("base")).all()
    two = tmp_path / "two.jsonl"
    two.write_text((run_folder / "rows.jsonl").read_text().split("\n", 2)[1] + "\n")
    told("quantize", blocks, "--format", "fp8", "--out", tmp_path / "other", "--data", two)
    assert not torch.equal(scale("other"), scale("one"))

    kept = quantize("kept", "--samples", 4, "--keep", "attention", "--keep", "routed experts")
    for part in kept["parts"]:
        own = kept["parts"][part]
        whole = part in ("attention", "routed experts")
        expected = own["before"] if whole else base["parts"][part]["after"]
        assert own["after"] == expected, part
    assert base["parts"]["attention"]["after"] < base["parts"]["attention"]["before"]
    stored = load_file(tmp_path / "kept" / "model.safetensors")
    assert not any("q_proj" in name and name.endswith("scale") for name in stored)
    assert ElasticCheckpoint(tmp_path / "kept").input_scales("small")

    text = printed(
        "quantize", blocks, "--format", "fp8", "--out", tmp_path / "shown", *data, "--samples", 4
    )  # fmt: skip
    for part, own in [*base["parts"].items(), ("all", None)]:
        before, after = (
            (own["before"], own["after"]) if own else (base["bytes_before"], base["bytes"])
        )  # fmt: skip
        cells = [part, f"{before:,}", f"{after:,}", f"{after / before:.3f}"]
        assert re.search(r"\s+".join(map(re.escape, cells)), text), cells

    for layout, entry in (("modelopt", "hf_quant_config.json"), ("compressed-tensors", None)):
        out = tmp_path / layout
        told("slice", tmp_path / "base", "--size", "small", "--layout", layout, "--out", out)
        assert (out / "hf_quant_config.json").is_file() == (entry is not None)
    model, _ = load_parent(tmp_path / "compressed-tensors")
    assert model.quantised_inputs is not None


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *((name, None) for name in ("router", "orders", "basis", "latency", "input_scales")),
        ("router", {"hidden": torch.zeros(2)}),
        ("orders", {"hidden": torch.zeros(48, dtype=torch.int64)}),
        ("basis", {"hidden": torch.zeros(48, 48)}),
    ],
)
def test_check_reads_what_a_family_has_beside_its_weights(blocks, tmp_path, capsys, name, content):
    """Whatever file it is, one that is cut off or another model's is told by its name."""
    family = shutil.copytree(blocks, tmp_path / "family")
    axis_map = architecture_of(config := read_config(family)).axis_map(config)
    save_tensors(family / "orders.safetensors", random_orders(axis_map, 0))
    save_tensors(family / "basis.safetensors", {"hidden": torch.eye(48)})
    manifest = load_manifest(family, axis_map)
    if name == "input_scales":  # as of a quantised family
        manifest = replace(manifest, own_input_scales=("small",))
        save_tensors(family / "input_scales.safetensors", {"small/x": torch.ones(1)})
    save_manifest(manifest, family)
    main(["check", str(family)])
    file = family / ("latency.json" if name == "latency" else f"{name}.safetensors")
    if content is None:
        file.write_bytes(file.read_bytes()[:40] if file.exists() else b"{")
    else:
        save_tensors(file, content)
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["check", str(family)])
    said = capsys.readouterr()
    assert ended.value.code == 2 and not said.out
    assert str(file) in said.err and "; " in said.err, said.err


@hears("check", "checkpoint", "as_json")
def test_check(blocks, told, printed):
    verdicts, text = told("check", blocks)["engines"], printed("check", blocks)
    assert {verdict["engine"] for verdict in verdicts} >= {"star-elastic", "transformers", "vLLM"}
    for verdict in verdicts:
        cells = [verdict["engine"], "yes" if verdict["runs"] else "no"]
        assert re.search(r"\s+".join(map(re.escape, cells)), text), cells
        assert verdict["note"].split()[0] in text
    others = [v["note"] for v in verdicts if v["engine"] in ("transformers", "vLLM", "llama.cpp")]
    assert all(note.startswith("as its largest size alone; cut the others") for note in others)


# generate


@hears("generate", "elastic", "prompt", "size", "think", "answer", "thinking_budget", "grace",
       "max_new_tokens", "as_json")  # fmt: skip
def test_generate_by_two_sizes(writer, question, told, printed):
    def ask(*options, prompt: str = question) -> dict:
        return told("generate", writer, prompt, *options)

    family = star_elastic.load(writer)
    for size in ("large", "small"):
        (expected,) = family.generate(["9"], think=size, answer=size, max_new_tokens=20)
        found = ask("--size", size, "--max-new-tokens", 20, prompt="9")
        assert found["token_ids"] == list(expected.token_ids)
        assert set(found["token_sizes"]) - {None} == {size}
        assert len(found["token_ids"]) <= 20
    pair = ["--think", "small", "--answer", "large", "--thinking-budget", 3, "--grace", 2]
    result = ask(*pair, "--max-new-tokens", 40)
    trace, reply = result["phases"]
    assert (trace["size"], reply["size"]) == ("small", "large") and 3 <= trace["tokens"] <= 5
    none = ask(*pair[:6], "--grace", 0, "--max-new-tokens", 40)
    assert none["phases"][0]["tokens"] == 3
    text = printed("generate", writer, question, *pair, "--max-new-tokens", 40)
    assert text.startswith(result["text"] + "\n") and "</think>" in result["text"]
    for phase in result["phases"]:
        line = f"[{phase['name']}: {phase['size']}, {phase['tokens']} tokens"
        assert line in text and phase["ended"] in text
    seconds = [float(found) for found in re.findall(r"([\d.]+) s,", text)]
    assert len(seconds) == 2 and all(0 <= second < 60 for second in seconds)


@hears("generate", "unsure", "phases", "switch", "stop")
def test_generate_in_turns(writer, question, told):
    def ask(*options) -> dict:
        return told("generate", writer, question, *options, "--max-new-tokens", 120)

    pair = ["--think", "small", "--answer", "large", "--thinking-budget", 6, "--grace", 0]
    never, always = (ask(*pair, "--unsure", level) for level in (100.0, -1.0))
    assert never["phases"][0]["by_size"] == {"small": 6}
    assert always["phases"][0]["by_size"] == {"large": 6}
    turns = ["--phases", "small:line:3,large:line:3,small:line:2,large"]
    family = star_elastic.load(writer)
    plan = Plan(parse_phases(turns[1]), max_new_tokens=120)
    prompt, _ = next(  # one in which each size has its turns
        pair
        for pair in zip(PROMPTS, family.generator.generate(PROMPTS, plan), strict=True)
        if sum(len(phase.handed) for phase in pair[1].phases) == 4
    )
    hows = {}
    for switch in ("reprefill", "catch-up", "hand-over"):
        options = [*turns, "--switch", switch, "--max-new-tokens", 120]
        result = told("generate", writer, prompt, *options)
        written = [size for size in result["token_sizes"] if size]
        assert [size for size, _ in groupby(written)][:2] == ["small", "large"]
        hows[switch] = [h["how"] for phase in result["phases"] for h in phase["handed"]]
    assert hows["reprefill"] == ["fresh", *["reprefill"] * 3]
    assert hows["catch-up"] == ["fresh", "reprefill", "catch-up", "catch-up"]
    assert set(hows["hand-over"][1:]) == {"hand-over"}
    whole = ask("--size", "small")["text"]
    stops = [whole[5:7], whole[8:10]]
    ended = ask("--size", "small", "--stop", stops[1], "--stop", stops[0])
    first = min(whole.find(stop) for stop in stops)
    assert ended["phases"][-1]["ended"] == "stop_string" and ended["text"] == whole[:first]


@hears("generate", "temperature", "top_p", "seed", "stream")
def test_generate_by_chance(writer, question, told, printed, monkeypatch):
    def ask(*options) -> list[int]:
        common = ["--size", "small", "--max-new-tokens", 20, *options]
        return told("generate", writer, question, *common)["token_ids"]

    greedy, hot = ask(), ask("--temperature", 2.0, "--seed", 3)
    assert hot != greedy and hot == ask("--temperature", 2.0, "--seed", 3)
    assert hot != ask("--temperature", 2.0, "--seed", 4)
    assert ask("--temperature", 2.0, "--top-p", 1e-6, "--seed", 3) == greedy
    options = ["generate", writer, question, "--size", "small", "--max-new-tokens", 20]
    result = told(*options)
    streams, stream = [], Generator.stream
    monkeypatch.setattr(Generator, "stream", lambda *a, **k: streams.append(a) or stream(*a, **k))
    for option in ([], ["--stream"]):
        assert printed(*options, *option).startswith(result["text"] + "\n[")
        assert bool(streams) == bool(option)


# eval, report


@hears(
    "eval", "elastic", "out", "problems", "validation", "sizes", "budgets", "dials", "data",
    "batch_size", "switch", "max_new_tokens", "dtype", "seed", "match", "as_json",
)  # fmt: skip
@hears("report", "out", "as_json")
def test_eval_and_report(writer, tmp_path, told, printed, monkeypatch):
    rows = [
        {"prompt": f"{a}+{b}", "answer": str(a + b), "task": f"task {a % 2}"}
        for a in range(1, 9) for b in range(1, 9)
    ]  # fmt: skip
    data = tmp_path / "sums.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given, solve = [], evaluation.solve

    def watched(generator, problems, plan, **options):
        given.append((plan, len(problems), options["batch_size"], generator))
        return solve(generator, problems, plan, **options)

    monkeypatch.setattr(evaluation, "solve", watched)
    out = tmp_path / "out"
    options = {
        "problems": 3, "validation": 2, "sizes": "large,small", "budgets": "4,none",
        "dials": "0.3", "data": data, "batch-size": 5, "switch": "reprefill",
        "max-new-tokens": 44, "dtype": "bfloat16", "seed": 6,
    }  # fmt: skip
    flags = [x for name, value in options.items() for x in (f"--{name}", value)]
    result = told("eval", writer, "--out", out, *flags)
    assert result == json.loads((out / "evaluation.json").read_text())
    counts = result["problems"]
    assert (set(counts["validation"].values()), set(counts["test"].values())) == ({2}, {3})
    assert {(problems, batch) for _, problems, batch, _ in given} == {(4, 5), (6, 5)}
    for plan, _, _, generator in given:
        assert (plan.max_new_tokens, plan.switch) == (44, "reprefill")
        assert generator.model("large").dtype == torch.bfloat16
    labels = {plan["label"] for plan in result["plans"]}
    assert {"large", "small", "large@4", "small>large@4"} <= labels
    dialled = [plan["dial"] for plan in result["plans"] if plan["kind"] == "policy"]
    assert {dial["position"] for dial in dialled} == {0.3}
    alone = told(
        "eval", writer, "--out", tmp_path / "alone", *flags, "--sizes", "small", "--dials", "none",
        "--budgets", "none", "--seed", 7, "--match", "regex:()",  # finds nothing in every reply
    )  # fmt: skip
    assert [plan["label"] for plan in alone["plans"]] == ["small"]
    assert (result["settings"]["match"], alone["settings"]["match"]) == (None, "regex:()")
    assert (result["settings"]["seed"], alone["settings"]["seed"]) == (6, 7)

    text = printed("eval", writer, "--out", out, *flags)
    for plan in result["plans"]:
        (line,) = re.findall(rf"^ *{re.escape(plan['label'])}  .*%.*$", text[text.rindex("Every"):], re.M)  # fmt: skip  # noqa: E501
        test = plan["test"]
        low, high = (100 * end for end in test["interval"])
        assert f"{test['accuracy']:.1%} ({low:.1f} to {high:.1f})" in line
        assert f"{test['flops'] / 1e6:,.1f}" in line
        assert f"{1e3 * test['seconds']:,.1f}" in line
    assert str(out) in text.splitlines()[-1]

    made = told("report", out)
    assert made == {"page": str(out / "report.html"), "plot": str(out / "pareto.png")}
    (out / "report.html").unlink()
    assert str(out / "report.html") in printed("report", out)
    assert (out / "report.html").is_file()


# demo


@hears("demo", "out", "as_json")
def test_demo(tmp_path, told, printed, monkeypatch):
    """Both ways of printing a report; what makes one is run by the recipe of an hour."""
    size = {
        "active": 1_230_000, "total": 2_340_000, "active_share": 0.753, "total_share": 0.698,
        "budget_miss": 0.0012, "kl_to_parent": 0.0345, "accuracy": 0.987,
        "interval": [0.975, 0.993], "share_of_parent": 0.991, "untrained_accuracy": 0.055,
    }  # fmt: skip
    plan = {
        "label": "small>large@32", "accuracy": 0.876, "seconds": 0.0123, "flops": 45_600_000,
        "bytes_per_token": 7_890_000, "thinking_tokens": 31.4, "cut_share": 0.25,
    }  # fmt: skip
    report = {
        "parent": {"active": 1_650_000, "total": 2_840_000, "accuracy": 0.998,
                   "interval": [0.991, 1.0]},
        "sizes": {"medium": size, "large": {**size, "untrained_accuracy": None}},
        "evaluations": [plan],
    }  # fmt: skip
    asked = []
    monkeypatch.setattr(
        demo, "run_recipe", lambda recipe, out, bars: asked.append((recipe, out)) or report
    )
    assert told("demo", "--out", tmp_path / "a") == report
    text = printed("demo", "--out", tmp_path / "b")
    assert asked == [(demo.DEMO, tmp_path / "a"), (demo.DEMO, tmp_path / "b")]
    assert re.search(r"^ *medium .*$", text, re.M) and re.search(r"^ *small>large@32 ", text, re.M)
    assert str(tmp_path / "b" / "report.json") in text


# devices and dtypes


@hears("rank", "device")
@hears("latency", "device")
@hears("quantize", "device")
@hears("generate", "device")
@hears("eval", "device")
@hears("adopt", "device")
@pytest.mark.parametrize(
    "command", ["rank", "latency", "latency sizes", "quantize", "generate", "eval", "adopt"]
)
def test_a_device_that_is_not_here_is_refused(command, writer, run_folder, tmp_path, capsys):
    """Which shows that the one that is named is the one that is asked for."""
    name, *more = command.split()
    out, rows = tmp_path / "out.json", run_folder / "rows.jsonl"
    arguments = {
        "rank": [run_folder / "parent", "--data", rows, "--out", out],
        "latency": [writer, "--out", out, *(f"--{flag}" for flag in more)],
        "quantize": [writer, "--format", "fp8", "--data", rows, "--out", out],
        "generate": [writer, "1+1"],
        "eval": [writer, "--out", out],
        "adopt": [run_folder / "parent", "--size", "a:hidden=32", "--data", rows, "--out", out],
    }[name]
    with pytest.raises(SystemExit) as ended:
        main([name, *map(str, arguments), "--device", "cuda:99"])
    assert ended.value.code == 2
    assert "device='cuda:99' cannot be used here" in capsys.readouterr().err.replace("\n", " ")
    assert not out.exists()


@hears("rank", "dtype")
@hears("quantize", "dtype")
@hears("generate", "dtype")
def test_the_parent_is_computed_in_the_dtype_that_is_named(
    writer, blocks, run_folder, tmp_path, told, monkeypatch
):
    seen = []
    original = loading.load_parent

    def watched(path, dtype=torch.float32, *arguments, **options):
        seen.append(dtype)
        return original(path, dtype, *arguments, **options)

    for module in (loading, generate_family, quantise):
        monkeypatch.setattr(module, "load_parent", watched)
    rows = run_folder / "rows.jsonl"
    told(
        "rank", run_folder / "parent", "--data", rows, "--out", tmp_path / "scores.safetensors",
        "--samples", 1, "--dtype", "bfloat16",
    )  # fmt: skip
    assert seen == [torch.bfloat16]
    told("generate", writer, "1+1", "--max-new-tokens", 2, "--dtype", "bfloat16")
    assert seen == [torch.bfloat16] * 2
    told(
        "quantize", blocks, "--format", "fp8", "--data", rows, "--samples", 1, "--out",
        tmp_path / "quantised", "--dtype", "bfloat16",
    )  # fmt: skip
    assert seen[2] == torch.bfloat16


def test_every_option_is_watched():
    options = {
        (name, option.name)
        for name, command in program.commands.items()
        for option in command.params
        if option.name != "help"
    }
    assert options == WATCHED
