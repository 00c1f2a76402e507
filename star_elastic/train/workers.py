"""Threads that share a step's windows.

The products of a small model are too small to keep several cores busy; threads that each take a
part of the windows do. All compute with the same weights in the same memory; each collects
gradients of its own, and their sum, in the order of the threads, is the step's gradient.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TypeVar

import torch

from star_elastic.models.elastic import ElasticModel
from star_elastic.models.skeleton import build_skeleton
from star_elastic.router.router import Router

Part = TypeVar("Part")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Learner:
    """What one thread trains with: the shared weights, where its own gradients collect, and the
    teacher, if there is one."""

    student: ElasticModel
    router: Router
    teacher: ElasticModel | None

    def parameters(self) -> list[torch.nn.Parameter]:
        """Parameters of student and router, in the same order for every learner."""
        return [*self.student.parent.parameters(), *self.router.parameters()]

    def twin(self) -> Learner:
        """A learner with the same memory for its weights and its own for gradients."""
        router = copy.deepcopy(self.router)
        for own, theirs in zip(router.parameters(), self.router.parameters(), strict=True):
            own.data = theirs.data
        teacher = None if self.teacher is None else _twin(self.teacher)
        return Learner(_twin(self.student), router, teacher)


def _twin(model: ElasticModel) -> ElasticModel:
    parent = build_skeleton(model.model_config, model.parent)
    shared = {name: value.detach() for name, value in model.state().items()}
    parent.load_state_dict(shared, strict=False, assign=True)
    parent.tie_weights()
    twin = ElasticModel(
        parent, model.model_config, recompute=model.recompute, axis_map=model.axis_map,
        fake=model.fake,
    )  # fmt: skip
    needed = {name for name, p in model.parent.named_parameters() if p.requires_grad}
    for name, parameter in parent.named_parameters():
        parameter.requires_grad_(name in needed)
    return twin.train(model.training)


class Workers:
    """`count` learners, the first with no copy; one alone works in the calling thread."""

    def __init__(self, learner: Learner, count: int):
        self.learners = [learner, *(learner.twin() for _ in range(count - 1))]
        threads = max(torch.get_num_threads() // count, 1)
        self._pool = None
        if count > 1:
            self._pool = ThreadPoolExecutor(count, "learner", torch.set_num_threads, (threads,))

    def map(self, work: Callable[[Learner, Part], Result], parts: Sequence[Part]) -> list[Result]:
        """`work` on every part, one per learner; the gradients end up in the first learner's."""
        assert len(parts) <= len(self.learners)
        if self._pool is None:
            return [work(self.learners[0], part) for part in parts]
        futures = [
            self._pool.submit(work, learner, part)
            for learner, part in zip(self.learners, parts, strict=False)
        ]
        wait(futures)
        first, *others = self.learners
        for other in others:
            for parameter, twin in zip(first.parameters(), other.parameters(), strict=True):
                if parameter.grad is None:
                    parameter.grad = twin.grad
                elif twin.grad is not None:
                    parameter.grad += twin.grad
                twin.grad = None
        return [future.result() for future in futures]
