"""Law 7 over ranks: two gloo ranks compute what one process does, and save for any number."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from star_elastic.errors import ConfigError, Interrupted
from star_elastic.train.check import check
from star_elastic.train.distributed import join_world, multiplies_bf16
from star_elastic.train.run import train
from tests import ranks
from tests.processes import on_ranks
from tests.tiny_run import SHORT, StopAt, config_in, metrics

ROOT = Path(__file__).parent.parent
PHASES = {
    "router": {"[sizes.large]": 'per_layer = ["ssm_heads"]\n[sizes.large]'},
    "plain": {
        "[router]": '[router.fixed]\nlarge = "hidden=48"\nsmall = "hidden=32,'
        'layers=0/1/1,experts=6"\n[router]',
        "active = 0.7": "active = 0.535",
    },
    "one size": {"batch_size = 4": 'batch_size = 8\ngroups = 4\nsizes_per_step = "one"'},
    "recompute": {"save_every = 16": "recompute = true\nmicro_batch = 1"},
    "clipped": {"[engine]": "[optimizer]\nclip_norm = 1e-3\n[engine]"},
}


@pytest.fixture(scope="module")
def gradients(run_folder):
    """The first step's gradients in every phase, of one process and of two ranks."""
    files = []
    for phase, changes in PHASES.items():
        name = "ranks-" + phase.replace(" ", "-")
        config_in(run_folder, name, **changes)
        files.append(run_folder / f"{name}.toml")
    alone = ranks.gradients_of(files, run_folder)
    together = on_ranks(2, ranks.gradients_of, files, run_folder)
    return {
        phase: (one, [rank[number] for rank in together])
        for number, (phase, one) in enumerate(zip(PHASES, alone, strict=True))
    }


@pytest.mark.parametrize("phase", PHASES)
def test_two_ranks_compute_the_gradients_of_one(gradients, phase):
    one, together = gradients[phase]
    for two in together:
        assert one.keys() == two.keys()
        for key, expected in one.items():
            largest = expected.abs().max().clamp(min=1e-12)
            assert (two[key] - expected).abs().max() <= ranks.TOLERANCE * largest, key


@pytest.mark.long
def test_states_load_on_another_number_of_ranks(run_folder, short):
    """From two ranks to one, and back to two from the command line, which ends the run."""
    torch.set_num_threads(1)
    config, file = config_in(run_folder, "two-ranks", **SHORT), run_folder / "two-ranks.toml"
    said = on_ranks(2, ranks.stop, file, 4)
    assert said == ["stopped at step 4; go on with --resume"] * 2
    assert len(list((run_folder / "two-ranks" / "state").glob("*.safetensors"))) == 2
    with pytest.raises(Interrupted, match="stopped at step 8"):
        train(config, resume=True, progress=StopAt(8))
    first, other = on_ranks(2, ranks.command, "train", str(file), "--resume", "--json")
    assert json.loads(first)["steps"] == 12 and other == ""
    # Committed before the second stop, the router rests, whatever its optimiser remembers.
    rested, other = (
        load_file(run.parent / "elastic" / "router.safetensors")
        for run in (run_folder / "two-ranks" / "elastic", short.elastic)
    )
    for key, value in other.items():
        assert (rested[key] - value).abs().max() <= 1e-3 * value.abs().max().clamp(min=1), key
    log = (run_folder / "two-ranks" / "metrics.jsonl").read_text().splitlines()
    for a, b in zip(map(json.loads, log), metrics(short), strict=True):
        assert a["num_tokens"] == b["num_tokens"]
        assert a["kd"] == pytest.approx(b["kd"], rel=1e-3)


WHOLE = {
    "hidden = [48, 40, 32, 24]": "hidden = [48, 40, 32]\nlayers = [5, 4]",
    "num_samples = 16": 'num_samples = 16\nbasis = "principal"',
    "active = 0.7": "active = 0.6",
    "tokens = 15360": "tokens = 3072",
    "save_every = 16": "save_every = 5",
    "[engine]": """[[stages]]
tokens = 1024
context = 128
batch_size = 4
size_weights = [3, 1]
sizes_per_step = "one"
groups = 2
learning_rate = 1e-3

[engine]""",
}
"""Two stages, a basis, and layers that are cut."""


