"""Elastic budget control: budgets to the token, exact hand-over, batches that change nothing."""

import inspect
import json
import shutil
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import star_elastic
from star_elastic.cost.count import CostModel
from star_elastic.errors import BudgetError, CheckpointError, ConfigError
from star_elastic.generate.decode import BatchDecoder, choose_tokens, pads_exactly
from star_elastic.generate.engine import Generator, Options
from star_elastic.generate.phases import (
    ANSWERING,
    TAG,
    THINKING,
    Generation,
    Sampling,
    think_and_answer,
)
from star_elastic.generate.prompts import Tag, ThinkingTags
from tests.thinking import make_sequence
from tests.tiny_family import (
    ALWAYS_THINKS,
    CLOSE,
    END,
    EOS,
    LEAVES_TAG_TO_MODEL,
    NEVER_THINKS,
    NEWLINE,
    PROMPTS,
    TAGS,
    TEMPLATE,
    TOKENIZER,
    make_checkpoint,
    make_config,
    make_model,
    make_tokenizer,
    play,
)


@torch.no_grad()
def greedy_choices(model, ids, start: int) -> list[int]:
    """What greedy decoding would choose at each position from `start` on, given those before.

    One forward over the whole text, without cache, padding or batch: it equals `ids[start:]` only
    if every one of these tokens was the greedy choice.
    """
    return model(torch.tensor([ids])).logits[0, start - 1 : -1].argmax(-1).tolist()


def split_ids(result: Generation):
    """(trace, first end of thinking, what follows) of the new token ids."""
    ids, sizes = list(result.token_ids), result.token_sizes
    if TAG not in result.token_parts:
        return ids, [], []
    start = result.token_parts.index(TAG)
    end = start + 1
    while sizes[start] is None and sizes[end : end + 1] == (None,):
        end += 1
    return ids[:start], ids[start:end], ids[end:]


def assert_greedy(family, prompt_ids: list[int], result: Generation) -> None:
    """Every token that a size has written is its own choice after all tokens before it."""
    ids, start = [*prompt_ids, *result.token_ids], len(prompt_ids)
    for size in set(result.token_sizes) - {None}:
        chosen = greedy_choices(family[size], ids, start)
        own = [place for place, who in enumerate(result.token_sizes) if who == size]
        assert [chosen[p] for p in own] == [result.token_ids[p] for p in own]


# --- law 8: the hand-over is exact -----------------------------------------------------------


@pytest.mark.parametrize(("think", "answer"), [("small", "large"), ("large", "small")])
def test_answer_after_hand_over_equals_answering_size_continuing(family, think, answer):
    results = family.generate(
        PROMPTS, think=think, answer=answer, thinking_budget=7, grace=5, max_new_tokens=40
    )
    lengths = set()
    for prompt, result in zip(PROMPTS, results, strict=True):
        prompt_ids = list(family.generator.tags.encode_prompt(prompt, thinking=True).ids)
        trace, closing, answered = split_ids(result)
        lengths.add(len(trace))
        assert set(result.token_sizes[: len(trace)]) == {think}
        assert set(result.token_sizes[len(trace + closing) :]) <= {answer, None}
        assert_greedy(family, prompt_ids, result)
        if answered:
            (handed,) = [h for phase in result.phases for h in phase.handed if h.size == answer]
            assert handed.read == handed.position == len(prompt_ids + trace + closing)
            # An end of thinking that does not fit any more is not injected.
            room = family.generator.tags.max_closing
            assert result.phases[-1].ended != "length" or len(result.token_ids) > 40 - room
    assert len(lengths) > 1, "all traces ended at once: the batch was not ragged"


def test_answer_equals_plain_generate(family):
    results = family.generate(
        PROMPTS, think="small", answer="large", thinking_budget=6, max_new_tokens=50
    )
    result, prompt = next(
        pair for pair in zip(results, PROMPTS, strict=True) if pair[0].phase(ANSWERING)
    )
    prompt_ids = family.generator.tags.encode_prompt(prompt, thinking=True).ids
    trace, closing, answered = split_ids(result)
    again = result.token_sizes[len(trace + closing) :]  # up to a second end that is injected
    answered = answered[: again.index(None)] if None in again else answered
    ids = torch.tensor([[*prompt_ids, *trace, *closing]])
    output = family["large"].generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=len(answered), do_sample=False
    )
    assert output[0, ids.shape[1] :].tolist() == answered


