"""The training loop: every step distils the frozen parent into submodels of the shared weights.

First the router learns: each size runs as a mixture of widths (`nesting.gate`), inside a slice as
wide as its widest choice with weight. At `router.commit_at` of the steps the widths are fixed
(argmax, moved at most one grid step per axis onto the budget) and from then on every size trains
as the plain slice that will be cut out, at the cost of that slice. Committing before the end is a
deliberate difference from the papers: the sizes that leave are then sizes that were trained.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import PreTrainedModel

from star_elastic.cost import CostModel
from star_elastic.errors import CheckpointError
from star_elastic.nesting.submodel import ElasticModel
from star_elastic.router.budget import Commitment, budget_loss, settle
from star_elastic.router.router import Decision, Router, Temperature, seed_for
from star_elastic.train.config import RunConfig
from star_elastic.train.data import Batch, BatchOrder
from star_elastic.train.losses import distillation_loss
from star_elastic.train.workers import Learner, Workers


@dataclass(slots=True)
class StepReport:
    """What one step did. `kd` in nats per token and `budget` (router loss) by size; `expected`
    widths by size while the router learns; `num_tokens` real tokens of the batch."""

    step: int
    num_tokens: int
    learning_rate: float
    kd: dict[str, float] = field(default_factory=dict)
    budget: dict[str, float] = field(default_factory=dict)
    expected: dict[str, dict[str, float]] = field(default_factory=dict)


class Trainer:
    """One nested distillation run over a sorted parent.

    `student.parent` holds the shared weights that are trained; `teacher` the frozen original.
    The random draws of a step depend only on (seed, step), never on what ran before.
    """

    def __init__(
        self,
        config: RunConfig,
        student: ElasticModel,
        teacher: PreTrainedModel,
        router: Router,
        batches: BatchOrder,
    ):
        self.config = config
        self.student = student.train()
        self.teacher = teacher.eval().requires_grad_(False)
        self.router = router
        self.batches = batches
        self.workers = Workers(Learner(self.student, router), config.schedule.workers)
        self.cost = CostModel(student.axis_map, config.workload)
        self.names = list(config.sizes)
        self.step = 0
        self.committed: dict[str, Commitment] = {}
        options = config.optimizer
        self.optimizer = torch.optim.AdamW(
            [
                {"params": list(student.parent.parameters()), "lr": options.learning_rate},
                {"params": list(router.parameters()), "lr": config.router.learning_rate},
            ],
            betas=(options.betas[0], options.betas[1]),
            weight_decay=options.weight_decay,
            fused=True,
        )

    @property
    def commit_step(self) -> int:
        """The first step that trains plain slices."""
        return max(1, round(self.config.router.commit_at * self.config.schedule.steps))

    def temperature(self) -> Temperature:
        """Router temperature of the current step."""
        return self.config.router.annealing.at(self.step / self.commit_step)

    def learning_rate(self) -> float:
        """Learning rate of the shared weights at the current step."""
        options, steps = self.config.optimizer, self.config.schedule.steps
        warm = min(1.0, (self.step + 1) / max(options.warmup_steps, 1))
        done = self.step / steps
        low, high = options.final_learning_rate, options.learning_rate
        return warm * (low + (high - low) * 0.5 * (1 + math.cos(math.pi * done)))

    def sizes_of_step(self) -> list[tuple[str, float]]:
        """The sizes that train in this step, with the weights of their losses (sum 1)."""
        weights = self.config.schedule.size_weights or (1.0,) * len(self.names)
        if self.config.schedule.sizes_per_step == "one":
            draw = random.Random(seed_for(self.config.seed, self.step, "size"))
            return [(draw.choices(self.names, weights)[0], 1.0)]
        total = sum(weights)
        return [(name, w / total) for name, w in zip(self.names, weights, strict=True)]

    def decide(self, name: str, router: Router) -> Decision:
        """A router's noisy decision for a size in this step."""
        key = (self.config.seed, self.step, 0, name)
        hard = random.Random(seed_for(*key, "hard")).random() < self.config.router.hard_share
        budget = router.one_hot(self.names.index(name))
        return router.decide(budget, self.temperature(), noise_key=key, hard=hard)

    def commit(self) -> dict[str, Commitment]:
        """Fixes the widths of every size (called once, at `commit_step`)."""
        for number, name in enumerate(self.names):
            budget = self.router.one_hot(number)
            self.committed[name] = settle(self.router, budget, self.config.sizes[name], self.cost)
        self.router.requires_grad_(False)
        return self.committed

    def train_step(self) -> StepReport:
        """One optimiser step over the sizes of this step, all on the same tokens.

        Raises CheckpointError if a loss is not finite, before any weight changes.
        """
        if self.step >= self.commit_step and not self.committed:
            self.commit()
        limit = 0 if self.committed else self.config.router.batch_size
        batch = self.batches.batch(self.step, limit)
        rate = self.learning_rate()
        self.optimizer.param_groups[0]["lr"] = rate
        report = StepReport(self.step, batch.num_tokens, rate)
        self.optimizer.zero_grad(set_to_none=True)
        counted = batch.num_predicted
        if not counted:
            raise CheckpointError(
                f"no row of step {self.step} has a token to learn from; raise data.context or "
                "remove rows whose prompts fill it"
            )
        shards = [s for s in batch.split(len(self.workers.learners)) if s.num_predicted]
        parts = [(shard, shard.num_predicted / counted) for shard in shards]
        losses = self.workers.map(self._learn, parts)
        for name, _ in self.sizes_of_step():
            report.kd[name] = math.fsum(loss[name] for loss in losses)
            if not math.isfinite(report.kd[name]):
                raise CheckpointError(
                    f"the loss of size {name!r} is {report.kd[name]} at step {self.step}; lower "
                    "optimizer.learning_rate and resume, the last saved state is intact"
                )
            if not self.committed:
                self._report_router(name, report)
        clip = self.config.optimizer.clip_norm
        nn.utils.clip_grad_norm_(self.student.parent.parameters(), clip)
        nn.utils.clip_grad_norm_(self.router.parameters(), clip)
        self.optimizer.step()
        self.step += 1
        return report

    def _learn(self, learner: Learner, part: tuple[Batch, float]) -> dict[str, float]:
        """Adds the gradients of a part of the step's rows, which has `share` of its counted
        tokens; returns the part's share of the step's KD per size."""
        batch, share = part
        with torch.no_grad(), self._autocast():
            teacher = _counted_logits(self.teacher(**_inputs(batch)).logits, batch)
        kd = {}
        for name, weight in self.sizes_of_step():
            if self.committed:
                size, pull = self.committed[name].widths, 0.0
            else:
                size = self.decide(name, learner.router).mixtures
                pull = budget_loss(size, self.config.sizes[name], self.cost)
            with self._autocast():
                logits = learner.student(size, **_inputs(batch)).logits
            loss = distillation_loss(teacher, _counted_logits(logits, batch))
            kd[name] = loss.item() * share
            loss = batch.weight * loss + self.config.router.weight * pull
            (loss * (weight * share)).backward()
        return kd

    @torch.no_grad()
    def _report_router(self, name: str, report: StepReport) -> None:
        mixtures = self.decide(name, self.router).mixtures
        report.budget[name] = budget_loss(mixtures, self.config.sizes[name], self.cost).item()
        report.expected[name] = {
            axis: round(mixture.expected().item(), 1) for axis, mixture in mixtures.items()
        }

    def _autocast(self) -> AbstractContextManager:
        if not self.config.schedule.autocast:
            return nullcontext()
        device = next(self.student.parameters()).device.type
        return torch.autocast(device, torch.bfloat16)


def _inputs(batch: Batch) -> Mapping[str, torch.Tensor | bool]:
    """Right padding never reaches a real token in a causal model, so no mask is passed (it would
    only slow attention down)."""
    return {"input_ids": batch.input_ids, "use_cache": False}


def _counted_logits(logits_BTV: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Logits (N, V) of the positions whose next token counts."""
    return logits_BTV[batch.predicts]
