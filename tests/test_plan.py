"""Plans: the best that fits by its stated objective, against plain loops; and every byte of it."""

from __future__ import annotations

import itertools
import json
import re

import pytest
import torch

from star_elastic.architectures import ModelConfig, read_config
from star_elastic.axes import axis_keys, order_key
from star_elastic.checkpoints.elastic import ElasticCheckpoint
from star_elastic.cli import main
from star_elastic.cost.count import CostModel, Workload
from star_elastic.errors import BudgetError
from star_elastic.importance.files import ScoreInfo, save_scores
from star_elastic.importance.orders import orders_from_scores
from star_elastic.models.load import load_parent
from star_elastic.router import search
from star_elastic.router.files import widths_for, widths_within
from star_elastic.router.grid import default_choices, make_grid
from star_elastic.router.objective import Objective
from star_elastic.router.plan import Planner
from star_elastic.train.check import check
from star_elastic.train.fingerprint import digest_weights
from tests.architectures import ROWS
from tests.latencies import made_up
from tests.memory import cache_bytes
from tests.processes import ROOT, refusal
from tests.tiny_run import config_in

TRAINED = {kind: row.trained for kind, row in ROWS.items() if row.trained is not None}
LOAD = Workload(context=40, batch=3)


def planner(kind: str, per_layer: tuple[str, ...] = (), scores=None, load=LOAD, ms=None) -> Planner:
    """Of a parent that is trained in tests, over the choices that it is trained with."""
    axis_map = ModelConfig({**TRAINED[kind].config, "vocab_size": 20}).axis_map
    grid = make_grid(TRAINED[kind].choices, axis_map, per_layer=per_layer)
    return Planner(grid, CostModel(axis_map, load, ms), Objective(axis_map, scores or {}))


def random_scores(axis_map, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        key: torch.rand(axis_map.axes[axis].size, generator=generator).double() ** 4
        for key, (axis, _) in axis_keys(axis_map).items()
    }


