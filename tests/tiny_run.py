"""A tiny nested run: a random parent with the bundled tokenizer, rows, a run config, its result.

Fixtures of this file are those of tests.fixtures, so that every test can use them.
"""

from __future__ import annotations

import json
import math
import os
import signal
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from star_elastic import bundled
from star_elastic.demo import write_rows
from star_elastic.models.elastic import ElasticModel
from star_elastic.progress import Silent
from star_elastic.rewrite.stream import save_model
from star_elastic.train import build
from star_elastic.train.config import load_run_config
from star_elastic.train.inputs import open_inputs
from star_elastic.train.run import train
from tests.architectures import ROWS

TINY = ROWS["moe"].trained.config
RUN = """
parent = "parent"
out = "run"

[sizes.large]
active = 1.0
[sizes.small]
active = 0.7

[choices]
hidden = [48, 40, 32, 24]
expert_ffn = [32, 24, 16]
shared_ffn = [64, 60, 56, 52, 48, 44, 40, 36, 32, 28, 24]
ssm_heads = [8, 6, 4]

[[data]]
files = ["rows.jsonl"]
loss_on = "answers"
held_out = 0

[calibration]
num_samples = 16
context = 96

[router]
commit_at = 0.6
learning_rate = 3e-2
weight = 10

[[stages]]
tokens = 15360
context = 96
batch_size = 4
learning_rate = 2e-3
warmup_steps = 2

[engine]
save_every = 16
autocast = false
"""

JUDGED = {"held_out = 0\n": ""}
"""With a verdict in the end, as is the default, which takes a third of such a run."""
SHORT = {"tokens = 15360": "tokens = 4608"}
"""12 steps instead of 40."""
BLOCKS = {
    "hidden = [48, 40, 32, 24]": "hidden = [48, 32]",
    "expert_ffn = [32, 24, 16]": "expert_ffn = [32, 16]",
    "shared_ffn = [64, 60, 56, 52, 48, 44, 40, 36, 32, 28, 24]": "shared_ffn = [64, 48, 32]",
    "[sizes.small]\nactive = 0.7": "[sizes.small]\nactive = 0.6",
}
"""Choices that end on the edges of NVFP4's blocks."""


class StopAt(Silent):
    """Asks a run to stop after some steps."""

    def __init__(self, step: int, by: signal.Signals = signal.SIGINT):
        self.step, self.by = step, by

    def advance(self, done: int, note: str = "") -> None:
        if note and done == self.step:
            os.kill(os.getpid(), self.by)


def metrics(result) -> list[dict]:
    """The rows of a run's log."""
    text = (result.elastic.parent / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory):
    """A tiny random parent with the bundled tokenizer, rows and a run config beside it."""
    return make_folder(tmp_path_factory.mktemp("train"), TINY)


@pytest.fixture(scope="session")
def deep_folder(tmp_path_factory):
    """The same with two layers of each kind but attention."""
    return make_folder(
        tmp_path_factory.mktemp("deep"), {**TINY, "hybrid_override_pattern": "ME*ME"}
    )


def make_folder(folder, config, seed=0):
    """Fills a folder for training a random parent."""
    folder.mkdir(exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(bundled.PARENT)
    config = {**config, "vocab_size": len(tokenizer)}
    model = random_model(config, seed)
    state = ElasticModel(model, config).state()
    save_model(state, config, bundled.PARENT, folder / "parent", dtype=torch.float32)
    write_rows(folder / "rows.jsonl", 64, seed=0)
    (folder / "run.toml").write_text(RUN)
    return folder


def random_model(config, seed=0):
    """A model of random weights in fp32, large enough for every unit to matter."""
    torch.manual_seed(seed)
    fields = {k: v for k, v in config.items() if k not in ("model_type", "dtype")}
    model_config = AutoConfig.for_model(config["model_type"], **fields)
    model = AutoModelForCausalLM.from_config(model_config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=1.5 / math.sqrt(parameter.shape[-1]))
    return model


def config_in(folder, name="run", **replacements):
    text = RUN.replace('out = "run"', f'out = "{name}"')
    for old, new in replacements.items():
        assert old in text
        text = text.replace(old, new)
    file = folder / f"{name}.toml"
    file.write_text(text)
    return load_run_config(file)


def build_trainer(config, scratch, world, progress=None, *, whole=False):
    """The trainer of a run that has not begun, with its calibration in a folder of its own; with
    `whole` also the orders and the basis."""
    scratch.mkdir(exist_ok=True)
    inputs = open_inputs(replace(config, out=str(scratch)), world.size)
    built = build.build_trainer(inputs, progress or Silent(), world)
    return built if whole else built[0]


@pytest.fixture(scope="session")
def trained(run_folder):
    """The result of an uninterrupted run on one thread, whose router has learned."""
    torch.set_num_threads(1)
    return train(config_in(run_folder, "straight"))


@pytest.fixture(scope="session")
def short(run_folder):
    """The same in 12 steps."""
    torch.set_num_threads(1)
    return train(config_in(run_folder, "short", **SHORT))


@pytest.fixture(scope="session")
def blocks(run_folder):
    """A family whose sizes end on the edges of NVFP4's blocks."""
    torch.set_num_threads(1)
    return train(config_in(run_folder, "blocks", **BLOCKS)).elastic
