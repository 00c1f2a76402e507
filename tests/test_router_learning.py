"""How the router learns: its optimiser, its schedule, its draws, and what a training step makes of
them. Each of its two signals reaches it, and it finds what is free to cut on every axis."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import planting
from star_elastic.axes.widths import Widths
from star_elastic.cost.count import CostModel
from star_elastic.models.elastic import ElasticModel
from star_elastic.nesting.gate import Mixture
from star_elastic.router.budget import budget_loss
from star_elastic.router.commit import ASKED, LEARNED, Commitment, commit
from star_elastic.router.grid import Grid, default_choices
from star_elastic.router.optimizer import SharedAdam
from star_elastic.router.router import Annealing, Decision, Router, Temperature
from star_elastic.train.config import OptimizerConfig, RouterConfig
from star_elastic.train.losses import distillation_loss

HYBRID = {**planting.HYBRID, "hidden_size": 32, "hybrid_override_pattern": "ME*", "vocab_size": 64}
LLAMA = {**planting.LLAMA, "hidden_size": 32, "vocab_size": 64}
CASES = [(HYBRID, a) for a in ("experts", "expert_ffn", "shared_ffn", "ssm_heads")]
CASES += [(LLAMA, a) for a in ("hidden", "ffn", "heads")]


def shipped_optimizer(router: Router) -> SharedAdam:
    betas = OptimizerConfig().betas
    return SharedAdam(
        router.parameters(), lr=RouterConfig().learning_rate, betas=(betas[0], betas[1])
    )


@pytest.mark.parametrize(("config", "axis"), CASES, ids=lambda v: v if isinstance(v, str) else "")
def test_the_planted_axis_is_cut_first(config, axis):
    """With the shipped schedule and learning rate, on a parent that is not trained meanwhile."""
    model = planting.random_parent(config)
    elastic = ElasticModel(model, config)
    axis_map = elastic.axis_map
    planting.plant_dead_half(model, axis_map, axis)
    cost = CostModel(axis_map)
    half = axis_map.full.replace(**{axis: axis_map.axes[axis].size // 2})
    ids = torch.randint(0, 64, (4, 24), generator=torch.Generator().manual_seed(1))
    elastic.requires_grad_(False)
    teacher = elastic.parent(input_ids=ids).logits.flatten(0, 1)
    kept = elastic(half, input_ids=ids).logits.flatten(0, 1)
    assert distillation_loss(teacher, kept) < 1e-6, "the planted half must be free to cut"

    choices = {
        name: (axis_map.axes[name].size, axis_map.axes[name].size // 2)
        for name in dict.fromkeys([*default_choices(axis_map), axis])
    }
    # Experts cost hardly any active parameters, so their budget is on the total.
    metric = "total" if axis == "experts" else "active"
    target = cost.count(half).metric(metric) / cost.full.metric(metric)
    router = Router(choices, 1, seed=3)
    optimizer = shipped_optimizer(router)
    for step in range(LEARNED):
        temperature = RouterConfig().annealing.at(step)
        decision = router.decide(router.one_hot(0), temperature, noise_key=(7, step))
        logits = elastic(decision.mixtures, input_ids=ids).logits.flatten(0, 1)
        loss = distillation_loss(teacher, logits)
        loss = loss + budget_loss(decision, {metric: target}, cost)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    decision = router.decide(router.one_hot(0), ASKED)
    assert decision.choice == {name: half[name] for name in choices}


# The optimiser


def moved(scale: float, optimizer_of) -> list[torch.Tensor]:
    """How far two parameters go in 5 steps down a noisy slope, sixty times as steep for one."""
    steep, flat = (torch.nn.Parameter(torch.zeros(3)) for _ in range(2))
    optimizer = optimizer_of([steep, flat])
    noise = torch.Generator().manual_seed(0)
    for _ in range(5):
        optimizer.zero_grad()
        slope = 1 + 0.1 * torch.rand(3, generator=noise)
        (scale * slope @ (60 * steep + flat)).backward()
        optimizer.step()
    return [-steep.detach(), -flat.detach()]


def test_the_optimiser_keeps_the_proportions_of_gradients_and_forgets_their_scale():
    def shared(parameters):
        return SharedAdam(parameters, lr=0.1, betas=(0.9, 0.98))

    steep, flat = moved(1.0, shared)
    assert torch.allclose(steep / flat, torch.full((3,), 60.0), rtol=1e-3)
    assert 0.3 < steep.mean() < 1.0  # five steps of up to sqrt(2) * lr
    for scale in (1e-6, 1e6):
        for one, other in zip(moved(scale, shared), (steep, flat), strict=True):
            assert torch.allclose(one, other, rtol=1e-3)
    adam = moved(1.0, lambda parameters: torch.optim.Adam(parameters, lr=0.1))
    assert torch.allclose(adam[0], adam[1], rtol=1e-3)  # what it is there to avoid


def test_the_optimiser_is_adam_where_all_gradients_are_alike():
    for make in (
        lambda p: SharedAdam([p], lr=0.01, betas=(0.9, 0.98)),
        lambda p: torch.optim.Adam([p], lr=0.01, betas=(0.9, 0.98), eps=1e-12),
    ):
        parameter = torch.nn.Parameter(torch.ones(1))
        optimizer = make(parameter)
        for step in range(20):
            optimizer.zero_grad()
            ((2 + torch.tensor(step).sin()) * parameter.square()).sum().backward()
            optimizer.step()
        if make.__code__.co_names[0] == "SharedAdam":
            ours = parameter.item()
    assert ours == pytest.approx(parameter.item(), rel=1e-5)


# The schedule


@pytest.mark.parametrize("step", [0, 28, 150, 600, 10_000, 20_000])
def test_the_temperature_is_the_papers_step_by_step(step):
    temperature = Annealing().at(step)
    assert temperature.tau == pytest.approx(max(0.05, 0.9997**step))
    assert temperature.scale == pytest.approx(1 + 9 * min(1, step / 10_000))


def test_a_run_anneals_by_its_steps_whatever_its_length(planted_llama):
    short = planted_llama.trainer("short", steps=4)
    long = planted_llama.trainer("long", steps=400)
    for trainer in (short, long):
        trainer.step = 3
        assert trainer.temperature() == Annealing().at(3)
    own = planted_llama.trainer("own", annealing=Annealing(tau_decay=0.5, scale_growth=1.0))
    own.step = 3
    assert own.temperature() == Temperature(0.125, 4.0)


# The draws of a run


def probs(decision: Decision) -> torch.Tensor:
    return torch.cat([pick.probs.detach() for pick in decision.picks])


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_share_of_hard_draws_is_the_configs(planted_llama, share):
    trainer = planted_llama.trainer("hard", hard_share=share)
    hard = 0
    for step in range(200):
        trainer.step = step
        drawn = probs(trainer.decide("small", trainer.router, 0))
        hard += bool(torch.all((drawn == 0) | (drawn == 1)))
    assert hard / 200 == pytest.approx(share, abs=0.08)


# What is fixed in the end


class CountedCost(CostModel):
    """Knows how often it was asked."""

    asked = 0

    def count(self, widths):
        self.asked += 1
        return super().count(widths)


def test_committing_asks_for_few_costs():
    """However far an untrained router is from its budgets: no descent, no search after search."""
    config = {**HYBRID, "hybrid_override_pattern": "ME*-" * 3}
    axis_map = ElasticModel(planting.random_parent(config), config).axis_map
    per_layer = {"ffn": 3, "shared_ffn": 3, "expert_ffn": 3, "ssm_heads": 3}
    grid = Grid(
        {
            "hidden": (32, 24, 16), "ffn": tuple(range(128, 63, -16)), "experts": (8, 6, 4),
            "shared_ffn": tuple(range(128, 63, -16)), "expert_ffn": (64, 48, 32),
            "ssm_heads": (8, 6, 4),
        },
        per_layer,
    )  # fmt: skip
    assert len(grid.places) == 14
    cost = CountedCost(axis_map)
    router = Router(grid, 1, seed=0)
    decision = router.decide(router.one_hot(0), ASKED)
    fixed = commit(decision, {"active": 0.7}, cost, grid)
    assert fixed.miss <= max(0.005, fixed.possible or 0) and fixed.data_free_steps
    assert cost.asked <= 30


def test_repair_is_told_layer_by_layer():
    """Moves in opposite directions do not cancel."""
    axis_map = ElasticModel(planting.random_parent(LLAMA), LLAMA).axis_map
    grid = Grid({"ffn": (128, 96, 64), "hidden": (32, 24)}, {"ffn": 2})
    cost = CostModel(axis_map)

    def pick(axis, *probs):
        return Mixture(grid.choices[axis], torch.tensor(probs))

    # The likeliest is (96, 96), which costs what (128, 64) costs, but hidden must be whole.
    picks = (pick("ffn", 0.3, 0.6, 0.1), pick("ffn", 0.1, 0.6, 0.3), pick("hidden", 0.1, 0.9))
    target = cost.count(axis_map.complete({"ffn": 96})).active
    share = {"active": target / cost.full.active}
    fixed = commit(Decision({}, picks, {}), share, cost, grid)
    assert fixed.argmax == axis_map.complete({"ffn": 96, "hidden": 24})
    assert fixed.widths == axis_map.complete({"ffn": 96}) and fixed.repair == {"hidden": 1}
    uneven = {"active": cost.count(axis_map.complete({"ffn": (128, 96)})).active
              / cost.full.active}  # fmt: skip
    fixed = commit(Decision({}, picks, {}), uneven, cost, grid)
    assert fixed.repair == {"ffn": (1, 0), "hidden": 1} and fixed.data_free_steps == 0


def test_a_choice_that_is_far_from_its_budget_was_not_the_datas():
    axis_map = ElasticModel(planting.random_parent(LLAMA), LLAMA).axis_map
    grid, cost = Grid({"ffn": tuple(range(128, 31, -8))}), CostModel(axis_map)
    sure = torch.zeros(13)
    sure[2] = 1.0  # 112

    def fixed_at(ffn: int) -> Commitment:
        counted, full = cost.count(axis_map.complete({"ffn": ffn})), cost.full
        decision = Decision({}, (Mixture(grid.choices["ffn"], sure),), {})
        return commit(decision, {"active": counted.active / full.active}, cost, grid)

    assert (fixed_at(112).widths_from, fixed_at(112).data_free_steps) == ("data", 0)
    assert (fixed_at(104).widths_from, fixed_at(104).data_free_steps) == ("data", 0)
    far = fixed_at(64)
    assert (far.widths_from, far.data_free_steps, far.repair) == ("budget", 6, {"ffn": -6})


def test_a_commitment_survives_json():
    fixed = Commitment(
        Widths({"hidden": 8, "ffn": (4, 2)}), 0.01, {"hidden": -2, "ffn": (0, 1)}, 0.001,
        Widths({"hidden": 12, "ffn": (4, 3)}), 3, "budget",
    )  # fmt: skip
    assert Commitment.from_json(json.loads(json.dumps(fixed.to_json()))) == fixed
    given = Commitment(Widths({"hidden": 8}), 0.0)
    assert Commitment.from_json(json.loads(json.dumps(given.to_json()))) == given
