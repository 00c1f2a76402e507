"""Distillation losses without full logits, and the cached teacher."""

import json
import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from star_elastic.checkpoints.tensors import load_tensors, save_tensors
from star_elastic.errors import CheckpointError, ConfigError
from star_elastic.measure.chunks import chunks
from star_elastic.train.losses import (
    SampledTargets,
    distillation_loss,
    linear_kl,
    next_token_targets,
    sampled_kl,
    starts_of,
)
from star_elastic.train.teacher import TeacherCache, sample_targets

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
    targets = sample_targets(*inputs[2:], 5, [(0, 0, 3)], seed=0)
    assert torch.autograd.gradcheck(
        lambda x, w: sampled_kl(x, w, targets, chunk_bytes=1), inputs[:2]
    )


def test_a_student_that_equals_its_teacher_has_no_loss():
    _, _, teacher, head = heads()
    assert linear_kl(teacher, head, teacher, head) == 0
    targets = sample_targets(teacher, head, 8, [(0, 0, 11)], seed=0)
    assert abs(sampled_kl(teacher, head, targets).item()) < 1e-5


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
    targets = sample_targets(teacher, teacher_head, 4, [], seed=0)
    for loss in (
        linear_kl(student, head, teacher, teacher_head),
        sampled_kl(student, head, targets),
    ):
        _, rows, weight = with_gradients(loss, student, head)
        assert loss == 0 and rows.shape == (0, 6) and not weight.any()


@pytest.mark.gpu
def test_a_gpu_gives_what_the_cpu_gives():
    inputs = heads(num_rows=40)
    there = [value.detach().cuda().requires_grad_(value.requires_grad) for value in inputs]
    targets = sample_targets(*inputs[2:], 8, [(0, 0, 40)], seed=0)
    for ours, theirs in (
        (linear_kl(*inputs), linear_kl(*there, chunk_bytes=TINY_CHUNK)),
        (sampled_kl(*inputs[:2], targets), sampled_kl(*there[:2], targets)),
    ):
        expected = with_gradients(ours, *inputs[:2])
        for value, truth in zip(with_gradients(theirs, *there[:2]), expected, strict=True):
            assert relative(value.cpu(), truth) < 1e-4
    labels = torch.arange(40) % inputs[1].shape[0]
    ours, theirs = (
        sampled_kl(*of[:2], next_token_targets(labels.to(of[0].device))) for of in (inputs, there)
    )
    assert float(theirs) == pytest.approx(float(ours), rel=1e-4)
    there_targets = sample_targets(*there[2:], 8, [(0, 0, 40)], seed=0)
    assert (there_targets.entropy - targets.entropy).abs().mean() < 1e-2


# Draws of a teacher


def test_draws_are_what_they_say():
    """Every count and the stored entropy, against the distribution itself."""
    *_, teacher, head = heads(num_rows=5)
    targets = sample_targets(teacher, head, 16, [(0, 3, 2), (1, 0, 3)], seed=7)
    log_p = (teacher @ head.T).log_softmax(-1)
    assert targets.ids.dtype == torch.uint16 and targets.counts.dtype == torch.uint8
    for n in range(5):
        one = targets.rows(n, n + 1)
        ids, p_hat = one.ids.long(), one.counts / 16
        assert p_hat.sum() == 1 and len(ids.unique()) == len(ids)
        assert torch.allclose(one.entropy[0], -(p_hat * log_p[n, ids]).sum(), atol=1e-5)
        # Stratified draws are never two or more away from what is expected.
        assert ((p_hat - log_p[n, ids].exp()).abs() * 16 < 2).all()


def test_an_id_without_probability_is_never_drawn():
    rows, head = torch.ones(1, 1), torch.tensor([[-math.inf], [0.0], [-math.inf]])
    targets = sample_targets(rows, head, 255, [(0, 0, 1)], seed=0)
    assert targets.ids.tolist() == [1] and targets.counts.tolist() == [255]
    assert targets.entropy.tolist() == [0]
    with pytest.raises(CheckpointError, match="not finite"):
        sample_targets(rows * math.nan, head, 4, [(0, 0, 1)], seed=0)


