"""Law 11 in the ways in which words get lost: fields of other types, switches and tags, Python's
way to print, keys that nobody reads, traces that do not close."""

from __future__ import annotations

import json
from typing import Any

import pytest

from star_elastic.data.rendering import LossOn, Renderer
from star_elastic.data.sources import Source
from star_elastic.errors import RowError
from tests.chat_templates import (
    CHATML,
    MARKED,
    PARTS,
    SWITCHES,
    TRIMS,
    WITH_TOOLS,
    byte_tokenizer,
)

CALLS = CHATML.replace(
    "{{ m['content'] }}",
    "{{ m['content'] or '' }}{% for c in m.tool_calls or [] %}CALL{% endfor %}",
)
"""Writes calls in the place of CALL."""
CALL = {"type": "function", "function": {"name": "now", "arguments": {"at": "Rome"}}}
TALK = {"messages": [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b."}]}


def talk(question: Any = "a?", answer: Any = "b.", **more: Any) -> dict[str, Any]:
    """A question and an answer; `more` are fields of the answer."""
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer, **more},
        ]
    }


def learned(template, row, loss_on: LossOn = "answers") -> tuple[str, str]:
    """What a row's document says up to where it counts and from there on."""
    tokenizer = byte_tokenizer(template)
    document = Renderer(tokenizer, loss_on).document(row)
    place = document.first + 1
    before, after = document.ids[:place], document.ids[place:]
    return str(tokenizer.decode(before)), str(tokenizer.decode(after))


def refused(template, row, problem, loss_on: LossOn = "answers"):
    """The row is refused for this, in one line with a remedy."""
    with pytest.raises(RowError, match=problem) as raised:
        Renderer(byte_tokenizer(template), loss_on).document(row)
    assert "\n" not in str(raised.value) and "; " in str(raised.value)


# Fields of messages


@pytest.mark.parametrize("template", [CHATML, SWITCHES], ids=["unread", "read"])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("tool_calls", v) for v in (True, 5, "x", ["x"], [1], [[]], {"name": "f"}, '{"a": 1}')),
        *(("tool_calls", [v]) for v in ({"function": "f"}, {"id": "x"}, {"name": 5})),
        *(("tool_calls", [{"name": "f", "arguments": v}]) for v in ([1], 5, True, "", " ")),
        ("tool_calls", [{"name": "f", "parameters": {"city": "Rome"}}]),
        ("tool_calls", [{"function": {"name": "f", "kwargs": {"city": "Rome"}}}]),
        *(("function_call", v) for v in ("auto", True, ["x"], {"arguments": "{}"})),
        *(("reasoning_content", v) for v in (["x"], {"a": "x"}, 5, True)),
        *((key, ["x"]) for key in ("thinking", "reasoning", "name")),
        *((key, v) for key in ("tools", "functions", "documents") for v in (5, [1], "x")),
    ],
)
def test_a_field_of_another_type_is_refused(template, field, value):
    """By its name and that of its message, whether the template reads it or not."""
    refused(template, talk(**{field: value}), f"has .*{field}.* in message 2.*; ")


def test_calls_may_be_a_json_text():
    """Tables keep them so; and whole conversations."""
    row = talk("q", None, tool_calls=[CALL])
    expected = learned(SWITCHES, row)
    assert expected[1].startswith('<tool>{"name": "now", "arguments": {"at": "Rome"}}')
    row["messages"][1]["tool_calls"] = json.dumps([CALL])
    assert learned(SWITCHES, row) == expected
    assert learned(SWITCHES, {"messages": json.dumps(row["messages"])}) == expected
    refused(CHATML, row, "has tool_calls in message 2 that the chat template leaves out")
    refused(CHATML, {"messages": "[{"}, "has no list of messages")


@pytest.mark.parametrize(
    "row", [{"text": None}, {"prompt": "a", "completion": None}, {"messages": None, "id": 3}]
)
def test_what_is_null_is_told_as_null(row):
    """As tables have it, where a key is missing in a row alone."""
    empty = next(key for key, value in row.items() if value is None)
    refused(CHATML, row, f"^has a {empty} that is null; write a text")


