"""The training loop: every step distils the frozen parent into submodels of the shared weights.

First the router learns: each size runs as a mixture of widths (`nesting.gate`), inside a slice as
wide as its widest choice with weight. At `router.commit_at` of the steps the widths are fixed
(argmax, moved onto the budget by as few grid steps as do) and from then on every size trains
as the plain slice that will be cut out, at the cost of that slice. Committing before the end is a
deliberate difference from the papers: the sizes that leave are then sizes that were trained.

A step's windows fall into groups. The sizes of a group, the router's noise in it and its windows
depend on (seed, step, group) alone: not on how many windows a micro-batch, a thread or a rank takes
at a time. The loss is normalised by the counted tokens of the whole step, so that none of these
changes the gradient.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from star_elastic.cost.count import CostModel
from star_elastic.data.sources import Source
from star_elastic.errors import CheckpointError, not_finite
from star_elastic.models.elastic import ElasticModel
from star_elastic.nesting.gate import expected_widths
from star_elastic.progress import Progress, Silent
from star_elastic.router.budget import Budgets, budget_loss
from star_elastic.router.commit import ASKED, Commitment, commit, origin_line
from star_elastic.router.optimizer import SharedAdam
from star_elastic.router.router import Decision, Router, Temperature, seed_for
from star_elastic.train.config import RunConfig
from star_elastic.train.distributed import World, multiplies_bf16
from star_elastic.train.losses import linear_cross_entropy, linear_kl
from star_elastic.train.reader import WindowReader
from star_elastic.train.stages import Curriculum
from star_elastic.train.windows import PackedBatch
from star_elastic.train.workers import Learner, Workers


@dataclass(slots=True)
class StepReport:
    """What one step did. `kd` in nats per token (where the task is the objective, cross-entropy);
    while the router learns, `budget` (its loss) and `expected` widths without noise (the mean over
    layers that decide for themselves); all by size; `num_tokens` real tokens of the step's windows,
    `num_distilled` summed over the sizes. In this stage so far: `rows_cut` to the context,
    `rows_dropped` because nothing in them counts, `rows_skipped` because they cannot be read."""

    step: int
    stage: int
    num_tokens: int
    num_distilled: int
    learning_rate: float
    kd: dict[str, float] = field(default_factory=dict)
    budget: dict[str, float] = field(default_factory=dict)
    expected: dict[str, dict[str, float]] = field(default_factory=dict)
    rows_cut: int = 0
    rows_dropped: int = 0
    rows_skipped: int = 0


UNSTABLE = (
    "lower learning_rate in the stage or the router and go on, with --resume if there is a saved "
    "state: the last one is intact"
)
Job = tuple[int, PackedBatch]
"""Windows of one group: the group's number, and the windows."""