def test_sampled_loss_and_gradients_are_unbiased():
    """Means over 600 independent caches, within four standard errors of the exact values."""
    inputs = heads(num_rows=2, vocab=9, dtype=torch.float64)
    exact = with_gradients(linear_kl(*inputs), *inputs[:2])
    draws = [
        with_gradients(
            sampled_kl(*inputs[:2], sample_targets(*inputs[2:], 4, [(0, 0, 2)], seed=seed)),
            *inputs[:2],
        )
        for seed in range(600)
    ]
    for values, truth in zip(zip(*draws, strict=True), exact, strict=True):
        stacked = torch.stack([value.detach().flatten() for value in values])
        error = stacked.std(0) / math.sqrt(len(stacked))
        assert error.max() > 0
        assert ((stacked.mean(0) - truth.flatten()).abs() < 4 * error + 1e-7).all()


def test_draws_depend_on_the_document_and_not_on_the_batch():
    *_, teacher, head = heads(num_rows=9)
    documents = [(0, 3, 4), (1, 3, 5)]
    together = sample_targets(teacher, head, 8, documents, seed=5)
    chunked = sample_targets(teacher, head, 8, documents, seed=5, chunk_bytes=1)
    swapped = sample_targets(teacher.roll(5, 0), head, 8, documents[::-1], seed=5)
    prefix = sample_targets(teacher[4:7], head, 8, [(1, 3, 3)], seed=5)
    assert_equal(together, chunked)
    assert_equal(together.rows(4, 9), swapped.rows(0, 5))
    assert_equal(together.rows(4, 7), prefix)
    for other in ([(0, 4, 4), (1, 3, 5)], [(2, 3, 4), (1, 3, 5)]):
        drawn = sample_targets(teacher, head, 8, other, seed=5).rows(0, 4)
        assert drawn.ids.tolist() != together.rows(0, 4).ids.tolist()
    reseeded = sample_targets(teacher, head, 8, documents, seed=6)
    assert reseeded.ids.tolist() != together.ids.tolist()


def assert_equal(one: SampledTargets, other: SampledTargets):
    for name in ("ids", "counts", "starts"):
        assert getattr(one, name).tolist() == getattr(other, name).tolist(), name
    assert torch.allclose(one.entropy, other.entropy, atol=1e-5)


# The cache


def cache_in(directory, **changes):
    options = {"parent": "tiny", "seed": 1, **changes}
    samples, vocab = options.pop("num_samples", 8), options.pop("vocab_size", 97)
    return TeacherCache(directory, samples, vocab, **options)


def targets_of(row, length, vocab=97):
    *_, teacher, head = heads(num_rows=length, vocab=vocab, seed=row)
    return sample_targets(teacher, head, 8, [(0, row, length)], seed=1)


def test_cache_round_trip_and_prefix(tmp_path):
    cache = cache_in(tmp_path / "cache")
    whole = {row: targets_of(row, 5 + row) for row in range(3)}
    for row, targets in whole.items():
        cache.add(0, row, targets)
    assert cache.bytes_per_token == 0
    assert_equal(cache.get(0, 1, 4), whole[1].rows(0, 4))  # not yet on disk
    assert cache.flush().name == "shard-0000-000000.safetensors"
    assert cache.flush() is None
    opened = cache_in(tmp_path / "cache")
    for row, targets in whole.items():
        assert opened.has(0, row, 5 + row) and not opened.has(0, row, 6 + row)
        assert_equal(opened.get(0, row, 5 + row), targets)
        assert_equal(opened.get(0, row, 3), targets.rows(0, 3))
    assert not opened.has(1, 0, 1)
    with pytest.raises(CheckpointError, match="lacks 9 positions of document 1 of source 0; remov"):
        opened.get(0, 1, 9)
    size = (tmp_path / "cache" / "shard-0000-000000.safetensors").stat().st_size
    assert opened.bytes_per_token == cache.bytes_per_token == size / 18


