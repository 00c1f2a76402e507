"""Law 7 over ranks: two gloo ranks compute what one process does, and save for any number."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from star_elastic.errors import ConfigError, Interrupted
from star_elastic.train.check import check
from star_elastic.train.distributed import join_world
from star_elastic.train.run import train
from tests.test_train import SHORT, StopAt, metrics
from tests.tiny_run import config_in

ROOT = Path(__file__).parent.parent
TOLERANCE = 1e-6
"""Of gradients, relative to the largest one of their tensor: sums run in another order."""


def launch(ranks: int, *arguments, module: str = "tests.ranks") -> str:
    """Runs a module on some ranks of this machine and returns what it prints."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    if ranks > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command = [sys.executable, *launcher, "-m", module, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize("phase", ["router", "plain", "one size", "recompute"])
def test_two_ranks_compute_the_gradients_of_one(run_folder, phase):
    changes = {
        "router": {"[sizes.large]": 'per_layer = ["ssm_heads"]\n[sizes.large]'},
        "plain": {
            "[router]": '[router.fixed]\nlarge = "hidden=48"\nsmall = "hidden=32,'
            'layers=0/1/1,experts=6"\n[router]',
            "active = 0.7": "active = 0.535",
        },
        "one size": {"batch_size = 4": 'batch_size = 8\ngroups = 4\nsizes_per_step = "one"'},
        "recompute": {"save_every = 16": "recompute = true\nmicro_batch = 1"},
    }[phase]
    name = "ranks-" + phase.replace(" ", "-")
    config_in(run_folder, name, **changes)
    found = []
    for ranks in (1, 2):
        out = run_folder / f"{name}-{ranks}.safetensors"
        launch(ranks, "gradients", run_folder / f"{name}.toml", out)
        found.append(load_file(out))
    one, two = found
    assert one.keys() == two.keys()
    for key, expected in one.items():
        largest = expected.abs().max().clamp(min=1e-12)
        assert (two[key] - expected).abs().max() <= TOLERANCE * largest, key


def test_states_load_on_another_number_of_ranks(run_folder):
    """From two ranks to one, and back to two from the command line, which ends the run."""
    torch.set_num_threads(1)
    straight = train(config_in(run_folder, "one-rank", **SHORT))
    config, file = config_in(run_folder, "two-ranks", **SHORT), run_folder / "two-ranks.toml"
    said = launch(2, "stop", file, 4)
    assert "stopped at step 4; go on with --resume" in said
    assert len(list((run_folder / "two-ranks" / "state").glob("*.safetensors"))) == 2
    with pytest.raises(Interrupted, match="stopped at step 8"):
        train(config, resume=True, progress=StopAt(8))
    said = launch(2, "train", file, "--resume", "--json", module="star_elastic.cli")
    assert json.loads(said)["steps"] == 12
    log = (run_folder / "two-ranks" / "metrics.jsonl").read_text().splitlines()
    for a, b in zip(map(json.loads, log), metrics(straight), strict=True):
        assert a["num_tokens"] == b["num_tokens"]
        assert a["kd"] == pytest.approx(b["kd"], rel=1e-3)


def test_ranks_wait_for_one_that_writes():
    """Longer than any other collective may take: quantising a large family takes its time."""
    assert launch(2, "wait", 6).split() == ["met", "met"]


def test_windows_that_ranks_cannot_share_are_refused(run_folder):
    config = config_in(run_folder, "three-ranks")
    with pytest.raises(ConfigError, match="batch_size=4 .* cannot be shared by 3 ranks; use a mul"):
        check(config, world_size=3)


def test_ranks_that_torchrun_did_not_start_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ConfigError, match="ranks cannot meet .*start with torchrun"), join_world():
        pass


def test_a_process_group_of_the_caller_is_refused(monkeypatch):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    try:
        with (
            pytest.raises(ConfigError, match="a process group is initialised already"),
            join_world(),
        ):
            pass
    finally:
        dist.destroy_process_group()
