"""Law: documents that share a row do not see each other.

What a model says about a document in a packed window is what it says about the document alone,
in plain transformers; so are the gradients. Below the models, the scan and the convolution are held
against the recurrence and the sum that define them.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMamba2Mixer

from star_elastic.data.rendering import Document
from star_elastic.models.documents import (
    BLIND,
    DocumentMamba2Mixer,
    document_conv,
    document_scan,
    keep_documents_apart,
)
from star_elastic.train.packing import PackedBatch, PackedStream
from tests.architectures import ROWS, fixed_config
from tests.laws.parents import (
    Parent,
    assert_equal,
    examples,
    make_parent,
    parents,
    precision,
    relative_error,
)

ids = st.lists(st.integers(0, 19), min_size=2, max_size=9)


@dataclass
class Texts:
    """Documents given as token ids; all tokens count."""

    documents: list[list[int]]
    name: str = "texts"
    pad_id: int = 0

    def __len__(self) -> int:
        return len(self.documents)

    def is_held_out(self, row: int) -> bool:
        return False

    def document(self, row: int) -> Document:
        return Document(self.documents[row], 0)


@st.composite
def batches(draw) -> PackedBatch:
    """Two windows of 12 tokens with several documents each, and some padding."""
    texts = Texts(draw(st.lists(ids, min_size=3, max_size=5)))
    return PackedStream([texts], [1.0], context=12, batch_size=2, seed=0, stage=0).batch(0)


def documents(batch: PackedBatch, values: torch.Tensor) -> list[torch.Tensor]:
    """The parts of (B, T, ...) that belong to each document, (1, L, ...)."""
    return [
        values[row : row + 1, d.start : d.start + d.length]
        for row, placed in enumerate(batch.documents)
        for d in placed
    ]


def alone(parent: Parent, batch: PackedBatch) -> list[torch.Tensor]:
    """Logits of every document by itself, without any of the inputs of packed rows."""
    return [
        parent.model(input_ids=part, use_cache=False).logits
        for part in documents(batch, batch.input_ids)
    ]


def together(parent: Parent, batch: PackedBatch, **inputs) -> list[torch.Tensor]:
    inputs = inputs or batch.inputs
    return documents(batch, parent.model(**inputs, use_cache=False).logits)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("kind", ROWS)
@given(data=st.data())
@examples(5)
def test_documents_in_a_window_equal_documents_alone(kind, dtype, attention, data):
    parent = data.draw(parents(kind, dtype))
    batch = data.draw(batches())
    parent.model.set_attn_implementation(attention if parent.model._supports_sdpa else "eager")
    with torch.no_grad(), precision(dtype):
        expected = alone(parent, batch)
        keep_documents_apart(parent.model)
        logits = together(parent, batch)
    assert_equal(torch.cat(logits, 1), torch.cat(expected, 1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("kind", ROWS)
@given(data=st.data())
@examples(3)
def test_gradients_equal_those_of_documents_alone(kind, dtype, data):
    parent = data.draw(parents(kind, dtype))
    batch = data.draw(batches())
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(*batch.input_ids.shape, 20, generator=generator, dtype=dtype)
    parameters = list(parent.model.parameters())

    def gradients(logits: list[torch.Tensor]) -> list[torch.Tensor]:
        parts = zip(logits, documents(batch, weight), strict=True)
        loss = sum((part * w).sum() for part, w in parts)
        return list(torch.autograd.grad(loss, parameters, materialize_grads=True))

    with precision(dtype):
        expected = gradients(alone(parent, batch))
        keep_documents_apart(parent.model)
        found = gradients(together(parent, batch))
    scale = max(grad.abs().max().item() for grad in expected)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}[dtype]
    for (name, _), ours, theirs in zip(
        parent.model.named_parameters(), found, expected, strict=True
    ):
        assert ours.isfinite().all() and (ours - theirs).abs().max() <= tolerance * scale, name


@pytest.mark.parametrize("kind", ROWS)
def test_plain_transformers_would_let_documents_see_each_other(kind):
    """Attention reads `position_ids`, but for models that make their masks without them; Mamba
    layers run on, and refuse `seq_idx`."""
    parent = make_parent(fixed_config(kind), 0, torch.float32)
    texts = Texts([[1, 2, 3, 4], [5, 6, 7]])
    batch = PackedStream([texts], [1.0], context=12, batch_size=2, seed=0, stage=0).batch(0)
    with torch.no_grad():
        expected = torch.cat(alone(parent, batch), 1)
        blind = together(parent, batch, input_ids=batch.input_ids)
        assert relative_error(torch.cat(blind, 1), expected) > 1e-2
        inputs = {name: batch.inputs[name] for name in ("input_ids", "position_ids")}
        positions = together(parent, batch, **inputs)
        is_blind = type(parent.model.base_model).__name__ in BLIND
        if not ROWS[kind].is_recurrent and not is_blind:
            assert_equal(torch.cat(positions, 1), expected)
            return
        assert relative_error(torch.cat(positions, 1), expected) > 1e-2
        if is_blind:
            return
        with pytest.raises(ValueError, match="can't keep packed sequences apart"):
            together(parent, batch)


# The mixer


def mixers(dtype: torch.dtype = torch.float32) -> tuple[NemotronHMamba2Mixer, DocumentMamba2Mixer]:
    """transformers' mixer and ours with the same weights."""
    parent = make_parent(fixed_config("dense"), 3, torch.float32).model.to(dtype)
    theirs = parent.get_submodule("model.layers.0.mixer")
    assert type(theirs) is NemotronHMamba2Mixer
    ours = DocumentMamba2Mixer(parent.config, 0).to(dtype)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def test_one_document_is_what_transformers_computes():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 11, 12, generator=generator)
    mask = torch.ones(2, 11)
    mask[0, 7:] = 0
    number = torch.zeros(2, 11, dtype=torch.int32)
    theirs, ours = mixers()
    assert torch.equal(ours(x), theirs(x))
    assert_equal(ours(x, seq_idx=number), theirs(x))
    assert_equal(ours(x, attention_mask=mask, seq_idx=number), theirs(x, attention_mask=mask))
    theirs, ours = mixers(torch.bfloat16)
    low = ours(x.bfloat16(), seq_idx=number)
    assert low.dtype == torch.bfloat16
    assert relative_error(low.float(), theirs(x.bfloat16()).float()) < 0.02


