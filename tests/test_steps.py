"""Steps in static memory: replayed as CUDA graphs on a GPU, run as they are here."""

from __future__ import annotations

import pytest
import torch

import star_elastic
from star_elastic.generate import engine, steps
from star_elastic.generate.decode import BatchDecoder
from star_elastic.generate.steps import MAX_CAPTURED, StepPool, pool_for
from tests.tiny_family import PROMPTS

ROWS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14], [6], [9, 9, 5, 8, 7]]
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@pytest.fixture(scope="module", params=DEVICES)
def model(request, tiny_checkpoint):
    # On a GPU, experts can be captured in bf16 only; graphs compute there what steps without do.
    dtype = "bfloat16" if request.param == "cuda" else "float32"
    return star_elastic.load(tiny_checkpoint, dtype, request.param)["small"]


@pytest.fixture(autouse=True)
def few_columns(monkeypatch):
    """So that texts of a few tokens outgrow their memory."""
    monkeypatch.setattr(steps, "MIN_COLUMNS", 8)


def near(a: torch.Tensor, b: torch.Tensor) -> bool:
    tolerance = 1e-4 if a.device.type == "cpu" else 3e-2
    return bool((a - b).abs().max() < tolerance * b.abs().max())


@torch.inference_mode()
def test_rows_that_join_leave_and_grow_read_as_without_static_memory(model):
    ours, plain = BatchDecoder(model, StepPool(model, patience=1)), BatchDecoder(model)
    decoders = (ours, plain)
    for number in range(24):
        if number == 0:
            for decoder in decoders:
                decoder.prefill(ROWS)
        if number == 5:  # a row leaves, another joins where its memory was
            rows = [decoder.take(1) for decoder in decoders]
            for decoder, row in zip(decoders, rows, strict=True):
                length = decoder.lengths[1]
                decoder.keep([0, 2, 3])
                decoder.resume([(row, length, [5, 6])])
        if number == 12:
            for decoder in decoders:
                decoder.prefill([[7] * 11])
        if number == 18:
            for decoder in decoders:
                decoder.keep([4, 1])
        assert ours.lengths == plain.lengths
        assert near(ours.logits_BV, plain.logits_BV)
        tokens = [5 + (number + row) % 7 for row in range(len(ours))]
        for decoder in decoders:
            decoder.step(tokens)
        assert ours._static is not None, "the step did not run in static memory"
    assert ours.num_bytes == plain.num_bytes


@torch.inference_mode()
def test_two_decoders_share_static_memory_without_mixing(model, monkeypatch):
    monkeypatch.setattr(steps, "MIN_COLUMNS", 16)
    pool = StepPool(model, patience=1)
    pairs = [(BatchDecoder(model, pool), BatchDecoder(model)) for _ in range(2)]
    for number, pair in enumerate(pairs):
        for decoder in pair:
            decoder.prefill([row[::-1] if number else row for row in ROWS])
    for token in (5, 9, 12):
        for ours, plain in pairs:
            for decoder in (ours, plain):
                decoder.step([token] * len(ROWS))
            assert near(ours.logits_BV, plain.logits_BV)
    assert len(pool._steps.kept) == 1


@torch.inference_mode()
def test_memory_that_longer_rows_have_left_shows_nothing_of_them(model, monkeypatch):
    monkeypatch.setattr(steps, "MIN_COLUMNS", 32)
    pool = StepPool(model, patience=1)
    for rows in ([[7] * 20, [9] * 18], [[5, 6], [8]]):
        decoders = BatchDecoder(model, pool), BatchDecoder(model)
        for decoder in decoders:
            decoder.prefill(rows)
        for token in (5, 9, 12):
            for decoder in decoders:
                decoder.step([token] * len(rows))
            assert near(*(decoder.logits_BV for decoder in decoders))
    assert len(pool._steps.kept) == 1, "the memory was not taken up again"


@torch.inference_mode()
def test_a_shape_is_captured_when_it_is_worth_it_and_few_are_kept(model):
    pool = StepPool(model, patience=3)
    decoder = BatchDecoder(model, pool)
    decoder.prefill(ROWS[:1])
    captured = []
    for _ in range(4):
        decoder.step([5])
        captured.append(decoder._static is not None)
    assert captured == [False, False, True, True]
    for rows in range(2, 40):
        decoder.prefill([[6, 7]])
        for _ in range(3):
            decoder.step([5] * rows)
    assert len(pool._steps.kept) == MAX_CAPTURED


@pytest.mark.parametrize("switch", ["reprefill", "catch-up"])
def test_generations_are_the_same(family, switch, monkeypatch):
    options = {"thinking_budget": 9, "grace": 3, "max_new_tokens": 40, "switch": switch}
    expected = family.generate(PROMPTS, think="small", answer="large", **options)
    made = []
    monkeypatch.setattr(
        engine, "pool_for", lambda model: made.append(StepPool(model, 1)) or made[-1]
    )
    monkeypatch.delitem(vars(family), "generator")
    results = family.generate(PROMPTS, think="small", answer="large", **options)
    assert [r.token_ids for r in results] == [r.token_ids for r in expected]
    assert all(pool._steps.kept for pool in made)


def test_a_step_that_cannot_be_captured_is_run_without(model, monkeypatch):
    def fail(self):
        raise RuntimeError("this operation waits for the CPU")

    monkeypatch.setattr(steps.StaticStep, "__init__", lambda self, *rest: fail(self))
    decoder = BatchDecoder(model, StepPool(model, patience=1))
    with torch.inference_mode():
        decoder.prefill(ROWS)
        for _ in range(3):
            decoder.step([5] * len(ROWS))
    assert decoder._static is None
    assert decoder.lengths == [len(row) + 3 for row in ROWS]


def test_no_static_steps_where_nothing_is_gained(family):
    assert pool_for(family["small"]) is None  # on the CPU, and for experts in fp32 anywhere
