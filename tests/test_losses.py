"""Losses without full logits: the divergence from a teacher, and the cross-entropy."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from star_elastic.measure.chunks import chunks
from star_elastic.train.losses import distillation_loss, linear_cross_entropy, linear_kl

TINY_CHUNK = 3 * 4 * 97 * 4
"""Bytes for four tokens of a live teacher at V = 97 in fp32."""


def heads(num_rows=11, vocab=97, dtype=torch.float32, seed=0):
    """Student rows and weight with gradients, teacher rows and weight; a student near enough to
    its teacher that the KL is of order 1."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((num_rows, 6), (vocab, 6), (num_rows, 10), (vocab, 10))
    student, head, teacher, teacher_head = (
        torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes
    )
    return student.requires_grad_(), head.requires_grad_(), teacher, teacher_head


def plain(student, head, teacher, teacher_head):
    """The ground truth, summed over rows."""
    with torch.no_grad():
        teacher_logits = F.linear(teacher, teacher_head)
    return distillation_loss(teacher_logits, F.linear(student, head)) * len(student)


def plain_float64(student, head, teacher, teacher_head):
    log_p, log_q = (teacher @ teacher_head.T).log_softmax(-1), (student @ head.T).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum()


def with_gradients(loss, student, head):
    return (loss, *torch.autograd.grad(loss, (student, head)))


def relative(value, truth):
    return ((value - truth).abs().max() / truth.abs().max()).item()


@pytest.mark.parametrize("chunk_bytes", [1, TINY_CHUNK, 1 << 28])
def test_value_and_gradients_equal_the_ground_truth(chunk_bytes):
    inputs = heads()
    ours = with_gradients(3 * linear_kl(*inputs, chunk_bytes=chunk_bytes), *inputs[:2])
    truth = with_gradients(3 * plain(*inputs), *inputs[:2])
    assert max(map(relative, ours, truth)) < 1e-6
    assert ours[0].dtype == torch.float32


@pytest.mark.parametrize("chunk_bytes", [1, 2 * TINY_CHUNK, 1 << 28])
def test_float64_is_computed_in_float64(chunk_bytes):
    inputs = heads(dtype=torch.float64)
    ours = with_gradients(linear_kl(*inputs, chunk_bytes=chunk_bytes), *inputs[:2])
    truth = with_gradients(plain_float64(*inputs), *inputs[:2])
    assert max(map(relative, ours, truth)) < 1e-12


def test_gradcheck():
    inputs = heads(num_rows=3, vocab=7, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x, w: linear_kl(x, w, *inputs[2:], chunk_bytes=1), inputs[:2]
    )
    labels = torch.tensor([6, 0, 6])
    assert torch.autograd.gradcheck(
        lambda x, w: linear_cross_entropy(x, w, labels, chunk_bytes=1), inputs[:2]
    )


@pytest.mark.parametrize("chunk_bytes", [1, TINY_CHUNK, 1 << 28])
def test_the_cross_entropy_is_that_of_whole_logits(chunk_bytes):
    """Value and gradients, in fp32 and in float64."""
    labels = torch.arange(11) * 8 % 97
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-12)):
        student, head, *_ = heads(dtype=dtype)
        found = linear_cross_entropy(student, head, labels, chunk_bytes=chunk_bytes)
        truth = F.cross_entropy(F.linear(student, head), labels, reduction="sum")
        both = (with_gradients(3 * loss, student, head) for loss in (found, truth))
        assert max(map(relative, *both)) < tolerance


def test_a_student_that_equals_its_teacher_has_no_loss():
    _, _, teacher, head = heads()
    assert linear_kl(teacher, head, teacher, head) == 0


def test_chunks_cover_every_row_once():
    assert chunks(0, 8, 80) == []
    assert chunks(3, 8, 1) == [slice(0, 1), slice(1, 2), slice(2, 3)]
    assert chunks(20, 8, 80) == [slice(0, 10), slice(10, 20)]
    assert chunks(21, 8, 87) == [slice(0, 10), slice(10, 20), slice(20, 21)]


