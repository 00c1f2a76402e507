"""Where thinking opens and closes: in prompts by the template alone, in new tokens by the model."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from star_elastic.errors import ConfigError
from star_elastic.evaluate.accuracy import solve
from star_elastic.evaluate.tasks import Problem
from star_elastic.generate.phases import (
    ANSWERING,
    MAX_REOPENED,
    TAG,
    THINKING,
    Phase,
    Plan,
    Token,
    think_and_answer,
)
from star_elastic.generate.prompts import ThinkingTags
from tests.thinking import (
    CLOSING,
    PLAIN,
    TEMPLATES,
    make_tokenizer,
    one,
    parts_streamed,
    play,
    table_generator,
)

OPEN, CLOSE = "<think>", "</think>"

# --- prompts: what the template itself opens ---------------------------------------------------

IS_OPEN = {
    "opens": (True, False),
    "always opens": (True, True),
    "leaves the tag to the model": (True, False),
    "never opens": (False, False),
    "trims": (True, False),
    "mentions the tag before": (False, False),
    "mentions the tag after": (False, False),
    "knows no generation prompt": (True, False),
    "forgets old traces": (True, False),
    "repeats the first message": (True, False),
}
"""By template: whether a turn begins inside a trace, with thinking and without."""
TEMPLATE_TAGS = {name: ThinkingTags(make_tokenizer(t), CLOSING) for name, t in TEMPLATES.items()}
words = st.lists(
    st.sampled_from([OPEN, CLOSE, "\n", " ", "what is ", "tag", "a", "<th", "ink>"]), max_size=6
).map("".join)
said = words.filter(str.strip)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("thinking", [True, False])
@given(contents=st.lists(said, min_size=1, max_size=3), ends_with_answer=st.booleans())
def test_nobodys_words_open_or_close_a_trace(name, thinking, contents, ends_with_answer):
    """Whatever tags stand in whichever messages; and the prompt is the template's own text."""
    tags = TEMPLATE_TAGS[name]
    roles = ["user", "assistant"] if len(contents) % 2 else ["system", "user", "assistant"]
    messages = [
        {"role": roles[number % len(roles)], "content": content}
        for number, content in enumerate(contents)
    ]
    if ends_with_answer:
        messages.append({"role": "assistant", "content": contents[0]})
    encoded = tags.encode_prompt(messages, thinking=thinking)
    expected = IS_OPEN[name][0 if thinking else 1]
    assert encoded.in_thinking is expected
    assert encoded.has_tags is (name != "never opens")
    text = tags.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
    )
    added = f"{OPEN}\n" if name == "leaves the tag to the model" and thinking else ""
    assert tags.decode(encoded.ids) == text + added


@pytest.mark.parametrize(
    ("text", "in_thinking", "has_tags"),
    [
        ("1+1", False, False),
        ("1+1 <think>\n", True, True),
        ("1+1<think>", True, True),
        ("1+1 <think></think>\n", False, True),
        ("what does <think> do?", False, False),
        ("</think> and <think> are tags", False, False),
    ],
)
def test_a_text_without_template_opens_a_trace_by_ending_with_the_tag(text, in_thinking, has_tags):
    encoded = ThinkingTags(make_tokenizer(None), CLOSING).encode_prompt(text, thinking=True)
    assert (encoded.in_thinking, encoded.has_tags) == (in_thinking, has_tags)


@pytest.mark.parametrize("budget", [None, 0])
@pytest.mark.parametrize("question", ["What does the tag do?", "What does the <think> tag do?"])
def test_a_question_about_the_tag_is_a_question(question, budget):
    """A model that never thinks answers it as any other, and its own tags are text."""
    for follow in ({"\n": "A", "A": "B"}, {"\n": OPEN, OPEN: "B", "B": CLOSE}):
        generator = table_generator(follow, PLAIN)
        plan = think_and_answer("small", "small", thinking_budget=budget, max_new_tokens=40)
        (result,) = generator.generate(question, plan)
        expected = "AB" if "A" in follow else "<think>B</think>"
        assert (result.thinking, result.answer, result.closing_tokens) == ("", expected, 0)
        assert [phase.name for phase in result.phases] == [ANSWERING]