@pytest.mark.long
def test_a_whole_run_of_two_ranks_is_that_of_one_process(deep_folder):
    torch.set_num_threads(1)
    alone = train(config_in(deep_folder, "whole-alone", **WHOLE))
    config_in(deep_folder, "whole-ranks", **WHOLE)
    first, second = on_ranks(2, ranks.run, deep_folder / "whole-ranks.toml")
    assert first.steps == second.steps == alone.steps == 10
    ours, theirs = metrics(first), metrics(alone)
    assert [row["stage"] for row in ours] == [0] * 8 + [1] * 2
    for a, b in zip(ours, theirs, strict=True):
        assert (a["num_tokens"], a["kd"].keys()) == (b["num_tokens"], b["kd"].keys())
        assert a["kd"] == pytest.approx(b["kd"], rel=1e-3)
    for name in ("orders", "basis", "router", "model"):
        one, two = (load_file(run.elastic / f"{name}.safetensors") for run in (first, alone))
        assert one.keys() == two.keys()
        for key, value in two.items():
            gap = (one[key].double() - value.double()).abs().max()
            assert gap <= 1e-3 * value.double().abs().max().clamp(min=1), (name, key)
    manifests = [json.loads((run.elastic / "elastic.json").read_text()) for run in (first, alone)]
    assert manifests[0]["sizes"] == manifests[1]["sizes"]
    assert manifests[0]["depth"] == manifests[1]["depth"]


def test_ranks_wait_for_one_that_writes():
    """Longer than any other collective may take: quantising a large family takes its time."""
    assert all(seconds >= 1.4 for seconds in on_ranks(2, ranks.wait, 1.5))


def test_what_a_rank_raises_is_raised():
    with pytest.raises(ConfigError, match="no.toml does not exist"):
        on_ranks(2, ranks.run, Path("no.toml"))
    with pytest.raises(TimeoutError, match="have not answered in time"):
        on_ranks(2, ranks.wait, 60, timeout=1)


def test_windows_that_ranks_cannot_share_are_refused(run_folder):
    config = config_in(run_folder, "three-ranks")
    with pytest.raises(ConfigError, match="batch_size=4 .* cannot be shared by 3 ranks; start"):
        check(config, world_size=3)
    config_in(run_folder, "of-three", **{"batch_size = 4": "batch_size = 3"})
    with pytest.raises(ConfigError, match="batch_size=3 .* cannot be shared by 2 ranks; start"):
        on_ranks(2, ranks.run, run_folder / "of-three.toml")


@pytest.mark.parametrize(("size", "groups", "count"), [(6, 2, 2), (12, 4, 2), (8, 4, 4), (9, 3, 3)])
def test_ranks_share_every_group(run_folder, size, groups, count):
    """A group has to have windows for every rank; that the batch has enough is not enough."""
    shape = {"batch_size = 4": f"batch_size = {size}\ngroups = {groups}"}
    config = config_in(run_folder, f"{size}-in-{groups}", **shape)
    if size % (groups * count) == 0:
        check(config, world_size=count)
        return
    message = f"batch_size={size} in {groups} groups cannot be shared by {count} ranks; start"
    with pytest.raises(ConfigError, match=message):
        check(config, world_size=count)


def test_ranks_that_torchrun_did_not_start_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ConfigError, match="ranks cannot meet .*start with torchrun"), join_world():
        pass


def test_an_address_that_is_taken_is_told(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        taken.listen()
        address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(taken.getsockname()[1])}
        for key, value in {"WORLD_SIZE": "2", "RANK": "0", **address}.items():
            monkeypatch.setenv(key, value)
        with pytest.raises(ConfigError, match="ranks cannot meet .*start with t"), join_world():
            pass


@pytest.mark.parametrize("has_units", [True, False])
def test_gpus_without_units_for_bf16_train_in_fp32(monkeypatch, has_units):
    asked = []

    def supported(including_emulation: bool = True) -> bool:
        asked.append(including_emulation)
        return has_units

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert multiplies_bf16(torch.device("cuda")) is has_units and asked == [False]


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
