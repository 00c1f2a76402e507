"""Wiring: every key of a run config changes what a run does, in the way that it says.

Each test names the keys that it watches; the last one fails for a key that nobody watches.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from star_elastic.axes import axis_keys
from star_elastic.axes.widths import Widths
from star_elastic.cost.latency import save_table
from star_elastic.errors import ConfigError, RowError
from star_elastic.importance.files import ScoreInfo, load_scores, save_scores
from star_elastic.nesting.gate import Mixture
from star_elastic.train import loop, steps
from star_elastic.train.check import check
from star_elastic.train.config import RunConfig, load_run_config
from star_elastic.train.inputs import open_inputs
from star_elastic.train.losses import linear_cross_entropy
from star_elastic.train.outlook import look_ahead
from star_elastic.train.run import train
from tests.latencies import made_up
from tests.tiny_run import RUN, TINY, config_in, make_folder, metrics
from tests.watched import keys_of

WATCHED: set[str] = set()
STAGE = "learning_rate = 2e-3"
FIXED = {
    "[router]": '[router.fixed]\nlarge = "hidden=48"\nsmall = "hidden=32,top_k=1"\n[router]',
    "active = 0.7": "active = 0.6356",
}
"""The widths of both sizes given."""


def hears(*keys: str) -> Callable:
    """Marks a test as the one that watches these keys."""
    WATCHED.update(keys)
    return lambda test: test


@pytest.fixture(scope="module")
def file(run_folder):
    return run_folder / "keys.toml"


def same(one, other) -> bool:
    """Whether two runs ended with the same weights, bit for bit."""
    ours, theirs = one.weights, other.weights
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


# What is trained, and where it goes


@hears("parent", "out", "seed")
def test_parent_out_and_seed(run_folder, tmp_path, watch):
    base = watch()
    make_folder(tmp_path / "other", TINY, seed=1)
    other = watch(**{'parent = "parent"': f'parent = "{tmp_path / "other" / "parent"}"'})
    assert other.kd != base.kd
    seeded = watch(**{'parent = "parent"': 'parent = "parent"\nseed = 7'})
    assert not torch.equal(seeded.batches[0].input_ids, base.batches[0].input_ids)
    assert not torch.equal(seeded.gradient(part="router"), base.gradient(part="router"))
    assert same(watch(), base)
    (run_folder / "elsewhere.toml").write_text(RUN.replace('out = "run"', 'out = "deep/er"'))
    assert load_run_config(run_folder / "elsewhere.toml").out == str(run_folder / "deep" / "er")


@hears("sizes")
def test_sizes_have_the_budgets_that_they_are_given(watch):
    base = watch()
    less = watch(**{"active = 0.7": "active = 0.6", "[sizes.small]": "[sizes.tiny]"})
    assert list(less.kd[0]) == ["large", "tiny"]
    far, near = less.reports[0].budget["tiny"], base.reports[0].budget["small"]
    assert (1 + far) * 0.6 == pytest.approx((1 + near) * 0.7, rel=1e-6)  # the same cost
    assert less.reports[0].budget["large"] == base.reports[0].budget["large"]


@hears("choices", "per_layer")
def test_choices_are_those_of_the_router(deep_folder, watch):
    base = watch()
    coarse = watch(**{"hidden = [48, 40, 32, 24]": "hidden = [48, 40, 32]"})
    assert base.trainer.router.grid.choices["hidden"] == (48, 40, 32, 24)
    assert coarse.trainer.router.grid.choices["hidden"] == (48, 40, 32)
    assert coarse.kd != base.kd
    each = watch(
        folder=deep_folder, **{"[sizes.large]": 'per_layer = ["ssm_heads"]\n[sizes.large]'}
    )
    (small,) = [f.size for f in each.forwards if not isinstance(f.size, Widths)][1:]
    assert [len(small["ssm_heads"]), isinstance(small["hidden"], Mixture)] == [2, True]


@hears("router.fixed")
def test_given_widths_are_trained(watch):
    given = watch(**FIXED)
    sizes = [f.size for f in given.forwards if not f.is_teacher]
    assert [(size["hidden"], size["top_k"]) for size in sizes] == [(48, 2), (32, 1)]
    assert not given.decisions and given.reports[0].budget == {}


@hears("family")
def test_a_family_is_trained_on(run_folder, trained, watch):
    family = load_file(trained.elastic / "model.safetensors")
    text = RUN[RUN.index("[choices]") : RUN.index("[[data]]")]
    on = watch(**{text: "", "[sizes.large]": f'family = "{trained.elastic}"\n[sizes.large]'})
    committed = json.loads((trained.elastic / "elastic.json").read_text())["sizes"]
    sizes = [f.size for f in on.forwards if not f.is_teacher]
    assert [size["hidden"] for size in sizes] == [
        size["widths"]["hidden"] for size in committed.values()
    ]
    # Its weights moved by one step at most, and the family's own loss goes on.
    weights = on.weights["student.model.embeddings.weight"]
    assert (weights - family["backbone.embeddings.weight"]).abs().max() < 2e-3
    assert on.kd[0]["small"] == pytest.approx(metrics(trained)[-1]["kd"]["small"], rel=0.5)


@hears("objective")
def test_the_task_is_the_next_token(watch):
    """Given widths: the loss is the cross-entropy of the size's own forward."""
    task = watch(**FIXED, **{'parent = "parent"': 'parent = "parent"\nobjective = "task"'})
    before = watch(steps=0, **FIXED)
    (batch,) = task.batches
    labels = batch.targets[batch.predicts]
    size = before.trainer.committed["small"].widths
    with torch.no_grad():
        states, head = before.trainer.student.hidden_states(size, **batch.inputs)
        total = linear_cross_entropy(states[batch.predicts], head, labels)
    expected = total / batch.num_predicted
    assert task.kd[0]["small"] == pytest.approx(expected.item(), rel=1e-5)
    assert not any(f.is_teacher for f in task.forwards)
    assert any(f.is_teacher for f in watch(**FIXED).forwards)