def test_a_model_that_opens_the_trace_by_itself_where_its_template_mentions_it():
    generator = table_generator(
        {"\n": OPEN, OPEN: "A", "A": "B", "B": CLOSE, CLOSE: "!"},
        TEMPLATES["mentions the tag before"],
    )
    (result,) = generator.generate("q", think_and_answer("small", "small", max_new_tokens=40))
    assert (result.thinking, result.answer) == ("AB", "!")
    assert [(p.name, p.tokens) for p in result.phases] == [(THINKING, 2), (ANSWERING, 2)]
    (cut,) = generator.generate("q", think_and_answer("small", "small", thinking_budget=0))
    assert cut.thinking == "" and OPEN not in cut.answer


# --- new tokens: tags that the model writes ----------------------------------------------------

KINDS = {
    "tokens": {},
    "letters": {"tags": ()},
    "pieces": {
        "tags": (),
        "pieces": (
            "</",
            "think",
            "><",
            ">x<",
            ".</",
            "<think",
            ">\u010a",
            "</think>!",
            "x<think>y",
        ),
    },
    "other tags": {"tags": ("[THINK]", "[/THINK]")},
    "other letters": {"tags": ()},
}
"""Tags that are tokens, that are spelled byte by byte, and that tokens of a model reach across."""
CLOSINGS = {"other tags": "\n[/THINK]\n", "other letters": "[/r]"}
TAGS = {
    kind: ThinkingTags(make_tokenizer(None, **options), CLOSINGS.get(kind, CLOSING))
    for kind, options in KINDS.items()
}


def ids_of(tags: ThinkingTags, text: str) -> list[int]:
    return tags.encode(text)


@st.composite
def scripts(draw, kind: str) -> list[int]:
    """Tokens that a model might want to write: tags whole and in part, lines, letters, ends."""
    tags = TAGS[kind]
    vocab = tags.tokenizer.get_vocab()
    pieces = [[vocab[piece]] for piece in KINDS[kind].get("pieces", ())]
    texts = [tags.open, tags.close, tags.close, "\n", "a", "b\n", "\u6f22"]
    if tags.is_spelled(tags.close):
        texts += [tags.open[:3], tags.close[:4], tags.open[3:], tags.close[2:]]
    parts = [ids_of(tags, text) for text in texts]
    parts += [*pieces, ids_of(tags, "\u6f22")[:2], [tags.tokenizer.eos_token_id]]
    weights = st.sampled_from([*parts[:4], *parts, *parts[:4]])
    return [token for part in draw(st.lists(weights, max_size=16)) for token in part]


def plans() -> st.SearchStrategy[Plan]:
    def pair(budget, grace, room, stop) -> Plan:
        spent = 0 if budget is None else budget + grace + 12
        return think_and_answer(
            "s", "l", thinking_budget=budget, grace=grace, max_new_tokens=spent + room,
            stop=stop,
        )  # fmt: skip

    stops = st.sampled_from([(), (), ("a",), ("b\n",), ("<",), (">", "ab")])
    budgets = st.none() | st.integers(0, 8)
    return st.builds(pair, budgets, st.integers(0, 4), st.integers(1, 60), stops)


TURNS = Plan((
    Phase(size="a", until="budget", budget=3, grace=1),
    Phase(size="b", until="end_of_thinking", budget=4, grace=2),
    Phase(size="c", until="line", budget=6, grace=1),
    Phase(size="d"),
), max_new_tokens=60)  # fmt: skip


def check(tags: ThinkingTags, result, tokens: list[Token], plan: Plan) -> None:
    """What holds of every sequence, whatever its model writes."""
    parts, sizes = result.token_parts, result.token_sizes
    assert len(parts) == len(sizes) == len(result.token_ids) <= plan.max_new_tokens
    # No tag comes back, and none of the trace is in the answer.
    assert tags.open not in result.answer and tags.close not in result.answer
    assert tags.close not in result.thinking
    # The counts add up, in all and by phase.
    assert result.closing_tokens == parts.count(TAG)
    for name in (THINKING, ANSWERING):
        own = [phase for phase in result.phases if phase.name == name]
        assert sum(phase.tokens for phase in own) == parts.count(name)
        assert all(phase.tokens == sum(phase.by_size.values()) for phase in own)
    assert {size for size, part in zip(sizes, parts, strict=True) if part != TAG} <= set(plan.sizes)
    # The trace is as long as its budget allows, but for what was only told to be one afterwards.
    first = [token.phase for token in tokens]
    bound = plan.thinking_budget
    if bound is not None:
        before = sum(p.budget + p.grace for p in plan.trace[:-1])
        grace = plan.trace[-1].grace if plan.trace else 0
        known = [part == THINKING == now for part, now in zip(parts, first, strict=True)]
        assert sum(known) <= before + bound + grace
    assert sum(phase.ended == "reopened" for phase in result.phases) <= MAX_REOPENED + 1
    # The stream is the same text, and tells in the end the same of every token.
    assert tuple(token.id for token in tokens) == result.token_ids
    assert tuple(token.size for token in tokens) == sizes
    streamed = parts_streamed(tokens)
    assert "".join(text for _, text in streamed) == result.text
    assert [phase for phase, _ in streamed] == [ANSWERING if p == ANSWERING else THINKING
                                                for p in parts]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data(), plan=plans())