def test_options_of_generate_are_all_heard(family, monkeypatch):
    """Each is set to what is not its default, and arrives at the plan or at the generator."""
    asked = {
        "think": "small", "answer": "large", "thinking_budget": 7, "grace": 3,
        "max_new_tokens": 9, "switch": "project", "stop": ("x",), "temperature": 0.5,
        "top_p": 0.9, "seed": 4, "batch_size": 2, "batch_tokens": 77, "compare": True,
    }  # fmt: skip
    options = dict(inspect.signature(family.generate).parameters)
    options |= inspect.signature(family.generator._start).parameters
    others = {"prompts", "plan", "streams", "options"}
    assert {*asked, *others} == set(options), "an option of generate is left out here"
    assert {*inspect.get_annotations(Options)} < {*asked}
    assert all(value != options[name].default for name, value in asked.items())
    plans, make_plan = [], family.plan

    def plan(think, answer, **options):
        plans.append({"think": think, "answer": answer, **options})
        return make_plan()

    monkeypatch.setattr(family, "plan", plan)
    monkeypatch.setattr(family.generator, "generate", lambda prompts, plan, **options: options)
    arrived = family.generate("1+2", **asked)
    assert plans[0] | arrived == asked


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_forced_tokens_in_one_loop_equal_second_prefill(family, temperature):
    """One size under two names re-prefills where the same size under one name does not."""
    model = family["small"]
    twice = Generator({"a": model, "b": model}, family.tokenizer, END)
    options = {"thinking_budget": 6, "grace": 4, "max_new_tokens": 40}
    one_loop, handed_over = (
        twice.generate(
            PROMPTS, think_and_answer("a", answer, **options), temperature=temperature, seed=3
        )
        for answer in "ab"
    )
    assert [r.token_ids for r in one_loop] == [r.token_ids for r in handed_over]
    for result in one_loop:
        if answering := result.phase(ANSWERING):
            assert answering.prefill_tokens == 0
        read = sum(phase.prefill_tokens + phase.decode_steps for phase in result.phases)
        assert read == result.prompt_tokens + len(result.token_ids) - 1


# --- batches and caches ----------------------------------------------------------------------


@torch.no_grad()
def test_ragged_cached_logits_equal_uncached(family):
    rows = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14], [6]]
    for size in family:
        model, texts = family[size], [list(row) for row in rows]
        decoder = BatchDecoder(model)
        decoder.prefill(texts)
        present = [0, 1, 2]
        for token in (5, 9, 11, 12):
            if token == 11:  # the longest row leaves
                decoder.keep([0, 2])
                present = [0, 2]
            for place, row in enumerate(present):
                expected = model(torch.tensor([texts[row]])).logits[0, -1]
                tolerance = 1e-4 * expected.abs().max()
                assert (decoder.logits_BV[place] - expected).abs().max() < tolerance
                texts[row].append(token + row)
            decoder.step([token + row for row in present])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_batching_changes_nothing(family, temperature):
    options = {
        "think": "small",
        "thinking_budget": 8,
        "grace": 3,
        "max_new_tokens": 30,
        "temperature": temperature,
    }
    together = family.generate(PROMPTS, **options)
    alone = family.generate(PROMPTS, **options, batch_size=1)
    assert [r.token_ids for r in together] == [r.token_ids for r in alone]
    assert len({r.phase(THINKING).tokens for r in together}) > 1


def test_padding_with_a_projection_bias_is_avoided():
    tokenizer = make_tokenizer()
    model = make_model(make_config("nemotron_h", len(tokenizer), use_bias=True))
    torch.nn.init.normal_(model.model.layers[0].mixer.in_proj.bias)
    assert not pads_exactly(model)
    generator = Generator({"only": model}, tokenizer, END)
    plan = think_and_answer("only", "only", max_new_tokens=20)
    together = generator.generate(PROMPTS, plan)
    alone = [generator.generate(prompt, plan)[0] for prompt in PROMPTS]
    assert [r.token_ids for r in together] == [r.token_ids for r in alone]


