"""What a training step means, against plain code: loss, clipping, optimiser, schedule; and that
`[engine]` does what it says, beside changing nothing."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from star_elastic.router.router import Annealing
from star_elastic.train.config import MICRO_TOKENS, EngineConfig, StageConfig
from star_elastic.train.loop import Trainer
from star_elastic.train.losses import distillation_loss
from tests.tiny_trainer import SIZES, make_config, make_trainer

KINDS = ("moe", "llama")


def gradients(trainer: Trainer) -> dict[str, torch.Tensor]:
    """The gradients that the last step left, by name."""
    return {
        name: parameter.grad.clone()
        for name, parameter in trainer._parameters()
        if parameter.grad is not None
    }


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer._parameters() if p.requires_grad}


def shaken(trainer: Trainer) -> Trainer:
    """The trainer with a student that has left its parent, so that every size has a loss."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in trainer.student.parent.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return trainer


def norm(found: dict[str, torch.Tensor], part: str) -> float:
    """The common norm of the gradients of "student" or "router"."""
    return math.sqrt(sum(float(g.square().sum()) for n, g in found.items() if n.startswith(part)))


def assert_close(found, expected, *, rtol: float = 1e-4) -> None:
    """Equal by name, relative to the largest value of each tensor."""
    assert found.keys() == expected.keys()
    for name, value in found.items():
        scale = expected[name].abs().max().clamp(min=1e-12)
        assert (value - expected[name]).abs().max() <= rtol * scale, name


NO_CLIP = {"clip_norm": 1e9}

# The loss


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_the_weighted_divergences(tmp_path, kind):
    """Forward KL from the parent per counted token, of every size by its weight, from full logits
    and autograd."""
    run = make_config(tmp_path, stage={"size_weights": (3.0, 1.0)}, optimizer=NO_CLIP)
    plain = shaken(make_trainer(kind, run))
    batch, loss, expected = plain.reader.read(plain.curriculum.at(0)).batch, torch.zeros(()), {}
    teacher = plain.workers.learners[0].teacher
    assert teacher is not None
    with torch.no_grad():
        known = teacher(teacher.axis_map.full, **batch.inputs).logits[batch.predicts]
    for (name, fixed), weight in zip(plain.committed.items(), (0.75, 0.25), strict=True):
        logits = plain.student(fixed.widths, **batch.inputs).logits[batch.predicts]
        divergence = distillation_loss(known, logits)
        expected[name] = divergence.item()
        loss = loss + weight * divergence
    loss.backward()

    trainer = shaken(make_trainer(kind, run))
    report = trainer.train_step()
    assert report.kd == pytest.approx(expected, rel=1e-4)
    assert report.num_tokens == batch.num_tokens
    assert report.num_distilled == len(SIZES) * batch.num_predicted
    assert_close(gradients(trainer), gradients(plain), rtol=1e-3)


def test_the_router_learns_from_the_divergence_and_from_its_budget_by_weight(tmp_path):
    """With no weight on the budget the router still has a gradient; weights add up linearly."""
    found = []
    for weight in (0.0, 1.0, 3.0):
        run = make_config(tmp_path, router={"weight": weight}, optimizer=NO_CLIP)
        trainer = shaken(make_trainer("moe", run, committed=False))
        trainer.train_step()
        found.append({n: g for n, g in gradients(trainer).items() if n.startswith("router")})
    kd, one, three = found
    assert norm(kd, "router") > 1e-6
    pull = {name: one[name] - kd[name] for name in kd}
    assert norm(pull, "router") > 1e-6
    assert_close(three, {name: kd[name] + 3 * pull[name] for name in kd}, rtol=1e-3)


def test_sizes_weigh_in_the_router_as_well(tmp_path):
    """What a budget teaches the router lies in its own column of the first layer."""
    norms = []
    for share in (0.25, 0.75):
        run = make_config(tmp_path, stage={"size_weights": (1 - share, share)}, optimizer=NO_CLIP)
        trainer = make_trainer("moe", run, committed=False)
        trainer.train_step()
        first = trainer.router.get_parameter("nets.hidden.0.weight").grad
        assert first is not None
        norms.append(first.norm(dim=0))
    assert torch.allclose(norms[1] / norms[0], torch.tensor([1 / 3, 3.0]), rtol=1e-3)


