"""Nested distillation end to end on a tiny parent: config, data, training, resume, the result."""

import json
import os

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from star_elastic.checkpoint import load_tensors
from star_elastic.demo import bundled_parent
from star_elastic.errors import BudgetError, CheckpointError, ConfigError, Interrupted, ShapeError
from star_elastic.evaluate.tasks import messages, sample_problems
from star_elastic.families import family_of
from star_elastic.generate.family import load
from star_elastic.manifest import load_manifest
from star_elastic.nesting.stream import slice_checkpoint
from star_elastic.nesting.submodel import ElasticModel, load_parent
from star_elastic.router.budget import TOLERANCE
from star_elastic.train.data import BatchOrder, Examples, JsonLines
from star_elastic.train.losses import distillation_loss
from star_elastic.train.run import Silent, default_choices, train
from tests.tiny_run import TINY, config_in


def metrics(result):
    text = (result.elastic.parent / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_result_is_an_elastic_checkpoint_that_meets_its_budgets(run_folder, trained):
    family = load(trained.elastic)
    axis_map = family.axis_map
    assert family.sizes["large"].widths == axis_map.full
    assert family.sizes["small"].cost["budget_miss"] <= TOLERANCE
    assert set(family.sizes["small"].repair.values()) <= {-1, 1}
    plain, info = AutoModelForCausalLM.from_pretrained(
        trained.elastic, output_loading_info=True, dtype=torch.float32
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids = torch.arange(20)[None]
    assert torch.equal(plain(input_ids=ids).logits, family["large"](input_ids=ids).logits)


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
    orders = load_tensors(trained.elastic / "orders.safetensors")
    from star_elastic.nesting.submodel import sort_in_place

    sort_in_place(original, family.axis_map, orders)
    elastic = ElasticModel(original, config)
    with torch.no_grad():
        teacher = elastic(family.axis_map.full, input_ids=ids).logits.flatten(0, 1)
        before = elastic(widths, input_ids=ids).logits.flatten(0, 1)
        after = family["small"](input_ids=ids).logits.flatten(0, 1)
    assert distillation_loss(teacher, after) < 0.95 * distillation_loss(teacher, before)


def test_interrupted_and_resumed_equals_uninterrupted(run_folder, trained):
    torch.set_num_threads(1)
    config = config_in(run_folder, "resumed")

    class StopAt(Silent):
        def __init__(self, step):
            self.step = step

        def advance(self, done, note=""):
            if note and done == self.step:
                os.kill(os.getpid(), 2)

    for step in (7, 31):
        with pytest.raises(Interrupted, match=f"stopped at step {step}; go on with --resume"):
            train(config, resume=step > 7, progress=StopAt(step))
    result = train(config, resume=True)
    for name in ("model.safetensors", "router.safetensors", "orders.safetensors"):
        ours, theirs = (load_tensors(r.elastic / name) for r in (result, trained))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name
    losses = [[row["kd"] for row in metrics(r)] for r in (result, trained)]
    assert losses[0] == losses[1]
    with pytest.raises(CheckpointError, match="is complete already"):
        train(config, resume=True)
    with pytest.raises(CheckpointError, match="is not empty"):
        train(config)


def test_two_workers_train_as_one_does(run_folder):
    """Half of the rows each: the same losses and weights up to the order of sums; resumable."""
    torch.set_num_threads(2)
    short = {"steps = 40": "steps = 12", "save_every = 16": "save_every = 16\nworkers = {}"}

    def run(name: str, workers: int, **kwargs):
        changes = {old: new.format(workers) for old, new in short.items()}
        return train(config_in(run_folder, name, **changes), **kwargs)

    class StopAt(Silent):
        def advance(self, done, note=""):
            if note and done == 9:
                os.kill(os.getpid(), 2)

    one, two = run("one-worker", 1), run("two-workers", 2)
    for a, b in zip(metrics(one), metrics(two), strict=True):
        assert a["num_tokens"] == b["num_tokens"] and a["expected"].keys() == b["expected"].keys()
        assert b["kd"] == pytest.approx(a["kd"], rel=1e-4)
    first, second = (load_tensors(r.elastic / "model.safetensors") for r in (one, two))
    assert all(torch.allclose(first[k], second[k], atol=1e-4) for k in first)
    with pytest.raises(Interrupted):
        run("two-resumed", 2, progress=StopAt())
    again = load_tensors(run("two-resumed", 2, resume=True).elastic / "model.safetensors")
    assert all(torch.equal(second[k], again[k]) for k in second)


def test_principal_basis_is_stored_with_the_checkpoint(run_folder):
    config = config_in(
        run_folder,
        "principal",
        **{
            "num_samples = 16": 'num_samples = 16\nbasis = "principal"',
            "steps = 40": "steps = 1",
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
    manifest = load_manifest(trained.elastic, load(trained.elastic).axis_map)
    assert manifest.sizes["large"].repair == {}


def test_one_size_per_step_follows_the_weights(run_folder):
    config = config_in(
        run_folder,
        "one",
        **{"steps = 40": 'steps = 16\nsizes_per_step = "one"\nsize_weights = [3, 1]'},
    )
    result = train(config)
    rows = metrics(result)
    drawn = [next(iter(row["kd"])) for row in rows]
    assert all(len(row["kd"]) == 1 for row in rows)
    assert drawn.count("large") > drawn.count("small") > 0


def test_batches_depend_on_seed_and_step_only(run_folder):
    tokenizer = AutoTokenizer.from_pretrained(bundled_parent())
    examples = Examples(JsonLines([run_folder / "rows.jsonl"]), tokenizer, 96, "answers")
    straight = BatchOrder(examples, 8, seed=1)
    rows = [straight.rows(step) for step in range(20)]
    jumped = BatchOrder(examples, 8, seed=1)
    assert [jumped.rows(step) for step in (17, 3, 12)] == [rows[17], rows[3], rows[12]]
    assert sorted(row for batch in rows[:8] for row in batch) == list(range(64))
    assert [BatchOrder(examples, 8, seed=2).rows(step) for step in range(20)] != rows
    # A batch of short rows counts for less.
    batches = [straight.batch(step) for step in range(8)]
    assert sum(b.weight for b in batches) == pytest.approx(8)
    by_length = sorted(batches, key=lambda b: b.num_tokens)
    assert [b.weight for b in by_length] == sorted(b.weight for b in batches)
    assert by_length[0].weight < 0.7 and by_length[-1].weight > 1.2


def test_answers_only_marks_the_completion(run_folder):
    tokenizer = AutoTokenizer.from_pretrained(bundled_parent())
    (problem,) = sample_problems(["add"], "train", 1, seed=0)
    file = run_folder / "one.jsonl"
    rows = [
        {"messages": messages(problem)},
        {"messages": messages(problem, thinking=False)},
        {"prompt": "add 1 2", "completion": " 3"},
        {"text": "add 1 2"},
    ]
    file.write_text("\n".join(json.dumps(row) for row in rows))
    examples = Examples(JsonLines([file]), tokenizer, 200, "answers")
    for row, opening in ((0, "<think>\n"), (1, "<think></think>")):
        ids, first = examples[row]
        assert tokenizer.decode(ids[: first + 1]).endswith(f"assistant\n{opening}")
        assert tokenizer.decode(ids).endswith(f"{problem.answer}<|im_end|>")
    batch = examples.batch([0, 2, 3])
    assert batch.predicts.sum(1).tolist()[1] == len(tokenizer.encode(" 3"))
    assert batch.predicts.sum(1).tolist()[2] == len(tokenizer.encode("add 1 2")) - 1
    assert not (batch.predicts & (batch.attention_mask == 0)).any()


def test_distillation_loss_is_the_kl_and_chunks_do_not_change_it():
    generator = torch.Generator().manual_seed(0)
    teacher, student = (torch.randn(10, 7, generator=generator) for _ in range(2))
    p, q = teacher.softmax(-1), student.softmax(-1)
    expected = (p * (p / q).log()).sum(-1).mean()
    assert torch.allclose(distillation_loss(teacher, student), expected, atol=1e-6)
    assert torch.allclose(distillation_loss(teacher, student, chunk=3), expected, atol=1e-6)
    assert distillation_loss(teacher, teacher).abs() < 1e-7


@pytest.mark.parametrize(
    ("old", "new", "kind", "message"),
    [
        (
            "steps = 40",
            "stepz = 12",
            ConfigError,
            "schedule.stepz is not a key.*did you mean steps",
        ),
        ("steps = 40", "steps = 0", ConfigError, "schedule.steps=0 is less than 1"),
        ("steps = 40", 'steps = "12"', ConfigError, "schedule.steps='12' is not a int"),
        ("active = 0.7", "active = 1.7", ConfigError, r"sizes.small.active=1.7 is not a fraction"),
        ("active = 0.7", "speed = 0.7", ConfigError, "sizes.small.speed is no budget"),
        ("active = 0.7", "active = 0.1", BudgetError, "small.*cannot be met; the choices reach"),
        ("[8, 6, 4]", "[8, 5]", ShapeError, "ssm_heads=5 is not a multiple of its 2 groups"),
        ("[8, 6, 4]", "[6, 4]", ConfigError, "must descend from the full width 8"),
        ('loss_on = "answers"', 'loss_on = "some"', ConfigError, "data.loss_on='some' is unknown"),
        ("rows.jsonl", "none.jsonl", ConfigError, "none.jsonl does not exist"),
        ('parent = "parent"', 'parent = "nowhere"', ConfigError, "nowhere holds no config.json"),
        ("num_samples = 16", 'scores = "none"', CheckpointError, "none does not exist"),
        ("warmup_steps = 2", "betas = [1.0, 0.9]", ConfigError, r"optimizer.betas=\[1.0, 0.9\]"),
        ("[optimizer]", "[router.annealing]\ntau_end = 0\n[optimizer]", ConfigError, "all must be"),
        ("[data]", "[workload]\ncontext = -1\n[data]", ConfigError, "context=-1.*give tokens >= 0"),
        ("[schedule]", "[schedul]", ConfigError, "schedul is not a key.*did you mean schedule"),
    ],
)
def test_mistakes_end_before_any_work(run_folder, old, new, kind, message):
    with pytest.raises(kind, match=message):
        train(config_in(run_folder, "mistake", **{old: new}))
    assert not (run_folder / "mistake").exists()


def test_resume_refuses_another_config(run_folder, trained):
    with pytest.raises(ConfigError, match="schedule differ from the run"):
        train(config_in(run_folder, "straight", **{"steps = 40": "steps = 50"}), resume=True)
    with pytest.raises(CheckpointError, match="holds no saved state"):
        train(config_in(run_folder, "never"), resume=True)


def test_a_loss_that_is_not_finite_ends_with_one_line(run_folder):
    config = config_in(run_folder, "nan", **{"learning_rate = 2e-3": "learning_rate = 1e20"})
    with pytest.raises(
        CheckpointError, match=r"the loss of size .* lower optimizer\.learning_rate"
    ):
        train(config)


def test_default_choices_halve_every_axis_but_heads():
    config = {**TINY, "vocab_size": 64}
    grid = default_choices(family_of(config).axis_map(config))
    assert grid["hidden"] == (48, 40, 32, 24) and grid["ssm_heads"] == (8, 6, 4)
    assert grid["experts"] == (8, 7, 6, 5, 4) and "heads" not in grid