def test_seeds_reproduce_and_leave_the_global_state(family):
    state = torch.random.get_rng_state()
    first, again, other = (
        [
            r.token_ids
            for r in family.generate(PROMPTS, temperature=1.0, seed=seed, max_new_tokens=30)
        ]
        for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other
    assert torch.equal(state, torch.random.get_rng_state())


def test_draws_follow_the_softmax():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1e9]]).expand(4000, -1)
    generators = [torch.Generator().manual_seed(i) for i in range(4000)]
    tokens = torch.tensor(choose_tokens(logits, Sampling(temperature=2.0), generators))
    shares = torch.bincount(tokens, minlength=4) / 4000
    assert torch.allclose(shares, (logits[0] / 2).softmax(-1), atol=0.03)
    assert shares[3] == 0


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-308, 5e-324])
def test_a_temperature_that_is_nearly_zero_draws_the_likeliest(temperature):
    logits = torch.tensor([[3.0, 70.0, 69.0, -2.0], [9.0, 1.0, 2.0, 8.5]])
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    drawn = choose_tokens(logits, Sampling(temperature=temperature), generators)
    assert list(drawn) == [1, 0]


# --- budgets ---------------------------------------------------------------------------------


@given(
    tokens=st.lists(st.sampled_from([CLOSE, NEWLINE, EOS, *range(6, 16)]), min_size=1, max_size=30),
    budget=st.none() | st.integers(1, 20),
    grace=st.integers(0, 8),
    spare=st.integers(1, 30),
)
def test_budget_is_obeyed_to_the_token(tokens, budget, grace, spare):
    room = (budget or 0) + grace + TAGS.max_closing + spare
    plan = think_and_answer("s", "l", thinking_budget=budget, grace=grace, max_new_tokens=room)
    result = play(tokens, plan)
    trace, closing, answer = split_ids(result)
    thinking, answering = result.phase(THINKING), result.phase(ANSWERING)
    assert len(result.token_ids) <= room
    assert thinking.tokens == len(trace)
    assert CLOSE not in trace
    # no line end that should have cut the trace lies before its end
    first_cut = len(trace) if budget is None else budget - 1
    assert NEWLINE not in trace[first_cut : len(trace) - 1]
    if budget is not None:
        assert len(trace) <= budget + grace
    if thinking.ended == "natural":
        assert closing == [CLOSE]
    elif thinking.ended == "cut_at_newline":
        assert len(trace) >= budget
        assert trace[-1] == NEWLINE
        assert TAGS.decode(closing) == "</think>\n"
    elif thinking.ended == "cut":
        assert len(trace) == budget + grace
        assert trace[-1] != NEWLINE
        assert TAGS.decode(closing) == END
    elif thinking.ended == "stopped":
        assert trace[-1] == EOS
        assert answering is None
    else:
        assert thinking.ended == "length"
        assert budget is None
        assert len(result.token_ids) == room
    if answering and CLOSE not in answer:
        assert answering.tokens == len(answer)
        assert (answering.ended == "natural") == (answer[-1:] == [EOS])
        spoken = [i for i in result.token_ids if i != EOS]
        assert result.text == TAGS.decode(spoken)
        thought = [i for i in trace if i != EOS]
        assert result.text.startswith(TAGS.decode(thought + closing))
        assert result.thinking == TAGS.decode(thought).strip("\n")
        assert result.answer == TAGS.decode([i for i in answer if i != EOS]).strip("\n")


def test_each_end_of_thinking():
    cases = {
        "natural": ([9, 8, CLOSE, 9, EOS], {}),
        "cut": ([9], {"thinking_budget": 3, "grace": 2}),
        "cut_at_newline": ([9, 9, 9, 9, NEWLINE], {"thinking_budget": 3, "grace": 2}),
        "stopped": ([9, EOS], {}),
        "length": ([9], {}),
    }
    for ended, (tokens, options) in cases.items():
        result = play(tokens, think_and_answer("s", "l", max_new_tokens=20, **options))
        assert result.phase(THINKING).ended == ended


