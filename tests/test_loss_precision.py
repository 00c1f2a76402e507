"""Losses under autocast: bf16 operands, and nothing else rounded to bf16.

The reference has the same operands, rounded to bf16, and everything after them in float64. Logits
are of order 10 at a large vocabulary, where one step of bf16 is 1/16.
"""

from __future__ import annotations

import pytest
import torch

from star_elastic.measure.chunks import CHUNK_BYTES
from star_elastic.train.losses import (
    GPU_SHARE,
    Head,
    default_chunk_bytes,
    linear_cross_entropy,
    linear_kl,
)

VOCAB, HIDDEN, TOKENS = 16384, 32, 6
FLOOR = 1e-6
"""Nats per token that rounding may add; bf16 logits add about 2e-4."""


def near(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows and head of a student near its teacher, as late in a run, and those of the teacher."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    teacher, teacher_head = normal(TOKENS, HIDDEN), normal(VOCAB, HIDDEN) / 4
    teacher[:, 0], teacher_head[:, 0] = 4.0, 3.0  # a common offset, which no softmax sees
    student = teacher + 1e-3 * normal(TOKENS, HIDDEN)
    head = teacher_head + 3e-4 * normal(VOCAB, HIDDEN)
    return student.requires_grad_(), head.requires_grad_(), teacher, teacher_head


def exact(student, head, teacher, teacher_head):
    """Forward KL summed over rows, and its gradients, from operands rounded to bf16."""
    own = [value.detach().bfloat16().double() for value in (student, head)]
    theirs = [value.bfloat16().double() for value in (teacher, teacher_head)]
    rows, weight = (value.requires_grad_() for value in own)
    log_p = (theirs[0] @ theirs[1].T).log_softmax(-1)
    log_q = (rows @ weight.T).log_softmax(-1)
    loss = (log_p.exp() * (log_p - log_q)).sum()
    return loss.detach(), *torch.autograd.grad(loss, (rows, weight))


def autocast() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


def relative(value: torch.Tensor, truth: torch.Tensor) -> float:
    return float((value - truth).norm() / truth.norm())


@pytest.mark.parametrize("chunk_bytes", [1, None], ids=["token by token", "by default"])
def test_a_small_divergence_is_measured_and_not_the_rounding(chunk_bytes):
    """Of a student that has nearly arrived, value and gradient are those of the operands."""
    inputs = near()
    with autocast():
        loss = linear_kl(*inputs, chunk_bytes=chunk_bytes)
    gradients = torch.autograd.grad(loss, inputs[:2])
    truth, *true_gradients = exact(*inputs)
    assert 1e-7 < truth / TOKENS < 1e-4
    assert abs(loss - truth) / TOKENS < 0.1 * FLOOR
    for gradient, expected in zip(gradients, true_gradients, strict=True):
        assert gradient.dtype == torch.float32
        assert relative(gradient, expected) < 2e-3


def test_equal_models_that_compute_in_another_order_have_no_divergence():
    """As a sorted parent and its original: the same channels, added up in another order."""
    *_, states, head = near()
    order = torch.randperm(HIDDEN, generator=torch.Generator().manual_seed(1))
    with autocast():
        assert abs(linear_kl(states[:, order], head[:, order], states, head)) / TOKENS < FLOOR
        assert linear_kl(states, head, states, head) == 0


def test_the_cross_entropy_is_as_precise():
    student, head, *_ = near()
    labels = torch.arange(TOKENS)
    with autocast():
        loss = linear_cross_entropy(student, head, labels)
    gradients = torch.autograd.grad(loss, (student, head))
    own = [value.detach().bfloat16().double().requires_grad_() for value in (student, head)]
    truth = torch.nn.functional.cross_entropy(own[0] @ own[1].T, labels, reduction="sum")
    assert abs(loss - truth) / TOKENS < 1e-5
    for gradient, expected in zip(gradients, torch.autograd.grad(truth, own), strict=True):
        assert relative(gradient, expected) < 2e-3


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_logits_are_fp32_whatever_the_head_is_stored_in(stored):
    """Models held in bf16 have no autocast around them, and no more rounding either."""
    *_, states, head = near()
    states, head = states.to(stored), head.to(stored)
    out, work = torch.empty(2, TOKENS, VOCAB)
    Head(states, head).log_probs(slice(0, TOKENS), out, work)
    truth = (states.double() @ head.double().T).log_softmax(-1)
    assert (out - truth).abs().max() < 1e-4


@pytest.mark.gpu
def test_a_gpu_keeps_fp32_logits_of_bf16_operands():
    inputs = near()
    there = [value.detach().cuda().requires_grad_(value.requires_grad) for value in inputs]
    with torch.autocast("cuda", torch.bfloat16):
        loss = linear_kl(*there)
    gradients = torch.autograd.grad(loss, there[:2])
    truth, *true_gradients = exact(*inputs)
    assert abs(loss.cpu() - truth) / TOKENS < 0.1 * FLOOR
    for gradient, expected in zip(gradients, true_gradients, strict=True):
        assert relative(gradient.cpu(), expected) < 1e-2  # the gradient of the logits is rounded
    total = torch.cuda.get_device_properties(0).total_memory
    assert default_chunk_bytes(torch.device("cuda")) == max(CHUNK_BYTES, total // GPU_SHARE)


def test_a_cpu_takes_the_least_memory_for_chunks():
    assert default_chunk_bytes(torch.device("cpu")) == CHUNK_BYTES
