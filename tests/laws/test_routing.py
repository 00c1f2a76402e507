"""Law 5: dropped experts are never selected, and closing one never raises its chance."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.nemotron_h.configuration_nemotron_h import NemotronHConfig
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHTopkRouter

from star_elastic.architectures import architecture_of
from star_elastic.models.elastic import ElasticModel
from star_elastic.models.modules import ElasticSigmoidRouter
from star_elastic.nesting.gate import Mixture
from tests.architectures import hybrids
from tests.laws.parents import examples, legal_widths, one_hot, parents, precision

TOKENS = 12


@st.composite
def routers(draw, *, bias: float = 2.0) -> tuple[NemotronHTopkRouter, ElasticSigmoidRouter, dict]:
    """transformers' router of a random config, ours with the same weights, and the config.

    Correction biases of either sign, up to about `bias`, far outrank the scores between 0 and 1.
    """
    config = draw(hybrids(moe=True))
    theirs = NemotronHTopkRouter(NemotronHConfig(**config))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    with torch.no_grad():
        theirs.weight.copy_(torch.randn(theirs.weight.shape, generator=generator))
        theirs.e_score_correction_bias.copy_(
            bias * torch.randn(theirs.num_experts, generator=generator)
        )
    ours = ElasticSigmoidRouter(theirs)
    ours.load_state_dict({**ours.state_dict(), **theirs.state_dict()})
    return theirs, ours, config


def tokens(config: dict, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, TOKENS, config["hidden_size"], generator=generator)


def chosen(router: ElasticSigmoidRouter, x_BTD: torch.Tensor, gate_E: torch.Tensor) -> torch.Tensor:
    """Which experts each token selects under a gate; (T, E) of bool."""
    router.expert_gate.copy_(gate_E)
    index_TK = router(x_BTD)[2]
    return torch.zeros(TOKENS, router.num_experts, dtype=torch.bool).scatter_(1, index_TK, True)


@given(pair=routers(), seed=st.integers(0, 2**20))
@examples(40)
@torch.no_grad()
def test_open_gates_route_as_transformers_does(pair, seed):
    theirs, ours, config = pair
    ours_out, theirs_out = ours(tokens(config, seed)), theirs(tokens(config, seed))
    assert torch.equal(ours_out[0], theirs_out[0])
    combined = [
        torch.zeros(TOKENS, ours.num_experts).scatter_(1, index, weight)
        for _, weight, index in (ours_out, theirs_out)
    ]
    assert torch.allclose(*combined, rtol=1e-6, atol=0)


@given(data=st.data(), pair=routers(), seed=st.integers(0, 2**20))
@examples(60)
@torch.no_grad()
def test_closed_experts_are_never_selected(data, pair, seed):
    _, ours, config = pair
    axis_map = architecture_of(config).axis_map(config)
    axis = axis_map.axes["experts"]
    width = data.draw(st.sampled_from(legal_widths(axis_map, "experts")))
    mixture = Mixture((axis.size, width), torch.tensor([float(width == axis.size), 1.0]))
    gate = mixture.unit_gates(axis.size, axis.num_groups).clamp(max=1)
    # The dropped experts would win every vote.
    ours.e_score_correction_bias[gate == 0] += 100.0
    picked = chosen(ours, tokens(config, seed), gate)
    assert not picked[:, gate == 0].any()
    assert picked.sum(1).eq(config["num_experts_per_tok"]).all()
    weights = ours(tokens(config, seed))[1]
    assert weights.isfinite().all() and weights.gt(0).all()


@given(data=st.data(), pair=routers(), seed=st.integers(0, 2**20))
@examples(60)
@torch.no_grad()
def test_closing_an_expert_never_raises_its_chance(data, pair, seed):
    _, ours, config = pair
    size = ours.num_experts
    gates = data.draw(st.lists(st.floats(0.05, 1), min_size=size, max_size=size))
    expert = data.draw(st.integers(0, size - 1))
    factor = data.draw(st.floats(0.05, 0.95))
    gate = torch.tensor(gates)
    before = chosen(ours, tokens(config, seed), gate)
    gate[expert] *= factor
    after = chosen(ours, tokens(config, seed), gate)
    assert not (after & ~before)[:, expert].any()


class Multiplied(ElasticSigmoidRouter):
    """The wrong turn that the logarithm avoids: c * (sigma + bias) rises as c falls, where the sum
    is negative."""

    @torch.no_grad()
    def _select(self, scores_TE: torch.Tensor) -> torch.Tensor:
        return ((scores_TE + self.e_score_correction_bias) * self.expert_gate).topk(self.top_k)[1]


@torch.no_grad()
def test_multiplying_the_score_would_raise_a_negative_one():
    """Two experts of equal scores and negative sums: half closed, the worse of them wins."""
    config = {"n_routed_experts": 2, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1}
    theirs = NemotronHTopkRouter(NemotronHConfig(hidden_size=4, **config))
    theirs.weight.zero_()
    theirs.e_score_correction_bias.copy_(torch.tensor([-2.0, -1.8]))
    x_BTD, half_closed = torch.ones(1, TOKENS, 4), torch.tensor([0.5, 1.0])
    picked = {}
    for kind in (ElasticSigmoidRouter, Multiplied):
        router = kind(theirs)
        router.load_state_dict({**router.state_dict(), **theirs.state_dict()})
        for gate in (torch.ones(2), half_closed):
            picked[kind, gate[0].item()] = chosen(router, x_BTD, gate)[:, 0].any().item()
    assert picked == {
        (ElasticSigmoidRouter, 1.0): False, (ElasticSigmoidRouter, 0.5): False,
        (Multiplied, 1.0): False, (Multiplied, 0.5): True,
    }  # fmt: skip


@given(data=st.data())
@examples(6)
def test_a_model_never_uses_the_experts_of_a_narrower_size(data):
    """In the whole gated model, at full parent width, with biases that favour what is dropped."""
    parent = data.draw(parents("moe"))
    axis = parent.axis_map.axes["experts"]
    width = legal_widths(parent.axis_map, "experts")[0]
    elastic = ElasticModel(parent.model, parent.config).eval()
    mixtures = one_hot({"experts": (axis.size, width)}, {"experts": width})
    gate = mixtures["experts"].unit_gates(axis.size, axis.num_groups)
    picked = []
    with torch.no_grad(), precision(torch.float64):
        for moe in parent.axis_map.moe_layers:
            parent.state[f"{moe.router_path}.e_score_correction_bias"][gate == 0] += 100.0
            block = elastic.blocks[moe.layer]
            skeleton = block.skeleton(parent.axis_map.full, gated=True)
            (local,) = block.rows.moe
            skeleton.get_submodule(local.router_path).register_forward_hook(
                lambda module, args, result: picked.append(result[2])
            )
        elastic(mixtures, slice_at=parent.axis_map.full, input_ids=parent.ids)
    assert len(picked) == len(parent.axis_map.moe_layers)
    for index_TK in picked:
        assert gate[index_TK].eq(1).all()


def test_lowest_width_keeps_enough_experts_in_the_selected_groups():
    config = {
        "model_type": "nemotron_h",
        "hybrid_override_pattern": "E",
        "n_routed_experts": 32,
        "n_group": 4,
        "topk_group": 2,
        "num_experts_per_tok": 6,
    }
    assert architecture_of(config).axis_map(config).axes["experts"].minimum == 12
    config["num_experts_per_tok"] = 1
    assert architecture_of(config).axis_map(config).axes["experts"].minimum == 8
