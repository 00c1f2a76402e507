"""Choice by difficulty, calibrated: the dial, on made-up entropies and on a tiny family."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from star_elastic.errors import ConfigError
from star_elastic.evaluate import difficulty
from star_elastic.evaluate.difficulty import (
    ALWAYS_LARGE,
    Dial,
    Readings,
    calibrate,
    deciding_entropies,
    read_texts,
    write_texts,
)
from star_elastic.evaluate.tasks import Problem
from star_elastic.generate.decode import entropies
from star_elastic.generate.phases import THINKING, ByDifficulty, think_and_answer
from tests.thinking import make_sequence
from tests.tiny_family import CLOSE, EOS, NEWLINE, PROMPTS, TAGS

LOOKS = st.sampled_from(["token", "line"])


@st.composite
def readings(draw) -> Readings:
    """Tokens with entropies that never tie, lines and phases of any length, the first of both."""
    count = draw(st.integers(2, 60))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    begins_line = rng.random(count) < draw(st.sampled_from([0.1, 0.4]))
    begins_stretch = begins_line | (rng.random(count) < 0.1)
    begins_line[0] = begins_stretch[0] = True
    entropy = rng.permutation(count) / count + rng.random()
    return Readings(entropy, rng.random(count) < 0.3, begins_line, begins_stretch)


@given(readings(), LOOKS, st.lists(st.floats(0, 1), min_size=2, max_size=8))
def test_turning_the_dial_up_leaves_more_to_the_large_size(found, look, positions):
    dials = calibrate(found, sorted(positions), look)
    for before, after in itertools.pairwise(dials):
        assert after.threshold <= before.threshold
        assert after.token_share >= before.token_share
        assert after.line_share >= before.line_share
        assert (after.recall or 0) >= (before.recall or 0)


@given(readings(), LOOKS)
def test_the_ends_of_the_dial_are_exact(found, look):
    nothing, everything = calibrate(found, [0, 1], look)
    assert (nothing.threshold, nothing.token_share, nothing.line_share) == (math.inf, 0, 0)
    assert everything.threshold == ALWAYS_LARGE and everything.line_share == 1
    if look == "token":
        assert everything.token_share == 1
    assert (nothing.recall, everything.recall) == (None, None) or (
        nothing.recall == 0 and (everything.recall == 1 or look == "line")
    )


@given(readings(), LOOKS, st.floats(0, 1))
def test_the_dial_is_the_share_that_the_large_size_writes(found, look, position):
    (dial,) = calibrate(found, [position], look)
    if look == "line":
        assert abs(dial.line_share - position) <= 0.5 / found.begins_line.sum() + 1e-9
        return
    # All tokens of a line from its most uncertain one on have one deciding entropy.
    deciding = np.sort(deciding_entropies(found, look))[::-1]
    ties = max(np.unique(deciding, return_counts=True)[1])
    assert position - (ties + 0.5) / len(deciding) <= dial.token_share
    assert dial.token_share <= position + 0.5 / len(deciding) + 1e-9


@given(st.data(), LOOKS)
def test_the_large_size_writes_what_its_rule_says(data, look):
    """The entropies that decide are those of the real state machine."""
    tokens = data.draw(st.lists(st.sampled_from([5, 6, NEWLINE]), min_size=1, max_size=12))
    tokens += [CLOSE, *data.draw(st.lists(st.sampled_from([7, NEWLINE]), max_size=8)), EOS]
    unsure = data.draw(
        st.lists(st.floats(0, 2), min_size=len(tokens), max_size=len(tokens), unique=True)
    )
    prompt = [5, 6, data.draw(st.sampled_from([7, NEWLINE]))]
    threshold = data.draw(st.sampled_from([*unsure, -1.0, math.inf]))
    policy = ByDifficulty(small="small", large="large", threshold=threshold, look=look)
    plan = think_and_answer(policy, policy)
    sequence = make_sequence(plan, TAGS, ids=prompt, ends=[EOS])
    for token, entropy in zip(tokens, unsure, strict=True):
        if sequence.looks:
            sequence.defer(entropy)
        sequence.accept(token)
    assert sequence.is_done
    before = [prompt[-1], *tokens[:-1]]
    begins_line = np.array([token == NEWLINE for token in before])
    begins_turn = np.array([place in (0, tokens.index(CLOSE) + 1) for place in range(len(tokens))])
    found = Readings(np.array(unsure), begins_line, begins_line, begins_line | begins_turn)
    is_large = deciding_entropies(found, look) > threshold
    assert [size == "large" for size in sequence.writers] == is_large.tolist()


def test_recall_counts_the_differing_tokens_that_the_large_size_writes():
    """Three lines; the small size is unsure in the middle of the second."""
    line = np.array([1, 0, 0, 1, 0, 0, 1, 0, 0], bool)
    entropy = np.array([0.1, 0.2, 0.1, 0.1, 0.9, 0.1, 0.3, 0.1, 0.1])
    differs = np.array([0, 0, 1, 1, 0, 1, 0, 1, 0], bool)
    found = Readings(entropy, differs, line, line)
    (dial,) = calibrate(found, [2 / 9])
    assert 0.3 < dial.threshold < 0.9
    assert dial.token_share == pytest.approx(2 / 9)
    assert (dial.line_share, dial.recall) == (pytest.approx(1 / 3), 0.25)
    (dial,) = calibrate(found, [1 / 3], "line")
    assert (dial.token_share, dial.line_share, dial.recall) == (
        pytest.approx(1 / 3),
        pytest.approx(1 / 3),
        0.25,
    )
    assert calibrate(Readings(entropy, differs & False, line, line), [0.5])[0].recall is None
    for position in (-0.1, 1.1, math.nan):
        with pytest.raises(ConfigError, match="does not lie between 0 and 1"):
            calibrate(found, [position])


def test_dials_are_kept_as_json():
    line = np.array([True, False])
    for dial in calibrate(Readings(np.array([0.1, 0.2]), line, line, line), [0, 0.5, 1]):
        assert Dial.from_json(dial.to_json()) == dial


@torch.no_grad()
def test_texts_are_read_as_one_forward_per_text_reads_them(family, monkeypatch):
    """Whatever the batch, the padding and the part of the logits that is made at a time."""
    problems = [Problem("sums", prompt, (), "1") for prompt in PROMPTS]
    generator = family.generator
    texts = write_texts(generator, problems, "large", max_new_tokens=25)
    plain = generator.generate(PROMPTS, think_and_answer("large", "large", max_new_tokens=25))
    for text, generation in zip(texts, plain, strict=True):
        assert text.ids[generation.prompt_tokens :] == generation.token_ids
        assert text.num_trace == generation.token_parts.count(THINKING)
    assert len({len(text.ids) for text in texts}) > 1
    unsure, differs = [], []
    for text in texts:
        ids, places = torch.tensor([text.ids]), [place - 1 for place in text.chosen]
        small, large = (family[size](ids).logits[0, places] for size in ("small", "large"))
        unsure += entropies(small)
        differs += (small.argmax(-1) != large.argmax(-1)).tolist()
        assert large.argmax(-1).tolist() == [text.ids[place] for place in text.chosen]
    assert True in differs and False in differs
    for batch_size, max_bytes in ((64, 1 << 20), (4, 1000)):
        monkeypatch.setattr(difficulty, "MAX_LOGITS_BYTES", max_bytes)
        found = read_texts(generator, texts, "small", "large", batch_size=batch_size)
        np.testing.assert_allclose(found.entropy, unsure, atol=1e-4)
        assert found.differs.tolist() == differs
        starts = np.cumsum([0, *(len(text.chosen) for text in texts[:-1])])
        expected = {*starts, *np.flatnonzero(found.begins_line)}
        begun = set(np.flatnonzero(found.begins_stretch))
        # Beside these only the answer of a text, which a policy begins with the small size.
        assert expected <= begun
        assert len(begun - expected) <= len(texts)
