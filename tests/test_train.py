"""Nested distillation end to end on a tiny parent: config, training, resume, the result."""

import errno
import json
import os
import re
import shutil
import signal
import time
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from star_elastic.architectures import architecture_of, read_config
from star_elastic.checkpoints.companions import BASIS
from star_elastic.checkpoints.manifest import load_manifest
from star_elastic.checkpoints.tensors import load_tensors
from star_elastic.cli.terminal import at_the_command_line
from star_elastic.cost.latency import load_table, save_table
from star_elastic.errors import BudgetError, CheckpointError, ConfigError, Interrupted, ShapeError
from star_elastic.generate.family import load
from star_elastic.importance.files import load_scores, save_scores
from star_elastic.models.elastic import ElasticModel
from star_elastic.models.load import load_parent
from star_elastic.models.submodel import sort_in_place
from star_elastic.rewrite.stream import slice_checkpoint
from star_elastic.router.budget import AIM, REACH
from star_elastic.router.files import widths_for
from star_elastic.router.grid import default_choices
from star_elastic.train import calibrate
from star_elastic.train.calibrate import DEPTH, SCORES
from star_elastic.train.check import check
from star_elastic.train.config import StageConfig, load_run_config
from star_elastic.train.directory import MAY_CHANGE
from star_elastic.train.distributed import World
from star_elastic.train.loop import Trainer
from star_elastic.train.losses import distillation_loss
from star_elastic.train.run import train
from star_elastic.train.stages import Curriculum, Position
from tests.latencies import made_up
from tests.laws.parents import assert_equal
from tests.processes import run_code, start_command
from tests.tiny_run import SHORT, TINY, StopAt, build_trainer, config_in, metrics
from tests.watchers import Said

TWO_STAGES = """
[[stages]]
tokens = 1536
context = 128
batch_size = 2
size_weights = [3, 1]
sizes_per_step = "one"
groups = 2
learning_rate = 1e-3

[engine]"""


def weights_of(result):
    return load_tensors(result.elastic / "model.safetensors")


def test_result_is_an_elastic_checkpoint_that_meets_its_budgets(trained):
    family = load(trained.elastic)
    cost = family.sizes["small"].cost
    assert family.sizes["large"].widths == family.axis_map.full
    assert cost["budget_miss"] <= max(AIM, cost["least_miss"])
    steps = [abs(moved) for moved in family.sizes["small"].repair.values()]
    free = sum(steps) if max(steps, default=0) > 1 else 0
    assert family.sizes["small"].data_free_steps == free
    plain, info = AutoModelForCausalLM.from_pretrained(
        trained.elastic, output_loading_info=True, dtype=torch.float32
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids = torch.arange(20)[None]
    assert_equal(family["large"](input_ids=ids).logits, plain(input_ids=ids).logits)


def test_slices_of_the_result_reload_in_plain_transformers(trained, tmp_path):
    family = load(trained.elastic)
    slice_checkpoint(trained.elastic, family.sizes["small"].widths, tmp_path / "small")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.float32)
    AutoTokenizer.from_pretrained(tmp_path / "small")
    ids = torch.arange(20)[None]
    assert torch.allclose(
        plain(input_ids=ids).logits, family["small"](input_ids=ids).logits, atol=1e-5
    )
    assert not (tmp_path / "small" / "elastic.json").exists()
    assert not (tmp_path / "small" / "router.safetensors").exists()


def test_training_brings_the_small_size_closer_to_the_parent(run_folder, trained):
    original, config = load_parent(run_folder / "parent")
    family = load(trained.elastic)
    widths = family.sizes["small"].widths
    rows = metrics(trained)
    committed = [row["kd"]["small"] for row in rows if not row["expected"]]
    assert len(rows) == 40 and len(committed) == 16
    ids = torch.randint(0, 300, (4, 40), generator=torch.Generator().manual_seed(3))
    sort_in_place(original, family.axis_map, load_tensors(trained.elastic / "orders.safetensors"))
    elastic = ElasticModel(original, config)
    with torch.no_grad():
        teacher = elastic(family.axis_map.full, input_ids=ids).logits.flatten(0, 1)
        before = elastic(widths, input_ids=ids).logits.flatten(0, 1)
        after = family["small"](input_ids=ids).logits.flatten(0, 1)
    assert distillation_loss(teacher, after) < 0.95 * distillation_loss(teacher, before)


