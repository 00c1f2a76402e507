"""The whole road at the command line, for every architecture: units planted dead are cut for
nothing, budgets on several costs are met at once, training brings a size closer, and what leaves
is an ordinary checkpoint that writes the same text."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import star_elastic
from star_elastic import bundled
from star_elastic.architectures import architecture_of
from star_elastic.axes import AxisMap, axis_keys
from star_elastic.axes.widths import Widths
from star_elastic.cost.count import CostModel, Workload
from star_elastic.demo import write_rows
from star_elastic.models.elastic import ElasticModel
from star_elastic.models.load import load_parent
from star_elastic.models.submodel import build_submodel, sort_in_place
from star_elastic.rewrite.stream import save_model
from star_elastic.train.losses import distillation_loss
from tests.architectures import ROWS
from tests.processes import answer
from tests.tiny_run import random_model

DEAD_SHARE = 1 / 4
RUN = """
parent = "parent"
out = "run"
workload = {{context = 64, batch = 4, dtype_bytes = {dtype_bytes}}}

[sizes.large]
active = 1.0
[sizes.live]
active = {live.active}
total = {live.total}
bytes = {live.bytes}
[sizes.small]
active = {small.active}
total = "{small.total:.2%}"

[router.fixed]
large = ""
live = "{live.text}"
small = "{small.text}"

[[data]]
files = ["rows.jsonl"]
loss_on = "answers"

[calibration]
num_samples = 24
context = 96

[[stages]]
tokens = 11520
context = 96
batch_size = 4
learning_rate = 2e-3
warmup_steps = 2
{stage}
[engine]
autocast = {autocast}
"""


@dataclass(frozen=True)
class Case:
    """One kind of parent: its row, what is changed in it, the dtype that it is stored in."""

    kind: str
    changes: dict
    dtype: torch.dtype = torch.float32
    autocast: bool = False


CASES = {
    "moe": Case("moe", {}, autocast=True),
    "llama": Case("llama", {"tie_word_embeddings": False}, torch.bfloat16),
    "tied llama": Case("llama", {"tie_word_embeddings": True}),
}


@dataclass(frozen=True)
class Size:
    """Widths as a run config has them, and their shares of the parent's costs."""

    text: str
    active: float
    total: float
    bytes: float


@dataclass(frozen=True)
class Road:
    """A folder in which a planted parent has been trained, and what was planted."""

    case: Case
    folder: Path
    config: dict
    axis_map: AxisMap
    axis: str
    dead: torch.Tensor

    @property
    def elastic(self) -> Path:
        """What the run has written."""
        return self.folder / "run" / "elastic"


def kill(state: dict[str, torch.Tensor], axis_map: AxisMap, axis: str, units: torch.Tensor) -> None:
    """Makes some units of an axis do nothing, in every layer."""
    with torch.no_grad():
        for name, spec in axis_map.tensors.items():
            for dim, segments in enumerate(spec.dims):
                if [segment.axis for segment in segments] == [axis]:
                    state[name].index_fill_(dim, units, 0)


def size_of(axis_map: AxisMap, load: Workload, widths: dict[str, int]) -> Size:
    cost, full = (
        CostModel(axis_map, load).count(w) for w in (axis_map.complete(widths), axis_map.full)
    )  # fmt: skip
    shares = {name: cost.metric(name) / full.metric(name) for name in ("active", "total", "bytes")}
    return Size(str(Widths(widths)), **shares)


@pytest.fixture(scope="module", params=CASES)
def road(request, tmp_path_factory) -> Road:
    """Planted, ranked, sorted, trained."""
    case, row = CASES[request.param], ROWS[CASES[request.param].kind]
    folder = tmp_path_factory.mktemp("road")
    tokenizer = AutoTokenizer.from_pretrained(bundled.PARENT)
    config = {**row.trained.config, **case.changes, "vocab_size": len(tokenizer)}
    config["dtype"] = str(case.dtype).removeprefix("torch.")
    model = random_model(config)
    axis_map = architecture_of(config).axis_map(config)
    axis = "expert_ffn" if "expert_ffn" in axis_map.axes else "ffn"
    size = axis_map.axes[axis].size
    generator = torch.Generator().manual_seed(4)
    dead = torch.randperm(size, generator=generator)[: int(size * DEAD_SHARE)].sort().values
    state = ElasticModel(model, config).state()
    kill(state, axis_map, axis, dead)
    save_model(state, config, bundled.PARENT, folder / "parent", dtype=case.dtype)
    write_rows(folder / "rows.jsonl", 64, seed=0)
    load = Workload(context=64, batch=4, dtype_bytes=case.dtype.itemsize)
    least = {name: widths[-1] for name, widths in row.trained.choices.items()}
    text = RUN.format(
        dtype_bytes=case.dtype.itemsize,
        live=size_of(axis_map, load, {axis: size - len(dead)}),
        small=size_of(axis_map, load, least),
        stage="",
        autocast=str(case.autocast).lower(),
    )
    (folder / "run.toml").write_text(text)
    done = answer("train", folder / "run.toml")
    assert done["elastic"] == str(folder / "run" / "elastic") and done["steps"] == 30
    return Road(case, folder, config, axis_map, axis, dead)


def logged(run: Path) -> list[dict]:
    """The log of a run, step by step."""
    return [json.loads(row) for row in (run / "metrics.jsonl").read_text().splitlines()]