def test_trace_closed_right_at_its_budget_is_natural():
    plan = think_and_answer("s", "l", thinking_budget=2, grace=0, max_new_tokens=20)
    result = play([9, 8, CLOSE, 9, EOS], plan)
    assert result.phase(THINKING).ended == "natural"
    result = play([9, 8, 7, CLOSE, 9, EOS], plan)
    assert result.phase(THINKING).ended == "cut"
    assert result.phase(THINKING).tokens == 2


def test_budgets_and_ends_in_whole_generations(family):
    ends = set()
    for budget in (1, 4, 9):
        for result in family.generate(
            PROMPTS * 2,
            thinking_budget=budget,
            grace=3,
            max_new_tokens=30,
            temperature=1.5,
            seed=budget,
        ):
            ends.add(result.phase(THINKING).ended)
            assert result.phase(THINKING).tokens <= budget + 3
            assert len(result.token_ids) <= 30
    assert ends == {"natural", "cut", "cut_at_newline", "stopped"}


def test_no_budget_means_no_thinking(family):
    result = family.generate(
        "1+2", think="small", answer="large", thinking_budget=0, max_new_tokens=60
    )[0]
    assert {phase.size for phase in result.phases} == {"large"}
    assert result.token_sizes[0] == "large"  # nothing is injected to begin with
    text = "<|im_start|>user\n1+2<|im_end|>\n<|im_start|>a\n<think></think>"
    ids = family.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert result.prompt_tokens == len(ids)
    assert_greedy(family, ids, result)


# --- prompts and tags ------------------------------------------------------------------------


def open_tags(template: str | None) -> ThinkingTags:
    return ThinkingTags(make_tokenizer(template), END)


@pytest.mark.parametrize(
    ("template", "thinking", "tail", "in_thinking"),
    [
        (TEMPLATE, True, "a\n<think>\n", True),
        (TEMPLATE, False, "a\n<think></think>", False),
        (ALWAYS_THINKS, False, "a\n<think>\n", True),
        (LEAVES_TAG_TO_MODEL, True, "a\n<think>\n", True),
        (LEAVES_TAG_TO_MODEL, False, "a\n<think></think>", False),
        (NEVER_THINKS, True, "a\n", False),
    ],
)
def test_chat_template_decides_how_a_turn_opens(template, thinking, tail, in_thinking):
    tags = open_tags(template)
    encoded = tags.encode_prompt("1+2", thinking=thinking)
    assert tags.decode(encoded.ids).endswith(tail)
    assert encoded.in_thinking is in_thinking


def test_end_of_thinking_is_injected_where_the_template_always_opens():
    tokenizer = make_tokenizer(ALWAYS_THINKS)
    model = make_model(make_config("llama", len(tokenizer)))
    generator = Generator({"m": model}, tokenizer, END)
    plan = think_and_answer("m", "m", thinking_budget=0, max_new_tokens=9)
    result = generator.generate("1+2", plan)[0]
    assert result.closing_tokens == 2
    assert result.text.startswith("</think>\n")
    assert result.text.strip("\n").endswith(result.answer)
    assert result.phase(THINKING) is None
    assert len(result.token_ids) <= 9
    with pytest.raises(BudgetError, match="use max_new_tokens=3 or more"):
        generator.generate("1+2", think_and_answer("m", "m", thinking_budget=0, max_new_tokens=2))


def test_model_that_does_not_think_answers_at_once():
    tokenizer = make_tokenizer(NEVER_THINKS)
    model = make_model(make_config("llama", len(tokenizer)))
    generator = Generator({"m": model, "n": model}, tokenizer, END)
    result = generator.generate("1+2", think_and_answer("m", "m", max_new_tokens=5))[0]
    assert [phase.name for phase in result.phases] == [ANSWERING]
    for plan in (
        think_and_answer("m", "m", thinking_budget=4),
        think_and_answer("m", "n"),
    ):
        with pytest.raises(ConfigError, match="does not open <think>"):
            generator.generate("1+2", plan)


