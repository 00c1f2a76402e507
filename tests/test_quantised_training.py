"""Quantisation-aware training: the nested loop with quantised weights and inputs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import star_elastic
from star_elastic.architectures import architecture_of, read_config
from star_elastic.checkpoints.tensors import CheckpointReader, load_tensors
from star_elastic.errors import CheckpointError, ConfigError, Interrupted, ShapeError
from star_elastic.models.fake_quantisation import FILE_NAME, FakeQuantisation
from star_elastic.models.load import load_parent
from star_elastic.progress import Silent
from star_elastic.quant.formats import dequantise, quantise
from star_elastic.quant.scheme import make_scheme
from star_elastic.rewrite.stream import slice_checkpoint
from star_elastic.train import steps
from star_elastic.train.config import load_run_config
from star_elastic.train.distributed import World
from star_elastic.train.inputs import open_inputs
from star_elastic.train.run import train
from star_elastic.train.write import write_family
from tests import ranks
from tests.processes import on_ranks
from tests.tiny_run import StopAt, build_trainer

RUN = """
parent = "parent"
out = "{name}"
family = "{family}"

[sizes.large]
active = 1.0
[sizes.small]
active = {small}

[[data]]
files = ["rows.jsonl"]
loss_on = "answers"

[quant]
format = "{format}"
samples = 8

[[stages]]
tokens = 3072
context = 96
batch_size = 4
learning_rate = 2e-3
warmup_steps = 2

[engine]
save_every = 4
autocast = false
"""


def quantised(folder, family, name, format="nvfp4", small=0.6, **replacements):
    """The config of a run on a family, with a quantised forward."""
    text = RUN.format(name=name, family=family, format=format, small=small)
    for old, new in replacements.items():
        assert old in text
        text = text.replace(old, new)
    (folder / f"{name}.toml").write_text(text)
    return load_run_config(folder / f"{name}.toml")


@pytest.mark.parametrize("format", ["fp8", "fp8-channel", "nvfp4"])
def test_weights_are_rounded_to_what_is_stored_before_they_are_quantised(blocks, format):
    """Codes are written of the stored bf16 weights, so they are what has to be trained with."""
    axis_map = architecture_of(read_config(blocks)).axis_map(read_config(blocks))
    scheme = make_scheme(axis_map, format)
    weights = load_parent(blocks)[0].state_dict()
    fake = FakeQuantisation.of(weights, axis_map, scheme, {})
    fake = fake.on(torch.device("cpu"), torch.bfloat16)
    differ = 0
    for name, largest in fake.largest.items():
        stored, direct = (
            dequantise(quantise(weight, scheme.format, largest))
            for weight in (weights[name].bfloat16(), weights[name])
        )
        assert torch.equal(fake.weight(name, weights[name], axis_map.full), stored), name
        differ += not torch.equal(direct, stored)
    assert differ, "rounding to bf16 changed no code"


def test_what_was_calibrated_before_the_first_state_is_kept_for_its_config(run_folder, blocks):
    """As it is left where a run is killed before it has saved its first state."""
    config = quantised(run_folder, blocks, "calibrated")
    with pytest.raises(Interrupted):
        train(config, progress=StopAt(1))
    shutil.rmtree(run_folder / "calibrated" / "state")
    assert (run_folder / "calibrated" / FILE_NAME).is_file()
    other = quantised(run_folder, blocks, "calibrated", **{"samples = 8": "samples = 4"})
    with pytest.raises(ConfigError, match=r"quant.samples \(8 then, 4 now\)"):
        train(other)
    with pytest.raises(Interrupted):
        train(config, progress=StopAt(1))


@pytest.mark.parametrize("name", ["fp8", "nvfp4"])
def test_what_was_trained_is_what_is_written(run_folder, blocks, name):
    """The quantised checkpoint computes what the last step's forward would."""
    config = quantised(run_folder, blocks, f"qad-{name}", name)
    result = train(config)
    folder = result.elastic.parent
    trainer = build_trainer(config, folder, World())
    trained, _ = load_parent(result.elastic)
    trainer.student.parent.load_state_dict(trained.state_dict())
    ids = torch.arange(40)[None] + 5
    for size, fixed in trainer.committed.items():
        slice_checkpoint(folder / "quantised", fixed.widths, folder / f"{name}-{size}")
        model, _ = load_parent(folder / f"{name}-{size}")
        family = star_elastic.load(folder / "quantised")
        with torch.no_grad():
            expected = trainer.student(fixed.widths, input_ids=ids).logits
            for found in (model(input_ids=ids).logits, family[size](input_ids=ids).logits):
                assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
            plain = trained(input_ids=ids).logits
        if size == "large":
            assert (expected - plain).abs().max() > 1e-2 * plain.abs().max()
    frozen = load_tensors(folder / FILE_NAME)
    assert any(key.startswith("inputs/") for key in frozen)


