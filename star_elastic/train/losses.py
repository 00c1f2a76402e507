"""The distillation loss."""

from __future__ import annotations

import torch


def distillation_loss(
    teacher_NV: torch.Tensor, student_NV: torch.Tensor, *, chunk: int = 4096
) -> torch.Tensor:
    """Forward KL(teacher || student) in nats per token at temperature 1, in fp32; a scalar.

    Rows are the N unmasked tokens. Works through `chunk` tokens at a time, so that only one
    chunk's probabilities exist in fp32 at once on the teacher's side.
    """
    total = student_NV.new_zeros((), dtype=torch.float32)
    for start in range(0, len(teacher_NV), chunk):
        teacher = teacher_NV[start : start + chunk].float().log_softmax(-1)
        student = student_NV[start : start + chunk].float().log_softmax(-1)
        total = total + (teacher.exp() * (teacher - student)).sum()
    return total / len(teacher_NV)
