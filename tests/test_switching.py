"""Sizes in turn: whatever is cached and batched, the tokens are those of no cache at all."""

from __future__ import annotations

import json
import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import star_elastic
from star_elastic.architectures import architecture_of, read_config
from star_elastic.checkpoints.manifest import Manifest, Size, save_manifest
from star_elastic.cost.count import Workload
from star_elastic.errors import BudgetError, ConfigError
from star_elastic.generate.caches import HandOver, take_row
from star_elastic.generate.decode import BatchDecoder, choose_tokens, entropies
from star_elastic.generate.engine import Generator
from star_elastic.generate.phases import (
    ANSWERING,
    THINKING,
    ByDifficulty,
    Generation,
    Phase,
    Plan,
    Sampling,
    Token,
    think_and_answer,
)
from star_elastic.generate.prompts import ThinkingTags
from star_elastic.generate.sequence import Request
from star_elastic.generate.text import TextStream
from star_elastic.nesting.slice import slice_tensor
from tests.thinking import PLAIN, make_sequence, one, parts_streamed, table_generator
from tests.thinking import make_tokenizer as make_byte_tokenizer
from tests.tiny_family import (
    ALWAYS_THINKS,
    END,
    EOS,
    NEWLINE,
    PROMPTS,
    TAGS,
    make_config,
    make_model,
    make_tokenizer,
    play,
)

BACK_AND_FORTH = (
    Phase(size="large", until="budget", budget=5, grace=0),
    Phase(size="small", until="budget", budget=4, grace=3),
    Phase(size="large", until="line", budget=6, grace=2),
    Phase(size="small", until="end_of_thinking", budget=7, grace=2),
    Phase(size="large", until="line", budget=5, grace=0),
    Phase(size="small"),
)
PLANS = {
    "pair": think_and_answer("small", "large", thinking_budget=7, grace=5, max_new_tokens=30),
    "other pair": think_and_answer("large", "small", thinking_budget=3, grace=4, max_new_tokens=30),
    "back and forth": Plan(BACK_AND_FORTH, max_new_tokens=46),
}


def by_difficulty(threshold: float, look: str = "token") -> ByDifficulty:
    return ByDifficulty(small="small", large="large", threshold=threshold, look=look)


@pytest.fixture(scope="module")
def threshold(family) -> float:
    """The median of the small size's entropies over its own texts."""
    found = []
    for result in family.generate(PROMPTS, think="small", thinking_budget=20):
        with torch.no_grad():
            found += entropies(family["small"](torch.tensor([result.token_ids])).logits[0])
    return statistics.median(found)


@pytest.fixture(scope="module")
def plans(threshold) -> dict[str, Plan]:
    by_token, by_line = by_difficulty(threshold), by_difficulty(threshold, "line")
    return {
        **PLANS,
        "by difficulty": think_and_answer(by_token, "large", max_new_tokens=30),
        "by the line": think_and_answer(
            by_line, by_line, thinking_budget=12, grace=4, max_new_tokens=40
        ),
    }


def switching(plan: Plan, switch) -> Plan:
    return Plan(plan.phases, plan.max_new_tokens, switch, plan.stop)