def test_nothing_but_a_row_error_leaves_a_row():
    """Whatever a row holds that nobody has thought of; so that it may be left out."""
    deep: dict = {}
    for _ in range(600):
        deep = {"properties": {"x": deep}}
    tools = "{{ tools | tojson if tools }}" + CHATML
    refused(tools, {**TALK, "tools": [deep]}, "cannot be read|refuses|leaves out")
    refused(CHATML, {**TALK, 5: "x"}, "cannot be read")


def test_a_message_that_is_not_to_count_is_refused():
    for weight in (0, 0.5, "0"):
        refused(CHATML, talk(weight=weight), "has the weight .* would count whole")
        refused(CHATML, talk(weight=weight), "has the weight .* would count whole", "all")
    assert learned(CHATML, talk(weight=1)) == learned(CHATML, TALK)
    earlier = {"messages": [*talk("x", "y", weight=0)["messages"], *TALK["messages"]]}
    assert learned(CHATML, earlier)[1] == "b.<|im_end|>"
    refused(CHATML, earlier, "has the weight 0", "all")


# Arguments of calls

WRITES_JSON = CALLS.replace("CALL", "{{ c.function.name }} {{ c.function.arguments | tojson }}")
WRITES_TEXT = CALLS.replace("CALL", "{{ c.function.name }} {{ c.function.arguments }}")


def calling(*arguments):
    """A row in which a call is made with each of these arguments, and answered."""
    calls = [
        {"role": "assistant", "content": "", "tool_calls": [{"function": function}]}
        for function in ({"name": "now", "arguments": given} for given in arguments)
    ]
    return {"messages": [{"role": "user", "content": "q"}, *calls]}


@pytest.mark.parametrize("template", [WRITES_JSON, WRITES_TEXT], ids=["json", "text"])
@pytest.mark.parametrize(
    ("given", "written"),
    [
        ("{}", "{}"),
        ({}, "{}"),
        ('{"a": "x"}', '{"a": "x"}'),
        ({"a": {"b": ["x", True, None, 2]}}, '{"a": {"b": ["x", true, null, 2]}}'),
        ('{"a": {"b": ["x", true, null, 2]}}', '{"a": {"b": ["x", true, null, 2]}}'),
    ],
)
def test_arguments_are_json_however_they_were_given(template, given, written):
    assert learned(template, calling(given))[1] == f"now {written}<|im_end|>"
    mixed = calling({"c": "y"}, given, '{"d": "z"}')
    before, after = learned(template, mixed)
    assert f"now {written}<" in before and 'now {"c": "y"}<' in before
    assert after == 'now {"d": "z"}<|im_end|>'


@pytest.mark.parametrize("text", ["[1, 2]", "5", "null", '"x"', "city=Rome", '{"a": 1, "a": 2}'])
def test_a_text_that_is_no_object_is_not_written_as_a_string(text):
    refused(WRITES_JSON, calling(text), "has tool_calls in message 2 that the chat template")
    assert learned(WRITES_TEXT, calling(text))[1] == f"now {text}<|im_end|>"


# Python's way to print

TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Looks.",
        "parameters": {
            "type": "object",
            "properties": {"x": {"type": "string"}},
        },
    },
}
XML = CALLS.replace(
    "CALL",
    "{% for k, v in c.function.arguments.items() %}<{{ k }}>{{ v }}</{{ k }}>{% endfor %}",
).replace("{% for k", "{{ c.function.name }}{% for k")
PRINTS_CALLS = CHATML.replace("{{ m['content'] }}", "{{ m['content'] or m.tool_calls }}")
PRINTS_CALL = CHATML.replace("{{ m['content'] }}", "{{ m['content'] or m.function_call }}")
PRINTS_TYPES = (
    "{% for t in tools %}{{ t.function.name }} {{ t.function.description }} "
    "{% for k, v in t.function.parameters.properties.items() %}{{ k }}: {{ v }}{% endfor %}"
    "{% endfor %}" + CHATML
)