def test_the_scan_is_fp32_under_autocast_too():
    inputs = scan_inputs(torch.Generator().manual_seed(0), 2, 20, 2, 2, 3, 4, torch.float32)
    number = torch.arange(20).div(6, rounding_mode="floor").expand(2, 20)

    def run() -> list[torch.Tensor]:
        leaves = [value.clone().requires_grad_() for value in inputs]
        y = document_scan(*leaves, number, 8)
        return [y, *torch.autograd.grad(y.square().sum(), leaves)]

    expected = run()
    with torch.autocast("cpu", torch.bfloat16):
        found = run()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_mixers_are_replaced_in_place_with_their_own_parameters():
    parent = make_parent(fixed_config("moe"), 0, torch.float32)
    before = dict(parent.model.named_parameters())
    parent.model.train()
    keep_documents_apart(parent.model)
    after = dict(parent.model.named_parameters())
    assert list(before) == list(after) and all(before[name] is after[name] for name in before)
    mixers = [m for m in parent.model.modules() if isinstance(m, NemotronHMamba2Mixer)]
    assert len(mixers) == 2
    assert all(isinstance(m, DocumentMamba2Mixer) and m.training for m in mixers)
    keep_documents_apart(parent.model)
    assert mixers == [m for m in parent.model.modules() if isinstance(m, NemotronHMamba2Mixer)]


# The scan and the convolution


def scan_inputs(generator, B, T, G, R, P, N, dtype, decay=1.0) -> list[torch.Tensor]:
    """x, dt, a, b, c and d; `decay` scales how fast states fade."""

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    dt = decay * F.softplus(randn(B, T, G * R))
    a = -torch.exp(randn(G * R))
    return [randn(B, T, G * R, P), dt, a, randn(B, T, G, N), randn(B, T, G, N), randn(G * R)]