@torch.no_grad()
def without_caches(
    family, plan: Plan, sampling: Sampling, seed: int, texts: list[list[int]]
) -> list[list[int]]:
    """The tokens of a generation without any cache, row by row.

    `texts`: what a generation has written to each prompt. Every size reads prompt and text at once,
    in one forward. Its logits at a token are those of the tokens up to there, so they are what the
    next one is chosen from, up to the first token that is not the text's.
    """
    found = []
    for index, (prompt, text) in enumerate(zip(PROMPTS, texts, strict=True)):
        request = Request(prompt=prompt, plan=plan, sampling=sampling, seed=f"{seed}/{index}")
        sequence = family.generator.open(request)
        ids = [*sequence.ids, *text]
        logits_TV = {size: family[size](torch.tensor([ids])).logits[0].float() for size in family}
        while not sequence.is_done and sequence.ids == ids[: len(sequence.ids)]:
            logits_1V = logits_TV[sequence.size][len(sequence.ids) - 1][None]
            if sequence.looks and sequence.defer(entropies(logits_1V)[0]):
                continue
            sequence.accept(choose_tokens(logits_1V, sampling, [sequence.generator])[0])
        found.append(sequence.ids[sequence.num_prompt :])
    return found


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.8, 0.9)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", [*PLANS, "by difficulty", "by the line"])
def test_cached_and_batched_equals_reading_all_anew(family, plans, name, sampling):
    """Law 8, for every kind of plan: phases end raggedly and in the middle of lines."""
    plan = plans[name]
    expected = None
    options = {"temperature": sampling.temperature, "top_p": sampling.top_p, "seed": 5}
    for switch, batch_size in (("reprefill", 4), ("catch-up", 4), ("catch-up", 64)):
        results = family.generator.generate(
            PROMPTS, switching(plan, switch), batch_size=batch_size, **options
        )
        texts = [list(result.token_ids) for result in results]
        expected = expected or without_caches(family, plan, sampling, 5, texts)
        assert texts == expected
        for result in results:
            check_account(result, switch)
    sizes = {size for result in results for size in result.token_sizes} - {None}
    assert sizes == set(plan.sizes), "one of the sizes never wrote anything"


def check_account(result: Generation, switch: str) -> None:
    """Every size has read each token at most once between rereadings, and knew those before."""
    known: dict[str, int] = {}
    for read in result.reads:
        start = 0 if switch == "reprefill" and read.at_once else known.get(read.size, 0)
        assert read.start == start
        known[read.size] = start + read.tokens
    num = result.prompt_tokens + len(result.token_ids)
    assert max(known.values()) in (num - 1, num)
    assert sum(phase.tokens for phase in result.phases) + result.closing_tokens == len(
        result.token_ids
    )
    for phase in result.phases:
        assert phase.tokens == sum(phase.by_size.values())
    handed = [h for phase in result.phases for h in phase.handed]
    assert handed[0].how == "fresh"
    assert {h.how for h in handed[1:]} <= {switch, "reprefill"}
    if switch == "catch-up":  # only a size that comes for the first time reads everything
        assert sum(h.how != switch for h in handed) == len(known)


@torch.no_grad()
def test_ragged_catch_up_equals_reading_all_anew(family):
    """Rows that have missed 1, 4, 4 and 7 tokens, beside rows that were there and that are new."""
    rows = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14], [6], [9, 9, 5, 8]]
    missed = [[9], [5, 6, 7, 8, 9, 10, 11], [5, 6, 7, 8], [7, 7, 8, 10]]
    for size in family:
        model = family[size]
        before = BatchDecoder(model)
        before.prefill(rows)
        kept = [(before.take(row), len(rows[row]), missed[row]) for row in range(4)]
        decoder = BatchDecoder(model)
        decoder.prefill([[5, 5, 6]])
        assert decoder.resume(kept) == [0, 2, 3, 1]  # the fewest tokens first
        decoder.prefill([[7] * 15])
        ends = [rows[row] + missed[row] for row in (0, 2, 3, 1)]
        texts = [[5, 5, 6], *ends, [7] * 15]
        for token in (5, 12, 9):
            assert decoder.lengths == list(map(len, texts))
            for place, text in enumerate(texts):
                expected = model(torch.tensor([text])).logits[0, -1]
                off = (decoder.logits_BV[place] - expected).abs().max()
                assert off < 1e-4 * expected.abs().max()
                text.append(token)
            decoder.step([token] * len(texts))
        decoder.keep([])
        assert len(decoder) == decoder.num_bytes == 0