def test_a_longer_document_takes_the_place_of_its_prefix(tmp_path):
    cache, long = cache_in(tmp_path), targets_of(0, 9)
    cache.add(0, 0, long.rows(0, 4))
    cache.flush()
    cache.add(0, 0, long)
    cache.add(0, 0, long.rows(0, 6))
    cache.flush()
    assert_equal(cache_in(tmp_path).get(0, 0, 9), long)
    assert not list(tmp_path.glob(".*"))


def test_a_shard_that_was_removed_takes_no_other_with_it(tmp_path):
    """As a damaged one is, on the message's advice."""
    cache, whole = cache_in(tmp_path), [targets_of(row, 5) for row in range(4)]
    for row in range(3):
        cache.add(0, row, whole[row])
        cache.flush()
    sorted(tmp_path.glob("shard-*"))[1].unlink()
    again = cache_in(tmp_path)
    again.add(0, 3, whole[3])
    again.flush()
    opened = cache_in(tmp_path)
    assert [row for row in range(4) if opened.has(0, row, 5)] == [0, 2, 3]
    assert_equal(opened.get(0, 2, 5), whole[2])


def test_what_was_not_flushed_is_drawn_again_and_alike(tmp_path):
    *_, teacher, head = heads(num_rows=6)
    documents = [[(0, 0, 0, 4)], [(0, 1, 0, 4)]]
    states = teacher.new_zeros(2, 4, 10)
    states[0], states[1, :2] = teacher[:4], teacher[4:]
    straight, killed = cache_in(tmp_path / "a"), cache_in(tmp_path / "b")
    straight.sample(documents, states, head)
    killed.sample(documents[:1], states[:1], head)
    killed.flush()
    killed.sample(documents[1:], states[1:], head)
    (tmp_path / "b" / ".shard-0000-000001.safetensors.9.tmp").write_bytes(b"half")
    resumed = cache_in(tmp_path / "b")
    assert not resumed.covers(documents) and resumed.covers(documents[:1])
    resumed.sample(documents, states, head)
    assert resumed.flush().name == "shard-0000-000001.safetensors"
    predicts = torch.ones(2, 4, dtype=torch.bool)
    assert_equal(straight.gather(documents, predicts), resumed.gather(documents, predicts))


def test_gather_follows_the_order_of_the_logits(tmp_path):
    """A packed batch against one call per document; the loss of both is the same."""
    student, weight, _, head = heads(num_rows=20)
    states = torch.randn(2, 10, 10, generator=torch.Generator().manual_seed(2))
    documents = [[(0, 5, 4, 6), (1, 0, 0, 4)], [(0, 6, 0, 7)]]
    predicts = torch.zeros(2, 10, dtype=torch.bool)
    predicts[0, 1:3] = predicts[0, 5:9] = predicts[1, 2:6] = True
    cache = cache_in(tmp_path)
    cache.sample(documents, states, head)
    targets = cache.gather(documents, predicts)
    one_by_one = SampledTargets.join(
        [
            sample_targets(states[0, :4], head, 8, [(1, 0, 4)], seed=1).rows(1, 3),
            sample_targets(states[0, 4:], head, 8, [(0, 5, 6)], seed=1).rows(1, 5),
            sample_targets(states[1, :7], head, 8, [(0, 6, 7)], seed=1).rows(2, 6),
        ]
    )
    assert_equal(targets, one_by_one)
    rows = student.view(2, 10, 6)[predicts]
    assert sampled_kl(rows, weight, targets) == sampled_kl(rows, weight, one_by_one)
    assert len(cache.gather(documents, torch.zeros_like(predicts))) == 0
    predicts[1, 8] = True
    with pytest.raises(AssertionError, match="in no document"):
        cache.gather(documents, predicts)