@pytest.mark.parametrize(
    ("template", "row"),
    [
        (PRINTS_CALLS, calling({"a": "x"})),
        (PRINTS_CALLS, calling({})),
        (PRINTS_CALLS, calling('{"a": "x"}')),
        (PRINTS_CALL, talk("q", None, function_call={"name": "now", "arguments": '{"a": 1}'})),
        (PRINTS_CALL, talk("q", None, function_call={"name": "now", "arguments": {"a": "x"}})),
        (XML, calling({"where": {"city": "Rome", "at": ["x", "y"]}})),
        (XML, calling({"where": {"n": {"deep": [True]}}})),
        (XML, calling({"a": True})),
        (XML, calling({"a": False})),
        (XML, calling({"a": None})),
        (XML, calling('{"a": true}')),
        ("{{ tools }}" + CHATML, {**TALK, "tools": [TOOL]}),
        (PRINTS_TYPES, {**TALK, "tools": [TOOL]}),
        ("{{ documents }}" + CHATML, {**TALK, "documents": [{"title": "t", "text": "x"}]}),
        ("{% for m in messages %}{{ m }}{% endfor %}", TALK),
        ("{{ messages }}", TALK),
    ],
)
def test_python_is_not_taught(template, row):
    for loss_on in ("answers", "all"):
        refused(template, row, "writes as Python does, not as JSON", loss_on)


@pytest.mark.parametrize(
    ("template", "row"),
    [
        (XML, calling({"a": "True", "b": "x", "n": 2})),
        (XML, calling({"a": "None of it", "b": 5})),
        (XML.replace("{{ v }}", "{{ v | tojson }}"), calling({"a": [True, None], "b": {"c": 1}})),
        ("{{ tools | tojson }}" + CHATML, {**TALK, "tools": [TOOL]}),
        ("{{ tools | tojson }}" + CHATML, {**talk("True or None?"), "tools": [TOOL]}),
        ("{{ tools | tojson }}" + CHATML, {**talk(str({"type": "x", "y": [1]})), "tools": [TOOL]}),
        (CHATML, talk("print({'a': True}) \\x7f")),
    ],
)
def test_what_only_looks_like_python_is_read(template, row):
    learned(template, row)


# Switches and tags

STEERED = CHATML.replace(
    "{{ m['content'] }}",
    "{{ m['content'].replace('/think', '').replace('/no_think', '') "
    "if m.role != 'assistant' else m['content'] }}",
)
LOSES_TAGS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "<think>\n\n</think>\n\n{{ m.content }}{% else %}{{ m.content.replace('<think>', '') }}"
    "{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}"
)
"""Takes tags out of the words of others and writes the same by itself."""


@pytest.mark.parametrize(
    "words", ["/thinking/a", "/home/no_thinker", "a/think", "/think.", "see /x/think /y"]
)
def test_a_switch_is_a_word_of_its_own(words):
    refused(STEERED, talk(f"What is in {words}?"), "has content in message 1 that the chat")
    assert "What is 2?" in learned(STEERED, talk("What is 2? /think"))[0]
    assert "Two\n\nwords" in learned(STEERED, talk("/think Two\n/think\nwords"))[0]
    assert words in learned(STEERED, talk("a", f"It is {words}."))[1]


@pytest.mark.parametrize("words", ["What does <think> do?", "<think>", "a <think>b</think> c"])
def test_tags_in_the_words_of_others_stay(words):
    refused(LOSES_TAGS, talk(words), "has content in message 1 that the chat template")
    for template in (CHATML, SWITCHES):
        assert words in learned(template, talk(words))[0]


@pytest.mark.parametrize(
    "answer", ["Write <think> first.", "The tag <think>", "<think> is a tag", "x </think> <think>"]
)
def test_tags_in_an_answer_stay(answer):
    template = LOSES_TAGS.replace("{{ m.content }}{% else", "{{ m.content.replace('<think>', '') }}"
                                  "{% else")  # fmt: skip
    refused(template, talk("q", answer), "has content in message 2 that the chat template")
    assert answer in learned(LOSES_TAGS, talk("q", answer))[1]


# Keys beside