def test_distillation_through_the_format_brings_the_sizes_closer(run_folder, blocks):
    config = quantised(run_folder, blocks, "closer", **{"tokens = 3072": "tokens = 15360"})
    folder = train(config).elastic.parent
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for size in ("large", "small"):
        first, last = (sum(row["kd"][size] for row in part) for part in (rows[:5], rows[-5:]))
        assert last < 0.9 * first


def test_gradients_are_those_of_a_straight_line(run_folder, blocks):
    """The gradient with respect to a weight is that of the same loss at the weights as known."""
    trainer = build_trainer(
        quantised(run_folder, blocks, "straight-through", "fp8"), run_folder / "st", World()
    )
    student, name = trainer.student, "model.layers.0.mixer.in_proj.weight"
    widths = trainer.committed["small"].widths
    ids = torch.arange(30)[None] + 7
    student(widths, input_ids=ids).logits.square().sum().backward()
    gradient = student.parent.get_parameter(name).grad
    assert gradient is not None
    assert gradient.dtype == torch.float32 and gradient.isfinite().all()
    # Not rounded to FP8, and zero outside the slice.
    assert len(gradient[gradient != 0].unique()) > 1000
    assert (gradient[:, widths["hidden"] :] == 0).all()


def test_stopped_and_resumed_equals_uninterrupted(run_folder, blocks, monkeypatch):
    straight = train(quantised(run_folder, blocks, "qad-straight"))
    config = quantised(run_folder, blocks, "qad-stopped")
    saved = steps.save_state

    def stop_after(trainer, run):
        saved(trainer, run)
        raise Interrupted("stopped")

    monkeypatch.setattr(steps, "save_state", stop_after)
    with pytest.raises(Interrupted):
        train(config)
    monkeypatch.setattr(steps, "save_state", saved)
    resumed = train(config, resume=True)
    for part in ("elastic", "quantised"):
        ours, theirs = (
            CheckpointReader(result.elastic.parent / part) for result in (resumed, straight)
        )
        assert ours.names == theirs.names
        for tensor in ours.names:
            a, b = ours.read(tensor), theirs.read(tensor)
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), tensor


def test_a_run_stopped_while_it_was_quantised_goes_on(run_folder, blocks):
    config = quantised(run_folder, blocks, "qad-last-step", **{"tokens = 3072": "tokens = 384"})
    folder = train(config).elastic.parent
    whole = (folder / "quantised" / "model.safetensors").read_bytes()
    shutil.rmtree(folder / "quantised")
    train(config, resume=True)
    assert (folder / "quantised" / "model.safetensors").read_bytes() == whole
    with pytest.raises(CheckpointError, match="quantised is complete already"):
        train(config, resume=True)