def test_closing_tag_of_several_tokens_is_found():
    tokenizer = make_tokenizer(tags=False)
    tags = ThinkingTags(tokenizer, END)
    ids = tags.encode("12</think>")
    assert len(ids) == 10
    assert tags.find(ids, opening=False) == Tag("</think>", opens=False, start=2, stop=10)
    assert tags.find(ids[:-1], opening=False) is None
    assert tags.find([], opening=False) is None
    plan = think_and_answer("s", "s", max_new_tokens=40)
    sequence = make_sequence(plan, tags)
    for token in ids:
        sequence.accept(token)
    assert not sequence.is_thinking
    trace = sequence.result().phase(THINKING)
    assert (trace.tokens, trace.by_size, sequence.parts().count(TAG)) == (2, {"s": 2}, 8)


def test_messages_and_texts_are_the_same_prompt(family):
    message = [{"role": "user", "content": "1+2"}]
    options = {"max_new_tokens": 5}
    results = [
        family.generate(prompts, **options)[0].token_ids
        for prompts in ("1+2", ["1+2"], message, [message])
    ]
    assert len(set(results)) == 1


# --- the family ------------------------------------------------------------------------------


def test_sizes_are_views_of_one_copy(family):
    assert list(family) == list(family.sizes) == ["large", "small"]
    assert len(family) == 2
    assert "small" in family
    assert "medium" not in family
    assert family["large"] is family.parent
    assert family["small"] is family["small"]
    own = {p.untyped_storage().data_ptr() for p in family["large"].parameters()}
    small = list(family["small"].parameters())
    views = sum(p.numel() for p in small if p.untyped_storage().data_ptr() in own)
    total = sum(p.numel() for p in small)
    assert views / total > 0.5  # gathered: what is cut inside groups
    assert total == family.cost("small").total
    widths = family.manifest.size("small").widths
    assert family.cost("small") == CostModel(family.axis_map).count(widths)


def test_sizes_stay_trainable_after_generation(family):
    family.generate("1+2", think="small", answer="large", max_new_tokens=3)
    family["small"](torch.tensor([[5, 6]]), labels=torch.tensor([[5, 6]])).loss.backward()


def test_dtype(tiny_checkpoint):
    family = star_elastic.load(tiny_checkpoint, dtype="bfloat16")
    assert family["small"].dtype == torch.bfloat16
    assert family.generate("1+2", think="small", answer="large", max_new_tokens=4)


def test_result_is_json(family):
    result = family.generate(
        "1+2", think="small", answer="large", thinking_budget=5, max_new_tokens=50
    )[0]
    content = json.loads(json.dumps(result.to_json()))
    assert content["token_ids"] == list(result.token_ids)
    first, *others = content["phases"]
    assert (first["name"], first["size"]) == (THINKING, "small")
    assert first["seconds"] > 0
    assert {phase["size"] for phase in others} <= {"large"}
    assert content["token_parts"] == list(result.token_parts)


def test_package_offers_what_it_lists():
    assert star_elastic.ElasticFamily.__name__ in star_elastic.__all__
    with pytest.raises(AttributeError, match="no attribute 'unknown'"):
        star_elastic.unknown  # noqa: B018


def test_factors_that_follow_the_length_are_not_mixed(tmp_path):
    """Beyond its first context longrope turns all keys of a batch otherwise: tokens would depend on
    neighbours. Up to there they do not."""
    rope = {
        "rope_type": "longrope", "factor": 6.0, "rope_theta": 1e4, "short_factor": [1.0] * 4,
        "long_factor": [3.0, 2.0, 5.0, 4.0], "original_max_position_embeddings": 64,
    }  # fmt: skip
    path = make_checkpoint(tmp_path / "longrope", "llama", rope_parameters=rope)
    family = star_elastic.load(path)
    prompts = ["1+2", "1" * 30]
    plan = {"think": "small", "answer": "large", "thinking_budget": 4, "grace": 2}
    both = family.generate(prompts, max_new_tokens=20, **plan)
    for prompt, result in zip(prompts, both, strict=True):
        (alone,) = family.generate(prompt, max_new_tokens=20, **plan)
        assert alone.token_ids == result.token_ids
    with pytest.raises(BudgetError, match="exceed the model's context of 64; use max_new_tokens="):
        family.generate(prompts, max_new_tokens=60, **plan)