@pytest.mark.parametrize(
    "key",
    ["completion", "response", "context", "instruction", "instructions", "system_instruction",
     "reasoning", "input", "prompt", "query", "odd key", "line\nend", "\ud83d"],
)  # fmt: skip
@pytest.mark.parametrize("value", ["unseen words", ["unseen words"], {"x": [{"y": "unseen"}]}])
@pytest.mark.parametrize(
    "row", [TALK, {"prompt": "p", "completion": "c"}, {"text": "t"}], ids=["talk", "pair", "text"]
)
def test_words_beside_a_row_are_refused(row, key, value):
    """Whatever their key; but for those which the model sees all the same."""
    if key in row:
        return
    refused(CHATML, {**row, key: value}, " beside .*would not be seen;")
    words = row.get("text") or row.get("prompt") or "a?"
    expected = learned(CHATML, row)
    for seen in (words, f" {words}\n", [words], {"x": words}):
        assert learned(CHATML, {**row, key: seen}) == expected


def test_a_part_of_a_word_is_not_seen():
    row = {"prompt": "unseemly", "completion": "x y\nz"}
    refused(CHATML, {**row, "context": "seem"}, "has context beside")
    learned(CHATML, {**row, "context": "x  y z"})


@pytest.mark.parametrize("value", ["x.png", ["https://a.b/x.png"], {"id": "a?"}, ["b."]])
def test_pictures_are_refused(value):
    for row in (TALK, {"prompt": "a?", "completion": "b."}, {"text": "a? b."}):
        refused(CHATML, {**row, "images": value}, "has images beside")
    refused(CHATML, talk(audio=value), "has audio in message 2, which a text model does not see")
    part = {"type": "text", "text": "a?", "image": "x.png"}
    refused(CHATML, talk([part]), "has image in a part in message 1")


@pytest.mark.parametrize(
    ("field", "value"),
    [("thought", "hmm"), ("thoughts", ["x y"]), ("reasoning_text", "r"), ("tool_plan", "plan"),
     ("reasoning_details", [{"text": "x y"}]), ("refusal", "no"), ("line\nend", "x y")],
)  # fmt: skip
def test_words_beside_a_content_are_refused_unless_they_are_written(field, value):
    name = "line" if field == "line\nend" else field
    for loss_on in ("answers", "all"):
        refused(CHATML, talk(**{field: value}), f"has {name}.* in message 2 that", loss_on)
    reads = CHATML.replace("{{ m['content'] }}", "{{ m.tool_plan }}{{ m['content'] }}")
    assert learned(reads, talk(tool_plan="Look it up. "))[1] == "Look it up. b.<|im_end|>"
    assert learned(CHATML, talk(**{field: "b."})) == learned(CHATML, TALK)


@pytest.mark.parametrize(
    "notes",
    [
        {"id": "x-1", "source": "glaive", "conversations": [{"from": "human", "value": "a?"}]},
        {"prompt": "a?", "prompt_id": "f0e3"},
        {"full_topic": None, "source": "smol-magpie", "difficulty": "easy", "quality": "good",
         "category": "math", "reward_model_score": 0.5, "conversation_tokens": 50},
        {"uuid": "b0a3", "license": "CC BY 4.0", "generator": "Some-Model", "version": "v1",
         "category": "math", "reasoning": "off", "used_in_training": "yes",
         "metadata": {"problem": "words that nobody sees"}},
        {"message_id": "m", "parent_id": None, "user_id": "u", "created_date": "2023-02-05",
         "role": "prompter", "lang": "en", "review_count": 3, "deleted": False, "rank": None,
         "synthetic": False, "model_name": None, "detoxify": {"toxicity": 0.1},
         "message_tree_id": "t", "tree_state": "ready_for_export",
         "emojis": {"name": ["+1"], "count": [2]}, "labels": {"name": ["spam"], "value": [0.0]}},
        {"idx": 5, "language": "English", "hash": None, "avatarUrl": "https://x.y/z.png",
         "model": "gpt-4", "views": 7, "title": "A talk", "topic": "chat", "skip": True},
        {"url": "https://x.y", "dump": "CC-MAIN", "file_path": "s3://x", "language_score": 0.9,
         "token_count": 3, "date": "2020-01-01T00:00:00Z", "meta": {"pile_set_name": "Books"}},
        {"category": "closed_qa", "context": "", "images": [], "tools": []},
        {"scores": [1, 2.5, None], "flag": True, "when": "2024-05-06", "mode": "auto"},
    ],
    ids=["openhermes", "ultrachat", "smoltalk", "nemotron", "oasst", "sharegpt", "web", "dolly",
         "values"],
)  # fmt: skip
def test_notes_beside_rows_are_left_alone(notes):
    """As well-known data sets have them."""
    for row in (TALK, {"text": "a?"}, {"completion": "b.", "prompt": "a?"}):
        if row.keys() & notes.keys() <= {"prompt"} and not (row is not TALK and "prompt" in notes):
            assert learned(CHATML, {**notes, **row}) == learned(CHATML, row)
    told = {"id": "m", "timestamp": "x", "language": "en", "toxic": False, "tool_call_id": "y"}
    assert learned(CHATML, talk(**told)) == learned(CHATML, TALK)