def test_writers_share_a_directory(tmp_path):
    first, second = cache_in(tmp_path), cache_in(tmp_path, writer=1)
    first.add(0, 0, targets_of(0, 4))
    second.add(0, 1, targets_of(1, 4))
    assert {first.flush().name, second.flush().name} == {
        "shard-0000-000000.safetensors",
        "shard-0001-000000.safetensors",
    }
    assert not first.has(0, 1, 4)
    first.refresh()
    assert first.has(0, 1, 4)


def test_large_vocabularies_take_wider_ids(tmp_path):
    vocab = (1 << 16) + 1
    cache = cache_in(tmp_path, vocab_size=vocab)
    rows, head = torch.ones(2, 1), torch.zeros(vocab, 1)
    head[-1] = 30.0
    cache.sample([[(0, 0, 0, 2)]], rows[None], head)
    cache.flush()
    targets = cache_in(tmp_path, vocab_size=vocab).get(0, 0, 2)
    assert targets.ids.dtype == torch.int32 and targets.ids.tolist() == [vocab - 1] * 2


@pytest.mark.parametrize(
    "change",
    [{"num_samples": 9}, {"vocab_size": 98}, {"parent": "other"}, {"seed": 2}],
    ids=lambda change: next(iter(change)),
)
def test_a_cache_of_other_targets_is_refused(tmp_path, change):
    cache_in(tmp_path)
    ((name, value),) = change.items()
    with pytest.raises(CheckpointError, match=f"{name}=.*not {value!r}; remove it, the targets"):
        cache_in(tmp_path, **change)


def test_damage_is_told(tmp_path):
    cache = cache_in(tmp_path)
    cache.add(0, 0, targets_of(0, 4))
    shard = cache.flush()
    whole, tensors = shard.read_bytes(), load_tensors(shard)
    for content in (whole[:-9], whole[:5], b""):
        shard.unlink()  # a file in use is mapped into memory and must not be cut short
        shard.write_bytes(content)
        with pytest.raises(CheckpointError, match="is damaged .*; remove it"):
            cache_in(tmp_path)
    for name, reason in (
        ("entropy", "its table promises"),
        ("counts", "its counts do not add up"),
        ("ids", "its ids are outside"),
    ):
        broken = tensors[name][:-1] if name == "entropy" else torch.full_like(tensors[name], 97)
        save_tensors(shard, {**tensors, name: broken})
        with pytest.raises(CheckpointError, match=reason):
            cache_in(tmp_path).get(0, 0, 4)
    save_tensors(shard, {name: tensors[name] for name in ("documents", "ids")})
    with pytest.raises(CheckpointError, match="is damaged"):
        cache_in(tmp_path)


def test_a_damaged_index_and_a_bad_count_are_told(tmp_path):
    for num_samples in (0, 256):
        with pytest.raises(ConfigError, match="does not fit into one byte; use 1 to 255"):
            cache_in(tmp_path, num_samples=num_samples)
    cache = cache_in(tmp_path)
    assert json.loads((tmp_path / "cache.json").read_text())["vocab_size"] == 97
    cache.add(0, 0, targets_of(0, 4))
    cache.flush()
    (tmp_path / "cache.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"cache\.json is missing or damaged; remove"):
        cache_in(tmp_path)
    (tmp_path / "cache.json").unlink()
    with pytest.raises(CheckpointError, match=r"cache\.json is missing or damaged; remove"):
        cache_in(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot be written"):
        cache_in(tmp_path / "file")


def test_lengths_to_starts():
    assert starts_of(torch.tensor([2, 0, 3], dtype=torch.uint8)).tolist() == [0, 2, 2, 5]
    assert starts_of(torch.empty(0, dtype=torch.uint8)).tolist() == [0]