def lost_by_hand(planner: Planner, widths, scores=None) -> float:
    """The mean over the axes of the share lost: of a sum of scores, or the square of the cut."""
    losses = []
    for name in planner.grid.choices:
        axis, width = planner.cost.axis_map.axes[name], widths[name]
        layers = axis.layers or (None,)
        own = width if isinstance(width, tuple) else (width,) * len(layers)
        shares = []
        for layer, kept in zip(layers, own, strict=True):
            if not scores:
                shares.append(((axis.size - kept) / axis.size) ** 2)
                continue
            units, each = scores[order_key(name, layer)].tolist(), axis.size // axis.num_groups
            groups = [units[start : start + each] for start in range(0, axis.size, each)]
            left = [sorted(g)[: each - kept // axis.num_groups] for g in groups]
            shares.append(sum(map(sum, left)) / sum(units))
        losses.append(sum(shares) / len(shares))
    return sum(losses) / len(losses)


def every_widths(planner: Planner):
    axis_map, sizes = (
        planner.cost.axis_map,
        [planner.grid.choices[p.axis] for p in planner.grid.places],
    )
    for at in itertools.product(*(range(len(own)) for own in sizes)):
        yield planner.grid.at(at, axis_map)


@pytest.mark.parametrize("measured", [False, True], ids=["assumed", "measured"])
@pytest.mark.parametrize(
    ("kind", "per_layer"),
    [*((kind, ()) for kind in TRAINED), ("llama", ("ffn",)), ("moe", ("ssm_heads",))],
)
def test_the_plan_is_the_best_that_fits(kind, per_layer, measured):
    """Of all combinations, by plain loops, at limits all over their range and right at their
    edges."""
    plain = planner(kind, per_layer)
    scores = random_scores(plain.cost.axis_map, 3) if measured else None
    orders = orders_from_scores(scores, plain.cost.axis_map) if scores else {}
    kept = {key: scores[key][order] for key, order in orders.items()} if scores else None
    asked = planner(kind, per_layer, kept)
    sizes = {
        w: (asked.cost.count(w).bytes, lost_by_hand(asked, w, scores)) for w in every_widths(asked)
    }
    held = sorted({num_bytes for num_bytes, _ in sizes.values()})
    limits = {held[0], held[-1], *held[1::5], *(h - 1 for h in held[1::7]), held[-1] * 2}
    for limit in limits:
        found = asked.best({"bytes": limit})
        fitting = [lost for num_bytes, lost in sizes.values() if num_bytes <= limit]
        assert found.memory.total == found.cost.bytes == sizes[found.widths][0] <= limit
        assert found.mean_lost == pytest.approx(sizes[found.widths][1], abs=1e-12)
        assert found.mean_lost == pytest.approx(min(fitting), abs=1e-12)
    assert asked.best({"bytes": held[-1]}).widths == asked.cost.axis_map.full
    assert asked.best({"bytes": held[-1] - 1}).widths != asked.cost.axis_map.full
    with pytest.raises(BudgetError, match=f"the smallest takes {held[0]:,} bytes"):
        asked.best({"bytes": held[0] - 1})


def test_a_beam_finds_what_fits(monkeypatch):
    """A grid that is too large to be tried out: what is found fits, however near the limit is to
    the least there is, and is hardly worse than the best."""
    asked = planner("llama", ("ffn",))
    sizes = {w: asked.cost.count(w).bytes for w in every_widths(asked)}
    limits = [min(sizes.values()), *sorted(set(sizes.values()))[1::6]]
    exact = [asked.best({"bytes": limit}).mean_lost for limit in limits]
    monkeypatch.setattr(search, "EXHAUSTIVE", 10)
    assert not search.is_exhaustive(asked.grid)
    for limit, best in zip(limits, exact, strict=True):
        found = asked.best({"bytes": limit})
        assert found.cost.bytes <= limit
        assert best - 1e-12 <= found.mean_lost <= best + 0.005


def test_a_speed_is_a_limit_too():
    axis_map = planner("llama").cost.axis_map
    table = made_up(axis_map, choices=TRAINED["llama"].choices)
    asked = planner("llama", ms=table.milliseconds)
    counted = {w: asked.cost.count(w) for w in every_widths(asked)}
    times = sorted(cost.ms for cost in counted.values())
    held = sorted(cost.bytes for cost in counted.values())
    for limits in (
        {"bytes": held[-1], "ms": times[len(times) // 2]},
        {"bytes": held[len(held) // 2], "ms": times[len(times) // 2]},
    ):
        fitting = [
            lost_by_hand(asked, w) for w, cost in counted.items()
            if all(cost.metric(m) <= limit for m, limit in limits.items())
        ]  # fmt: skip
        found = asked.best(limits)
        assert all(found.cost.metric(m) <= limit for m, limit in limits.items())
        assert found.mean_lost == pytest.approx(min(fitting), abs=1e-12)
    with pytest.raises(BudgetError, match=r"no size of these choices needs at most .* ms"):
        asked.best({"bytes": held[-1], "ms": times[0] * 0.99})


def test_neighbours_are_plans_of_other_limits():
    asked = planner("moe")
    limits = {"bytes": asked.cost.full.bytes * 0.7}
    found = asked.best(limits)
    rows = {row.name: row.plan for row in asked.neighbours(found, limits)}
    held = [plan.memory.total for name, plan in rows.items() if name.startswith("memory")]
    lost = [plan.mean_lost for name, plan in rows.items() if name.startswith("memory")]
    assert len(held) > 2 and held == sorted(held) and lost == sorted(lost, reverse=True)
    assert min(held) < found.memory.total < max(held)
    for name, load in (("context 80", Workload(80, 3)), ("batch 6", Workload(40, 6))):
        plan = rows[name]
        assert plan.memory.total == CostModel(asked.cost.axis_map, load).count(plan.widths).bytes
        assert plan.memory.total <= limits["bytes"] and plan.mean_lost >= found.mean_lost


# On the command line


@pytest.fixture
def planned(capsys):
    """What the command tells as JSON."""

    def run(*arguments) -> dict:
        main(["plan", *map(str, arguments), "--json"])
        return json.loads(capsys.readouterr().out)

    return run


@pytest.mark.parametrize("kind", ROWS)
def test_a_bare_config_is_enough(kind, tmp_path, planned):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(ROWS[kind].wide))
    axis_map = ModelConfig(ROWS[kind].wide).axis_map
    grid = make_grid(default_choices(axis_map), axis_map)
    cost = CostModel(axis_map, Workload(100, 2))
    whole, least = cost.full.bytes, cost.count({**axis_map.full, **grid.narrowest()}).bytes
    options = (file, "--context", 100, "--batch", 2, "--memory")
    assert planned(*options, f"{whole / 1000}KB")["is_parent"]
    limit = (whole + least) // 2
    found = planned(*options, f"{limit / 1000}KB")
    assert least <= found["memory"]["total"] == cost.count(axis_map.complete(found["widths"])).bytes
    assert found["memory"]["left"] == limit - found["memory"]["total"] >= 0
    assert found["known"] == [] and not found["is_parent"] and found["objective"]["measured"] == []
    refused = refusal("plan", *options, f"{(least - 1) / 1000}KB")
    assert f"the smallest takes {least:,} bytes" in refused


def test_a_plan_of_a_parent_can_be_trained(run_folder, planned, capsys):
    """As its last line says it: the run config takes it."""
    parent = run_folder / "parent"
    axis_map = read_config(parent).axis_map
    memory = CostModel(axis_map, Workload(64)).full.bytes * 0.7 / 1000
    asked = (parent, "--memory", f"{memory:.0f}KB", "--context", 64)
    found = planned(*asked)
    main(["plan", *map(str, asked)])
    said = capsys.readouterr().out
    (total,) = re.findall(r"sizes\.planned\.total = ([\d.]+)", said)
    (widths,) = re.findall(r'router\.fixed\.planned = "([^"]+)"', said)
    before = "[sizes.large]\nactive = 1.0\n[sizes.small]\nactive = 0.7"
    sizes = {before: f"[sizes.planned]\ntotal = {total}"}
    router = {"[router]": f'[router]\nfixed = {{planned = "{widths}"}}'}
    spec = check(config_in(run_folder, "as-planned", **sizes, **router))
    assert dict(spec.fixed["planned"].widths) == found["widths"]


def test_every_byte_of_a_family_s_plan(trained, tmp_path, planned, capsys):
    """What the certificate says is what the slice holds once it is loaded and has read a batch."""
    family = ElasticCheckpoint(trained.elastic)
    load = Workload(context=24, batch=3, dtype_bytes=4)
    cost = CostModel(family.axis_map, load)
    limit = cost.full.bytes * 0.75 / 1000
    found = planned(
        trained.elastic, "--memory", f"{limit:.3f}KB", "--context", 24, "--batch", 3,
        "--dtype-bytes", 4,
    )  # fmt: skip
    for axis, choices in family.manifest.choices.items():
        assert found["widths"][axis] in choices
    widths = ",".join(f"{a}={w}" for a, w in found["widths"].items() if a != "layers")
    main(["slice", str(trained.elastic), "--widths", widths, "--out", str(tmp_path / "cut")])
    capsys.readouterr()
    model, _ = load_parent(tmp_path / "cut", torch.float32)
    with torch.no_grad():
        cache = model(input_ids=torch.ones(3, 24, dtype=torch.long), use_cache=True).cache
    memory = found["memory"]
    assert sum(p.nbytes for p in model.parameters()) == memory["weights"] + memory["fp32_weights"]
    assert sum(b.nbytes for b in model.buffers()) == memory["buffers"]
    assert cache_bytes(cache) == sum(memory["states"].values())


def test_a_family_tells_its_trained_sizes_and_its_router(trained, planned):
    family = ElasticCheckpoint(trained.elastic)
    cost = CostModel(family.axis_map, Workload(context=24))
    own = {name: cost.count(size.widths).bytes for name, size in family.manifest.sizes.items()}
    limit = (own["small"] + own["large"]) / 2
    found = planned(trained.elastic, "--memory", f"{limit / 1000}KB", "--context", 24)
    rows = {row["name"]: row for row in found["known"]}
    for name, held in own.items():
        assert rows[name]["memory"]["total"] == held and rows[name]["trained"]
        assert rows[name]["fits"] == (held <= limit)
    (router,) = [row for name, row in rows.items() if name.startswith("router, active=")]
    share = float(router["name"].partition("=")[2])
    assert router["fits"] and not router["trained"] and 0.7 < share < 1
    # Nearly the largest share that fits: what is a step above it does not.
    assert dict(widths_for(family, {"active": share}).widths) == router["widths"]
    above = widths_for(family, {"active": share + 0.3 / 2**6}).widths
    assert cost.count(above).bytes > limit or dict(above) == router["widths"]


def test_a_router_is_asked_only_where_it_can_answer(trained):
    family = ElasticCheckpoint(trained.elastic)
    budget, whole = widths_within(family, lambda widths: True)
    assert budget == {"active": 1.0} and whole.widths == family.axis_map.full
    assert widths_within(family, lambda widths: False) is None
    family = ElasticCheckpoint(trained.elastic)
    family.router_state = None
    assert widths_within(family, lambda widths: True) is None


def test_importance_is_read_in_the_order_in_which_units_are_kept(trained, tmp_path, planned):
    """Those that a parent scores highest, of a family those that come first in its own order: its
    own scores as they stand, the parent's put into that order."""
    family, parent = ElasticCheckpoint(trained.elastic), trained.elastic.parents[1] / "parent"
    axes, scores = family.axis_map.axes, random_scores(family.axis_map, 5)
    as_they_stand = {key: torch.arange(len(units)) for key, units in scores.items()}
    limit = f"{CostModel(family.axis_map, Workload(24)).full.bytes * 0.7 / 1000:.3f}KB"
    for name, path, weights, orders in (
        ("parent", parent, "", orders_from_scores(scores, family.axis_map)),
        ("parent's", trained.elastic, digest_weights(parent), family.orders),
        ("own", trained.elastic, digest_weights(trained.elastic), as_they_stand),
    ):
        (tmp_path / name).mkdir()
        info = ScoreInfo(num_samples=7, num_tokens=70, source="rows", weights=weights)
        save_scores(tmp_path / name / "scores.safetensors", scores, family.axis_map, info)
        options = ("--memory", limit, "--context", 24, "--importance", tmp_path / name)
        found = planned(path, *options)
        assert set(found["objective"]["measured"]) <= set(axes) - {"layers", "top_k"}
        for axis in found["objective"]["measured"]:
            lost = []
            for layer in axes[axis].layers or (None,):
                key = order_key(axis, layer)
                grouped = scores[key][orders[key]].reshape(axes[axis].num_groups, -1)
                cut = grouped[:, found["widths"][axis] // axes[axis].num_groups :]
                lost.append(float(cut.sum() / scores[key].sum()))
            assert found["given_up"][axis]["lost"] == pytest.approx(sum(lost) / len(lost)), axis
        assert found["objective"]["measured"] and found["lost"] > 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--memory", "16"], "--memory '16' has no unit; use KB"),
        (["--memory", "50%"], "--memory '50%' is not a number with a unit"),
        (["--memory", "-3GB"], "is not a number with a unit; write an amount like '16GB'"),
        (["--memory", "0GB"], "is not a positive budget"),
        (["--memory", "1KB"], "the smallest takes"),
        ([], "Missing option '--memory'"),
        (["--memory", "1GB", "--batch", "0"], "--batch"),
        (["--memory", "1GB", "--context", "-1"], "--context"),
        (["--memory", "1GB", "--tokens-per-second", "40"], "--tokens-per-second needs a latency"),
        (["--memory", "1GB", "--tokens-per-second", "0"], "--tokens-per-second"),
        (["--memory", "1GB", "--tokens-per-second", "nan"], "--tokens-per-second"),
        (["--memory", "1GB", "--latency", "nowhere.json"], "nowhere.json does not exist"),
        (["--memory", "1GB", "--importance", "nowhere"], "nowhere does not exist"),
    ],
)
def test_mistakes_are_one_line(options, said):
    assert said in refusal("plan", "bundled", *options)


def test_a_quantised_family_is_refused(blocks, tmp_path, run_folder):
    out = tmp_path / "quantised"
    main(["quantize", str(blocks), "--format", "fp8", "--data", str(run_folder / "rows.jsonl"),
          "--samples", "1", "--out", str(out)])  # fmt: skip
    assert "is quantised" in refusal("plan", out, "--memory", "1GB")


def test_the_command_of_the_readme_runs(planned):
    """With a model and a memory in the places of theirs."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^\| `star-elastic plan ([^`]+)`", readme, re.M)
    words = ["bundled-parent" if word == "MODEL" else word for word in command.split()]
    assert "--memory" in words
    assert planned(*words)["is_parent"]