def asked(trainer: Trainer, axis: str = "hidden") -> list[torch.Tensor]:
    """The mixtures of an axis that the student is asked for in one step: sizes in their order, for
    every group of windows."""
    found: list[torch.Tensor] = []

    def hook(module, inputs):
        found.append(inputs[1].mixtures[axis].probs.detach().clone())

    block: Any = trainer.student.blocks[0]
    handle = block.register_forward_pre_hook(hook)
    trainer.train_step()
    handle.remove()
    return found


def test_the_student_runs_the_routers_noisy_mixtures(tmp_path):
    """Other noise for every size, group and step; the same for the same run. Here the noise alone
    makes a difference: the router tells no sizes apart and is not annealed."""
    annealing = Annealing(tau_start=1.0, tau_end=1.0, scale_start=1.0, scale_end=1.0)
    still = {"learning_rate": 1e-12, "hard_share": 0.0, "annealing": annealing}
    run = make_config(tmp_path, stage={"groups": 2}, router=still)
    trainer, again = (make_trainer("moe", run, committed=False) for _ in range(2))
    for router in (trainer.router, again.router):
        for parameter in router.parameters():
            nn.init.zeros_(parameter)
    steps = [asked(trainer) for _ in range(2)]
    assert [len(step) for step in steps] == [2 * len(SIZES)] * 2
    probs = torch.stack([own for step in steps for own in step])
    assert len(probs.unique(dim=0)) == len(probs)
    assert ((probs > 0) & (probs < 1)).all()
    assert all(torch.equal(a, b) for a, b in zip(asked(again), steps[0], strict=True))


def test_a_share_of_the_mixtures_is_hard(tmp_path):
    run = make_config(tmp_path, router={"hard_share": 1.0})
    for probs in asked(make_trainer("moe", run, committed=False)):
        assert sorted(probs.round(decimals=6).tolist()) == [0, 1]


def test_mixtures_are_as_sharp_as_the_annealing_says(tmp_path):
    """The same logits and noise at two temperatures."""
    found = []
    for tau in (2.0, 1.0):
        annealing = Annealing(tau_start=tau, tau_end=tau, scale_start=1.0, scale_end=1.0)
        router = {"hard_share": 0.0, "annealing": annealing}
        trainer = make_trainer("moe", make_config(tmp_path, router=router), committed=False)
        found.append(torch.stack(asked(trainer)).double())
    soft, sharp = (probs[:, 0].logit() for probs in found)
    assert torch.allclose(sharp, 2 * soft, rtol=1e-3)


# Clipping


@pytest.mark.parametrize("committed", [True, False])
def test_gradients_are_clipped_by_their_common_norm(tmp_path, committed):
    """Weights and router each by their own; what is below the limit stays as it is."""
    free, tight = (
        shaken(make_trainer("moe", make_config(tmp_path, optimizer=o), committed=committed))
        for o in (NO_CLIP, {"clip_norm": 1e-3})
    )
    free.train_step()
    tight.train_step()
    whole, clipped = gradients(free), gradients(tight)
    for part in ("student",) if committed else ("student", "router"):
        size = norm(whole, part)
        assert size > 2e-3
        assert norm(clipped, part) == pytest.approx(1e-3, rel=1e-3)
        own = {n: g for n, g in clipped.items() if n.startswith(part)}
        assert_close(own, {n: whole[n] * (1e-3 / size) for n in own}, rtol=1e-3)


def test_it_is_the_clipped_gradients_that_the_optimiser_sees(tmp_path):
    """AdamW divides by the gradients' size, up to its epsilon, far below which these are cut."""
    moved = []
    for limit in (1e9, 1e-12):
        trainer = shaken(
            make_trainer("llama", make_config(tmp_path, optimizer={"clip_norm": limit}))
        )
        before = weights(trainer)
        trainer.train_step()
        after = weights(trainer)
        moved.append(max((after[n] - before[n]).abs().max().item() for n in before))
    rate = trainer.config.stages[0].learning_rate
    assert moved[0] == pytest.approx(rate, rel=0.1)
    assert moved[1] < 0.01 * rate


