"""Prompts as their tokenizer's template writes them, or one line that says why not; batches."""

from __future__ import annotations

import json
import os
import signal
from itertools import groupby

import pytest
from hypothesis import given
from hypothesis import strategies as st

from star_elastic.cli import main
from star_elastic.cli.generate import print_stream
from star_elastic.errors import ConfigError
from star_elastic.generate.engine import Generator, fitting
from star_elastic.generate.phases import Token, think_and_answer
from star_elastic.generate.prompts import ThinkingTags
from tests.thinking import (
    CLOSING,
    OPENS,
    PLAIN,
    make_sequence,
    make_tokenizer,
    table_generator,
    table_model,
)

TOOLS = OPENS.replace(
    "{{ m['content'] }}",
    "{% if m.tool_calls %}{% for c in m.tool_calls %}<call>{{ c.function.name }} "
    "{{ c.function.arguments | tojson }}</call>{% endfor %}{% else %}{{ m['content'] }}{% endif %}",
)
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "<think>"}}}
TALK = [
    {"role": "user", "content": "1+1"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "2"},
]


def encode(prompt, template: str | None = OPENS, *, thinking: bool = True):
    return ThinkingTags(make_tokenizer(template), CLOSING).encode_prompt(prompt, thinking=thinking)


def part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


# --- what is read ------------------------------------------------------------------------------


def test_content_in_parts_is_their_text():
    whole = encode([{"role": "user", "content": "say <think> twice"}])
    parts = [part("say "), part("<think> twice")]
    assert encode([{"role": "user", "content": parts}]) == whole
    assert encode([{"role": "user", "content": (part("say <think> twice"),)}]) == whole
    assert encode([{"role": "user", "content": ["say ", {"text": "<think> twice"}]}]) == whole
    assert encode("say <think> twice") == whole


@pytest.mark.parametrize("thinking", [True, False])
def test_contents_reach_a_template_that_knows_parts_alone(thinking):
    """As those of models that see images; whether they are texts, parts or both."""
    content = "{% for p in m.content %}{{ p.text }}{% endfor %}"
    for written in (content, "{{ m.content[0]['text'] + '' }}"):
        template = OPENS.replace("{{ m['content'] }}", written)
        for ask in ("say <think> twice", [part("say <think> "), "twice"]):
            talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": ask}]
            expected = encode(talk, OPENS, thinking=thinking)
            assert encode(talk, template, thinking=thinking) == expected
    prints = OPENS.replace("{{ m['content'] }}", "{{ m['content'] if m.content[0].text }}")
    with pytest.raises(ConfigError, match="leaves out message 1 .role 'user'."):
        encode([{"role": "user", "content": "q"}], prints)


def test_calls_of_tools_are_those_of_the_template():
    encoded = encode(TALK, TOOLS)
    text = make_tokenizer(TOOLS).decode(encoded.ids)
    assert '<|start|>assistant\n<call>add {"a": 1, "b": "<think>"}</call><|end|>' in text
    assert encoded.in_thinking
    without = [{**TALK[1], "content": "calls"}, TALK[2]]
    del without[0]["tool_calls"]
    assert "<|start|>assistant\ncalls<|end|>" in make_tokenizer(TOOLS).decode(
        encode([TALK[0], *without], TOOLS).ids
    )


def test_a_text_has_what_its_tokenizer_puts_before_it_and_nothing_behind():
    """Some tokenizers end every text with the token that ends a turn."""
    from tokenizers import processors

    for single, expected in (("<pad> $A <|end|>", [0, 7]), ("$A", [7])):
        tokenizer = make_tokenizer(None)
        core = tokenizer.backend_tokenizer
        marks = [("<pad>", 0), ("<|end|>", 2)]
        core.post_processor = processors.TemplateProcessing(single=single, special_tokens=marks)
        tags = ThinkingTags(tokenizer, CLOSING)
        text = tokenizer.decode([7])
        assert list(tags.encode_prompt(text, thinking=True).ids) == expected
        own = tags.encode_prompt(f"{text}<|end|>", thinking=True).ids
        assert own[-1] == 2  # the user's own stays
        begun = tags.encode_prompt(f"<pad>{text}", thinking=True).ids
        assert list(begun) == [0, 7]  # not once more


def test_a_turn_of_the_assistants_is_followed_by_another():
    talk = [TALK[0], {"role": "assistant", "content": "<think>\nso far"}]
    encoded = encode(talk, thinking=False)
    text = make_tokenizer(OPENS).decode(encoded.ids)
    assert text.endswith("so far<|end|>\n<|start|>assistant\n<think></think>")
    assert not encoded.in_thinking