def test_catch_up_reads_only_what_was_missed(family):
    """Switching back and forth costs in sum what reading everything once in each size costs."""
    turns = [Phase(size=s, until="budget", budget=3, grace=0) for s in ("large", "small") * 4]
    trace = Phase(size="large", until="end_of_thinking", budget=3, grace=0)
    phases = (*turns, trace, Phase(size="large"))
    results = (
        family.generator.generate(PROMPTS, Plan(phases, 60, switch))
        for switch in ("catch-up", "reprefill")
    )
    # The text in which the sizes take the most turns: others end before.
    caught_up, anew = max(
        zip(*results, strict=True), key=lambda both: sum(len(p.handed) for p in both[0].phases)
    )
    assert caught_up.token_ids == anew.token_ids
    for size in ("large", "small"):
        reads = [read for read in caught_up.reads if read.size == size]
        assert sum(read.tokens for read in reads) == reads[-1].start + reads[-1].tokens
    known = [h for phase in caught_up.phases for h in phase.handed if h.how == "catch-up"]
    assert len(known) >= 5
    # Three tokens of the other size, and its own last one; fewer where a trace was closed.
    assert {h.read for h in known[:-1]} == {4}
    assert known[-1].read <= 4
    assert sum(r.tokens for r in anew.reads) > 2 * sum(r.tokens for r in caught_up.reads)


def test_cache_bytes_are_those_of_the_states(family):
    """One row: exactly the states of each size at the context it has read."""
    trace = Phase(size="small", until="end_of_thinking", budget=4, grace=0)
    back = Plan((Phase(size="large", until="budget", budget=3, grace=0), trace,
                 Phase(size="large")), 25, "catch-up")  # fmt: skip
    (result,) = family.generator.generate(PROMPTS[0], back)
    known: dict[str, int] = {}
    for read in result.reads:
        known[read.size] = read.start + read.tokens
    states = {
        size: family.cost(size, Workload(context=context, batch=1, dtype_bytes=4)).state_bytes
        for size, context in known.items()
    }
    # The large size goes on after the small one, whose cache nobody needs then.
    large_before = family.cost(
        "large", Workload(context=result.reads[0].tokens + 2, batch=1, dtype_bytes=4)
    ).state_bytes
    assert result.cache_bytes == max(large_before + states["small"], states["large"])
    (alone,) = family.generator.generate(PROMPTS[0], switching(back, "reprefill"))
    assert alone.cache_bytes == max(states.values()) < result.cache_bytes


# --- hand-over -------------------------------------------------------------------------------


def test_hand_over_between_equal_sizes_is_exact(family):
    model = family["large"]
    twins = Generator(
        {"small": model, "large": model}, family.tokenizer, family.table.end_of_thinking,
        lambda giver, taker: HandOver(family.axis_map, family.axis_map.full, family.axis_map.full),
    )  # fmt: skip
    exact, handed = (
        twins.generate(PROMPTS, switching(PLANS["back and forth"], switch), compare=True)
        for switch in ("catch-up", "hand-over")
    )
    assert [r.token_ids for r in exact] == [r.token_ids for r in handed]
    switches = [h for r in handed for p in r.phases for h in p.handed if h.how == "hand-over"]
    assert switches
    assert all(abs(h.divergence) < 1e-5 for h in switches)
    assert all(h.divergence is None for r in exact for p in r.phases for h in p.handed)


def test_hand_over_between_sizes_is_approximate_and_says_so(family):
    plan = switching(PLANS["back and forth"], "hand-over")
    results = family.generator.generate(PROMPTS, plan, compare=True)
    switches = [h for r in results for p in r.phases for h in p.handed if h.how == "hand-over"]
    assert max(h.divergence for h in switches) > 1e-3
    assert all(h.divergence > -1e-5 for h in switches)
    for result in results:
        assert len(result.token_ids) <= 46
        assert all(h.read < 10 for p in result.phases for h in p.handed[1:])
    by_default = family.generator.generate(PROMPTS, plan)
    assert [r.token_ids for r in by_default] == [r.token_ids for r in results]
    assert {h.divergence for r in by_default for p in r.phases for h in p.handed} == {None}