def test_a_key_that_stands_twice_is_refused(tmp_path):
    """The last one would win without a word; also inside a text that holds JSON."""
    file = tmp_path / "rows.jsonl"
    row = json.dumps(TALK)
    lines = [
        '{"prompt": "one", "prompt": "two", "completion": "c"}',
        '{"messages": [{"role": "user", "content": "a", "content": "b"}]}',
        f'{row[:-1]}, "id": {{"a": 1, "a": 1}}}}',
        f'{row[:-1]}, "tools": "[{{\\"a\\": 1, \\"a\\": 2}}]"}}',
    ]
    file.write_text("\n".join(lines))
    source = Source([file], byte_tokenizer("{{ tools | tojson if tools }}" + CHATML))
    for number in range(len(lines)):
        with pytest.raises(RowError, match=f"line {number + 1} .*the key '.*' stands twice.*; cor"):
            source.document(number)


# Traces that a turn opens

OPENS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}"
    "{{ '<think></think>' if enable_thinking is false else '<think>\n' }}"
    "{{ m.content.strip() }}{% else %}{{ m.content.split('</think>')[-1] }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{{ '<think></think>' if enable_thinking is false else '<think>\n' }}{% endif %}"
)
"""As Nemotron Nano v2: the last turn begins as it was opened."""
ALWAYS = OPENS.replace("'<think></think>' if enable_thinking is false else ", "")
WORDS = ALWAYS.replace("'<think>\n' }}", "'<think></think>' if '/no_think' in messages[0].content "
                       "else '<think>\n' }}").replace("m.content.split('</think>')[-1]",
                       "m.content.replace('/no_think', '')")  # fmt: skip
MARKS = ALWAYS.replace("{{ m.content.strip() }}", "{% generation %}{{ m.content }}{% endgener" +
                       "ation %}")  # fmt: skip
HEAD = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("template", [OPENS, ALWAYS, WORDS, MARKS])
@pytest.mark.parametrize("content", ["<think>\nhm\n</think>\n\n4", "hm\n</think>\n\n4"])
def test_a_trace_in_a_content_is_opened_once(template, content):
    expected = (f"{HEAD}<think>\n", "hm\n</think>\n\n4<|im_end|>")
    assert learned(template, talk("q", content)) == expected
    whole = "".join(learned(template, talk("q", content), "all"))
    assert whole == "".join(expected) + "\n"


def test_an_answer_without_a_trace_begins_as_generation_without_thinking():
    for row in (talk("q", "4"), {**talk("q", "4"), "enable_thinking": False}):
        assert learned(OPENS, row) == (f"{HEAD}<think></think>", "4<|im_end|>")
    system = {"messages": [{"role": "system", "content": "/no_think"}, *talk("q", "4")["messages"]]}
    before, after = learned(WORDS, system)
    assert before.endswith("assistant\n<think></think>") and after == "4<|im_end|>"