class Trainer:
    """One nested distillation run over a sorted parent.

    `student.parent` holds the shared weights that are trained; `teacher` the frozen original, None
    where the task is the objective.
    `budgets` are the sizes' budgets as fractions of the parent's cost. In a world of many ranks,
    student and teacher are sharded already, and every rank calls the same methods.
    """

    def __init__(
        self,
        config: RunConfig,
        student: ElasticModel,
        teacher: ElasticModel | None,
        router: Router,
        sources: Sequence[Source],
        budgets: Mapping[str, Budgets],
        cost: CostModel,
        world: World | None = None,
        progress: Progress | None = None,
    ):
        self.config = config
        self.progress = progress or Silent()
        self.world = world or World()
        self.student = student.train()
        self.router = router
        self.sources = sources
        self.budgets = budgets
        self.cost = cost
        self.curriculum = Curriculum(config.stages)
        self.reader = WindowReader(config, sources, self.world)
        if teacher is not None:
            teacher.eval().requires_grad_(False)
        self.workers = Workers(Learner(self.student, router, teacher), config.engine.workers)
        self.names = list(config.sizes)
        self.step = 0
        self.tokens = 0
        self.committed: dict[str, Commitment] = {}
        self.is_sound = True
        """Whether this and all other ranks have the weights of the last step, and these are worth
        going on from: what goes wrong then can be mended after the state is saved."""
        options = config.optimizer
        betas = (options.betas[0], options.betas[1])
        self.optimizer = torch.optim.AdamW(
            student.parent.parameters(),
            lr=config.stages[0].learning_rate,
            betas=betas,
            weight_decay=options.weight_decay,
            fused=True,
        )
        self.router_optimizer = SharedAdam(
            router.parameters(), lr=config.router.learning_rate, betas=betas
        )

    @property
    def commit_step(self) -> int:
        """The first step that trains plain slices."""
        return self.config.router.num_steps(self.curriculum.num_steps)

    def temperature(self) -> Temperature:
        """Router temperature of the current step."""
        return self.config.router.annealing.at(self.step)

    def _decision(self, name: str, temperature: Temperature) -> Decision:
        """The router's decision for a size, without noise."""
        return self.router.decide(self.router.one_hot(self.names.index(name)), temperature)

    def decide(self, name: str, router: Router, group: int) -> Decision:
        """A router's noisy decision for a size in a group of this step's windows."""
        key = (self.config.seed, self.step, group, name)
        hard = random.Random(seed_for(*key, "hard")).random() < self.config.router.hard_share
        budget = router.one_hot(self.names.index(name))
        return router.decide(budget, self.temperature(), noise_key=key, hard=hard)

    def commit(self) -> None:
        """Fixes the widths of every size (called once, at `commit_step`), and says where the budget
        has chosen them. The first rank searches for all. Raises BudgetError, on all ranks, if a
        cost cannot be counted."""
        grid = self.router.grid
        # One rank's answer for all: rounding that differs between machines could tip a search.
        self.committed = self.world.from_first(lambda: {
            name: commit(self._decision(name, ASKED), self.budgets[name], self.cost, grid)
            for name in self.names
        })  # fmt: skip
        self.router.requires_grad_(False)
        for name, fixed in self.committed.items():
            if line := origin_line(name, fixed, self.cost.axis_map.full, self.step):
                self.progress.say(line)

    def train_step(self) -> StepReport:
        """One optimiser step over the sizes of this step.

        Raises CheckpointError for rows that cannot be read (on all ranks, whichever reads them) and
        for a loss or gradient that is not finite, BudgetError at commit: all of them before any
        weight changes. `is_sound` tells whether the state of the last step can then be saved.
        """
        if self.step >= self.commit_step and not self.committed:
            self.commit()
        position = self.curriculum.at(self.step)
        read = self.reader.read(position)
        if not read.num_predicted:
            raise CheckpointError(
                f"no window of step {self.step} has a token to learn from; start another run in "
                "another directory, with a longer context or without rows whose prompts fill it"
            )
        self.is_sound = self.world.size == 1  # of many, one may fail alone from here on
        rate = self.curriculum.learning_rate(self.step)
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        self.router_optimizer.zero_grad(set_to_none=True)
        jobs = self._jobs(read.batch, self.config.stages[position.stage].groups)
        results = self.workers.map(
            lambda learner, own: self._learn(learner, own, read.num_predicted), jobs
        )
        report = StepReport(self.step, position.stage, read.num_tokens, 0, rate, **read.rows)
        self._collect(report, results)
        if not self.committed:
            self._report_router(report)
        self.world.average_gradients(self.router)
        self._clip("the weights", self.student.parent)
        self._clip("the router", self.router)
        self.is_sound = False
        self.optimizer.step()
        self.router_optimizer.step()
        if not self.committed:  # a decision that is not finite would be found a step too late
            for name in self.names:
                self._decision(name, self.temperature())
        self.is_sound = True
        self.step += 1
        self.tokens += read.num_tokens
        self.reader.finish()
        return report

    def _clip(self, name: str, module: nn.Module) -> None:
        """Clips the gradients of all ranks by their common norm, and checks them."""
        norm: Any = nn.utils.clip_grad_norm_(module.parameters(), self.config.optimizer.clip_norm)
        norm = getattr(norm, "full_tensor", lambda: norm)()
        if not math.isfinite(norm):
            self.is_sound = False
            raise CheckpointError(
                f"the gradients of {name} are {float(norm)} at step {self.step}; {UNSTABLE}"
            )

    def _jobs(self, batch: PackedBatch, num_groups: int) -> list[list[Job]]:
        """Every worker's windows of every group, in micro-batches; of workers that have any."""
        size = self.config.engine.windows_at_once(batch.input_ids.shape[1])
        jobs: list[list[Job]] = [[] for _ in self.workers.learners]
        for group, windows in enumerate(batch.split(num_groups)):
            for own, part in zip(jobs, windows.split(len(jobs)), strict=False):
                own += [(group, micro) for micro in part.split(-(-len(part.input_ids) // size))]
        return [own for own in jobs if own]

    def _learn(
        self, learner: Learner, jobs: Sequence[Job], counted: int
    ) -> tuple[dict[str, float], dict[str, int]]:
        """Adds the gradients of some windows of a step that has `counted` counted tokens; returns
        KD (summed, nats) and counted tokens by size."""
        kd: dict[str, float] = dict.fromkeys(self.names, 0.0)
        tokens = dict.fromkeys(self.names, 0)
        for group, batch in jobs:
            batch = batch.to(self.world.device)
            share = batch.num_predicted / counted
            divergence = self._teach(learner, batch)
            for name, weight in self.curriculum.sizes(
                self.step, group, self.names, self.config.seed
            ):
                pull: Any = 0.0
                if self.committed:
                    size: Any = self.committed[name].widths
                else:
                    decision = self.decide(name, learner.router, group)
                    size = decision.mixtures
                    pull = budget_loss(decision, self.budgets[name], self.cost)
                with self._autocast():
                    states, head = learner.student.hidden_states(size, **batch.inputs)
                    total = divergence(states[batch.predicts], head)
                # The budget has no tokens to be averaged over: every micro-batch takes its share.
                loss = total / counted + self.config.router.weight * share * pull
                # Ranks average their gradients: each must count for all of them.
                (self.world.size * weight * loss).backward()
                kd[name] += total.item()
                tokens[name] += batch.num_predicted
        return kd, tokens

    def _teach(self, learner: Learner, batch: PackedBatch):
        """The divergence from the teacher on some windows, as a function of the student's states
        at their counted positions and its head. With the task as the objective, the next tokens
        themselves are the teacher."""
        if self.config.objective == "task":
            labels = batch.targets[batch.predicts]
            return lambda states, head: linear_cross_entropy(states, head, labels)
        assert learner.teacher is not None
        with torch.no_grad(), self._autocast():
            full = learner.teacher.axis_map.full
            states, head = learner.teacher.hidden_states(full, **batch.inputs)
            known = states[batch.predicts]
        return lambda own, own_head: linear_kl(own, own_head, known, head)

    def _collect(self, report: StepReport, results: Sequence[tuple[Mapping, Mapping]]) -> None:
        """Puts the losses of all workers and ranks into the report, and checks them."""
        sums = [math.fsum(kd[name] for kd, _ in results) for name in self.names]
        counts = [sum(tokens[name] for _, tokens in results) for name in self.names]
        totals = self.world.sum([*sums, *counts])
        for name, kd, count in zip(self.names, totals, totals[len(sums) :], strict=False):
            if not count:
                continue
            report.kd[name] = kd / count
            report.num_distilled += int(count)
            if not math.isfinite(kd):
                self.is_sound = False
                if not self.step:  # nothing has been changed yet
                    raise not_finite(f"the loss of size {name!r} is {kd} at the first step,")
                raise CheckpointError(
                    f"the loss of size {name!r} is {kd} at step {self.step}; {UNSTABLE}"
                )

    @torch.no_grad()
    def _report_router(self, report: StepReport) -> None:
        for name in (name for name in self.names if name in report.kd):
            decision = self._decision(name, self.temperature())
            report.budget[name] = float(budget_loss(decision, self.budgets[name], self.cost))
            expected = expected_widths(decision.mixtures, self.student.axis_map)
            report.expected[name] = {
                axis: round(_mean(expected[axis]), 1) for axis in decision.mixtures
            }

    def _autocast(self) -> AbstractContextManager:
        wanted = self.config.engine.autocast
        if not (multiplies_bf16(self.world.device) if wanted is None else wanted):
            return nullcontext()
        return torch.autocast(self.world.device.type, torch.bfloat16)

    # What a saved state holds

    def tensors(self, names: Sequence[str] = ()) -> dict[str, torch.Tensor]:
        """Every tensor of the state by name: weights, router, the optimiser's moments.

        Moments exist once a step was taken; those in `names` are made (as zeros) to be loaded into.
        """
        tensors: dict[str, torch.Tensor] = {}
        for label, parameter in self._parameters():
            tensors[label] = parameter.detach()
            of_router = label.startswith("router.")
            state = (self.router_optimizer if of_router else self.optimizer).state[parameter]
            for key in ("step", "exp_avg", "exp_avg_sq"):
                name = f"optimizer.{label}.{key}"
                if name in names and key not in state:
                    scalar = torch.zeros((), dtype=torch.float32, device=parameter.device)
                    state[key] = scalar if key == "step" else torch.zeros_like(parameter)
                if key in state:
                    tensors[name] = state[key]
        return tensors

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for label, module in (("student", self.student.parent), ("router", self.router)):
            for name, parameter in module.named_parameters():
                yield f"{label}.{name}", parameter


def _mean(width: Any) -> float:
    values = width if isinstance(width, tuple) else (width,)
    return float(sum(values) / len(values))