# Data


@hears("data.files", "data.loss_on")
def test_rows_are_those_of_the_files(run_folder, watch):
    base = watch()
    rows = (run_folder / "rows.jsonl").read_text().splitlines(keepends=True)
    (run_folder / "few.jsonl").write_text("".join(rows[:3]))
    few = watch(**{'"rows.jsonl"': '"few.jsonl"'})
    read = {placed.row for row in few.batches[0].documents for placed in row}
    assert read == {0, 1, 2}
    every = watch(**{'loss_on = "answers"\n': ""})
    assert torch.equal(every.batches[0].input_ids, base.batches[0].input_ids)
    assert every.batches[0].num_predicted > 1.2 * base.batches[0].num_predicted
    assert every.reports[0].num_distilled == 2 * every.batches[0].num_predicted
    answers = base.batches[0]
    assert all(
        not answers.predicts[row, placed.start]
        for row, documents in enumerate(answers.documents)
        for placed in documents
    )


@hears("data.bad_rows")
def test_bad_rows_stop_or_are_left_out(run_folder, watch):
    rows = (run_folder / "rows.jsonl").read_text().splitlines(keepends=True)
    (run_folder / "bad.jsonl").write_text("".join(rows[:3]) + "{\n")
    bad = {'"rows.jsonl"]': '"bad.jsonl"]'}
    with pytest.raises(RowError, match="line 4 is not valid JSON"):
        watch(**bad)
    skipped = watch(**{'"rows.jsonl"]': '"bad.jsonl"]\nbad_rows = "skip"'})
    assert skipped.reports[0].rows_skipped > 0