@pytest.mark.parametrize(
    ("template", "row", "remedy"),
    [
        (ALWAYS, talk("q", "4"), "prompt and completion"),
        (MARKS, talk("q", "4"), "prompt and completion"),
        (WORDS, talk("q", "4"), "put /no_think into the system message"),
        (ALWAYS, talk("q", "<think>\nhm"), "prompt and completion"),
        (OPENS, {**talk("q", "4"), "enable_thinking": True}, "prompt and completion"),
    ],
)
def test_an_answer_in_a_trace_that_never_closes_is_refused(template, row, remedy):
    for loss_on in ("answers", "all"):
        refused(
            template, row, f"last answer inside <think>, .* and </think>, or .*{remedy}", loss_on
        )


EMPTY = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n' }}{% endif %}OPEN{{ m.content }}<|im_end|>CLOSE\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{{ '<think>\n\n</think>\n' if enable_thinking is false }}{% endif %}"
)
"""As SmolLM 3: an empty trace where there is to be none, before whatever the content is."""
MARKS_EMPTY = EMPTY.replace("OPEN", "{% generation %}").replace("CLOSE", "{% endgeneration %}")
MARKS_TURN = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}<|im_start|>assistant\n"
    "{{ '<think>\n\n</think>\n' if enable_thinking is false }}OPEN{{ m.content }}<|im_end|>"
    "{% endgeneration %}\n{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>CLOSE\n"
    "{% endif %}{% endfor %}"
)
"""Marks what it writes itself at the beginning of a turn, too."""


@pytest.mark.parametrize("template", [EMPTY, MARKS_EMPTY, MARKS_TURN])
@pytest.mark.parametrize("loss_on", ["answers", "all"])
def test_an_empty_trace_is_learned_once(template, loss_on):
    """Whether the row or the template writes it; and no trace behind it."""
    template = template.replace("OPEN", "").replace("CLOSE", "")
    no_trace = {**talk("q", "ok"), "enable_thinking": False}
    own = {**talk("q", "<think>\n\n</think>\n\nok"), "enable_thinking": False}
    assert learned(template, own, loss_on) == learned(template, no_trace, loss_on)
    assert "".join(learned(template, own, loss_on)).count("<think>") == 1
    assert "".join(learned(template, talk("q", "<think>hm</think>ok"))).count("<think>") == 1
    for answer in ("<think>hm</think>ok", "</think>ok"):
        row = {**talk("q", answer), "enable_thinking": False}
        refused(template, row, "trace behind an empty one, <think></think>, which", loss_on)


@pytest.mark.parametrize("within", ["<tool></tool>", "<tool>{}</tool>", "a </tool>", ""])
@pytest.mark.parametrize("behind", ["\n\n", "\n", ""])
def test_a_trace_with_tags_inside_is_read_however_long_the_answer_is(within, behind):
    """What a template takes apart is the trace, whatever tags stand in it."""
    template = SWITCHES.replace("{{- '}' }}", "{{- '}</tool>' }}")
    for length in range(0, 40, 3):
        answer = f"{'y' * length}."
        row = talk("a", f"<think>\nCall {within} now.\n</think>{behind}{answer}")
        written = f"<think>\nCall {within} now.\n</think>\n\n{answer}<|im_end|>"
        assert "".join(learned(template, row)).endswith(written), length


# Where an answer ends

END_BEHIND = MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")


@pytest.mark.parametrize("between", ["", " ", "\n"])
def test_an_end_behind_the_mark_is_learned(between):
    written = f"{{% endgeneration %}}{{{{ {between!r} }}}}"
    template = END_BEHIND.replace("{% endgeneration %}", written)
    assert learned(template, TALK)[1] == f"b.{between}<|im_end|>"
    other = END_BEHIND.replace("{% endgeneration %}<|im_end|>", "{% endgeneration %}.<|im_end|>")
    assert learned(other, TALK)[1] == "b."


@pytest.mark.parametrize("template", [CHATML, MARKED, END_BEHIND, SWITCHES])
@pytest.mark.parametrize("end", ["<|im_end|>", "<|im_end|>\n", "\n<|im_end|>"])
def test_an_end_is_not_learned_twice(template, end):
    for row, number in ((talk("a?", f"b.{end}"), 2), (talk(f"a?{end}"), 1)):
        refused(template, row, f"has <|im_end|> at the end of message {number}".replace("|", r"\|"))
    no_end = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
    assert learned(no_end, talk("a?", f"b.{end}"))[1] == f"[assistant] b.{end}".rstrip()