# --- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "statement",
    [
        "{{ 1 // 0 }}",
        "{{ nothing.at.all }}",
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0]['content'] + 1 }}",
        "{% for x in 7 %}{% endfor %}",
    ],
)
def test_whatever_a_template_raises_is_one_line(statement):
    generator = table_generator({}, OPENS + statement)
    with pytest.raises(ConfigError, match="the chat template refuses these messages") as caught:
        generator.generate("q", think_and_answer("small", "small"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("statement", ["{{ messages | nofilter }}", "{% if %}"])
def test_a_template_that_cannot_be_parsed_is_not_the_messages_fault(statement):
    generator = table_generator({}, OPENS + statement)
    with pytest.raises(
        ConfigError, match=r"template is no valid Jinja \(.*, line \d+\); correct it"
    ):
        generator.generate("q", think_and_answer("small", "small"))


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("half \ud83d", r"half a character \(U\+D83D\), which"),
        ([{"role": "user", "content": "\udcff"}], r"half a character \(U\+DCFF"),
        (" \n", "the prompt is empty"),
        ([{"role": "user", "content": " \n"}], "the prompt is empty"),
        ([{"role": "user", "content": [part(" ")]}], "the prompt is empty"),
        ([{"role": "user", "content": []}], "the prompt is empty"),
        ([{"role": "user", "content": 7}], "the content of message 1 is of type int"),
        ([{"role": "user", "content": {"a": 1}}], "the content of message 1 is of type dict"),
        (
            [TALK[0], {"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
            "message 2 holds a part of type 'image_url'",
        ),
        ([{"role": "user", "content": [7]}], "message 1 holds a part of type 'int'"),
        (TALK, "the chat template leaves out the tool_calls of message 2"),
        ([TALK[1]], "the prompt is empty"),
        (7, "prompts of type int cannot be read"),
        (b"q", "a prompt of type int cannot be read"),
        ({"role": "user"}, "prompts of type dict cannot be read"),
    ],
)
def test_what_cannot_be_read_is_one_line(prompt, message):
    template = OPENS.replace("{{ m['content'] }}", "{{ m['content'] or '' }}")
    generator = table_generator({}, template)
    with pytest.raises(ConfigError, match=message) as caught:
        generator.generate(prompt, think_and_answer("small", "small"))
    assert "\n" not in str(caught.value)


def test_a_message_that_the_template_leaves_out_is_refused():
    leaves_out = OPENS.replace(
        "{% for m in messages %}", "{% for m in messages if m.role != 'developer' %}"
    )
    talk = [{"role": "developer", "content": "be brief"}, TALK[0]]
    assert encode(talk, OPENS)
    with pytest.raises(ConfigError, match="leaves out message 1 .role 'developer'."):
        encode(talk, leaves_out)
    assert encode([{"role": "developer", "content": ""}, TALK[0]], leaves_out)


def test_a_token_without_embedding_is_refused_before_any_work():
    tokenizer = make_tokenizer(OPENS)
    model = table_model(tokenizer, {})
    tokenizer.add_tokens(["<tool>"])
    generator = Generator({"m": model}, tokenizer, CLOSING)
    plan = think_and_answer("m", "m", max_new_tokens=4)
    assert generator.generate("call it", plan)
    with pytest.raises(ConfigError, match=f"token '<tool>' with id {len(tokenizer) - 1}, but the"):
        generator.stream(["call it", "call <tool> now"], plan)


def test_a_prompt_without_tokens_is_refused():
    """Of a tokenizer that drops what it does not know."""
    tokenizer = make_tokenizer(None)
    from tokenizers import normalizers

    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("x", "")
    with pytest.raises(ConfigError, match="the prompt has no tokens"):
        ThinkingTags(tokenizer, CLOSING).encode_prompt("xx", thinking=True)


# --- batches -----------------------------------------------------------------------------------


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=20),
    size=st.integers(1, 8),
    tokens=st.integers(1, 300),
    room=st.integers(1, 20),
)
def test_batches_hold_so_many_sequences_and_tokens(lengths, size, tokens, room):
    plan = think_and_answer("s", "s", max_new_tokens=room)
    tags = ThinkingTags(make_tokenizer(), CLOSING)
    rows = [
        make_sequence(plan, tags, ids=[5] * length, index=index)
        for index, length in enumerate(lengths)
    ]
    waiting, batches = list(rows), []
    while waiting:
        batches.append(fitting(waiting, [], size, tokens))
        waiting = [row for row in waiting if row not in batches[-1]]
    assert sorted(r.index for batch in batches for r in batch) == list(range(len(rows)))
    left = list(rows)
    for batch in batches:
        longest = max(row.num_prompt for row in batch)
        held = len(batch) * (longest + room)
        assert len(batch) <= size and (held <= tokens or len(batch) == 1)
        assert batch[0] is left[0], "who has waited longest does not lead"
        left = [row for row in left if row not in batch]
        for row in left:  # none is smaller than it must be
            more = (len(batch) + 1) * (max(longest, row.num_prompt) + room)
            assert len(batch) == size or more > tokens


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=8),
    num_running=st.integers(1, 4),
    size=st.integers(1, 8),
    tokens=st.integers(1, 300),
)
def test_newcomers_leave_room_for_those_that_run(lengths, num_running, size, tokens):
    plan = think_and_answer("s", "s", max_new_tokens=3)
    tags = ThinkingTags(make_tokenizer(), CLOSING)
    rows = [
        make_sequence(plan, tags, ids=[5] * length, index=index)
        for index, length in enumerate(lengths)
    ]
    running, waiting = rows[:num_running], rows[num_running:]
    joined = fitting(waiting, running, size, tokens)
    together = [*running, *joined]
    held = len(together) * (max(row.num_prompt for row in together) + 3)
    assert not joined or (len(together) <= size and held <= tokens)
    assert joined == waiting[: len(joined)], "somebody was overtaken"