def test_a_hand_over_that_cannot_be_is_refused_before_any_work(tmp_path):
    """A layer that only the taker has. The other way round it works."""
    tokenizer = make_tokenizer()
    config = make_config("nemotron_h", len(tokenizer))
    make_model(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    table = architecture_of(read_config(tmp_path)).axis_map(read_config(tmp_path))
    shallow = table.complete({"layers": (1, 1, 1, 0)})
    save_manifest(
        Manifest("nemotron_h", {}, {"large": Size(table.full), "small": Size(shallow)}), tmp_path
    )
    family = star_elastic.load(tmp_path)
    options = {"thinking_budget": 4, "grace": 0, "max_new_tokens": 20, "switch": "hand-over"}
    with pytest.raises(ConfigError, match="layer 3 remembers something in one of the sizes only"):
        family.generator.stream(PROMPTS, family.plan("small", "large", **options))
    for result in family.generate(PROMPTS, think="large", answer="small", **options):
        answering = result.phase(ANSWERING)
        assert answering is None or answering.handed[0].how == "hand-over"


def test_heads_are_mapped_by_the_axis_map():
    """A wide size's states, handed to a narrow one, are the slices; back, the rest is empty."""
    tokenizer = make_tokenizer()
    config = make_config("nemotron_h", len(tokenizer))
    table = architecture_of(config.to_dict()).axis_map(config.to_dict())
    narrow = table.complete({"ssm_heads": 2})
    decoder = BatchDecoder(make_model(config))
    with torch.no_grad():
        decoder.prefill([[5, 6, 7, 8]])
    wide_row = take_row(decoder._cache, 0, 4)
    down = HandOver(table, table.full, narrow)(wide_row)
    back = HandOver(table, narrow, table.full)(down)
    specs = {(state.layer, state.name): state for state in table.states}
    mamba = [(i, layer) for i, layer in enumerate(wide_row.layers) if (i, "ssm") in specs]
    assert len(mamba) == 2
    for number, layer in mamba:
        cut = down.layers[number]
        kept = slice_tensor(layer.first[0], specs[number, "conv"].dims, narrow)
        assert torch.equal(cut.first[0], kept)
        assert cut.second.shape == (1, 2, 8, 8)
        assert torch.equal(cut.second, layer.second[:, [0, 2]])  # the first head of each group
        again = back.layers[number]
        assert torch.equal(again.second[:, [0, 2]], layer.second[:, [0, 2]])
        assert again.second[:, [1, 3]].abs().max() == 0
        assert again.first.shape == layer.first.shape
    attention = next(
        i for i, layer in enumerate(wide_row.layers) if layer and layer.kind != "mamba"
    )
    assert down.layers[attention] is wide_row.layers[attention]
    shallow = table.complete({"layers": (1, 1, 1, 0)})
    assert len(HandOver(table, table.full, shallow)(wide_row).layers) == 3
    with pytest.raises(ConfigError, match="layer 3 remembers something in one of the sizes only"):
        HandOver(table, shallow, table.full)


# --- a choice by difficulty ------------------------------------------------------------------


def test_the_dial_reaches_from_always_small_to_always_large(family, threshold):
    median = threshold
    plans = {
        threshold: think_and_answer(
            by_difficulty(threshold),
            "large",
            thinking_budget=12,
            grace=0,
            max_new_tokens=30,
        )
        for threshold in (math.inf, median + 0.1, median - 0.1, -1.0)
    }
    shares = []
    for plan in plans.values():
        results = family.generator.generate(PROMPTS, plan)
        traces = [result.phase(THINKING) for result in results]
        total = sum(trace.tokens for trace in traces)
        shares.append(sum(trace.by_size.get("large", 0) for trace in traces) / total)
    assert shares[0] == 0
    assert shares[-1] == 1
    assert shares == sorted(shares)
    for threshold, size in ((math.inf, "small"), (-1.0, "large")):
        alone = family.generate(
            PROMPTS, think=size, answer="large", thinking_budget=12, grace=0, max_new_tokens=30
        )
        mixed = family.generator.generate(PROMPTS, plans[threshold])
        assert [r.token_ids for r in alone] == [r.token_ids for r in mixed]


# --- streams, stop strings, sampling ---------------------------------------------------------


def test_streamed_tokens_are_the_generation(family):
    plan = switching(PLANS["back and forth"], "catch-up")
    expected = family.generator.generate(PROMPTS, plan)
    events = list(family.generator.stream(PROMPTS, plan))
    results = [event for event in events if isinstance(event, Generation)]
    tokens = [event for event in events if isinstance(event, Token)]
    assert sorted(r.token_ids for r in results) == sorted(r.token_ids for r in expected)
    for index, result in enumerate(expected):
        own = [token for token in tokens if token.index == index]
        assert tuple(token.id for token in own) == result.token_ids
        assert tuple(token.size for token in own) == result.token_sizes
        assert "".join(token.text for token in own) == result.text
        told = [phase for phase, _ in parts_streamed(own)]
        assert told == [ANSWERING if p == ANSWERING else THINKING for p in result.token_parts]
    stream = family.generator.stream(PROMPTS, plan)
    assert isinstance(next(stream), Token)
    stream.close()


@pytest.mark.parametrize("thinking_budget", [0, 6])
def test_stop_strings_end_a_sequence_wherever_they_are_written(family, thinking_budget):
    options = {"think": "small", "answer": "large", "thinking_budget": thinking_budget,
               "grace": 2, "max_new_tokens": 30}  # fmt: skip
    ended = set()
    for free in family.generate(PROMPTS[:1], **options):
        spoken = [i for i in free.token_ids if i != EOS]
        for stop in {TAGS.decode(spoken[i : i + 2]) for i in range(min(len(spoken) - 1, 6))}:
            if "<" in stop or ">" in stop:
                continue  # may be written by an injected end of thinking
            results = family.generate(PROMPTS, stop=(stop,), **options)
            ended |= {result.phases[-1].ended for result in results}
            for prompt, result in zip(PROMPTS, results, strict=True):
                assert stop not in result.thinking
                assert stop not in result.answer
                written = TAGS.decode([i for i in result.token_ids if i != EOS])
                if result.phases[-1].ended == "stop_string":
                    assert stop in written, (prompt, stop)
            plan = think_and_answer(
                "small", "large", thinking_budget=thinking_budget, grace=2, max_new_tokens=30,
                stop=(stop,),
            )  # fmt: skip
            streamed = [""] * len(PROMPTS)
            for event in family.generator.stream(PROMPTS, plan):
                if isinstance(event, Token):
                    streamed[event.index] += event.text
            assert streamed == [result.text for result in results]
    assert "stop_string" in ended


def test_a_stop_string_may_take_several_tokens_a_letter():
    tags = ThinkingTags(make_byte_tokenizer(), END)
    plan = think_and_answer("s", "s", thinking_budget=0, stop=["終わり"])
    sequence = make_sequence(plan, tags)
    for token in tags.encode("ab終わり"):
        assert not sequence.is_done
        sequence.accept(token)
    assert sequence.is_done and sequence.result().answer == "ab"


@pytest.mark.parametrize("ends", ["b", ["b"], ["z", "b"], None])
def test_a_turn_ends_at_what_the_model_says_ends_it(ends):
    """At the tokenizer's own end, and at any that generation_config.json names."""
    generator = table_generator({"\n": "a", "a": "b", "b": "c"}, PLAIN)
    ids = {text: one(generator.tokenizer, text) for text in "abcz"}
    settings = generator.models["small"].generation_config
    settings.eos_token_id = [ids[e] for e in ends] if type(ends) is list else ids.get(ends)
    plan = think_and_answer("small", "small", max_new_tokens=6)
    (result,) = generator.generate("q", plan)
    assert result.phases[-1].ended == "natural"
    assert result.answer == ("abc" if ends is None else "a")


def test_an_end_of_thinking_that_the_prompt_leaves_open_is_streamed():
    """Where the template always opens the tag, no thinking means to close it at once."""
    tokenizer = make_tokenizer(ALWAYS_THINKS)
    model = make_model(make_config("llama", len(tokenizer)))
    generator = Generator({"m": model}, tokenizer, END)
    *tokens, result = generator.stream(
        "1+2", think_and_answer("m", "m", thinking_budget=0, max_new_tokens=9)
    )
    assert tuple(token.id for token in tokens) == result.token_ids
    assert "".join(token.text for token in tokens) == result.text
    assert [token.size for token in tokens[:2]] == [None, None]


def test_the_first_stop_string_in_the_text_ends_it():
    """Whatever the order of the list, also where one token holds both."""
    for stops in (("b", "a"), ("a", "b")):
        stream = TextStream(lambda ids: "".join("xab"[i % 3] * 1 for i in ids), stops)
        assert "".join([stream.push([0]), stream.push([1]), stream.flush()]) == "x"
        whole = TextStream(lambda ids: "xab" * len(ids), stops)
        assert whole.push([0]) + whole.flush() == "x"


@given(
    text=st.text(alphabet="ab\n\u00e9\u6f22\U0001f600", max_size=30),
    stops=st.lists(st.text(alphabet="ab\u00e9", min_size=1, max_size=3), max_size=2),
)
def test_pieces_of_a_stream_are_the_text_up_to_a_stop_string(text, stops):
    """Tokens of one byte each: most of them are less than a character."""
    stream = TextStream(lambda ids: bytes(ids).decode("utf-8", errors="replace"), stops)
    pieces = [stream.push([byte]) for byte in text.encode()]
    first = min((text.find(stop) for stop in stops if stop in text), default=len(text))
    assert "".join([*pieces, stream.flush()]) == text[:first]
    assert all("\ufffd" not in piece for piece in pieces)


def test_top_p_draws_from_the_likeliest_only():
    logits = torch.tensor([[0.1, 0.5, 0.15, 0.25]]).log().expand(4000, -1)
    for top_p, allowed in ((0.5, {1}), (0.6, {1, 3}), (0.75, {1, 3}), (0.76, {1, 2, 3})):
        generators = [torch.Generator().manual_seed(i) for i in range(4000)]
        tokens = choose_tokens(logits, Sampling(1.0, top_p), generators)
        assert set(tokens) == allowed
    shares = torch.bincount(torch.tensor(tokens), minlength=4) / 4000
    assert torch.allclose(shares, torch.tensor([0, 0.5, 0.15, 0.25]) / 0.9, atol=0.03)


# --- phases ----------------------------------------------------------------------------------


def test_phases_end_by_line_and_by_budget():
    plan = Plan((
        Phase(size="a", until="line", budget=9, grace=0),
        Phase(size="b", until="budget", budget=2, grace=0),
        Phase(size="c", until="end_of_thinking", budget=2, grace=0),
        Phase(size="d", budget=3, grace=1),
    ), max_new_tokens=30)  # fmt: skip
    result = play([9, 8, NEWLINE, *[7] * 9], plan)
    assert [(p.name, p.size, p.tokens, p.ended) for p in result.phases] == [
        (THINKING, "a", 3, "natural"),
        (THINKING, "b", 2, "cut"),
        (THINKING, "c", 2, "cut"),
        (ANSWERING, "d", 4, "cut"),
    ]
    assert result.token_sizes == (*"aaabbcc", *[None] * result.closing_tokens, *"dddd")


def test_a_trace_closed_early_goes_on_with_the_answer():
    close = TAGS.encode("</think>")[0]
    result = play([9, close, 8, EOS], Plan(BACK_AND_FORTH, max_new_tokens=46))
    assert [(p.name, p.size, p.tokens, p.ended) for p in result.phases] == [
        (THINKING, "large", 1, "natural"),
        (ANSWERING, "large", 2, "natural"),
    ]


def test_a_closing_tag_split_over_two_phases_is_given_back_by_both():
    tags = ThinkingTags(make_tokenizer(tags=False), END)
    plan = Plan((
        Phase(size="a", until="budget", budget=5, grace=0),
        Phase(size="b", until="end_of_thinking"),
        Phase(size="c"),
    ), 40)  # fmt: skip
    sequence = make_sequence(plan, tags)
    for token in tags.encode("12</think>"):
        sequence.accept(token)
    result = sequence.result()
    assert [(p.size, p.tokens, p.by_size) for p in result.phases] == [
        ("a", 2, {"a": 2}),
        ("b", 0, {}),
    ]
    assert result.closing_tokens == 8


def test_results_are_json(family):
    (result,) = family.generator.generate(PROMPTS[0], PLANS["back and forth"])
    content = json.loads(json.dumps(result.to_json()))
    assert content["token_sizes"] == list(result.token_sizes)
    assert content["phases"][0]["handed"][0]["how"] == "fresh"
    assert sum(read["tokens"] for read in content["reads"]) == sum(r.tokens for r in result.reads)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Plan(()), ConfigError, "the plan has no end"),
        (lambda: Plan(BACK_AND_FORTH[:-1]), ConfigError, "the plan has no end"),
        (lambda: Plan((Phase(size="a"), Phase(size="a"))), ConfigError, "2 phases until="),
        (
            lambda: Plan((Phase(size="a", until="line"), BACK_AND_FORTH[3], Phase(size="a"))),
            BudgetError, "give every phase before it a budget",
        ),
        (lambda: Phase(size="a", until="soon"), ConfigError, "until='soon' is unknown"),
        (lambda: Phase(size="a", until="budget"), BudgetError, "has no end; give it a budget"),
        (lambda: Phase(size="a", budget=0), BudgetError, "budget=0 is not a number"),
        (lambda: Phase(size="a", budget=-3), BudgetError, "budget=-3 is not a number"),
        (lambda: think_and_answer("a", "b", switch="magic"), ConfigError, "switch='magic'"),
        (lambda: think_and_answer("a", "b", stop=[""]), ConfigError, "leave out empty ones"),
        (
            lambda: think_and_answer(by_difficulty(1.0), "a", switch="hand-over"),
            ConfigError, "use switch='catch-up'",
        ),
        (
            lambda: ByDifficulty(small="a", large="a", threshold=1.0),
            ConfigError, "'a' is named twice",
        ),
        (
            lambda: ByDifficulty(small="a", large="b", threshold=math.nan),
            ConfigError, "threshold=nan is not a number",
        ),
        (lambda: Sampling(top_p=0.0), ConfigError, r"top_p=0.0 is not in \(0, 1\]"),
    ],
)  # fmt: skip
def test_mistakes_in_plans_are_told_in_one_line(make, error, message):
    with pytest.raises(error, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_mistakes_of_running_a_plan(family):
    plan = think_and_answer("small", "large", thinking_budget=1_000_000)
    with pytest.raises(BudgetError, match="after 1000032 of .* use budgets and grace of 36[0-9] i"):
        family.generator.generate("1+2", plan)
    strangers = Generator(dict(family), family.tokenizer, family.table.end_of_thinking)
    with pytest.raises(ConfigError, match="not sizes of one family"):
        strangers.generate("1+2", switching(PLANS["pair"], "hand-over"))
    with pytest.raises(ConfigError, match="size 'huge' is not in this family"):
        family.generator.stream("1+2", think_and_answer("huge", "large"))