@settings(max_examples=60)
def test_whatever_a_model_writes_no_tag_comes_back_and_counts_add_up(kind, data, plan):
    tags = TAGS[kind]
    result, tokens = play(tags, data.draw(scripts(kind)), plan)
    check(tags, result, tokens, plan)
    if kind in ("tokens", "other tags"):  # no token holds a tag and other text
        answer = "".join(t for phase, t in parts_streamed(tokens) if phase == ANSWERING)
        known = str.maketrans("", "", "\n\ufffd")  # parted, or half a character
        assert answer.translate(known) == result.answer.translate(known)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=30)
def test_the_same_with_more_phases_on_both_sides(kind, data):
    tags = TAGS[kind]
    result, tokens = play(tags, data.draw(scripts(kind)), TURNS)
    check(tags, result, tokens, TURNS)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data(), room=st.integers(1, 40))
def test_where_tags_are_text_all_is_the_answer(kind, data, room):
    tags = TAGS[kind]
    plan = think_and_answer("s", "s", thinking_budget=0, max_new_tokens=room)
    result, tokens = play(tags, data.draw(scripts(kind)), plan, has_tags=False)
    end = tags.tokenizer.eos_token_id
    spoken = [token for token in result.token_ids if token != end]
    assert result.answer == tags.decode(spoken).strip("\n")
    assert set(result.token_parts) == {ANSWERING}
    assert "".join(token.text for token in tokens) == result.text


def told(kind: str, text: str, **options):
    """Thinking, answer and phases of a script, with tags of one kind."""
    tags = TAGS[kind]
    text = text.replace(OPEN, tags.open).replace(CLOSE, tags.close)
    plan = think_and_answer("s", "l", **{"max_new_tokens": 90, "grace": 0, **options})
    result, tokens = play(tags, ids_of(tags, text), plan)
    check(tags, result, tokens, plan)
    phases = [(p.name, p.size, p.tokens, p.ended) for p in result.phases]
    return result.thinking, result.answer, phases


