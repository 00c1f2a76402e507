"""Distillation losses: whole for reading, in chunks of tokens for training.

At V = 131,072 the fp32 logits of 8,192 tokens are 4.3 GB, for teacher and student each, and their
gradients as much again. The chunked losses take hidden states and heads instead of logits: at no
time do the logits of more than one chunk exist, and the gradients are made in the forward pass,
so that nothing of a chunk is kept for the backward.

Low precision is for operands only. Logits rounded to bf16 before the softmax would leave a floor of
2.6e-4 nats between equal models at V = 131,072; products of bf16 operands are therefore summed up
and kept in fp32 (at most 1e-6 nats, `tests/test_loss_precision.py`).

Shapes: N tokens, C of them in a chunk, V vocabulary, H width of the student, G of the teacher,
M different ids drawn for all N tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.autograd.function import once_differentiable

from star_elastic.measure.chunks import CHUNK_BYTES, chunks

GPU_SHARE = 64
"""On a GPU a chunk may take one part in so many of its memory: few tokens would leave it idle."""
BLOCK = 4096
"""Mixed-precision products go by blocks of this many rows or columns of the vocabulary."""


def default_chunk_bytes(device: torch.device) -> int:
    """Memory for the logits of a chunk on a device. It depends on the device alone, so that a run
    adds up its gradients in one order whatever else the memory holds."""
    if device.type != "cuda":
        return CHUNK_BYTES
    total = torch.cuda.get_device_properties(device).total_memory
    return max(CHUNK_BYTES, total // GPU_SHARE)


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
    teacher = _Teacher(Head(teacher_NG, teacher_weight_VG))
    return _chunked_loss(student_NH, student_weight_VH, teacher, chunk_bytes)


def sampled_kl(
    student_NH: torch.Tensor,
    student_weight_VH: torch.Tensor,
    targets: SampledTargets,
    *,
    chunk_bytes: int | None = None,
) -> torch.Tensor:
    """An unbiased estimate of `linear_kl` from ids that were drawn from the teacher; a scalar.

    In nats, *summed* over the N rows: -sum_j p_hat_j log q_j - entropy, with p_hat the share of
    draws that gave id j. Its gradient is unbiased, too ("Sparse Logit Sampling", Anshumann et al.,
    ACL 2025; the top-k ids would be biased). Precision and memory as in `linear_kl`.
    """
    return _chunked_loss(student_NH, student_weight_VH, _Samples(targets), chunk_bytes)


@dataclass(frozen=True, slots=True, eq=False)
class SampledTargets:
    """What a teacher said at N positions: ids drawn from its distribution, each with its count.

    Position n has `ids[starts[n]:starts[n + 1]]`, all different, and their `counts`.
    ids: (M,) uint16 or int32. counts: (M,) uint8. starts: (N + 1,) int64, from 0 to M.
    entropy: (N,) float32, -sum_j p_hat_j log p_j in nats, with p the teacher's own probabilities.
    Its mean over draws is the teacher's entropy; taken at the ids that were drawn, the noise of a
    reported KL falls with the KL, and is zero for a student that equals its teacher.
    """

    ids: torch.Tensor
    counts: torch.Tensor
    starts: torch.Tensor
    entropy: torch.Tensor

    def __len__(self) -> int:
        return len(self.entropy)

    def rows(self, start: int, stop: int) -> SampledTargets:
        """Positions [start, stop), sharing memory."""
        first, last = int(self.starts[start]), int(self.starts[stop])
        starts = self.starts[start : stop + 1] - first
        part = slice(first, last)
        return SampledTargets(self.ids[part], self.counts[part], starts, self.entropy[start:stop])

    def select(self, mask_N: torch.Tensor) -> SampledTargets:
        """The positions where a bool mask is True."""
        lengths = self.starts.diff()
        kept = mask_N.repeat_interleave(lengths)
        starts = starts_of(lengths[mask_N])
        return SampledTargets(self.ids[kept], self.counts[kept], starts, self.entropy[mask_N])

    @classmethod
    def join(cls, parts: Sequence[SampledTargets]) -> SampledTargets:
        """The positions of all parts (at least one) in their order."""
        starts = starts_of(torch.cat([part.starts.diff() for part in parts]))
        ids, counts, entropy = (
            torch.cat([getattr(part, name) for part in parts])
            for name in ("ids", "counts", "entropy")
        )
        return cls(ids, counts, starts, entropy)


def next_token_targets(labels_N: torch.Tensor) -> SampledTargets:
    """A teacher that is sure of these ids: the divergence from it is the cross-entropy.

    On the CPU, as samples of a teacher are: they are cut into chunks by numbers.
    """
    labels_N = labels_N.cpu()
    return SampledTargets(
        labels_N.to(torch.int32),
        torch.ones_like(labels_N, dtype=torch.uint8),
        torch.arange(len(labels_N) + 1),
        torch.zeros(len(labels_N)),
    )


def starts_of(lengths_N: torch.Tensor) -> torch.Tensor:
    """Where each of N ragged rows starts, and the end of the last; (N + 1,) int64."""
    starts = torch.zeros(len(lengths_N) + 1, dtype=torch.int64)
    torch.cumsum(lengths_N, 0, out=starts[1:])
    return starts


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


class _Target(Protocol):
    """What a student is compared with, chunk by chunk."""

    precision: torch.dtype
    num_work: int
    """Buffers of a chunk's logits (C, V) that `compare` needs beside the student's; at least 1."""

    def __len__(self) -> int: ...

    def compare(
        self, chunk: slice, log_q_CV: torch.Tensor, work: Sequence[torch.Tensor], *, gradient: bool
    ) -> torch.Tensor:
        """Loss of each row (C,), given the student's log-probabilities. With `gradient`, these
        are overwritten by the gradient of the summed loss with respect to the logits."""
        ...


class _Teacher:
    """A teacher at hand: forward KL, whose gradient is q - p."""

    num_work = 2

    def __init__(self, head: Head):
        self.head = head
        self.precision = head.precision

    def __len__(self) -> int:
        return len(self.head.rows_NH)

    def compare(
        self, chunk: slice, log_q_CV: torch.Tensor, work: Sequence[torch.Tensor], *, gradient: bool
    ) -> torch.Tensor:
        log_p_CV, p_CV = work
        assert len(self.head.weight_VH) == log_q_CV.shape[1], "teacher and student share ids"
        self.head.log_probs(chunk, log_p_CV, p_CV)
        torch.exp(log_p_CV, out=p_CV)
        losses_C = log_p_CV.sub_(log_q_CV).mul_(p_CV).sum(-1)
        if gradient:
            log_q_CV.exp_().sub_(p_CV)
        return losses_C


class _Samples:
    """A teacher's draws: sampled cross entropy, whose gradient is q - p_hat."""

    num_work = 1
    precision = torch.float32

    def __init__(self, targets: SampledTargets):
        self.targets = targets

    def __len__(self) -> int:
        return len(self.targets)

    def compare(
        self, chunk: slice, log_q_CV: torch.Tensor, work: Sequence[torch.Tensor], *, gradient: bool
    ) -> torch.Tensor:
        part = self.targets.rows(chunk.start, chunk.stop)
        lengths = part.starts.diff()
        row_M = torch.arange(len(part)).repeat_interleave(lengths).to(log_q_CV.device)
        id_M = part.ids.to(torch.int64).to(log_q_CV.device)
        p_hat_M = part.counts.to(log_q_CV)
        p_hat_M /= p_hat_M.new_zeros(len(part)).index_add_(0, row_M, p_hat_M)[row_M]
        losses_C = -part.entropy.to(log_q_CV)
        losses_C.index_add_(0, row_M, p_hat_M * log_q_CV[row_M, id_M], alpha=-1)
        if gradient:
            log_q_CV.exp_().index_put_((row_M, id_M), -p_hat_M, accumulate=True)
        return losses_C