def test_long_prompts_do_not_run_together_and_results_keep_their_order():
    generator = table_generator({"\n": "a", "a": "b"}, PLAIN)
    prompts = ["long " * 20, "q", "longer " * 20, "r"]
    plan = think_and_answer("small", "small", max_new_tokens=4)
    together = generator.generate(prompts, plan)
    apart = generator.generate(prompts, plan, batch_tokens=200)
    assert [r.token_ids for r in apart] == [r.token_ids for r in together]
    assert [r.prompt_tokens for r in apart] == [r.prompt_tokens for r in together]
    events = list(generator.stream(prompts, plan, batch_tokens=200))
    order = [e.index for e in events if isinstance(e, Token)]
    batches = [set(group) for _, group in groupby(order, key=lambda index: index % 2 or index)]
    assert batches == [{0}, {1, 3}, {2}]  # each long one by itself, and who came first comes first
    for limits in ({"batch_size": 0}, {"batch_tokens": 0}, {"batch_tokens": 1.5}):
        with pytest.raises(ConfigError, match=f"{next(iter(limits))}="):
            generator.generate("q", plan, **limits)


# --- at the terminal ---------------------------------------------------------------------------


class Plain:
    """A console that is no terminal."""

    is_terminal = False


def test_a_stream_says_what_turned_out_to_be_thinking(capsys):
    generator = table_generator({"\n": "a", "a": "b", "b": "c", "c": "</think>", "</think>": "!"})
    for budget, again in ((2, True), (None, False)):
        plan = think_and_answer("small", "large", thinking_budget=budget, grace=0)
        result = print_stream(generator.stream("q", plan), Plain(), ["small", "large"])  # type: ignore[arg-type]
        shown = capsys.readouterr().out
        assert shown.startswith(result.text + "\n")
        assert shown.endswith("the answer is:]\n!\n") is again


def test_ctrl_c_ends_a_stream_in_one_line(monkeypatch, capsys, trained):
    """What was written stays; exit code 1, no traceback."""
    options = ["generate", str(trained.elastic), "--size", "small", "--max-new-tokens", "40"]
    main([*options, "--json", "add 12 34"])
    text = json.loads(capsys.readouterr().out)["text"]
    accept, seen = Generator.stream, []

    def stream(self, *arguments, **more):
        for event in accept(self, *arguments, **more):
            yield event
            seen.append(event)
            if len(seen) == 5:
                os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Generator, "stream", stream)
    with pytest.raises(SystemExit) as ended:
        main([*options, "--stream", "add 12 34"])
    shown = capsys.readouterr()
    assert ended.value.code == 1
    assert shown.err == "stopped; what is written above is not all\n"
    assert shown.out.endswith("\n") and 0 < len(shown.out.strip("\n")) < len(text)
    assert text.startswith(shown.out[:-1])


def test_a_half_character_on_the_command_line_is_one_line(trained, capsys):
    for prompt in ("\udcff", "add \ud83d 2"):
        with pytest.raises(SystemExit) as ended:
            main(["generate", str(trained.elastic), prompt])
        shown = capsys.readouterr()
        assert ended.value.code == 2 and shown.err.count("\n") == 1
        assert "half a character" in shown.err