# Optimiser and schedule


class PlainAdamW:
    """AdamW (arXiv 1711.05101) of one vector in float64; `shared`: with one second moment for all
    of it, and no epsilon."""

    def __init__(self, value, betas, decay, *, shared=False):
        self.value, self.betas, self.decay = value.double(), betas, decay
        self.first, self.second, self.steps = (torch.zeros_like(self.value),) * 2 + (0,)
        self.shared = shared

    def step(self, gradient: torch.Tensor, rate: float) -> None:
        self.steps += 1
        gradient, (b1, b2) = gradient.double(), self.betas
        self.first = b1 * self.first + (1 - b1) * gradient
        self.second = b2 * self.second + (1 - b2) * gradient.square()
        first = self.first / (1 - b1**self.steps)
        second = self.second / (1 - b2**self.steps)
        size = second.mean().sqrt() if self.shared else second.sqrt() + 1e-8
        self.value = self.value * (1 - rate * self.decay)
        self.value -= rate * first / size


def in_one(found: dict[str, torch.Tensor], part: str) -> torch.Tensor:
    """Everything of "student" or "router" as one vector."""
    return torch.cat([value.flatten() for name, value in found.items() if name.startswith(part)])


def test_weights_and_router_follow_their_optimisers_at_the_rates_of_the_stages(tmp_path):
    """Warm-up and cosine in every stage, betas, decay: none of them the default. The router's Adam
    has one second moment and no decay."""
    rates = {"learning_rate": 3e-3, "final_learning_rate": 1e-3, "warmup_steps": 3}
    later = {"learning_rate": 2e-3, "final_learning_rate": 0.0, "warmup_steps": 2}
    shape = {"tokens": 5 * 384, "context": 96, "batch_size": 4}
    run = make_config(
        tmp_path,
        optimizer={"betas": (0.6, 0.8), "weight_decay": 0.3, "clip_norm": 0.05},
        router={"learning_rate": 5e-3, "commit_at": 1.0},
        stages=(
            StageConfig(**shape, **rates),
            StageConfig(**{**shape, "tokens": 3 * 384}, **later),
        ),
    )
    trainer = shaken(make_trainer("llama", run, committed=False))
    start = weights(trainer)
    plain = {
        "student": PlainAdamW(in_one(start, "student"), (0.6, 0.8), decay=0.3),
        "router": PlainAdamW(in_one(start, "router"), (0.6, 0.8), decay=0.0, shared=True),
    }
    for step in range(8):
        trainer.train_step()
        place, length, peak, end = (step, 5, 3e-3, 1e-3) if step < 5 else (step - 5, 3, 2e-3, 0.0)
        rate = end + (peak - end) * (1 + math.cos(math.pi * place / length)) / 2
        rate *= min(1, (place + 1) / (3 if step < 5 else 2))
        found = gradients(trainer)
        plain["student"].step(in_one(found, "student"), rate)
        plain["router"].step(in_one(found, "router"), 5e-3)
    after = weights(trainer)
    for part, reference in plain.items():
        moved = (reference.value - in_one(start, part)).abs().max()
        assert moved > 1e-3
        assert (in_one(after, part) - reference.value).abs().max() < 1e-3 * moved, part


# How a step is computed


@contextmanager
def watched(trainer: Trainer) -> Iterator[dict[str, list[tuple[int, int, int]]]]:
    """Windows, tokens of each and thread of every forward of the first block, by model."""
    calls: dict[str, list[tuple[int, int, int]]] = {"student": [], "teacher": []}

    def remember(name: str):
        def hook(module, inputs):
            calls[name].append((*inputs[0].shape[:2], threading.get_ident()))

        return hook

    handles = []
    for learner in trainer.workers.learners:
        for name in calls:
            block = getattr(learner, name).blocks[0]
            handles.append(block.register_forward_pre_hook(remember(name)))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize(("micro_batch", "parts"), [(0, [4]), (1, [1] * 4), (3, [2, 2])])