def test_a_strided_view_of_the_parents_head_gets_its_gradient():
    student, _, teacher, teacher_head = heads()
    whole = torch.randn(97, 9, generator=torch.Generator().manual_seed(1)).requires_grad_()
    gradients = []
    for loss in (linear_kl, plain):
        value = loss(student, whole[:, :6], teacher, teacher_head)
        gradients.append(torch.autograd.grad(value, whole)[0])
    assert relative(*gradients) < 1e-6
    assert not gradients[0][:, 6:].any()


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize("vocab", [97, 4100])
def test_autocast_is_no_worse_than_the_plain_form_under_autocast(vocab):
    """Against the truth in fp32: the same products in bf16, and sums that lose no more."""
    inputs = heads(num_rows=40, vocab=vocab)
    truth = with_gradients(plain(*inputs), *inputs[:2])
    with autocast():
        theirs = with_gradients(plain(*inputs), *inputs[:2])
        ours = with_gradients(linear_kl(*inputs, chunk_bytes=1 << 18), *inputs[:2])
    assert [t.dtype for t in ours] == [torch.float32] * 3
    rounded = plain(*(value.detach().bfloat16().float() for value in inputs))
    assert relative(ours[0], rounded) < 1e-6
    for value, other, exact in zip(ours[1:], theirs[1:], truth[1:], strict=True):
        assert (value - exact).norm() <= 1.05 * (other - exact).norm()


def test_bf16_weights_get_bf16_gradients_and_float64_stays_under_autocast():
    inputs = [value.detach().bfloat16() for value in heads()]
    for value in inputs[:2]:
        value.requires_grad_()
    linear_kl(*inputs).backward()
    assert inputs[0].grad.dtype == inputs[1].grad.dtype == torch.bfloat16
    exact = heads(dtype=torch.float64)
    with autocast():
        assert relative(linear_kl(*exact), plain_float64(*exact)) < 1e-12


class Recorder(TorchDispatchMode):
    """Counts the products of an autograd-free view of what runs, and the largest tensor made."""

    def __init__(self):
        super().__init__()
        self.largest = 0
        self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.products += func._schema.name in ("aten::mm", "aten::addmm_")
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, torch.Tensor):
                self.largest = max(self.largest, value.numel())
        return out


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_full_logits_never_exist(precision):
    """40 tokens in chunks of 4: nothing is larger than the three buffers of one chunk."""
    inputs = heads(num_rows=40)
    with Recorder() as seen, torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        linear_kl(*inputs, chunk_bytes=TINY_CHUNK).backward()
    assert seen.largest == 3 * 4 * 97
    with Recorder() as seen:
        plain(*inputs).backward()
    assert seen.largest == 40 * 97


def test_only_the_gradients_that_are_needed_are_computed():
    student, head, *teacher = heads(num_rows=4)

    def products(x, w):
        with Recorder() as seen:
            loss = linear_kl(x, w, *teacher)
        return seen.products, loss

    assert products(student, head)[0] == 4
    count, loss = products(student, head.detach())
    assert count == 3 and torch.autograd.grad(loss, student)[0].any()
    assert products(student.detach(), head)[0] == 3
    with torch.no_grad():
        count, loss = products(student, head)
    assert count == 2 and not loss.requires_grad
    assert relative(loss, plain(student, head, *teacher)) < 1e-6
    with torch.inference_mode():
        assert products(student, head)[0] == 2


def test_no_rows_give_no_loss_and_zero_gradients():
    student, head, teacher, teacher_head = heads(num_rows=0)
    for loss in (
        linear_kl(student, head, teacher, teacher_head),
        linear_cross_entropy(student, head, torch.empty(0, dtype=torch.int64)),
    ):
        _, rows, weight = with_gradients(loss, student, head)
        assert loss == 0 and rows.shape == (0, 6) and not weight.any()


@pytest.mark.gpu
def test_a_gpu_gives_what_the_cpu_gives():
    inputs = heads(num_rows=40)
    there = [value.detach().cuda().requires_grad_(value.requires_grad) for value in inputs]
    labels = torch.arange(40)
    for ours, theirs in (
        (linear_kl(*inputs), linear_kl(*there, chunk_bytes=TINY_CHUNK)),
        (
            linear_cross_entropy(*inputs[:2], labels),
            linear_cross_entropy(*there[:2], labels.cuda()),
        ),
    ):
        expected = with_gradients(ours, *inputs[:2])
        for value, truth in zip(with_gradients(theirs, *there[:2]), expected, strict=True):
            assert relative(value.cpu(), truth) < 1e-4