@pytest.mark.parametrize("kind", ["tokens", "letters", "other tags", "other letters"])
@pytest.mark.parametrize(
    ("script", "budget", "thinking", "answer", "phases"),
    [
        # The budget cuts, the model goes on and closes: that was all trace. (A cut costs a token.)
        ("abXcd</think>!", 2, "ab\ncd", "!",
         [(THINKING, "s", 2, "cut"), (THINKING, "l", 2, "natural"),
          (ANSWERING, "l", 2, "natural")]),
        # It closes at once.
        ("abX</think>!", 2, "ab", "!", [(THINKING, "s", 2, "cut"), (ANSWERING, "l", 2, "natural")]),
        # It closes twice, whoever closed first.
        ("abXcd</think>e</think>!", 2, "ab\ncd\ne", "!",
         [(THINKING, "s", 2, "cut"), (THINKING, "l", 2, "natural"), (THINKING, "l", 1, "natural"),
          (ANSWERING, "l", 2, "natural")]),
        ("ab</think>cd</think>!", None, "ab\ncd", "!",
         [(THINKING, "s", 2, "natural"), (THINKING, "l", 2, "natural"),
          (ANSWERING, "l", 2, "natural")]),
        # It opens the trace again where nothing is left: closed at once, both sides are answer.
        ("abXcd<think>e!", 2, "ab", "cd\ne!",
         [(THINKING, "s", 2, "cut"), (ANSWERING, "l", 2, "reopened"),
          (ANSWERING, "l", 3, "natural")]),
        # Right after the answer begins: there is no part of the answer before.
        ("ab</think><think>d</think>e", None, "ab\nd", "e",
         [(THINKING, "s", 2, "natural"), (THINKING, "l", 1, "natural"),
          (ANSWERING, "l", 2, "natural")]),
        # Once too often ends the turn.
        ("a</think>b<think>c</think>d<think>e</think>f<think>g</think>h", None, "a\nc\ne",
         "b\nd\nf",
         [(THINKING, "s", 1, "natural"), (ANSWERING, "l", 1, "reopened"),
          (THINKING, "l", 1, "natural"), (ANSWERING, "l", 1, "reopened"),
          (THINKING, "l", 1, "natural"), (ANSWERING, "l", 1, "reopened")]),
        # The turn ends inside a trace that was opened again.
        ("a</think>b<think>c", None, "a\nc", "b",
         [(THINKING, "s", 1, "natural"), (ANSWERING, "l", 1, "reopened"),
          (THINKING, "l", 2, "stopped")]),
        # No trace was asked for.
        ("ab</think>c", 0, "ab", "c",
         [(THINKING, "l", 2, "natural"), (ANSWERING, "l", 2, "natural")]),
        ("ab<think>c", 0, "", "ab\nc",
         [(ANSWERING, "l", 2, "reopened"), (ANSWERING, "l", 2, "natural")]),
        # A tag inside the trace that opens it once more is text, as it always was.
        ("a<think>b</think>c", None, "a<think>b", "c", None),
    ],
)  # fmt: skip
def test_tags_that_a_model_writes_by_itself(kind, script, budget, thinking, answer, phases):
    found = told(kind, script, thinking_budget=budget)
    name = TAGS[kind].open
    assert found[:2] == (thinking.replace(OPEN, name), answer)
    assert phases is None or found[2] == phases


@pytest.mark.parametrize("kind", ["tokens", "other tags"])
@pytest.mark.parametrize(
    ("script", "thinking", "answer", "phases"),
    [
        # Where something is left of the budget, so much; then it is cut, too.
        ("abcd</think>e<think>fgXhi", "abcd\nfg", "e\nhi",
         [(THINKING, "s", 4, "natural"), (ANSWERING, "l", 1, "reopened"), (THINKING, "l", 2, "cut"),
          (ANSWERING, "l", 3, "natural")]),
        # Or it closes by itself before.
        ("ab</think>c<think>d</think>e", "ab\nd", "c\ne",
         [(THINKING, "s", 2, "natural"), (ANSWERING, "l", 1, "reopened"),
          (THINKING, "l", 1, "natural"), (ANSWERING, "l", 2, "natural")]),
    ],
)  # fmt: skip
def test_what_is_left_of_the_budget(kind, script, thinking, answer, phases):
    """(A tag that is spelled takes tokens of the budget as long as it might be none.)"""
    assert told(kind, script, thinking_budget=6) == (thinking, answer, phases)


def test_a_line_end_that_is_there_is_not_doubled_whatever_token_holds_it():
    tokenizer = make_tokenizer(pieces=[".\u010a", "\u010a\u010a", "\u010aa"])
    tags = ThinkingTags(tokenizer, CLOSING)
    first = len(tokenizer) - 3
    ids = [one(tokenizer, "\n"), first, first + 1, first + 2, one(tokenizer, "a")]
    assert [tags.decode([i]) for i in ids] == ["\n", ".\n", "\n\n", "\na", "a"]
    closings = [tags.decode(tags.closing_ids([one(tokenizer, "x"), i])) for i in ids]
    assert closings == ["</think>\n"] * 3 + [CLOSING] * 2


def test_a_cut_waits_for_the_line_in_a_trace_that_is_opened_again_too():
    thinking, answer, phases = told(
        "tokens", "ab</think>c<think>def\nXg", thinking_budget=4, grace=3
    )
    assert (thinking, answer) == ("ab\ndef", "c\ng")
    assert phases[2] == (THINKING, "l", 4, "cut_at_newline")


def test_tokens_that_reach_across_a_tag_lose_no_text():
    tags = TAGS["pieces"]
    vocab = tags.tokenizer.get_vocab()
    pieces = ["a", ".</", "think", ">x<", "think", "><", "/", "think", ">\u010a", "b", "</think>!",
              "x<think>y", "<think", ">"]  # fmt: skip
    ids = [vocab[piece] for piece in pieces]
    plan = think_and_answer("s", "l", max_new_tokens=90)
    result, tokens = play(tags, ids, plan)
    check(tags, result, tokens, plan)
    assert result.thinking == "a.\nb\ny<think>"
    assert result.answer == "x\n!x"