@pytest.mark.parametrize("committed", [True, False])
def test_micro_batches_are_as_large_as_asked_for(tmp_path, committed, micro_batch, parts):
    """And change no gradient."""
    whole = shaken(make_trainer("moe", make_config(tmp_path), committed=committed))
    whole.train_step()
    run = make_config(tmp_path, engine={"micro_batch": micro_batch})
    trainer = shaken(make_trainer("moe", run, committed=committed))
    with watched(trainer) as calls:
        trainer.train_step()
    assert [windows for windows, *_ in calls["teacher"]] == parts
    assert [windows for windows, *_ in calls["student"]] == [p for p in parts for _ in SIZES]
    assert_close(gradients(trainer), gradients(whole), rtol=1e-3)


def test_by_default_a_forward_has_a_bounded_number_of_tokens(tmp_path):
    """33 windows of 512 tokens do not fit into one."""
    row = json.dumps({"text": "copy 4821 to the next line and say so. " * 12})
    (tmp_path / "rows.jsonl").write_text(f"{row}\n" * 64)
    shape = {"context": 512, "batch_size": 33, "tokens": 33 * 512}
    run = make_config(tmp_path, stage=shape)
    assert run.engine.micro_batch == 0
    trainer = make_trainer("llama", run, num_hidden_layers=1)
    with watched(trainer) as calls:
        trainer.train_step()
    for of_model, times in ((calls["teacher"], 1), (calls["student"], len(SIZES))):
        assert [windows for windows, *_ in of_model] == [w for w in (16, 17) for _ in range(times)]
        assert all(windows * tokens <= MICRO_TOKENS for windows, tokens, _ in of_model)


@pytest.mark.parametrize(("context", "windows"), [(96, 170), (8192, 2), (16384, 1), (49152, 1)])
def test_the_papers_windows_run_one_or_two_at_a_time(context, windows):
    assert EngineConfig().windows_at_once(context) == windows
    assert EngineConfig(micro_batch=7).windows_at_once(context) == 7


def kept_bytes(trainer: Trainer) -> int:
    """Bytes that one step's forwards keep for their backwards, parameters aside."""
    own = {p.untyped_storage().data_ptr() for p in trainer.student.parent.parameters()}
    kept = 0

    def pack(value: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        if value.untyped_storage().data_ptr() not in own:
            kept += value.numel() * value.element_size()
        return value

    with saved_tensors_hooks(pack, lambda value: value):
        trainer.train_step()
    return kept


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("committed", [True, False])
def test_recomputing_keeps_few_activations(tmp_path, kind, committed):
    """And gives the same gradients."""
    kept, found = [], []
    for recompute in (False, True):
        run = make_config(tmp_path, engine={"recompute": recompute})
        trainer = shaken(make_trainer(kind, run, committed=committed))
        kept.append(kept_bytes(trainer))
        found.append(gradients(trainer))
    assert kept[1] < 0.25 * kept[0]
    assert_close(found[1], found[0], rtol=1e-5)


@pytest.mark.parametrize("committed", [True, False])
def test_workers_are_threads_that_share_the_windows(tmp_path, committed):
    """And change no gradient."""
    whole = shaken(make_trainer("moe", make_config(tmp_path), committed=committed))
    whole.train_step()
    trainer = shaken(
        make_trainer("moe", make_config(tmp_path, engine={"workers": 2}), committed=committed)
    )
    with watched(trainer) as calls:
        trainer.train_step()
    for of_model, times in ((calls["teacher"], 1), (calls["student"], len(SIZES))):
        by_thread: dict[int, list[int]] = {}
        for windows, _, thread in of_model:
            by_thread.setdefault(thread, []).append(windows)
        assert list(by_thread.values()) == [[2] * times] * 2
        assert threading.get_ident() not in by_thread
    assert_close(gradients(trainer), gradients(whole), rtol=1e-3)