def _chunked_loss(
    student_NH: torch.Tensor, weight_VH: torch.Tensor, target: _Target, chunk_bytes: int | None
) -> torch.Tensor:
    assert len(student_NH) == len(target), (len(student_NH), len(target))
    if chunk_bytes is None:
        chunk_bytes = default_chunk_bytes(student_NH.device)
    if torch.is_grad_enabled() and (student_NH.requires_grad or weight_VH.requires_grad):
        loss: Any = _ChunkedLoss.apply(student_NH, weight_VH, target, chunk_bytes)
        return loss
    return _run(Head(student_NH, weight_VH), target, chunk_bytes, (False, False))[0]


class _ChunkedLoss(torch.autograd.Function):
    """Makes the gradients along with the loss and keeps only them."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> torch.Tensor:
        student_NH, weight_VH, target, chunk_bytes = inputs
        head = Head(student_NH, weight_VH)
        loss, *gradients = _run(head, target, chunk_bytes, ctx.needs_input_grad[:2])
        wanted = zip(gradients, (student_NH, weight_VH), strict=True)
        ctx.save_for_backward(*(None if g is None else g.to(like.dtype) for g, like in wanted))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[torch.Tensor | None, ...]:
        # Not in place: with retain_graph the gradients are asked for again.
        (scale,) = grad_outputs
        return *(None if g is None else g * scale for g in ctx.saved_tensors), None, None


def _run(
    student: Head, target: _Target, chunk_bytes: int, wanted: Sequence[bool]
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The summed loss, and the gradients of rows and weight (in fp32 or better) if wanted."""
    rows_NH, weight_VH = student.rows_NH, student.weight_VH
    precision = torch.promote_types(student.precision, target.precision)
    options = {"dtype": precision, "device": rows_NH.device}
    grad_rows_NH = torch.zeros(rows_NH.shape, **options) if wanted[0] else None
    grad_weight_VH = torch.zeros(weight_VH.shape, **options) if wanted[1] else None
    losses_N = torch.empty(len(rows_NH), **options)
    num_buffers = 1 + target.num_work
    row_bytes = num_buffers * len(weight_VH) * precision.itemsize
    parts = chunks(len(rows_NH), row_bytes, chunk_bytes)
    longest = parts[0].stop if parts else 0
    with torch.no_grad(), torch.autocast(rows_NH.device.type, enabled=False):
        buffers = torch.empty(num_buffers, longest, len(weight_VH), **options)
        for chunk in parts:
            log_q_CV, *work = buffers[:, : chunk.stop - chunk.start]
            student.log_probs(chunk, log_q_CV, work[0])
            losses_N[chunk] = target.compare(chunk, log_q_CV, work, gradient=any(wanted))
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
