"""A parent's dropout acts on no student: also in training a size is a function of its input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from star_elastic.models.skeleton import require_deterministic
from star_elastic.models.submodel import build_submodel
from tests.tiny_trainer import LLAMA, MOE, SMALL, make_config, make_model, make_trainer

PARENTS: dict[str, dict[str, Any]] = {
    "llama": {"attention_dropout": 0.5},
    "moe": {"attention_dropout": 0.5, "hidden_dropout": 0.3},
}
PHASES = {"committed": True, "router": False}


@pytest.mark.parametrize("kind", PARENTS)
@pytest.mark.parametrize("phase", PHASES)
def test_two_equal_steps_have_equal_losses_and_nothing_is_drawn(tmp_path, kind, phase):
    """Whatever the global generator says, which is not asked. At full width the loss is exactly 0
    until training changes the weights: law 9 under dropout."""
    reports = []
    for seed in (1, 2):
        run = make_config(tmp_path)
        trainer = make_trainer(kind, run, committed=PHASES[phase], **PARENTS[kind])
        assert trainer.student.training
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        reports.append(trainer.train_step())
        assert torch.equal(torch.get_rng_state(), before)
        parts: list[Any] = [trainer.student, *trainer.student.blocks]
        for part in parts:
            assert part.skeletons.kept
            for skeleton in part.skeletons.kept.values():
                require_deterministic(skeleton)
    assert reports[0].kd == reports[1].kd
    assert reports[0].kd["small"] > 0
    if phase == "committed":
        assert reports[0].kd["large"] == 0


@pytest.mark.parametrize(("kind", "config"), [("llama", LLAMA), ("moe", MOE)])
def test_sizes_keep_the_dropout_of_their_parent(kind, config):
    """What leaves is the parent's config: who trains a size further finds what the parent had."""
    config = {**config, **PARENTS[kind]}
    size = build_submodel(make_model(config), config, SMALL[kind])
    for name, value in PARENTS[kind].items():
        assert getattr(size.config, name) == value


@pytest.mark.parametrize("name", ["attention_dropout", "resid_pdrop", "router_jitter_noise"])
def test_a_module_that_draws_is_refused(name):
    """A table for an architecture that draws otherwise must say so, or nothing is built."""
    module = nn.Linear(2, 2)
    require_deterministic(nn.Sequential(module, nn.Dropout(0.0)))
    with pytest.raises(AssertionError, match=r"1 \(Dropout\) draws at random by its \['p'\]"):
        require_deterministic(nn.Sequential(module, nn.Dropout(0.1)))
    setattr(module, name, 0.1)
    with pytest.raises(AssertionError, match=rf"\(Linear\) draws at random by its \['{name}'\]"):
        require_deterministic(module)