@hears("data.notes")
def test_notes_need_not_be_seen(run_folder, watch):
    rows = [json.loads(row) for row in (run_folder / "rows.jsonl").read_text().splitlines()]
    for row in rows:
        row["solution"] = "words that nobody sees"
    (run_folder / "noted.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(RowError, match="solution beside the messages.*or name it in data.notes"):
        watch(**{'"rows.jsonl"]': '"noted.jsonl"]'})
    watch(**{'"rows.jsonl"]': '"noted.jsonl"]\nnotes = ["solution"]'})
    with pytest.raises(
        ConfigError, match=r"data\[0\].notes names messages, which rows are made of"
    ):
        watch(**{'"rows.jsonl"]': '"rows.jsonl"]\nnotes = ["messages"]'})


@hears("data.held_out")
def test_rows_that_are_held_out_are_what_the_verdict_is_measured_on(run_folder):
    brief = {"tokens = 15360": "tokens = 384", "held_out = 0": "held_out = 3"}
    config = config_in(run_folder, "keys-held-out", **brief)
    assert train(config).verdict.rows == 3


@hears("data.weight")
def test_sources_are_mixed_by_weight_in_tokens(run_folder, watch):
    rows = (run_folder / "rows.jsonl").read_text()
    (run_folder / "more.jsonl").write_text(rows)

    def share(weight: float) -> float:
        more = f'[[data]]\nfiles = ["more.jsonl"]\nweight = {weight}\n\n[calibration]'
        long = {"context = 96\nbatch_size": "context = 400\nbatch_size"}
        seen = watch(4, **{"[calibration]": more}, **long)
        tokens = [0, 0]
        for batch in seen.batches:
            for placed in (placed for row in batch.documents for placed in row):
                tokens[placed.source] += placed.length
        return tokens[1] / sum(tokens)

    assert share(1.0) == pytest.approx(1 / 2, abs=0.05)
    assert share(4.0) == pytest.approx(4 / 5, abs=0.1)


# Stages


@hears("stages.tokens", "stages.context", "stages.batch_size")
def test_windows_and_steps_of_a_stage(watch):
    seen = watch(**{"context = 96\nbatch_size = 4": "context = 64\nbatch_size = 3"})
    assert seen.batches[0].input_ids.shape == (3, 64)
    assert seen.trainer.curriculum.num_steps == 15360 // (3 * 64)
    assert watch(steps=0).trainer.curriculum.num_steps == 15360 // (4 * 96)
    fewer = watch(steps=0, **{"tokens = 15360": "tokens = 7680"})
    assert fewer.trainer.curriculum.num_steps == 20


@hears("stages.size_weights")
def test_losses_of_sizes_are_weighted(watch):
    """Gradients are linear in the weights, and differ with them."""
    loose = "[optimizer]\nclip_norm = 1e9\n[engine]"

    def gradient(large: float, small: float) -> torch.Tensor:
        weights = f"{STAGE}\nsize_weights = [{large}, {small}]"
        return watch(**{STAGE: weights, "[engine]": loose}).gradient(part="")

    first, middle, last = gradient(3, 1), gradient(1, 1), gradient(1, 3)
    assert torch.allclose(first + last, 2 * middle, rtol=1e-4, atol=1e-5 * float(middle.norm()))
    assert (first - last).norm() > 0.1 * middle.norm()


@hears("stages.sizes_per_step", "stages.groups")
def test_one_size_for_each_group_of_windows(watch):
    one = watch(6, **{STAGE: f'{STAGE}\nsizes_per_step = "one"\ngroups = 2'})
    students = [f for f in one.forwards if not f.is_teacher]
    assert len(students) == 6 * 2 and {f.rows for f in students} == {2}
    drawn = [tuple(report.kd) for report in one.reports]
    assert {name for names in drawn for name in names} == {"large", "small"}
    assert any(len(names) == 1 for names in drawn) and any(len(names) == 2 for names in drawn)
    every = watch()
    assert [f.rows for f in every.forwards if not f.is_teacher] == [4, 4]
    parts = watch(**{STAGE: f"{STAGE}\ngroups = 4"})
    assert [f.rows for f in parts.forwards if not f.is_teacher] == [1] * 8
    keys = [d["noise_key"] for d in parts.decisions if d.get("noise_key")]
    assert len(set(keys)) == 8  # noise of its own for every group and size
    noisy = [d for d in parts.decisions if d.get("noise_key") and d["noise_key"][-1] == "small"]
    first, *others = (d["decision"].picks[0].probs for d in noisy)
    assert others and not any(torch.equal(first, other) for other in others)


@hears("stages.sizes_per_step", "stages.size_weights")
def test_weights_of_one_size_at_a_time_are_how_often_it_is_drawn(watch):
    """Its loss then counts in full: once drawn, it has the same gradient whatever its weight."""

    def seen(large: float, small: float):
        stage = f'{STAGE}\nsizes_per_step = "one"\nsize_weights = [{large}, {small}]'
        return watch(**{STAGE: stage, "[engine]": "[optimizer]\nclip_norm = 1e9\n[engine]"})

    for often, rarely in (((9, 1), (7, 3)), ((1, 9), (3, 7))):
        one, other = seen(*often), seen(*rarely)
        drawn = [tuple(run.reports[0].kd) for run in (one, other)]
        if drawn[0] != drawn[1]:
            continue
        gradients = [run.gradient(part="") for run in (one, other)]
        assert torch.allclose(*gradients, rtol=1e-5, atol=1e-7)
        break
    else:
        raise AssertionError("neither pair of weights draws the same size at the first step")


@hears("stages.learning_rate", "stages.final_learning_rate", "stages.warmup_steps")
def test_learning_rates(watch):
    """What the report says is what the weights have moved by: a first step of AdamW is its rate."""
    plain = {"warmup_steps = 2": "warmup_steps = 0"}
    seen = watch(**plain)
    assert seen.reports[0].learning_rate == pytest.approx(2e-3)
    before, after = watch(steps=0).weights, seen.weights
    moved = max(float((after[n] - before[n]).abs().max()) for n in after if n.startswith("student"))
    assert moved == pytest.approx(2e-3, rel=1e-2)
    warm = watch(3, **{"warmup_steps = 2": "warmup_steps = 4"})
    assert [r.learning_rate for r in warm.reports] == pytest.approx([5e-4, 1e-3, 1.5e-3], rel=0.02)
    short = {**plain, "tokens = 15360": "tokens = 1536"}  # four steps
    low = watch(4, **short, **{STAGE: f"{STAGE}\nfinal_learning_rate = 1e-3"})
    assert low.reports[-1].learning_rate == pytest.approx(1e-3 + 1e-3 * 0.1464, rel=1e-2)


# Before training


@hears("calibration.num_samples", "calibration.batch_size", "calibration.context")
def test_what_units_are_ranked_on(watch):
    base = watch(0, measure=True)
    assert base.ranked == [16]
    few = watch(0, measure=True, **{"num_samples = 16": "num_samples = 5\nbatch_size = 2"})
    assert few.ranked == [2, 4, 5]
    cut = watch(0, measure=True, **{"context = 96\n\n[router]": "context = 20\n\n[router]"})
    for other in (few, cut):
        assert any(not torch.equal(other.orders[k], order) for k, order in base.orders.items())


@hears("calibration.scores")
def test_given_scores_order_the_units(run_folder, scores, tmp_path):
    """Scores turned upside down: the order is reversed inside each group."""
    config = config_in(run_folder, "scored", **{"tokens = 15360": "tokens = 384"}, **FIXED)
    checked = check(config)
    known, _ = load_scores(scores, checked.axis_map)
    upside_down = {key: 1 / (1 + value) for key, value in known.items()}
    info = ScoreInfo(num_samples=1, num_tokens=1, source="turned", weights="other")
    save_scores(tmp_path / "turned.safetensors", upside_down, checked.axis_map, info)
    given = f'scores = "{tmp_path / "turned.safetensors"}"'
    changes = {"tokens = 15360": "tokens = 384", "num_samples = 16": given, **FIXED}
    result = train(config_in(run_folder, "turned", **changes))
    orders = load_file(result.elastic / "orders.safetensors")
    plain = load_file(train(config).elastic / "orders.safetensors")
    for key, (name, _) in axis_keys(checked.axis_map).items():
        groups = checked.axis_map.axes[name].num_groups
        ours, theirs = (o[key].reshape(groups, -1) for o in (orders, plain))
        assert torch.equal(ours[:, 0], theirs[:, -1]), key


def test_scores_of_other_weights_are_told(run_folder, scores, tmp_path):
    """Nothing in their shapes shows it; of the parent's own there is nothing to say."""
    _, info = load_scores(scores, check(config_in(run_folder, "own")).axis_map)
    for weights, told in ((info.weights, 0), ("0123456789abcdef", 1)):
        config = config_in(run_folder, "own", **{"num_samples = 16": f'scores = "{scores}"'})
        given = replace(info, weights=weights)
        inputs = replace(open_inputs(config), scores=({}, given))
        outlook = look_ahead(inputs, torch.device("cpu"))
        said = [line for line in outlook.warnings if "were measured on other files" in line]
        assert len(said) == told, weights


def test_of_a_family_the_full_size_is_the_parent(run_folder, trained):
    """It is told, because it is not what the family was made from."""
    changes = {'parent = "parent"': f'parent = "{trained.elastic}"'}
    line = f"  parent: {trained.elastic} is a family, and its full size is the model that is cut"
    for config in (config_in(run_folder, "own"), config_in(run_folder, "again", **changes)):
        outlook = look_ahead(open_inputs(config), torch.device("cpu"))
        said = [line for line in outlook.facts if line.startswith("  parent: ")]
        assert said == ([line] if config.parent == str(trained.elastic) else [])
        assert outlook.facts[0].startswith(str(config.out))


@hears("calibration.basis")
def test_the_basis_of_the_stream(watch):
    principal = watch(0, **{"[calibration]": '[calibration]\nbasis = "principal"'})
    assert principal.basis is not None and "hidden" not in principal.orders
    plain = watch(0)
    assert plain.basis is None and "hidden" in plain.orders


# The router


@hears("router.learning_rate", "optimizer.betas", "optimizer.weight_decay")
def test_what_the_optimisers_step_by(watch):
    """The first two steps by their formulas: AdamW of the weights, and the router's Adam, which has
    one second moment for all parameters and no decay."""
    settings = "[optimizer]\nbetas = [0.8, 0.9]\nweight_decay = 0.1\n[engine]"
    changes = {
        "learning_rate = 3e-2": "learning_rate = 1e-2",
        "[engine]": settings,
    }
    before, seen = watch(0, **changes).weights, watch(2, **changes)
    for part, rates, decay in (
        ("router", [1e-2, 1e-2], 0.0),
        ("student", [r.learning_rate for r in seen.reports], 0.1),
    ):
        names = sorted(n for n in seen.gradients[0] if n.startswith(part))
        weight, after = (
            torch.cat([weights[n].flatten() for n in names]) for weights in (before, seen.weights)
        )
        mean = square = torch.zeros_like(weight)
        for number, rate in enumerate(rates, start=1):
            gradient = seen.gradient(number - 1, part)
            mean, square = 0.8 * mean + 0.2 * gradient, 0.9 * square + 0.1 * gradient**2
            size = square / (1 - 0.9**number)
            size = size.mean().sqrt() if part == "router" else size.sqrt() + 1e-8
            weight = weight * (1 - rate * decay) - rate * (mean / (1 - 0.8**number)) / size
        assert torch.allclose(after, weight, rtol=1e-4, atol=1e-6), part


@hears("optimizer.clip_norm")
def test_gradients_are_clipped(watch):
    """Those of the weights and of the router, each by its own norm."""
    free = watch(**{"[engine]": "[optimizer]\nclip_norm = 1e9\n[engine]"})
    tight = watch(**{"[engine]": "[optimizer]\nclip_norm = 0.05\n[engine]"})
    for part in ("student", "router"):
        whole, cut = free.gradient(part=part), tight.gradient(part=part)
        assert whole.norm() > 0.1
        assert cut.norm().item() == pytest.approx(0.05, rel=1e-3)
        assert torch.allclose(cut / cut.norm(), whole / whole.norm(), rtol=1e-3, atol=1e-6)


@hears("router.weight")
def test_the_budgets_pull_weighs(watch):
    """The router's gradient is what the losses say, plus the weight times what the budgets say."""
    loose = {"[engine]": "[optimizer]\nclip_norm = 1e9\n[engine]"}

    def gradient(weight: float) -> torch.Tensor:
        return watch(**loose, **{"weight = 10": f"weight = {weight}"}).gradient(part="router")

    none, one, two = gradient(0), gradient(1), gradient(2)
    assert none.norm() > 0  # distillation reaches the router by itself
    assert torch.allclose(two - one, one - none, rtol=1e-3, atol=1e-4 * float(one.norm()))
    assert (one - none).norm() > 0.1 * none.norm()


@hears("router.commit_at")
def test_widths_are_fixed_after_a_share_of_the_steps(watch):
    seen = watch(3, **{"tokens = 15360": "tokens = 1536", "commit_at = 0.6": "commit_at = 0.5"})
    kinds = [isinstance(f.size, Widths) for f in seen.forwards if not f.is_teacher]
    assert kinds == [False] * 4 + [True] * 2
    assert seen.trainer.committed and seen.reports[2].expected == {}


@hears("router.hard_share")
def test_a_share_of_the_decisions_is_hard(watch):
    def sharpness(share: float) -> list[bool]:
        seen = watch(2, **{"commit_at = 0.6": f"commit_at = 0.6\nhard_share = {share}"})
        gated = [f.size for f in seen.forwards if not isinstance(f.size, Widths)]
        return [
            bool(((mixture.probs < 1e-6) | (mixture.probs > 1 - 1e-6)).all())
            for size in gated
            for mixture in size.values()
        ]

    assert all(sharpness(1.0)) and not any(sharpness(0.0))


@hears(
    "router.annealing.tau_start", "router.annealing.tau_end", "router.annealing.tau_decay",
    "router.annealing.scale_start", "router.annealing.scale_end", "router.annealing.scale_growth",
)  # fmt: skip
def test_decisions_sharpen_as_the_router_learns(watch):
    """What it trains with, in the first step and in the last before its widths are fixed."""

    def temperatures(inner: str) -> list[tuple[float, float]]:
        annealing = f"weight = 10\nannealing = {{{inner}}}"
        seen = watch(4, **{"weight = 10": annealing})
        learning = [d["temperature"] for d in seen.decisions if d.get("noise_key")]
        return [(learning[0].tau, learning[0].scale), (learning[-1].tau, learning[-1].scale)]

    start = "tau_start = 2.0, scale_start = 3.0, tau_decay = 0.5, scale_growth = 2.0"
    assert temperatures(start) == [(2.0, 3.0), (0.25, 9.0)]
    assert temperatures(f"{start}, tau_end = 0.75, scale_end = 6.0") == [(2.0, 3.0), (0.75, 6.0)]


# How a step is computed


@hears("engine.micro_batch", "engine.workers", "engine.recompute")
def test_how_a_step_is_computed_shows_and_changes_nothing(watch):
    base = watch(2)
    micro = watch(2, **{"save_every = 16": "micro_batch = 1"})
    assert {f.rows for f in base.forwards} == {4} and {f.rows for f in micro.forwards} == {1}
    two = watch(2, **{"save_every = 16": "workers = 2"})
    assert len(two.trainer.workers.learners) == 2 and {f.rows for f in two.forwards} == {2}
    again = watch(2, **{"save_every = 16": "recompute = true"})
    blocks = len(again.trainer.student.blocks)
    assert (base.num_recomputed, again.num_recomputed) == (0, 2 * 2 * blocks)
    for other in (micro, two, again):
        for ours, theirs in zip(other.kd, base.kd, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)
        gap = (other.gradient() - base.gradient()).norm() / base.gradient().norm()
        assert gap < 1e-4


@hears("engine.autocast")
def test_products_are_in_bf16_where_autocast_is_on(watch, monkeypatch):
    """Weights and their gradients stay in fp32. Left out: where the device has units for it."""
    for has_units in (True, False):
        monkeypatch.setattr(loop, "multiplies_bf16", lambda device, answer=has_units: answer)
        for said, expected in (("true", True), ("false", False), (None, has_units)):
            line = f"autocast = {said}" if said else ""
            seen = watch(**FIXED, **{"autocast = false": line})
            assert {f.autocast for f in seen.forwards} == {expected}, (has_units, said)
    base = watch(**FIXED)
    low = watch(**FIXED, **{"autocast = false": "autocast = true"})
    assert not any(f.autocast for f in base.forwards) and all(f.autocast for f in low.forwards)
    assert low.kd != base.kd
    assert low.kd[0]["small"] == pytest.approx(base.kd[0]["small"], rel=0.05)
    assert {g.dtype for g in low.gradients[0].values()} == {torch.float32}
    assert {w.dtype for w in low.weights.values()} == {torch.float32}


@hears("engine.save_every")
def test_states_are_saved_every_so_many_steps(run_folder, monkeypatch):
    saved, save = [], steps.save_state

    def note(trainer, run):
        saved.append(trainer.step)
        save(trainer, run)

    monkeypatch.setattr(steps, "save_state", note)
    changes = {
        "tokens = 15360": "tokens = 1920",
        "save_every = 16": "save_every = 2",
    }
    assert train(config_in(run_folder, "saved", **changes, **FIXED)).steps == 5
    assert saved == [2, 4, 5]


# Costs and budgets


@hears(
    "workload.context", "workload.batch", "workload.dtype_bytes", "workload.ssm_dtype_bytes"
)  # fmt: skip
def test_bytes_are_counted_for_the_workload(watch):
    """What a budget in bytes is held to while the router learns."""

    def count(load: str) -> int:
        trainer = watch(0, **{"[engine]": f"[workload]\n{load}\n[engine]"}).trainer
        return trainer.cost.full.bytes

    plain = count("")
    for load, factor in (
        ("batch = 64", 1.1), ("context = 4096", 1.1), ("dtype_bytes = 4", 1.5),
        ("context = 4096\nbatch = 64", 5), ("batch = 64\nssm_dtype_bytes = 8", 1.2),
    ):  # fmt: skip
        assert count(load) > factor * plain, load
    losses = [
        watch(**{"active = 0.7": "bytes = 0.85", "[engine]": f"[workload]\n{load}\n[engine]"})
        .reports[0].budget["small"]
        for load in ("batch = 1", "batch = 64")
    ]  # fmt: skip
    assert losses[0] != losses[1]


@hears("latency")
def test_milliseconds_are_those_of_the_table(run_folder, watch):
    config = config_in(run_folder, "tables")
    axis_map = check(config).axis_map
    losses = []
    for seed in range(2):
        table = made_up(axis_map, seed)
        save_table(table, run_folder / f"table-{seed}.json")
        seen = watch(
            **{
                "active = 0.7": "ms = 0.9",
                "32, 28, 24]": "32]",  # as far as the table reaches
                "[sizes.large]": f'latency = "table-{seed}.json"\n[sizes.large]',
            }
        )
        full = seen.trainer.cost.full.ms
        assert full == pytest.approx(table.milliseconds(axis_map.full, axis_map))
        losses.append(seen.reports[0].budget["small"])
    assert losses[0] != losses[1]


# Quantisation


@hears("quant.format", "quant.keep", "quant.samples", "quant.percentile")
def test_training_through_a_format(blocks, watch):
    text = RUN[RUN.index("[choices]") : RUN.index("[[data]]")]
    family = {text: "", "active = 0.7": "active = 0.6"}
    family["[sizes.large]"] = f'family = "{blocks}"\n[sizes.large]'

    def through(quant: str):
        return watch(**family, **{"[engine]": f"[quant]\n{quant}\n[engine]"})

    plain = watch(**family)
    eight, kept = through('format = "fp8"\nsamples = 4'), through(
        'format = "fp8"\nsamples = 4\nkeep = ["attention"]'
    )  # fmt: skip
    assert plain.trainer.student.fake is None
    assert eight.kd[0]["large"] > 1.05 * plain.kd[0]["large"]
    assert kept.kd != eight.kd
    names = [set(run.trainer.student.fake.inputs) for run in (eight, kept)]
    assert {name.rsplit(".", 2)[-2] for name in names[0] - names[1]} == {
        "q_proj", "k_proj", "v_proj", "o_proj",
    }  # fmt: skip
    few = through('format = "fp8"\nsamples = 1').trainer.student.fake.inputs
    low = through('format = "fp8"\nsamples = 4\npercentile = 90.0').trainer.student.fake.inputs
    base = eight.trainer.student.fake.inputs
    assert all(few[name] <= base[name] for name in base) and few != base
    assert any(few[name] < base[name] for name in base)
    assert all(low[name] < base[name] for name in base)
    brief = {"num_samples = 16\ncontext = 96": "num_samples = 16\ncontext = 3"}
    cut = watch(**family, **brief, **{"[engine]": '[quant]\nformat = "fp8"\nsamples = 4\n[engine]'})
    scales = cut.trainer.student.fake.inputs
    assert all(scales[name] <= base[name] for name in base) and scales != base


def test_every_key_is_watched():
    assert set(keys_of(RunConfig)) == WATCHED