def test_any_mark_may_end_a_turn():
    """Also one that is not the tokenizer's own: it is not learned twice, nor what stands behind."""
    template = CHATML.replace("<|im_end|>", "<|eot|>")
    assert learned(template, TALK)[1] == "b.<|eot|>"
    assert "".join(learned(template, TALK, "all")).endswith("b.<|eot|>\n")
    for row, number in ((talk("a?", "b.<|eot|>"), 2), (talk("a?<|eot|>\n"), 1)):
        refused(template, row, rf"has <\|eot\|> at the end of message {number}, .* writes itself")


@pytest.mark.parametrize("template", [CHATML, MARKED, SWITCHES, TRIMS])
def test_special_tokens_that_end_no_turn_are_words(template):
    """As masks, unknown words and pictures stand in texts, once or twice."""
    for question, answer in (
        ("Paris is <tool> <tool>", "b."), ("a?", "of <tool><tool>"), ("a <tool>", "it is <tool>"),
        ("the <tool> <tool> of", "<tool>"),
    ):  # fmt: skip
        before, after = learned(template, talk(question, answer))
        assert answer in after and question in before
    bare = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    bare += "{% if add_generation_prompt %}assistant:{% endif %}"
    assert learned(bare, talk("a?", "x <tool>"))[1] == " x <tool>\n"


def test_an_end_behind_the_mark_need_not_be_the_tokenizers():
    """Any mark may end a turn, but one behind which something comes opens that."""
    behind = "{% endgeneration %}<|im_end|>"
    for end in ("<|eot|>", "<|eot|>\n", " <|eot|>", "<|eot|><|im_end|>"):
        template = END_BEHIND.replace(behind, f"{{% endgeneration %}}{end}")
        after = learned(template.replace("\n{% endif %}", "{% endif %}"), TALK)[1]
        assert after.startswith("b." + end[: end.index(">") + 1]), (end, after)
    for other in ("<tool>{}<|im_end|>", "<pad>", "<s>"):
        assert learned(END_BEHIND.replace(behind, f"{{% endgeneration %}}{other}"), TALK)[1] == "b."
    # One token for both ends of a text, as GPT-2 has it.
    tokenizer = byte_tokenizer(END_BEHIND.replace("<|im_end|>", "{{ eos_token }}"))
    tokenizer.bos_token = tokenizer.eos_token
    document = Renderer(tokenizer, "answers").document(TALK)
    assert tokenizer.decode(document.ids[document.first + 1 :]).startswith("b.<|im_end|>")


# What must not be refused


def test_a_comment_may_speak_of_the_mark():
    for comment in ("{# in {% generation %} #}", "{#- {%- generation -%}{% endgeneration %} -#}"):
        assert learned(comment + CHATML, TALK) == learned(CHATML, TALK)
    spaced = MARKED.replace("{% generation %}", "{%-   generation -%}")
    assert learned(spaced, TALK)[1] == "b.<|im_end|>"


LLAMA_2 = (
    "{% if messages[0].role == 'system' %}{% set system_message = messages[0].content %}"
    "{% set messages = messages[1:] %}{% else %}{% set system_message = '' %}{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ system_message }} {{ m.content }} "
    "[/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("key", ["system", "system_prompt", "system_message"])
def test_a_system_text_becomes_a_message_where_the_template_sets_the_variable(key):
    before, after = learned(LLAMA_2, {**TALK, key: "Be kind."})
    assert (before, after) == ("[INST] Be kind. a? [/INST]", " b.<|im_end|>")


@pytest.mark.parametrize("template", [CHATML, PARTS, MARKED, TRIMS, WITH_TOOLS])
def test_contents_may_be_texts_or_parts_or_both(template):
    expected = learned(template, TALK)
    for ask in ("a?", ["a?"], [{"type": "text", "text": "a?"}], [{"text": "a"}, "?"]):
        for say in ("b.", ["b", "."]):
            assert learned(template, talk(ask, say)) == expected
