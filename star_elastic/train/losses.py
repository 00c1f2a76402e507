"""Distillation losses: whole for reading, in chunks of tokens for training.

At V = 131,072 the fp32 logits of 8,192 tokens are 4.3 GB, for teacher and student each, and their
gradients as much again. The chunked losses take hidden states and heads instead of logits: at no
time do the logits of more than one chunk exist, and the gradients are made in the forward pass,
so that nothing of a chunk is kept for the backward.

Low precision is for operands only. Logits rounded to bf16 before the softmax would leave a floor of
2.6e-4 nats between equal models at V = 131,072; products of bf16 operands are therefore summed up
and kept in fp32 (at most 1e-6 nats, `tests/test_loss_precision.py`).

Shapes: N tokens, C of them in a chunk, V vocabulary, H width of the student, G of the teacher.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from star_elastic.measure.chunks import CHUNK_BYTES, chunks

GPU_SHARE = 64
"""On a GPU a chunk may take one part in so many of its memory: few tokens would leave it idle."""
BLOCK = 4096
"""Mixed-precision products go by blocks of this many rows or columns of the vocabulary."""

Work = Sequence[torch.Tensor]
Compare = Callable[[slice, torch.Tensor, Work, bool], torch.Tensor]
"""(chunk, the student's log-probabilities (C, V), buffers of the same shape, whether a gradient is
wanted) -> the loss of each row (C,). Log-probabilities are overwritten by the gradient of the
summed loss with respect to the logits, if it is wanted."""
Run = Callable[..., tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]]


def default_chunk_bytes(device: torch.device) -> int:
    """Memory for the logits of a chunk on a device. It depends on the device alone, so that a run
    adds up its gradients in one order whatever else the memory holds."""
    if device.type != "cuda":
        return CHUNK_BYTES
    total = torch.cuda.get_device_properties(device).total_memory
    return max(CHUNK_BYTES, total // GPU_SHARE)


def distillation_loss(teacher_NV: torch.Tensor, student_NV: torch.Tensor) -> torch.Tensor:
    """Forward KL(teacher || student) in nats per token at temperature 1, in fp32; a scalar.

    The plain form, from whole logits: the truth that the chunked one is held against.
    """
    teacher_NV, student_NV = (logits.float().log_softmax(-1) for logits in (teacher_NV, student_NV))
    return (teacher_NV.exp() * (teacher_NV - student_NV)).sum() / len(teacher_NV)


def linear_kl(
    student_NH: torch.Tensor,
    student_weight_VH: torch.Tensor,
    teacher_NG: torch.Tensor,
    teacher_weight_VG: torch.Tensor,
    *,
    chunk_bytes: int | None = None,
) -> torch.Tensor:
    """Forward KL(teacher || student) in nats at temperature 1, *summed* over the N rows; a scalar.

    Logits are `x @ weight.T` with operands in the dtype that `F.linear` would give them (autocast
    included); logits, softmax and sums are in fp32, or in float64 for float64 inputs. Gradients
    reach the student's rows and weight, which may be a strided view. Beside them, at most
    `chunk_bytes` (default: `default_chunk_bytes`; but at least one token's logits) are in use.
    """
    teacher = Head(teacher_NG, teacher_weight_VG)
    assert len(teacher_weight_VG) == len(student_weight_VH), "teacher and student share ids"
    assert len(teacher_NG) == len(student_NH), (len(teacher_NG), len(student_NH))

    def compare(chunk: slice, log_q_CV: torch.Tensor, work: Work, gradient: bool) -> torch.Tensor:
        log_p_CV, p_CV = work
        teacher.log_probs(chunk, log_p_CV, p_CV)
        torch.exp(log_p_CV, out=p_CV)
        losses_C = log_p_CV.sub_(log_q_CV).mul_(p_CV).sum(-1)
        if gradient:  # q - p
            log_q_CV.exp_().sub_(p_CV)
        return losses_C

    run = partial(_run, compare, 2, teacher.precision, chunk_bytes)
    return _loss(student_NH, student_weight_VH, run)


def linear_cross_entropy(
    student_NH: torch.Tensor,
    student_weight_VH: torch.Tensor,
    labels_N: torch.Tensor,
    *,
    chunk_bytes: int | None = None,
) -> torch.Tensor:
    """The cross-entropy of the ids `labels_N` (int64) in nats, *summed* over the N rows; a scalar.

    It is the divergence from a teacher that is sure of these ids. Precision and memory as in
    `linear_kl`.
    """
    assert len(labels_N) == len(student_NH), (len(labels_N), len(student_NH))

    def compare(chunk: slice, log_q_CV: torch.Tensor, work: Work, gradient: bool) -> torch.Tensor:
        labels_C1 = labels_N[chunk, None]
        losses_C = -log_q_CV.gather(1, labels_C1).squeeze(1)
        if gradient:  # q, less 1 at the label
            log_q_CV.exp_().scatter_add_(1, labels_C1, log_q_CV.new_full(labels_C1.shape, -1.0))
        return losses_C

    run = partial(_run, compare, 1, torch.float32, chunk_bytes)
    return _loss(student_NH, student_weight_VH, run)


class Head:
    """Last hidden states (N, H) and a head's weight (V, H), in the dtype of their multiplication.

    `precision` is the dtype of logits, softmax and sums: float32, or float64 where the operands
    are.
    """

    def __init__(self, rows_NH: torch.Tensor, weight_VH: torch.Tensor):
        assert rows_NH.shape[1:] == weight_VH.shape[1:], (rows_NH.shape, weight_VH.shape)
        rows_NH, weight_VH = rows_NH.detach(), weight_VH.detach()
        device = rows_NH.device.type
        if torch.is_autocast_enabled(device):
            # Like autocast's own products, which leave float64 alone.
            dtype = torch.get_autocast_dtype(device)
            rows_NH, weight_VH = (
                value if value.dtype == torch.float64 else value.to(dtype)
                for value in (rows_NH, weight_VH)
            )
        self.rows_NH = rows_NH
        self.weight_VH = weight_VH
        self.precision = torch.promote_types(rows_NH.dtype, torch.float32)

    def log_probs(self, chunk: slice, out_CV: torch.Tensor, work_CV: torch.Tensor) -> None:
        """Writes the log-probabilities of a chunk of rows to `out_CV`; `work_CV` is overwritten.

        Both are contiguous and of `precision` or better. Runs without autocast and gradients.
        """
        rows_CH, weight_VH = self.rows_NH[chunk], self.weight_VH
        if rows_CH.dtype == work_CV.dtype:
            torch.mm(rows_CH, weight_VH.T, out=work_CV)
        elif rows_CH.is_cuda and work_CV.dtype == torch.float32:
            torch.mm(rows_CH, weight_VH.T, out_dtype=work_CV.dtype, out=work_CV)
        else:
            # Elsewhere a product of bf16 operands is rounded to bf16: multiply their values in
            # fp32, and widen no more of the weight than a block.
            rows_CH = rows_CH.to(work_CV.dtype)
            for start in range(0, len(weight_VH), BLOCK):
                block = slice(start, start + BLOCK)
                wide_BH = weight_VH[block].to(work_CV.dtype)
                torch.mm(rows_CH, wide_BH.T, out=work_CV[:, block])
        torch.log_softmax(work_CV, -1, out=out_CV)


def _loss(student_NH: torch.Tensor, weight_VH: torch.Tensor, run: Run) -> torch.Tensor:
    if torch.is_grad_enabled() and (student_NH.requires_grad or weight_VH.requires_grad):
        loss: Any = _ChunkedLoss.apply(student_NH, weight_VH, run)
        return loss
    return run(Head(student_NH, weight_VH), (False, False))[0]


class _ChunkedLoss(torch.autograd.Function):
    """Makes the gradients along with the loss and keeps only them."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> torch.Tensor:
        student_NH, weight_VH, run = inputs
        loss, *gradients = run(Head(student_NH, weight_VH), ctx.needs_input_grad[:2])
        wanted = zip(gradients, (student_NH, weight_VH), strict=True)
        ctx.save_for_backward(*(None if g is None else g.to(like.dtype) for g, like in wanted))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[torch.Tensor | None, ...]:
        # Not in place: with retain_graph the gradients are asked for again.
        (scale,) = grad_outputs
        return *(None if g is None else g * scale for g in ctx.saved_tensors), None


def _run(
    compare: Compare,
    num_work: int,
    precision: torch.dtype,
    chunk_bytes: int | None,
    student: Head,
    wanted: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The summed loss, and the gradients of rows and weight (in fp32 or better) if wanted.
    `compare` needs `num_work` buffers of a chunk's logits beside the student's."""
    rows_NH, weight_VH = student.rows_NH, student.weight_VH
    precision = torch.promote_types(student.precision, precision)
    options = {"dtype": precision, "device": rows_NH.device}
    grad_rows_NH = torch.zeros(rows_NH.shape, **options) if wanted[0] else None
    grad_weight_VH = torch.zeros(weight_VH.shape, **options) if wanted[1] else None
    losses_N = torch.empty(len(rows_NH), **options)
    row_bytes = (1 + num_work) * len(weight_VH) * precision.itemsize
    parts = chunks(len(rows_NH), row_bytes, chunk_bytes or default_chunk_bytes(rows_NH.device))
    longest = parts[0].stop if parts else 0
    with torch.no_grad(), torch.autocast(rows_NH.device.type, enabled=False):
        buffers = torch.empty(1 + num_work, longest, len(weight_VH), **options)
        for chunk in parts:
            log_q_CV, *work = buffers[:, : chunk.stop - chunk.start]
            student.log_probs(chunk, log_q_CV, work[0])
            losses_N[chunk] = compare(chunk, log_q_CV, work, any(wanted))
            if grad_rows_NH is not None:
                _add_product(grad_rows_NH[chunk], log_q_CV, weight_VH)
            if grad_weight_VH is not None:
                _add_product(grad_weight_VH, log_q_CV.T, rows_NH[chunk])
    return losses_N.sum(), grad_rows_NH, grad_weight_VH


def _add_product(out_AB: torch.Tensor, left_AK: torch.Tensor, right_KB: torch.Tensor) -> None:
    """Adds left @ right to `out`, whose dtype `left` has.

    A `right` of a narrower dtype is multiplied in it on a GPU, with sums in that of `out`, and
    widened elsewhere. Either goes block by block along the longer dimension of `left` (in most
    cases the vocabulary), so that neither operand nor a product as large as a head exists twice.
    """
    if right_KB.dtype == out_AB.dtype:
        out_AB.addmm_(left_AK, right_KB)
        return
    rows, inner = left_AK.shape
    for start in range(0, max(rows, inner), BLOCK):
        block = slice(start, start + BLOCK)
        if rows >= inner:
            _add_block(out_AB[block], left_AK[block], right_KB)
        else:
            _add_block(out_AB, left_AK[:, block], right_KB[block])


def _add_block(out_AB: torch.Tensor, left_AK: torch.Tensor, right_KB: torch.Tensor) -> None:
    if right_KB.is_cuda:
        narrow_AK = left_AK.to(right_KB.dtype)
        out_AB += torch.mm(narrow_AK, right_KB, out_dtype=out_AB.dtype)
    else:
        out_AB.addmm_(left_AK, right_KB.to(out_AB.dtype))