@pytest.mark.parametrize("name", ["fp8", "fp8-channel", "nvfp4"])
def test_what_is_written_does_not_ask_where_it_was_trained(run_folder, blocks, name):
    """meta stands for a GPU: nothing on another device than the CPU may be looked at."""
    steps = {"tokens = 3072": "tokens = 384"}
    config = quantised(run_folder, blocks, f"qad-device-{name}", name, **steps)
    folder = train(config).elastic.parent
    whole = (folder / "quantised" / "model.safetensors").read_bytes()
    shutil.rmtree(folder / "quantised")
    inputs = open_inputs(config, 1)
    trainer, orders, basis = build_trainer(config, folder, World(), whole=True)
    trainer.student.fake = trainer.student.fake.on(torch.device("meta"), torch.float32)
    write_family(inputs, trainer, orders, basis, Silent())
    assert (folder / "quantised" / "model.safetensors").read_bytes() == whole


def test_ranks_share_the_work(run_folder, blocks):
    """Two ranks compute the gradients of one process through the format, and end with one family in
    both forms."""
    # The one process adds up the same pieces: gradients that cancel depend on the order.
    pieces = {"save_every = 4": "save_every = 4\nmicro_batch = 2"}
    config = quantised(run_folder, blocks, "qad-ranks", "fp8", **pieces)
    file = run_folder / "qad-ranks.toml"
    (one,) = ranks.gradients_of([file], run_folder)
    for (two,) in on_ranks(2, ranks.gradients_of, [file], run_folder):
        assert one.keys() == two.keys()
        for key, expected in one.items():
            largest = expected.abs().max()
            assert (two[key] - expected).abs().max() <= ranks.TOLERANCE * largest, key
    assert [done.steps for done in on_ranks(2, ranks.run, file)] == [8, 8]
    straight = train(quantised(run_folder, blocks, "qad-alone", "fp8", **pieces)).elastic
    ids = torch.arange(40)[None] + 5
    for folder in ("elastic", "quantised"):
        ours, theirs = (
            star_elastic.load(path / folder) for path in (Path(config.out), straight.parent)
        )
        for size in ours:
            with torch.no_grad():
                expected = theirs[size](input_ids=ids).logits
                difference = ours[size](input_ids=ids).logits - expected
            assert difference.abs().max() < 1e-3 * expected.abs().max(), (folder, size)


def test_the_task_itself_can_be_the_objective(run_folder, blocks):
    changes = {
        'out = "qat"': 'out = "qat"\nobjective = "task"',
        "[engine]": "[engine]\nworkers = 2",
    }
    config = quantised(run_folder, blocks, "qat", **changes)
    trainer = build_trainer(config, run_folder / "qat-scratch", World())
    batch = trainer.reader.read(trainer.curriculum.at(0)).batch
    states, head = trainer.student.hidden_states(trainer.committed["large"].widths, **batch.inputs)
    logits, counted = states @ head.T, batch.predicts
    expected = torch.nn.functional.cross_entropy(logits[counted], batch.targets[counted])
    report = build_trainer(config, run_folder / "qat-again", World()).train_step()
    assert report.kd["large"] == pytest.approx(expected.item(), rel=1e-4)
    assert [learner.teacher for learner in trainer.workers.learners] == [None, None]


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"[quant]": '[quant]\nkeep = ["heads"]'}, ConfigError, "part 'heads' is unknown"),
        ({'format = "nvfp4"': 'format = "fp5"'}, ConfigError, "quant.format='fp5' is unknown"),
        ({"samples = 8": "samples = 0"}, ConfigError, "quant.samples=0 is less than 1"),
        ({"[sizes.small]": "[sizes.tiny]"}, Exception, "size 'tiny' is not in this family"),
    ],
)
def test_mistakes_end_before_any_work(run_folder, blocks, changes, kind, message):
    with pytest.raises(kind, match=message):
        train(quantised(run_folder, blocks, "mistake", **changes))
    assert not (run_folder / "mistake").exists()


def test_sizes_inside_a_block_are_refused(run_folder, trained):
    """The family of the other tests has widths that NVFP4 cannot cut."""
    with pytest.raises(ShapeError, match="ends inside a block of 16"):
        train(quantised(run_folder, trained.elastic, "inside", small=0.7))