def recurrence(x, dt, a, b, c, d, number) -> torch.Tensor:
    """The definition, token by token."""
    per_group = x.shape[2] // b.shape[2]
    b, c = (v.repeat_interleave(per_group, dim=2) for v in (b, c))
    state = x.new_zeros(*x.shape[:1], *x.shape[2:], b.shape[-1])
    outputs = []
    for t in range(x.shape[1]):
        if t:
            same = (number[:, t] == number[:, t - 1]).to(x.dtype)
            state = state * same[:, None, None, None]
        state = state * torch.exp(dt[:, t] * a)[..., None, None]
        state = state + (dt[:, t, :, None] * x[:, t])[..., None] * b[:, t, :, None]
        outputs.append((state * c[:, t, :, None]).sum(-1) + d[:, None] * x[:, t])
    return torch.stack(outputs, 1)


@st.composite
def numbers(draw, B: int, T: int) -> torch.Tensor:
    """Document numbers (B, T) with random boundaries."""
    starts = draw(st.lists(st.integers(0, 5).map(lambda n: n == 0), min_size=B * T, max_size=B * T))
    return torch.tensor(starts).reshape(B, T).cumsum(1).int()


@given(data=st.data())
@examples(40)
def test_the_scan_is_the_recurrence(data):
    B, T, G, R, P, N = (data.draw(st.integers(1, top)) for top in (2, 20, 2, 2, 3, 3))
    number = data.draw(numbers(B, T))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**20)))
    decay = data.draw(st.sampled_from([0.02, 1.0, 20.0]))
    inputs = scan_inputs(generator, B, T, G, R, P, N, torch.float64, decay)
    leaves = [value.requires_grad_() for value in inputs]
    y = document_scan(*leaves, number, data.draw(st.integers(1, 9)))
    expected = recurrence(*leaves, number)
    assert_equal(y, expected)
    weight = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    found = torch.autograd.grad((y * weight).sum(), leaves)
    wanted = torch.autograd.grad((expected * weight).sum(), leaves)
    scale = max(grad.abs().max().item() for grad in wanted)
    for name, ours, theirs in zip(("x", "dt", "a", "b", "c", "d"), found, wanted, strict=True):
        assert (ours - theirs).abs().max() <= 1e-12 * scale, name


@pytest.mark.parametrize("decay", [1e-6, 1.0, 1e3, 1e30])
def test_extreme_decay_stays_finite_in_fp32(decay):
    inputs = scan_inputs(torch.Generator().manual_seed(0), 2, 30, 1, 2, 3, 4, torch.float32, decay)
    leaves = [value.requires_grad_() for value in inputs]
    number = (torch.arange(30) >= 13).int().expand(2, 30)
    y = document_scan(*leaves, number, 8)
    grads = torch.autograd.grad((y / (1 + decay)).sum(), leaves)
    assert all(value.isfinite().all() for value in (y, *grads))
    if decay < 1e6:
        double = [value.detach().double().requires_grad_() for value in leaves]
        exact = recurrence(*double, number)
        assert relative_error(y, exact) < 1e-5
        wanted = torch.autograd.grad((exact / (1 + decay)).sum(), double)
        scale = max(grad.abs().max().item() for grad in wanted)
        assert all((a - b).abs().max() < 1e-5 * scale for a, b in zip(grads, wanted, strict=True))


@given(data=st.data())
@examples(20)
def test_the_convolution_stays_inside_its_document(data):
    B, T, C, K = (data.draw(st.integers(1, top)) for top in (2, 9, 3, 4))
    number = data.draw(numbers(B, T))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**20)))
    shapes = ((B, T, C), (C, K), (C,))
    x, weight, bias = leaves = [
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in shapes
    ]
    rows = []
    for t in range(T):
        y = bias.expand(B, C)
        for lag in range(min(K, t + 1)):
            same = (number[:, t] == number[:, t - lag]).double()[:, None]
            y = y + same * x[:, t - lag] * weight[:, -1 - lag]
        rows.append(y)
    expected, found = torch.stack(rows, 1), document_conv(x, weight, bias, number)
    assert_equal(found, expected)
    factor = torch.randn(B, T, C, generator=generator, dtype=torch.float64)
    grads = (torch.autograd.grad((y * factor).sum(), leaves) for y in (found, expected))
    for ours, theirs in zip(*grads, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12)