# --- mistakes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "options", "error", "message"),
    [
        ("1+2", {"think": "huge"}, ConfigError, "size 'huge' is not in this family; it has large"),
        ("1+2", {"thinking_budget": -1}, BudgetError, "thinking_budget=-1 is not a number"),
        ("1+2", {"thinking_budget": 2.5}, BudgetError, "thinking_budget=2.5 is not a number"),
        ("1+2", {"grace": -1}, BudgetError, "grace=-1 is not a number"),
        ("1+2", {"max_new_tokens": 0}, BudgetError, "max_new_tokens=0 is not a number"),
        ("1+2", {"thinking_budget": 250}, BudgetError, "use max_new_tokens=28[67] or more"),
        ("1+2", {"thinking_budget": 380}, BudgetError, "for 3[0-9]+ new tokens: use budgets and"),
        (
            "1" * 390,
            {"thinking_budget": 9},
            BudgetError,
            "exceed the .* of 384; shorten the prompt",
        ),
        ("1" * 150, {}, BudgetError, "context of 384; use max_new_tokens=2[0-9]+ or less"),
        ("1" * 400, {"max_new_tokens": 1}, BudgetError, "context of 384; shorten the prompt"),
        ("1+2", {"temperature": -0.5}, ConfigError, "temperature=-0.5"),
        ("1+2", {"temperature": float("nan")}, ConfigError, "temperature=nan"),
        ("1+2", {"batch_size": 0}, ConfigError, "batch_size=0"),
        (" \n", {}, ConfigError, "the prompt is empty"),
        ([], {}, ConfigError, "the prompt is empty"),
        (["1", ""], {}, ConfigError, "the prompt is empty"),
        ([[]], {}, ConfigError, "the prompt is empty"),
        ([{"role": "user", "content": ""}], {}, ConfigError, "the prompt is empty"),
        ([{"role": "user"}], {}, ConfigError, "give each message both fields"),
        ([7], {}, ConfigError, "a prompt of type int cannot be read"),
    ],
)
def test_mistakes_are_told_in_one_line(family, prompts, options, error, message):
    with pytest.raises(error, match=message) as caught:
        family.generate(prompts, **options)
    assert "\n" not in str(caught.value)


def test_mistakes_of_loading(tiny_checkpoint, tmp_path):
    with pytest.raises(ConfigError, match="dtype='int8' is not supported; use auto, float32"):
        star_elastic.load(tiny_checkpoint, dtype="int8")
    nothing: Any = 5
    with pytest.raises(ConfigError, match="a checkpoint of type int cannot be loaded; name its"):
        star_elastic.load(nothing)
    with pytest.raises(ConfigError, match=r"holds no config\.json"):
        star_elastic.load(tmp_path)
    family = star_elastic.load(tiny_checkpoint)
    with pytest.raises(CheckpointError, match="size 'huge' is not in this family"):
        family["huge"]
    shutil.copyfile(tiny_checkpoint / "config.json", tmp_path / "config.json")
    family.path = tmp_path
    with pytest.raises(CheckpointError, match="holds no usable tokenizer"):
        family.generate("1+2")
    with pytest.raises(ConfigError, match="holds no closing tag"):
        ThinkingTags(TOKENIZER, "done")


def test_tokenizer_without_template_reads_plain_text_only():
    tokenizer = make_tokenizer(None)
    model = make_model(make_config("llama", len(tokenizer)))
    generator = Generator({"m": model}, tokenizer, END)
    plan = think_and_answer("m", "m", thinking_budget=2, grace=0, max_new_tokens=12)
    with pytest.raises(ConfigError, match="cannot read messages"):
        generator.generate([{"role": "user", "content": "1"}], plan)
    result = generator.generate("1+2<think>\n", plan)[0]
    assert result.phase(THINKING).tokens <= 2


@pytest.mark.parametrize(
    ("named", "sizes"),
    [
        ({}, ("large", "large")),
        ({"think": "small"}, ("small", "small")),
        ({"answer": "small"}, ("small", "small")),
        ({"think": "small", "answer": "large"}, ("small", "large")),
    ],
)
def test_a_size_that_is_not_named_is_the_one_that_is(family, named, sizes):
    plan = family.plan(**named, thinking_budget=4)
    assert tuple(phase.size for phase in plan.phases) == sizes
