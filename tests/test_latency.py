"""Milliseconds as a cost: the table's arithmetic and file, budgets in real units, measuring."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from star_elastic.architectures import architecture_of
from star_elastic.axes import LAYERS, AxisMap
from star_elastic.axes.widths import Widths
from star_elastic.cost.amounts import UNITS, Amount, parse_budget
from star_elastic.cost.latency import (
    Grid,
    kind_axes,
    layer_kinds,
    load_table,
    monotone,
    save_table,
)
from star_elastic.errors import BudgetError, CheckpointError, ConfigError
from star_elastic.measure.latency import Check, Setting, measure
from star_elastic.measure.latency_bench import Bench, undisturbed
from star_elastic.measure.latency_grid import grid_points, grid_widths, random_widths
from tests.architectures import DISTINCT, ROWS, fixed_config
from tests.latencies import made_up
from tests.laws.parents import legal_widths


def axis_map_of(kind: str) -> AxisMap:
    config = fixed_config(kind)
    return architecture_of(config).axis_map(config)


# Grids


@given(st.lists(st.integers(1, 3), min_size=1, max_size=3), st.randoms(use_true_random=False))
def test_clean_up_is_monotone_and_leaves_monotone_values_alone(shape, drawn):
    values = [drawn.random() for _ in range(math.prod(shape))]
    clean = torch.tensor(monotone(shape, values)).reshape(shape)
    for axis in range(len(shape)):
        assert (clean.diff(dim=axis) >= 0).all()
    assert min(values) <= clean.min() and clean.max() <= max(values) + 1e-6
    assert monotone(shape, monotone(shape, values)) == monotone(shape, values)
    assert monotone(shape, sorted(values)) == tuple(sorted(values))


def test_interpolation_is_exact_at_points_and_linear_between_and_beyond():
    values = (0.1, 0.3, 0.7, 0.2, 0.7, 1.9)
    grid = Grid(("ffn", "hidden"), ((4, 8), (10, 20, 50)), values)
    for at, value in zip(itertools.product(*grid.points), values, strict=True):
        assert grid.at(at) == value
    assert grid.at((4, 15)) == pytest.approx((0.1 + 0.3) / 2)
    assert grid.at((4, 40)) == pytest.approx(0.3 + (0.7 - 0.3) * 2 / 3)
    assert grid.at((5, 10)) == pytest.approx(0.1 + (0.2 - 0.1) / 4)
    assert grid.at((6, 35)) == pytest.approx((0.3 + 0.7 + 0.7 + 1.9) / 4)
    # The slope of the outermost interval goes on: a router keeps a gradient there.
    assert grid.at((4, 5)) == pytest.approx(0.1 - (0.3 - 0.1) / 2)
    assert grid.at((8, 80)) == pytest.approx(1.9 + 1.9 - 0.7)
    assert Grid(("ffn",), ((4,),), (0.5,)).at((3,)) == 0.5


@pytest.mark.parametrize(
    ("points", "values", "problem"),
    [
        (((1, 2),), (1.0,), "do not fill"),
        (((2, 1),), (1.0, 2.0), "not ascending"),
        (((1, 1),), (1.0, 2.0), "not ascending"),
        (((1, 2),), (1.0, math.nan), "finite"),
        (((1, 2),), (-1.0, 1.0), "not negative"),
    ],
)
def test_damaged_grids_are_refused(points, values, problem):
    with pytest.raises(ValueError, match=problem):
        Grid(("ffn",), points, values)


# Tables


@pytest.mark.parametrize("kind", DISTINCT)
def test_kinds_are_layers_with_equal_tensors(kind):
    axis_map = axis_map_of(kind)
    kinds = layer_kinds(axis_map)
    assert tuple(dict.fromkeys(kinds)) == ROWS[kind].kinds
    assert len(kinds) == len(axis_map.axes[LAYERS].layers)
    for layer, name in enumerate(kinds):
        assert kind_axes(axis_map, layer) == kind_axes(axis_map, kinds.index(name))
        assert {axis for axis in kind_axes(axis_map, layer) if layer in axis_map.axes[axis].layers}


@pytest.mark.parametrize("kind", DISTINCT)
def test_time_is_the_sum_over_layers_and_the_rest(kind):
    axis_map = axis_map_of(kind)
    table = made_up(axis_map)
    for widths in random_widths(axis_map, grid_points(axis_map), 6, seed=1):
        layers = [
            table.parts[kind].at([axis_map.width(widths, a, layer) for a in table.parts[kind].axes])
            for layer, kind in enumerate(table.layers)
        ]
        rest = table.fixed_milliseconds(widths, axis_map)
        assert table.milliseconds(widths, axis_map) == pytest.approx(rest + sum(layers))
        # Absent layers cost nothing, and a share of a layer its share.
        for share in (0, 0.25):
            presence = (share, *(1 for _ in layers[1:]))
            some = {**widths, LAYERS: presence}
            expected = rest + sum(layers) - (1 - share) * layers[0]
            assert table.milliseconds(some, axis_map) == pytest.approx(expected)


@pytest.mark.parametrize("kind", DISTINCT)
def test_one_width_per_layer_equals_the_same_width_everywhere(kind):
    axis_map = axis_map_of(kind)
    table = made_up(axis_map)
    narrow = {name: points[0] for name, points in grid_points(axis_map).items()}
    widths = axis_map.complete(narrow)
    spread = {
        name: (width,) * len(axis_map.axes[name].layers) if axis_map.axes[name].layers else width
        for name, width in widths.items()
    }
    expected = table.milliseconds(widths, axis_map)
    assert table.milliseconds(spread, axis_map) == pytest.approx(expected)


@pytest.mark.parametrize("kind", DISTINCT)
def test_time_is_monotone_in_every_axis(kind):
    axis_map = axis_map_of(kind)
    table = made_up(axis_map)
    for axis in (name for name in axis_map.axes if name != LAYERS):
        for start in (axis_map.full, *random_widths(axis_map, grid_points(axis_map), 3, seed=2)):
            widths = [{**start, axis: width} for width in legal_widths(axis_map, axis)]
            times = [table.milliseconds(own, axis_map) for own in widths]
            assert all(a <= b + 1e-12 for a, b in itertools.pairwise(times)), axis


@pytest.mark.parametrize("kind", DISTINCT)
def test_gradients_equal_finite_differences(kind):
    axis_map = axis_map_of(kind)
    table = made_up(axis_map)
    points = grid_points(axis_map)
    # Inside the grid's cells, below the grid, and one width per layer; never on an edge.
    for shift in (0.3, -0.3):
        values: dict = {}
        for name, axis in axis_map.axes.items():
            at = 0.7 if name == LAYERS else points[name][0] + shift
            number = torch.tensor(at, dtype=torch.float64)
            values[name] = tuple(number + 0.01 * i for i in range(len(axis.layers))) or number
        flat = [
            v
            for value in values.values()
            for v in (value if isinstance(value, tuple) else (value,))
        ]
        for leaf in flat:
            leaf.requires_grad_()
        time = table.milliseconds(values, axis_map)
        grads = torch.autograd.grad(time, flat, allow_unused=True)
        for leaf, grad in zip(flat, grads, strict=True):
            with torch.no_grad():
                sides = []
                for step in (1e-4, -2e-4):
                    leaf += step
                    sides.append(table.milliseconds(values, axis_map).item())
                leaf += 1e-4
            slope = (sides[0] - sides[1]) / 2e-4
            assert (0.0 if grad is None else grad.item()) == pytest.approx(slope, abs=1e-7)


@pytest.mark.parametrize("kind", DISTINCT)
def test_tables_come_back_as_they_were_saved(kind, tmp_path):
    axis_map = axis_map_of(kind)
    table = made_up(axis_map)
    save_table(table, tmp_path / "table.json")
    assert load_table(tmp_path / "table.json", axis_map) == table


def test_tables_of_other_models_and_damaged_ones_are_refused(tmp_path):
    file, axis_map = tmp_path / "table.json", axis_map_of("moe")
    save_table(made_up(axis_map), file)
    content = json.loads(file.read_text())
    config = fixed_config("moe")
    others = {
        "measured on a nemotron_h model, this one is llama": fixed_config("llama"),
        "at the widths hidden=12,": {**config, "hidden_size": 24},
        "layers are not of the kinds": {**config, "hybrid_override_pattern": "MEE*M"},
        "other shapes": {**config, "vocab_size": 21},
    }
    for problem, other in others.items():
        with pytest.raises(CheckpointError, match=problem) as raised:
            load_table(file, architecture_of(other).axis_map(other))
        assert "\n" not in str(raised.value) and "star-elastic latency" in str(raised.value)
    with pytest.raises(CheckpointError, match="does not exist"):
        load_table(tmp_path / "none.json", axis_map)
    damages = {
        "format version 9": {**content, "format_version": 9},
        "is damaged": {k: v for k, v in content.items() if k != "phase"},
        "no times of attention, mamba": {**content, "parts": {}},
        "do not fill": {**content, "fixed": {**content["fixed"], "milliseconds": [1.0]}},
    }
    for problem, changed in damages.items():
        file.write_text(json.dumps(changed))
        with pytest.raises(CheckpointError, match=problem):
            load_table(file, axis_map)
    file.write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_table(file, axis_map)


# Budgets in real units


@pytest.mark.parametrize(
    ("budget", "metric", "value"),
    [
        ("1.6GB", "bytes", 1.6e9), ("900MiB", "bytes", 900 * 2**20), ("2 TiB", "bytes", 2**41),
        ("12B", "total", 12e9), ("830M", "active", 830e6), ("64K", "total", 64e3),
        ("8.5ms", "ms", 8.5), ("250us", "ms", 0.25), (".5s", "ms", 500.0), ("3GFLOP", "flops", 3e9),
    ],
)  # fmt: skip
def test_amounts_have_units(budget, metric, value):
    assert parse_budget(budget, metric) == Amount(pytest.approx(value), is_fraction=False)
    assert parse_budget(budget, metric).fraction_of(2 * value) == pytest.approx(0.5)


@pytest.mark.parametrize("share", [0.577, 1, 1e-6])
def test_numbers_are_shares(share):
    amount = parse_budget(share, "bytes")
    assert amount == Amount(share, is_fraction=True) and amount.fraction_of(1e9) == share


@pytest.mark.parametrize(
    ("budget", "metric", "problem"),
    [
        ("12XB", "bytes", "sizes.small.bytes='12XB' has the unknown unit 'XB'; use KB, kB, MB"),
        ("1.6GB", "total", "unknown unit 'GB'; use K, M, B, T, or a share"),
        ("12b", "total", "unknown unit 'b'"),
        ("12", "ms", "has no unit; use us, ms, s"),
        ("GB", "bytes", "not a number with a unit"),
        ("-1GB", "bytes", "not a number with a unit"),
        ("1e3M", "total", "not a number with a unit"),
        ("0GB", "bytes", "not a positive budget"),
        ("9" * 400 + "B", "total", "not a positive budget"),
        (0, "active", "not a positive budget"),
        (math.nan, "active", "not a positive budget"),
        (True, "active", "not a positive budget"),
        ([1], "active", "not a positive budget"),
        (1.5, "active", "more than the parent; write a share like 0.5 or an amount like '830M'"),
        (math.inf, "active", "more than the parent"),
    ],
)
def test_other_budgets_are_refused(budget, metric, problem):
    with pytest.raises(ConfigError, match=problem) as raised:
        parse_budget(budget, metric, "sizes.small.")
    assert str(raised.value).startswith(f"sizes.small.{metric}=")


def test_units_are_known_for_every_metric():
    with pytest.raises(BudgetError, match="budget 'speed' is unknown; use active, total"):
        parse_budget(0.5, "speed")
    for metric, units in UNITS.items():
        for unit, factor in units.items():
            assert parse_budget(f"2{unit}", metric).value == 2 * factor


# Where it is measured


@pytest.mark.parametrize("kind", DISTINCT)
def test_models_of_the_grid_cover_every_kind_of_layer(kind):
    axis_map = axis_map_of(kind)
    points = grid_points(axis_map)
    models = list(grid_widths(axis_map, points))
    assert axis_map.full in models
    for layer in axis_map.axes[LAYERS].layers:
        axes = kind_axes(axis_map, layer)
        seen = {tuple(model[axis] for axis in axes) for model in models}
        assert seen == set(itertools.product(*(points[axis] for axis in axes)))
    for name, widths in points.items():
        assert widths[-1] == axis_map.axes[name].size
        assert name == "hidden" or 2 * widths[0] >= axis_map.axes[name].size


def test_the_grid_spans_the_choices():
    axis_map = axis_map_of("moe")
    points = grid_points(axis_map, {"hidden": (12, 9, 7, 3), "ssm_heads": (6, 2), "layers": (1, 0)})
    assert (points["hidden"], points["ssm_heads"]) == ((3, 7, 12), (2, 6))
    assert all(len(points[name]) == 1 for name in points if name not in ("hidden", "ssm_heads"))
    assert len(list(grid_widths(axis_map, points))) == 6
    for widths in random_widths(axis_map, points, 8, seed=0):
        assert widths["ssm_heads"] in (2, 4, 6, (2, 4), (2, 6), (4, 2), (4, 6), (6, 2), (6, 4))
        assert isinstance(widths["hidden"], int) and 3 <= widths["hidden"] <= 12
        assert widths["expert_ffn"] == axis_map.full["expert_ffn"]


def test_every_other_check_has_widths_of_its_own_in_each_layer():
    axis_map = axis_map_of("llama")
    checks = random_widths(axis_map, grid_points(axis_map), 6, seed=0)
    assert len(checks) == 6 and checks == random_widths(axis_map, grid_points(axis_map), 6, seed=0)
    mixed = [any(isinstance(width, tuple) for width in widths.values()) for widths in checks]
    assert not any(mixed[::2]) and any(mixed[1::2])


# Measuring

WORKLOADS = (
    {"phase": "decode", "batch": 2, "context": 6},
    {"phase": "prefill", "batch": 2, "context": 6, "dtype": torch.bfloat16},
    {"phase": "decode", "batch": 1, "context": 4},
)


@pytest.mark.parametrize("kind", DISTINCT)
def test_a_measured_table_predicts(kind, tmp_path):
    config, axis_map = fixed_config(kind), axis_map_of(kind)
    setting, told = Setting(**WORKLOADS[list(ROWS).index(kind) % len(WORKLOADS)], seconds=0), []
    table, checks = measure(
        config, setting, num_checks=2, progress=lambda done, total: told.append((done, total))
    )
    assert told and set(told) == {(0, 0)}
    assert (
        tuple(table.parts) == ROWS[kind].kinds and table.machine.threads == torch.get_num_threads()
    )
    save_table(table, tmp_path / "table.json")
    assert load_table(tmp_path / "table.json", axis_map) == table
    full = table.milliseconds(axis_map.full, axis_map)
    narrow = {name: grid[0] for name, grid in grid_points(axis_map).items()}
    assert 0 < table.milliseconds(axis_map.complete(narrow), axis_map) <= full
    assert len(checks) == 2 and all(c.predicted > 0 and c.measured > 0 for c in checks)


def test_of_a_large_model_one_layer_of_each_kind_is_enough():
    config = fixed_config("moe")
    bench = Bench(config, Setting(max_bytes=0))
    assert bench.kept == (0, 1, 3)
    table, checks = measure(config, Setting(context=4, seconds=0, max_bytes=0), num_checks=1)
    assert len(table.layers) == 5 and checks[0].predicted > 0


def test_a_decoding_step_sees_the_whole_context():
    bench = Bench(fixed_config("llama"), Setting(context=9))
    model = bench.model(bench.axis_map.full, clocked=True)
    for _ in range(3):
        model.visit(counts=True)
        assert model._cache is not None and model._cache.get_seq_length() == 9
    assert sum(model.split()[kind] for kind in ("rest", *bench.kinds)) == pytest.approx(
        model.milliseconds
    )


def test_settings_are_checked():
    with pytest.raises(ConfigError, match="phase='sleep' is unknown; use decode or prefill"):
        Setting(phase="sleep")
    with pytest.raises(ConfigError, match="context=0 is not positive"):
        Setting(context=0)


def test_errors_are_relative_and_times_are_the_undisturbed_ones():
    assert Check(Widths({}), predicted=1.1, measured=1.0).error == pytest.approx(0.1)
    assert undisturbed([3.0]) == 3.0
    assert undisturbed([9.0, *(float(i) for i in range(1, 20))]) == 3.0


def test_many_widths_at_once_are_each_width_alone():
    grid = Grid(("hidden", "ffn"), ((8, 16, 24, 32), (4, 8)), tuple(range(1, 9)))
    hidden = torch.tensor([6.0, 8.0, 13.0, 16.0, 25.0, 40.0], dtype=torch.float64)
    ffn = torch.tensor([4.0, 7.0, 9.0, 2.0, 8.0, 5.0], dtype=torch.float64)
    many = grid.at([hidden, ffn])
    each = [grid.at([h, f]) for h, f in zip(hidden.tolist(), ffn.tolist(), strict=True)]
    assert many.tolist() == pytest.approx(each, rel=1e-12)
    assert grid.at([hidden, 4]).tolist() == pytest.approx(
        [grid.at([h, 4]) for h in hidden.tolist()]
    )