def test_dead_units_are_ranked_last(road):
    orders = load_file(road.elastic / "orders.safetensors")
    keys = [key for key, (name, _) in axis_keys(road.axis_map).items() if name == road.axis]
    assert keys
    for key in keys:
        assert orders[key][-len(road.dead) :].sort().values.tolist() == road.dead.tolist(), key


def test_dead_units_are_cut_for_nothing_and_training_brings_a_size_closer(road):
    """By the run's own log, and on tokens that it has not seen."""
    rows = logged(road.folder / "run")
    scale = rows[0]["kd"]["small"]
    assert rows[0]["kd"]["live"] < 0.02 * scale
    last = sum(row["kd"]["small"] for row in rows[-5:]) / 5
    assert last < 0.8 * scale
    family = star_elastic.load(road.elastic)
    original, config = load_parent(road.folder / "parent", dtype=torch.float32)
    ids = torch.randint(0, 300, (4, 48), generator=torch.Generator().manual_seed(3))
    ids = torch.cat([ids, family.tokenizer("add 12 34\n" * 6, return_tensors="pt")["input_ids"]
                     .expand(4, -1)[:, :48]], 1)  # fmt: skip
    with torch.no_grad():
        teacher = original(input_ids=ids).logits.flatten(0, 1)
        orders = load_file(road.elastic / "orders.safetensors")
        sort_in_place(original, road.axis_map, orders)

        def distance(model) -> float:
            return float(distillation_loss(teacher, model(input_ids=ids).logits.flatten(0, 1)))

        untrained = build_submodel(original, config, family.sizes["small"].widths)
        live = build_submodel(original, config, family.sizes["live"].widths)
        assert distance(live) < 1e-2 * distance(untrained)
        assert distance(family["small"]) < distance(untrained)


def test_every_budget_of_a_size_is_met(road):
    told = answer("sizes", road.elastic)["sizes"]
    full = told["large"]
    for name in ("live", "small"):
        size = told[name]
        for metric, share in size["budgets"].items():
            if metric in ("active", "total"):
                assert size[metric] / full[metric] == pytest.approx(share, rel=1e-3)
        assert size["total"] < full["total"]
    manifest = json.loads((road.elastic / "elastic.json").read_text())["sizes"]
    assert set(manifest["live"]["budgets"]) == {"active", "total", "bytes"}
    assert manifest["live"]["cost"]["budget_miss"] < 1e-3
    used = [
        size["cost"]["weight_bytes"] + size["cost"]["state_bytes"] for size in manifest.values()
    ]
    assert used[1] / used[0] == pytest.approx(manifest["live"]["budgets"]["bytes"], rel=1e-3)


def test_what_leaves_is_an_ordinary_checkpoint_that_writes_the_same(road, tmp_path):
    """In the dtype that the parent was stored in."""
    family = star_elastic.load(road.elastic, dtype="float32")
    ask = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0, "eos_token_id": None}
    ids = torch.arange(20)[None] + 5
    for name in ("small", "live"):
        told = answer("slice", road.elastic, "--size", name, "--out", tmp_path / name)
        assert told["widths"] == dict(family.sizes[name].widths)
        stored = load_file(tmp_path / name / "model.safetensors")
        floats = {value.dtype for key, value in stored.items() if "correction_bias" not in key}
        assert floats == {road.case.dtype}
        assert ("lm_head.weight" in stored) != road.config.get("tie_word_embeddings", False)
        plain, info = AutoModelForCausalLM.from_pretrained(
            tmp_path / name, dtype=torch.float32, output_loading_info=True
        )
        assert not info["missing_keys"] and not info["unexpected_keys"]
        AutoTokenizer.from_pretrained(tmp_path / name)
        with torch.no_grad():
            ours, theirs = (m(input_ids=ids).logits for m in (family[name], plain))
            assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()
            mask = torch.ones_like(ids)
            written = [m.generate(ids, attention_mask=mask, **ask) for m in (family[name], plain)]
        assert torch.equal(*written)
        total = sum(parameter.numel() for parameter in plain.parameters())
        assert answer("count", tmp_path / name)["total"] == total
    asked = answer(
        "generate", road.elastic, "add 1 2", "--think", "small", "--answer", "live",
        "--thinking-budget", 4, "--grace", 0, "--max-new-tokens", 16,
    )  # fmt: skip
    assert asked["phases"][0]["by_size"] == {"small": 4}


def test_a_family_learns_the_task(road):
    """Trained on from where it stands, on the rows' own next tokens."""
    text = (road.folder / "run.toml").read_text()
    fixed = text[text.index("[router.fixed]") : text.index("[[data]]")]
    text = text.replace(fixed, "").replace('out = "run"', 'out = "task"\nobjective = "task"')
    text = text.replace('parent = "parent"', f'parent = "parent"\nfamily = "{road.elastic}"')
    (road.folder / "task.toml").write_text(text)
    answer("train", road.folder / "task.toml")
    rows = logged(road.folder / "task")
    for size in ("large", "live", "small"):
        first, last = (sum(row["kd"][size] for row in part) / 5 for part in (rows[:5], rows[-5:]))
        assert last < 0.9 * first, size
    widths = [answer("sizes", path / "elastic")["sizes"]["small"]["widths"]
              for path in (road.folder / "run", road.folder / "task")]  # fmt: skip
    assert widths[0] == widths[1]