def test_letters_of_a_tag_that_is_a_token_are_letters():
    """A model that has a token for the tag and spells it is quoting."""
    tags = TAGS["tokens"]
    spelled = [token for letter in CLOSE for token in tags.encode(letter)]
    result, _ = play(
        tags, [*tags.encode("a"), *spelled, *tags.encode(f"{CLOSE}b"), *spelled],
        think_and_answer("s", "l", max_new_tokens=60),
    )  # fmt: skip
    assert (result.thinking, result.answer) == ("a</think>", "b</think>")


def test_no_room_for_an_end_of_thinking_is_the_end():
    """An end is not injected beyond `max_new_tokens`."""
    tags = TAGS["letters"]
    plan = think_and_answer("s", "l", thinking_budget=0, max_new_tokens=12)
    result, _ = play(tags, tags.encode("ab<think>c"), plan)
    assert (result.answer, result.phases[-1].ended, len(result.token_ids)) == ("ab", "length", 9)


@pytest.mark.parametrize("kind", ["tokens", "letters"])
@pytest.mark.parametrize("switch", ["reprefill", "catch-up"])
def test_generation_and_stream_of_a_model_that_goes_on(kind, switch):
    """In whole generations, over caches and batches: cut, go on, close; and cut, answer, reopen."""
    on = {"\n": "a", "a": "b", "b": "c", "c": "d"}
    closes, opens = ({"d": CLOSE, CLOSE: "!"}, {"d": OPEN, OPEN: "z", "z": "z"})
    for follow, tag in ((on | closes, CLOSE), (on | opens, OPEN)):
        if kind == "letters":
            follow = {k: v for k, v in follow.items() if k != tag} | {"d": "<", ">": "!"}
            follow |= dict(pairwise(tag))
        generator = table_generator(follow, **KINDS[kind])
        plan = think_and_answer(
            "small", "large", thinking_budget=2, grace=0, max_new_tokens=60, switch=switch
        )
        results = generator.generate(["q", "longer"], plan)
        streamed: dict[int, list[Token]] = {0: [], 1: []}
        for event in generator.stream(["q", "longer"], plan):
            if isinstance(event, Token):
                streamed[event.index].append(event)
        for index, result in enumerate(results):
            check(generator.tags, result, streamed[index], plan)
            ended = [phase.ended for phase in result.phases]
            if tag == CLOSE:
                assert (result.thinking, result.answer) == ("ab\nabcd", "!")
                assert ended == ["cut", "natural", "natural"]
            else:
                assert result.thinking == "ab"
                assert result.answer.startswith("abcd\nabcd") and ended[1] == "reopened"
            read = sum(p.prefill_tokens + p.decode_steps for p in result.phases)
            assert read == sum(read.tokens for read in result.reads)
            assert sum(p.seconds for p in result.phases) > 0


@pytest.mark.parametrize(
    ("follow", "budget", "is_cut", "thinking_tokens"),
    [
        ({"b": "c", "c": CLOSE, CLOSE: "!"}, None, False, 3),
        ({"b": "c", "c": CLOSE, CLOSE: "!"}, 2, True, 5),  # a, b, cut, a, b, c
        ({"b": CLOSE, CLOSE: "!", "!": OPEN}, 2, False, 6),  # what is opened again is cut at once
    ],
)
def test_an_evaluation_counts_tokens_as_what_they_turned_out_to_be(
    follow, budget, is_cut, thinking_tokens
):
    generator = table_generator({"\n": "a", "a": "b"} | follow)
    plan = think_and_answer("small", "large", thinking_budget=budget, grace=0, max_new_tokens=30)
    ((outcome,), _) = solve(generator, [Problem("any", "q", (), "!")], plan)
    assert (outcome.is_cut, outcome.thinking_tokens) == (is_cut, thinking_tokens)
    if OPEN not in follow.values():
        assert outcome.is_right and outcome.answer_tokens == 2


@pytest.mark.parametrize("end", ["done", "\n", "</>"])
def test_an_end_of_thinking_needs_a_tag(end):
    with pytest.raises(ConfigError, match="holds no closing tag"):
        ThinkingTags(make_tokenizer(), end)
