"""Runs of the train command on parents in which half of one axis does nothing: what can be cut for
nothing is found, from the data, and the run tells the truth about it."""

from __future__ import annotations

import json

import torch

from star_elastic.checkpoints.elastic import ElasticCheckpoint
from star_elastic.generate.family import load
from star_elastic.models.load import load_parent
from star_elastic.router.commit import ASKED, LEARNED
from star_elastic.router.files import load_router
from star_elastic.train.losses import distillation_loss
from tests.planted_run import LEARNED_STEPS, run_planted


def own_choice(run, name):
    """What the router that was saved chooses for a size, and the grid."""
    router = load_router(ElasticCheckpoint(run.elastic))
    number = list(run.manifest.sizes).index(name)
    return router.decide(router.one_hot(number), ASKED).choice, router.grid


def test_the_routers_own_choice_is_the_planted_axis(planted_run):
    """With the shipped defaults, before any step that sees no data."""
    choice, _ = own_choice(planted_run, "small")
    wanted = planted_run.planted.widths
    assert choice == {axis: wanted[axis] for axis in planted_run.planted.choices}
    assert planted_run.manifest.sizes["small"].argmax == wanted


def test_the_widths_come_from_the_data(planted_run):
    small = planted_run.manifest.sizes["small"]
    assert small.widths == planted_run.planted.widths
    assert small.repair == {} and small.data_free_steps == 0 and small.widths_from == "data"
    assert not any("not from the data" in line for line in planted_run.lines)


def test_the_large_size_stays_whole(planted_run):
    large = planted_run.manifest.sizes["large"]
    assert large.widths == large.argmax == planted_run.planted.axis_map.full
    assert large.widths_from == "data"


def test_what_is_cut_was_dead(planted_run):
    """The parent was sorted best units first: without its dead half it says what it said."""
    parent, _ = load_parent(planted_run.planted.folder / "parent")
    family = load(planted_run.elastic)
    ids = torch.randint(0, 300, (4, 32), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        wanted, whole, small = (
            model(input_ids=ids).logits.flatten(0, 1)
            for model in (parent, family["large"], family["small"])
        )
    assert distillation_loss(wanted, whole) < 0.02
    assert distillation_loss(wanted, small) < 0.02


def test_a_router_without_time_to_learn_says_that_the_budget_has_chosen(unlearned_run):
    small, full = unlearned_run.manifest.sizes["small"], unlearned_run.planted.axis_map.full
    assert small.argmax == full and small.widths != full
    assert small.widths_from == "budget" and small.cost["budget_miss"] < 0.005
    (before,) = (line for line in unlearned_run.lines if f"below {LEARNED} the budgets" in line)
    assert before.startswith("warning: the router learns for 2 steps, ")
    (after,) = (line for line in unlearned_run.lines if "not from the data" in line)
    assert after.startswith("small: widths come from the budget, not from the data: after 2 steps")
    assert "still kept the parent whole" in after


def test_repair_and_data_free_steps_lead_from_the_routers_choice_to_the_widths(
    planted_run, unlearned_run
):
    for run in (planted_run, unlearned_run):
        for name, size in run.manifest.sizes.items():
            choice, grid = own_choice(run, name)
            assert size.argmax == run.planted.axis_map.complete(choice)
            steps = {
                axis: widths.index(choice[axis]) - widths.index(size.widths[axis])
                for axis, widths in grid.choices.items()
            }
            assert size.repair == {axis: moved for axis, moved in steps.items() if moved}
            far = any(abs(moved) > 1 for moved in steps.values())
            assert size.data_free_steps == (sum(map(abs, steps.values())) if far else 0)


def test_without_a_budget_that_counts_nothing_is_cut(planted_llama):
    """`router.weight` weighs the only signal that asks for a cut."""
    run = run_planted(planted_llama, "no-budget", LEARNED_STEPS, weight=0.0)
    small = run.manifest.sizes["small"]
    assert small.argmax == planted_llama.axis_map.full and small.widths_from == "budget"


def test_the_manifest_tells_where_widths_come_from(planted_run):
    content = json.loads((planted_run.elastic / "elastic.json").read_text())
    small = content["sizes"]["small"]
    assert small["argmax"] == small["widths"] == dict(planted_run.planted.widths)
    assert small["data_free_steps"] == 0 and small["widths_from"] == "data"