# Resume


def same_run(one, other):
    """Bit for bit the same result and losses, after as many steps and tokens."""
    assert (one.steps, one.tokens) == (other.steps, other.tokens)
    for name in ("model.safetensors", "router.safetensors", "orders.safetensors"):
        ours, theirs = (load_tensors(r.elastic / name) for r in (one, other))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name
    losses = [[row["kd"] for row in metrics(r)] for r in (one, other)]
    assert losses[0] == losses[1]


def test_interrupted_and_resumed_equals_uninterrupted(run_folder, trained):
    torch.set_num_threads(1)
    config = config_in(run_folder, "resumed")
    for step in (7, 31):
        with pytest.raises(Interrupted, match=f"stopped at step {step}; go on with --resume"):
            train(config, resume=step > 7, progress=StopAt(step))
    same_run(train(config, resume=True), trained)
    with pytest.raises(CheckpointError, match="is complete already"):
        train(config, resume=True)
    with pytest.raises(CheckpointError, match="is not empty"):
        train(config)


@pytest.mark.long
def test_killed_and_resumed_equals_uninterrupted(run_folder):
    """kill -9 at any moment of a run of two stages, in the router's part and after it."""
    torch.set_num_threads(1)
    changes = {
        **SHORT,
        "save_every = 16": "save_every = 2",
        "[engine]": TWO_STAGES,
    }
    straight = train(config_in(run_folder, "unkilled", **changes))
    assert [row["stage"] for row in metrics(straight)] == [0] * 12 + [1] * 6
    config_in(run_folder, "killed", **changes)
    log, saved = run_folder / "killed" / "metrics.jsonl", run_folder / "killed" / "state"
    for step in (5, 15):
        process = start_command("train", run_folder / "killed.toml", *["--resume"] * (step > 5))
        while not (saved.is_dir() and log.exists() and len(log.read_text().splitlines()) >= step):
            assert not process.has_ended, "the run ended before it was killed"
            time.sleep(0.01)
        process.kill()
        assert not (run_folder / "killed" / "elastic").exists()
    same_run(train(config_in(run_folder, "killed", **changes), resume=True), straight)


LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
from star_elastic.cli import main
main(["train", sys.argv[1], "--resume"])
"""
"""Resumes a run whose files may not grow beyond a size: what a full disk does to it."""


@pytest.mark.parametrize("limit", [1_000, 20_000], ids=["log", "state"])
def test_a_full_disk_leaves_the_last_state_intact(run_folder, short, limit):
    torch.set_num_threads(1)
    name = f"full-disk-{limit}"
    changes = {**SHORT, "save_every = 16": "save_every = 4"}
    config = config_in(run_folder, name, **changes)
    with pytest.raises(Interrupted):
        train(config, progress=StopAt(6))
    state = run_folder / name / "state"
    before = {file.name: file.read_bytes() for file in state.iterdir()}
    done = run_code(LIMITED, run_folder / f"{name}.toml", limit)
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "written (" in line and "resume" in line
    assert {file.name: file.read_bytes() for file in state.iterdir()} == before
    assert not list((run_folder / name).glob(".state*"))
    same_run(train(config, resume=True), short)


def test_a_disk_that_fails_when_it_is_flushed_leaves_the_last_state(run_folder, monkeypatch):
    """What a disk keeps in memory may be lost: a state counts when the disk says that it has it."""
    config = config_in(run_folder, "no-flush", **{**SHORT, "save_every = 16": "save_every = 4"})
    with pytest.raises(Interrupted):
        train(config, progress=StopAt(5))
    state = run_folder / "no-flush" / "state"
    before = {file.name: file.read_bytes() for file in state.iterdir()}

    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(CheckpointError, match="state cannot be written .*the last one is intact"):
        train(config, resume=True)
    assert {file.name: file.read_bytes() for file in state.iterdir()} == before


def test_a_damaged_state_ends_with_one_line(run_folder):
    config = config_in(run_folder, "damaged", **SHORT)
    with pytest.raises(Interrupted):
        train(config, progress=StopAt(3))
    (file,) = (run_folder / "damaged" / "state").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="is damaged or of another run .*; start anew"):
        train(config, resume=True)


# Law 7: how a step is computed does not change it


@pytest.mark.parametrize(
    "engine",
    ["micro_batch = 1", "micro_batch = 3", "recompute = true", "workers = 2"],
)
def test_micro_batches_threads_and_recomputing_change_nothing(run_folder, short, engine):
    torch.set_num_threads(2)
    name = engine.replace(" ", "")
    other = train(
        config_in(run_folder, name, **SHORT, **{"save_every = 16": f"save_every = 16\n{engine}"})
    )
    for a, b in zip(metrics(short), metrics(other), strict=True):
        assert a["num_tokens"] == b["num_tokens"] and a["expected"].keys() == b["expected"].keys()
        assert b["kd"] == pytest.approx(a["kd"], rel=1e-4)
    first, second = weights_of(short), weights_of(other)
    assert all(torch.allclose(first[k], second[k], atol=1e-4) for k in first)


# The parts of a run


def test_principal_basis_is_stored_with_the_checkpoint(run_folder):
    config = config_in(
        run_folder,
        "principal",
        **{
            "num_samples = 16": 'num_samples = 16\nbasis = "principal"',
            "tokens = 15360": "tokens = 1",
            "learning_rate = 2e-3": "learning_rate = 1e-12\nfinal_learning_rate = 1e-12",
        },
    )
    result = train(config)
    basis = load_tensors(result.elastic / "basis.safetensors")["hidden"]
    original, _ = load_parent(run_folder / "parent")
    family = load(result.elastic)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        expected = original(input_ids=ids).logits
        assert torch.allclose(family["large"](input_ids=ids).logits, expected, atol=1e-4)
        back = original.get_input_embeddings().weight.double() @ basis
    assert torch.allclose(family.parent.get_input_embeddings().weight.double(), back, atol=1e-5)
    assert "hidden" not in load_tensors(result.elastic / "orders.safetensors")
    norms = [n for n in family.axis_map.norms if n.axis == "hidden"]
    assert all(family.parent.get_parameter(f"{n.path}.weight").eq(1).all() for n in norms)


def test_router_at_full_budget_ends_at_full_width(trained):
    """Law 9: the argmax at budget 1 is full on every axis, with nothing to repair."""
    manifest = load_manifest(trained.elastic, load(trained.elastic).axis_map)
    assert manifest.sizes["large"].repair == {}


def test_one_size_per_group_follows_the_weights(run_folder):
    changes = {
        "batch_size = 4": 'batch_size = 4\nsizes_per_step = "one"\n'
        "size_weights = [3, 1]\ngroups = 4",
        "tokens = 15360": "tokens = 4608",
    }
    rows = metrics(train(config_in(run_folder, "one", **changes)))
    assert len(rows) == 12
    small = sum(row["num_distilled"] for row in rows if "small" in row["kd"])
    assert 0 < sum("small" in row["kd"] for row in rows) < 12 and small > 0
    assert any(len(row["kd"]) == 2 for row in rows)
    assert sum("large" in row["kd"] for row in rows) > sum("small" in row["kd"] for row in rows)


def fixed(small: str, budget: float) -> dict[str, str]:
    """Changes of the run config that give the widths of both sizes."""
    return {
        **SHORT,
        "active = 0.7": f"active = {budget}",
        "[router]": f'[router.fixed]\nlarge = "hidden=48"\nsmall = "{small}"\n[router]',
    }


def test_given_widths_leave_nothing_to_learn(run_folder):
    result = train(config_in(run_folder, "given", **fixed("hidden=32,top_k=1", 0.6356)))
    family = load(result.elastic)
    small = family.sizes["small"]
    assert small.widths["hidden"] == 32 and small.widths["top_k"] == 1
    assert not any(row["expected"] for row in metrics(result))
    assert not (result.elastic / "router.safetensors").exists()
    with pytest.raises(CheckpointError, match="has no router, so it has only the sizes large, sm"):
        family.at(active=0.8)


def test_given_widths_far_from_their_budget_are_refused(run_folder):
    config = config_in(run_folder, "far", **fixed("hidden=32,top_k=1", 0.7))
    with pytest.raises(BudgetError, match=r"router.fixed.small costs active=0.63.*misses active=0"):
        train(config)
    assert not (run_folder / "far").exists()


def test_layers_of_their_own_widths_and_fewer_layers(deep_folder):
    """Per-layer widths and depth, from the router to the reloaded family, generating."""
    changes = {
        "hidden = [48, 40, 32, 24]\n": "layers = [5, 4]\ntop_k = [2, 1]\n",
        "[sizes.large]": 'per_layer = ["ssm_heads", "expert_ffn", "shared_ffn"]\n[sizes.large]',
        "[64, 60, 56, 52, 48, 44, 40, 36, 32, 28, 24]": "[64, 24]",
        # With all layers at least .68; with widths alike in all layers 1.5 % off.
        "active = 0.7": "active = 0.61",
    }
    result = train(config_in(deep_folder, "own", **changes))
    family = load(result.elastic)
    assert sorted(family.manifest.depth) == [0, 1, 2, 3, 4]
    assert family.manifest.per_layer == ("ssm_heads", "expert_ffn", "shared_ffn")
    small = family.sizes["small"]
    assert small.cost["budget_miss"] <= max(AIM, small.cost["least_miss"])
    gone = [layer for layer, kept in enumerate(small.widths["layers"]) if not kept]
    assert gone and set(gone) <= set(family.manifest.depth[4:])
    assert any(isinstance(small.widths[a], tuple) for a in family.manifest.per_layer)
    assert family["small"].config.num_hidden_layers == 5 - len(gone)
    (generation,) = family.generate(["add 1 2"], think="small", answer="small", max_new_tokens=8)
    assert generation.token_ids
    assert family.at(active=0.7) is not None
    manifest = json.loads((result.elastic / "elastic.json").read_text())
    for depth, problem in (([0, 1], "does not list every layer"), ([], "depth is missing")):
        (result.elastic / "elastic.json").write_text(json.dumps({**manifest, "depth": depth}))
        with pytest.raises(CheckpointError, match=f"elastic.json is damaged.*{problem}"):
            load(result.elastic).at(active=0.7)


@pytest.mark.parametrize(
    ("metric", "budget", "is_ranked"), [("active", 0.3, False), ("bytes", 0.5, True)]
)
def test_budgets_that_depth_cannot_meet_are_refused(run_folder, metric, budget, is_ranked):
    """Before the layers are ranked, or when the ranking shows that what it leaves costs more."""
    changes = {
        **SHORT,
        "hidden = [48, 40, 32, 24]\nexpert_ffn = [32, 24, 16]\n": "",
        "shared_ffn = [64, 60, 56, 52, 48, 44, 40, 36, 32, 28, 24]\nssm_heads = [8, 6, 4]": (
            "layers = [3, 2]"
        ),
        "active = 1.0": f"{metric} = 1.0",
        "active = 0.7": f"{metric} = {budget}",
        # Of many sequences the Mamba states weigh most, and the ranking keeps the Mamba layer.
        "[engine]": "[workload]\nbatch = 64\n[engine]",
    }
    name = f"depth-{metric}"
    with pytest.raises(BudgetError, match=r"small.*cannot be met; the choices reach from"):
        train(config_in(run_folder, name, **changes))
    assert (run_folder / name / "depth.safetensors").exists() == is_ranked


def test_budgets_in_milliseconds_come_from_the_table(run_folder):
    """Here a made-up one, in which widths surely make a difference; it stays with the family."""
    config = read_config(run_folder / "parent")
    axis_map = architecture_of(config).axis_map(config)
    choices = config_in(run_folder, "ms").choices
    save_table(made_up(axis_map, choices=choices), run_folder / "made-up.json")
    changes = {
        **SHORT,
        "[sizes.large]\nactive = 1.0": 'latency = "made-up.json"\n[sizes.large]\nms = 1.0',
        "active = 0.7": "ms = 0.9",
    }
    result = train(config_in(run_folder, "ms", **changes))
    family, table = load(result.elastic), load_table(run_folder / "made-up.json", axis_map)
    full = table.milliseconds(axis_map.full, axis_map)
    small = family.sizes["small"]
    assert small.cost["ms"] == pytest.approx(table.milliseconds(small.widths, axis_map), abs=1e-5)
    assert small.cost["ms"] == pytest.approx(0.9 * full, rel=REACH)
    # The run keeps its table, and a plain slice has no use for it.
    slice_checkpoint(result.elastic, small.widths, run_folder / "ms-cut")
    assert not (run_folder / "ms-cut" / "latency.json").exists()
    between = widths_for(family.checkpoint, {"ms": 0.95})
    assert table.milliseconds(between.widths, axis_map) == pytest.approx(0.95 * full, rel=REACH)


def test_a_run_that_goes_on_counts_with_the_table_that_it_began_with(run_folder):
    """Whatever has been measured since."""
    model_config = read_config(run_folder / "parent")
    axis_map = architecture_of(model_config).axis_map(model_config)
    choices = config_in(run_folder, "own-ms").choices
    first, later = (made_up(axis_map, seed, choices=choices) for seed in (0, 1))
    save_table(first, run_folder / "own-table.json")
    changes = {
        **SHORT,
        "[sizes.large]\nactive = 1.0": 'latency = "own-table.json"\n[sizes.large]\nms = 1.0',
        "active = 0.7": "ms = 0.9",
    }
    config = config_in(run_folder, "own-ms", **changes)
    with pytest.raises(Interrupted):
        train(config, progress=StopAt(2))
    save_table(later, run_folder / "own-table.json")
    full = check(config).cost.full.ms
    assert full == first.milliseconds(axis_map.full, axis_map)
    assert full != later.milliseconds(axis_map.full, axis_map)


def test_stages_have_their_steps_rates_and_sizes():
    long = StageConfig(
        tokens=640,
        context=64,
        batch_size=2,
        learning_rate=1.0,
        final_learning_rate=0.5,
        warmup_steps=2,
        size_weights=(0.75, 0.25),
    )
    short = StageConfig(
        tokens=100,
        context=10,
        batch_size=2,
        learning_rate=0.1,
        final_learning_rate=0.1,
        warmup_steps=0,
        size_weights=(0.5, 0.5),
        sizes_per_step="one",
    )
    curriculum = Curriculum([long, short])
    assert curriculum.num_steps == 5 + 5
    assert [curriculum.at(step) for step in (0, 4, 5, 9)] == [
        Position(0, 0), Position(0, 4), Position(1, 0), Position(1, 4),
    ]  # fmt: skip
    rates = [curriculum.learning_rate(step) for step in range(10)]
    assert rates[0] == 0.5 and rates[1] > rates[2] > rates[4] > 0.5
    assert rates[5:] == pytest.approx([0.1] * 5)
    assert curriculum.sizes(3, 0, ["a", "b"], 0) == [("a", 0.75), ("b", 0.25)]
    drawn = [curriculum.sizes(7, group, ["a", "b"], 0)[0][0] for group in range(40)]
    assert 8 < drawn.count("a") < 32 and drawn == [
        curriculum.sizes(7, group, ["a", "b"], 0)[0][0] for group in range(40)
    ]


def test_default_stages_are_the_papers(run_folder):
    config = config_in(
        run_folder,
        "defaults",
        **{
            "context = 96\nbatch_size = 4\n": "",
            "[engine]": "[[stages]]\ntokens = 50_000_000\n[engine]",
        },
    )
    first, second = config.stages
    assert (first.context, first.batch_size, first.size_weights) == (8192, 1536, (0.5, 0.5))
    assert (second.context, second.batch_size) == (49152, 512)
    assert second.size_weights == pytest.approx((1 / 1.6, 0.6 / 1.6))
    assert (first.num_steps, second.num_steps) == (1, 2)


# Mistakes


@pytest.mark.parametrize(
    ("old", "new", "kind", "message"),
    [
        ("tokens = 15360", "tokenz = 12", ConfigError, "stages.0..tokenz is not.*did you mean tok"),
        ("tokens = 15360", "tokens = 0", ConfigError, r"stages\[0\].tokens=0 is less than 1"),
        (
            "tokens = 15360",
            'tokens = "12"',
            ConfigError,
            "tokens='12' is not a whole number; wr",
        ),
        ("active = 0.7", "active = 1.7", ConfigError, r"sizes.small.active=1.7 is more than the p"),
        ("active = 0.7", 'active = "7X"', ConfigError, r"sizes.small.active='7X' has the unknown"),
        ("active = 0.7", "speed = 0.7", ConfigError, "sizes.small.speed is no budget"),
        ("active = 0.7", "active = 0.1", BudgetError, "small.*cannot be met; the choices reach"),
        ("active = 0.7", "ms = 0.7", BudgetError, "milliseconds needs a latency table; measure"),
        (
            "active = 0.7",
            "active = 0.7\ntotal = 1.0",
            BudgetError,
            "no widths of the choices meet active=0.7 and total=1 within 2%; the nearest",
        ),
        ("[8, 6, 4]", "[8, 5]", ShapeError, "ssm_heads=5 is not a multiple of its 2 groups"),
        ("[8, 6, 4]", "[6, 4]", ConfigError, "does not descend from the full width 8"),
        ("[choices]", "[choices]\nlayers = [3, 0]", ConfigError, "keep at least one"),
        ('loss_on = "answers"', 'loss_on = "some"', ConfigError, "loss_on='some' is unknown"),
        ("rows.jsonl", "none.jsonl", ConfigError, "none.jsonl does not exist"),
        (
            'parent = "parent"',
            'parent = "nowhere"',
            ConfigError,
            "nowhere' does not exist.*downloaded",
        ),
        ("num_samples = 16", 'scores = "none"', CheckpointError, "none does not exist"),
        ("[engine]", "[optimizer]\nbetas = [1.0, 0.9]\n[engine]", ConfigError, "optimizer.betas="),
        (
            "weight = 10",
            "weight = 10\nannealing = {tau_end = 0}",
            ConfigError,
            "all must be",
        ),
        ("[engine]", "[workload]\ncontext = -1\n[engine]", ConfigError, "context=-1.*give tokens"),
        ("[engine]", "[engin]", ConfigError, "engin is not a key.*did you mean engine"),
        ("learning_rate = 2e-3", "learning_rate = inf", ConfigError, "learning_rate=inf is not fi"),
        (
            "learning_rate = 2e-3",
            "learning_rate = 1e-6",
            ConfigError,
            "final_learning_rate=.*above",
        ),
        ("active = 1.0", "active = 0.65", ConfigError, "'small' has a larger budget than 'large'"),
        ("[sizes.small]", '[sizes." "]', ConfigError, "sizes has the name ' '; use letters"),
        ('out = "mistake"', 'out = ""', ConfigError, "out is empty; name a directory"),
        ("batch_size = 4", "batch_size = 4\ngroups = 3", ConfigError, "groups=3 does not divide"),
        (
            "batch_size = 4",
            "batch_size = 4\nsize_weights = [1.0]",
            ConfigError,
            "size_weights has 1 entries for 2 sizes",
        ),
        ("[router]", '[router]\nfixed = {tiny = "hidden=1"}', ConfigError, "fixed.tiny is no size"),
    ],
)
def test_mistakes_end_before_any_work(run_folder, old, new, kind, message):
    with pytest.raises(kind, match=message):
        train(config_in(run_folder, "mistake", **{old: new}))
    assert not (run_folder / "mistake").exists()


def test_a_place_that_cannot_be_written_is_told_in_one_line(run_folder):
    config = replace(config_in(run_folder, "below"), out=str(run_folder / "rows.jsonl" / "below"))
    with pytest.raises(CheckpointError, match=r"rows.jsonl.* cannot be written in \(Not a dir"):
        train(config)


def test_resume_may_correct_learning_rates_and_how_steps_are_computed(run_folder):
    with pytest.raises(Interrupted):
        train(config_in(run_folder, "corrected", **SHORT), progress=StopAt(3))
    changes = {
        "learning_rate = 2e-3": "learning_rate = 1e-4",
        "learning_rate = 3e-2": "learning_rate = 1e-3",
        "[engine]\nsave_every = 16": "[optimizer]\nclip_norm = 0.5\n[engine]\nmicro_batch = 2",
    }
    result = train(config_in(run_folder, "corrected", **SHORT, **changes), resume=True)
    rates = [row["learning_rate"] for row in metrics(result)]
    assert rates[2] > 1e-3 and max(rates[3:]) < 2e-4
    went_on_with = json.loads((run_folder / "corrected/run.json").read_text())
    assert went_on_with["engine"]["micro_batch"] == 2
    assert went_on_with["router"]["learning_rate"] == 1e-3
    assert went_on_with["optimizer"]["clip_norm"] == 0.5


def test_a_directory_is_one_runs_at_a_time(run_folder):
    """A second process, resuming what is still running, changes nothing."""
    config_in(run_folder, "busy", **{"save_every = 16": "save_every = 2"})
    process = start_command("train", run_folder / "busy.toml")
    run = run_folder / "busy"
    while not (run / "state" / "state.json").exists():
        assert not process.has_ended
        time.sleep(0.05)
    with pytest.raises(CheckpointError, match="another process trains in .*busy; wait until"):
        train(load_run_config(run_folder / "busy.toml"), resume=True)
    os.kill(process.pid, signal.SIGINT)
    process.wait()
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(len(steps)))
    with pytest.raises(Interrupted):  # its lock has gone with it
        train(
            load_run_config(run_folder / "busy.toml"), resume=True, progress=StopAt(len(steps) + 1)
        )


def test_a_state_that_is_gone_is_told_and_half_of_one_is_refused(run_folder):
    config = config_in(run_folder, "lost-state", **SHORT)
    with pytest.raises(Interrupted):
        train(config, progress=StopAt(3))
    run = run_folder / "lost-state"
    kept = (run / "state" / "state.json").read_text()
    (run / "state" / "state.json").unlink()
    with pytest.raises(CheckpointError, match="state is damaged .state.json is missing.; restore"):
        train(config, resume=True)
    (run / "state" / "state.json").write_text(kept)
    shutil.rmtree(run / "state")
    told = Said()
    assert train(config, resume=True, progress=told).steps == 12
    assert any("no state is saved" in line and "at the first step" in line for line in told.lines)


def test_given_scores_are_those_of_the_whole_run(run_folder, trained, tmp_path):
    """Other ones are refused, also before the first state; the file may move, or go."""
    scores = trained.elastic.parent / "scores.safetensors"
    for name in ("mine", "moved"):
        shutil.copyfile(scores, tmp_path / f"{name}.safetensors")
    known, info = load_scores(scores, axis_map := check(config_in(run_folder, "x")).axis_map)
    other = {key: 1 / (1 + value) for key, value in known.items()}
    save_scores(tmp_path / "other.safetensors", other, axis_map, info)

    def config(name: str = ""):
        given = f'scores = "{tmp_path / name}.safetensors"' if name else "num_samples = 16"
        return config_in(run_folder, "scored-once", **SHORT, **{"num_samples = 16": given})

    with pytest.raises(Interrupted):
        train(config("mine"), progress=StopAt(3))
    (tmp_path / "mine.safetensors").unlink()
    with pytest.raises(Interrupted):  # the run has its own copy
        train(config("mine"), resume=True, progress=StopAt(4))
    for wrong in (config("other"), config()):
        with pytest.raises(ConfigError, match="the scores that calibration.scores names differ"):
            train(wrong, resume=True)
    assert train(config("moved"), resume=True).steps == 12


def test_what_is_advised_before_training_can_be_done_with_given_scores(run_folder, trained):
    """Nothing is fixed before the first line of advice: not by copying the scores either."""
    given = {"num_samples = 16": f'scores = "{trained.elastic.parent / "scores.safetensors"}"'}
    stage = {"context = 96\nbatch_size": "context = 4\nbatch_size"}
    with pytest.raises(CheckpointError, match=r"within stages\[0\].context=4; raise it"):
        train(config_in(run_folder, "advised", **SHORT, **given, **stage))
    told = Said()
    train(config_in(run_folder, "advised", **SHORT, **given), progress=told)
    assert any("ranking: taken from scores.safetensors" in line for line in told.lines)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
def test_memory_that_runs_out_is_told_in_one_line(run_folder, monkeypatch, capsys, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(Trainer, "_learn", fail)
    name = f"no-memory-{type(error).__name__}"
    with pytest.raises(CheckpointError, match=r"memory ran out \(.*lower engine.micro_batch or"):
        train(config_in(run_folder, name, **SHORT))
    with pytest.raises(SystemExit) as ended, at_the_command_line():
        raise error
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: memory ran out (") and "use smaller batches" in line


def test_what_is_advised_when_memory_runs_out_may_be_done(run_folder, monkeypatch):
    """Also after a part of the ranking is kept; what is measured does not depend on it."""

    def fail(*args):
        raise MemoryError

    ranking = 'num_samples = 16\nbasis = "principal"\nbatch_size = '
    layers = {"[choices]": "[choices]\nlayers = [3, 2]", "tokens = 15360": "tokens = 384"}
    text = {**layers, "num_samples = 16": f"{ranking}16"}
    monkeypatch.setattr(calibrate, "principal_basis", fail)
    with pytest.raises(CheckpointError, match="memory ran out ") as error:
        train(config_in(run_folder, "no-memory-to-rank", **text))
    monkeypatch.undo()
    advised = set(re.findall(r"\b(?:engine|calibration)\.\w+", str(error.value)))
    assert "calibration.batch_size" in advised
    assert all(MAY_CHANGE.fullmatch(key) for key in advised)
    fewer = {**text, "num_samples = 16": f"{ranking}3"}
    kept = [
        train(config_in(run_folder, name, **changes), resume=resume).elastic.parent
        for name, changes, resume in (
            ("no-memory-to-rank", fewer, True), ("ranked-by-3", fewer, False),
            ("ranked-by-16", text, False),
        )
    ]  # fmt: skip
    for file in (SCORES, BASIS, DEPTH):
        expected, *others = (load_tensors(folder / file) for folder in kept)
        for found in others:
            assert found.keys() == expected.keys()
            for key, value in expected.items():
                torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-4)


def test_resume_refuses_another_config(run_folder, trained):
    with pytest.raises(ConfigError, match=r"stages\[0\].tokens \(15360 then, 999 now\) differ"):
        train(config_in(run_folder, "straight", **{"tokens = 15360": "tokens = 999"}), resume=True)
    with pytest.raises(CheckpointError, match="holds no run to go on with"):
        train(config_in(run_folder, "never"), resume=True)


def test_a_loss_that_is_not_finite_ends_with_one_line(run_folder):
    config = config_in(run_folder, "nan", **{"learning_rate = 2e-3": "learning_rate = 1e20"})
    with pytest.raises(CheckpointError, match=r"(the loss|the gradients) of .* lower learning_r"):
        train(config)


def test_a_gradient_that_is_not_finite_changes_no_weight(run_folder):
    """The loss may be finite where its gradient is not."""
    config = config_in(run_folder, "inf", **SHORT)
    trainer = build_trainer(config, run_folder / "inf", World())
    parameter = next(iter(trainer.student.parent.parameters()))
    before = {name: value.clone() for name, value in trainer.student.state().items()}
    parameter.register_hook(lambda gradient: gradient / 0)
    with pytest.raises(CheckpointError, match="gradients of the weights are (nan|inf) at step 0"):
        trainer.train_step()
    assert all(torch.equal(value, before[name]) for name, value in trainer.student.state().items())


def test_default_choices_halve_every_axis_but_those_the_papers_keep():
    config = {**TINY, "vocab_size": 64}
    grid = default_choices(architecture_of(config).axis_map(config))
    assert grid["hidden"] == (48, 40, 32, 24) and grid["ssm_heads"] == (8, 6, 4)
    assert grid["experts"] == (8, 7, 6, 5, 4)
    assert not {"heads", "layers", "top_k"} & set(grid)
