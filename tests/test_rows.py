"""Law 11: what a row says is what a model sees, as it does when it runs; or the row is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, processors
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from star_elastic.data.encoding import Encoder
from star_elastic.data.rendering import Document, Renderer
from star_elastic.errors import CheckpointError, RowError
from star_elastic.generate.prompts import ThinkingTags
from star_elastic.models.tokenizer import load_tokenizer
from tests.chat_templates import (
    ALTERNATES,
    CHATML,
    DROPS_TRACES,
    MARKED,
    PARTS,
    SWITCHES,
    TRIMS,
    WITH_TOOLS,
    byte_tokenizer,
    spaced_tokenizer,
)
from tests.laws.parents import examples

END = "\n</think>\n\n"
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<>[]"), max_size=20)
words = texts.filter(lambda text: text.strip() == text != "")


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def seen(tokenizer, document: Document) -> tuple[str, str]:
    """What a document's ids say, up to where they count and from there on."""
    place = document.first + 1
    return tokenizer.decode(document.ids[:place]), tokenizer.decode(document.ids[place:])


def counted(tokenizer, row) -> str:
    """What counts of a row whose answers are trained on."""
    return seen(tokenizer, Renderer(tokenizer, "answers").document(row))[1]


# Plain rows

PLAIN = {
    "nothing": byte_tokenizer(),
    "front": byte_tokenizer(front=True),
    "both": byte_tokenizer(front=True, back=True),
    "back": byte_tokenizer(back=True),
    "no end": byte_tokenizer(front=True, eos=None),
}


@pytest.mark.parametrize("kind", PLAIN)
@given(text=texts, begins=st.booleans(), ends=st.booleans())
@examples(30)
def test_a_text_has_the_ends_that_the_tokenizer_gives_it_once(kind, text, begins, ends):
    """Also a text that writes them itself."""
    tokenizer = PLAIN[kind]
    has_front, has_end = kind in ("front", "both", "no end"), kind != "no end"
    row = {"text": "<s>" * begins + text + "<|im_end|>" * (ends and has_end)}
    document = Renderer(tokenizer).document(row)
    assert document.first == 0
    if not row["text"]:
        assert document.ids == [] == document.fed
        return
    front = "<s>" if has_front or begins else ""
    assert tokenizer.decode(document.ids) == front + text + "<|im_end|>" * has_end
    assert document == Renderer(tokenizer, "answers").document(row)  # a text counts whole


@pytest.mark.parametrize("kind", PLAIN)
@given(prompt=texts, completion=texts, begins=st.booleans(), ends=st.booleans())
@examples(30)
def test_a_prompt_is_read_as_generation_reads_it(kind, prompt, completion, begins, ends):
    tokenizer = PLAIN[kind]
    has_front, has_end = kind in ("front", "both", "no end"), kind != "no end"
    row = {
        "prompt": "<s>" * begins + prompt,
        "completion": completion + "<|im_end|>" * (ends and has_end),
    }
    document = Renderer(tokenizer, "answers").document(row)
    assert document.ids == Renderer(tokenizer).document(row).ids
    before, after = seen(tokenizer, document)
    if not row["prompt"] and not row["completion"]:
        assert not document.ids
    elif row["prompt"] or has_front:
        assert before == "<s>" * (has_front or begins) + prompt
        assert after == completion + "<|im_end|>" * has_end
    if prompt.strip() and not begins:
        ids = ThinkingTags(tokenizer, END).encode_prompt(prompt, thinking=False).ids
        end = (tokenizer.eos_token_id,) if kind in ("both", "back") else ()
        assert tuple(document.ids[: document.first + 1]) == ids[: len(ids) - len(end)] or (
            tuple(document.ids[: document.first + 1]) == ids
        )


def test_a_completion_has_no_space_that_the_row_does_not_have():
    """Tokenizers of sentencepiece's kind put one before every text; tokens may also run across the
    border, which generation could not write."""
    tokenizer = spaced_tokenizer()
    for prompt, completion, first in (
        ("add 3 7\n", "ten", "ten"),
        ("add 3 7:", "a", "a"),
        ("add", "ten", "ten"),
        ("add", " ten", "▁ten"),
    ):
        row = {"prompt": prompt, "completion": completion}
        document = Renderer(tokenizer, "answers").document(row)
        assert tokenizer.decode(document.ids) == f"<s> {prompt}{completion}</s>"
        assert tokenizer.convert_ids_to_tokens(document.ids[document.first + 1]) == first
        head = tokenizer(prompt)["input_ids"]
        assert document.ids[: document.first + 1] == head


@pytest.mark.parametrize("key", ["system", "tools", "documents", "functions", "reasoning_content"])
@pytest.mark.parametrize("row", [{"text": "a"}, {"prompt": "a", "completion": "b"}], ids=len)
def test_words_beside_a_plain_row_are_refused(row, key):
    renderer = Renderer(byte_tokenizer(CHATML))
    for blank in (None, "", []):
        assert renderer.document({**row, key: blank}) == renderer.document(row)
    with pytest.raises(RowError, match=f"has {key} beside .* write the row as messages, take it"):
        renderer.document({**row, key: ["words"]})


def test_notes_beside_a_row_are_left_alone():
    renderer = Renderer(byte_tokenizer(CHATML))
    row = {"prompt": "a", "completion": "b"}
    assert renderer.document({**row, "id": 7, "source": "web"}) == renderer.document(row)
    chat = {"messages": [user("a"), assistant("b")]}
    notes = {"id": 7, "prompt": "a", "source": "web", "add_generation_prompt": True, "eos_token": 3}
    assert renderer.document({**chat, **notes}) == renderer.document(chat)
    with pytest.raises(RowError, match="has context beside prompt and completion, which would not"):
        renderer.document({**row, "context": "the text to read"})


@pytest.mark.parametrize("loss_on", ["all", "answers"])
@pytest.mark.parametrize(
    "row",
    [
        {"text": "cut \ud83d"},
        {"prompt": "\udc00", "completion": "b"},
        {"prompt": "a", "completion": "b \ud83d"},
        {"messages": [user("a \ud83d"), assistant("b")]},
        {"messages": [user("a"), assistant("b \udfff")]},
    ],
    ids=["text", "prompt", "completion", "question", "answer"],
)
def test_half_characters_are_refused(row, loss_on):
    with pytest.raises(RowError, match=r"half of a character, '\\u[0-9a-f]{4}', which no tokeniz"):
        Renderer(byte_tokenizer(CHATML), loss_on).document(row)


def test_ids_beyond_the_embeddings_are_refused():
    tokenizer = byte_tokenizer(CHATML)
    size = len(tokenizer)
    tokenizer.add_tokens(["<new>"])
    renderer = Renderer(tokenizer, "answers", size)
    renderer.document({"text": "old"})
    rows = (
        {"text": "a <new>"},
        {"prompt": "<new>", "completion": "b"},
        {"prompt": "a", "completion": "<new>"},
        {"messages": [user("<new>"), assistant("b")]},
    )
    for row in rows:
        with pytest.raises(RowError, match=f"the token '<new>' with id {size}, but the model has"):
            renderer.document(row)
        assert max(Renderer(tokenizer).document(row).ids) == size


@pytest.mark.parametrize("end", ["front", "back", "eos"])
def test_ends_beyond_the_embeddings_are_refused_before_any_row(end):
    """Every row would have them."""
    tokenizer = byte_tokenizer(CHATML)
    size = len(tokenizer)
    tokenizer.add_tokens(["<new>"])
    if end == "eos":
        tokenizer.eos_token = "<new>"
    else:
        own: Any = tokenizer
        own.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<new> $A" if end == "front" else "$A <new>", special_tokens=[("<new>", size)]
        )
    Encoder(tokenizer)
    Encoder(tokenizer, size + 1)
    with pytest.raises(
        CheckpointError, match=f"begins or ends with the token '<new>' with id {size}"
    ):
        Encoder(tokenizer, size)


@pytest.mark.parametrize("alphabet", ["0123456789+=", "ACGT", "é"])
def test_what_stands_around_a_text_is_told_from_its_own_tokens(alphabet):
    """Whatever letters a vocabulary lacks."""
    core = Tokenizer(
        models.BPE(vocab={t: n for n, t in enumerate(["<s>", "</s>", *alphabet])}, merges=[])
    )
    core.add_special_tokens(["<s>", "</s>"])
    core.decoder = decoders.Fuse()
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    row = {"prompt": alphabet[0], "completion": alphabet[-1]}
    last = 1 + len(alphabet)
    assert Renderer(tokenizer, "answers").document(row) == Document([0, 2, last, 1], 1)
    assert Renderer(tokenizer).document({"text": alphabet}).ids == [0, *range(2, last + 1), 1]
    assert ThinkingTags(tokenizer, END).encode_prompt(alphabet[0], thinking=False).ids == (0, 2)


def test_a_tokenizer_that_encodes_nothing_is_refused():
    core = Tokenizer(models.BPE(vocab={"<s>": 0}, merges=[]))
    core.add_special_tokens(["<s>"])
    with pytest.raises(CheckpointError, match="the tokenizer encodes no text of its own tokens"):
        Encoder(PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>"))


@pytest.mark.parametrize("kind", [kind for kind in PLAIN if kind != "no end"])
@pytest.mark.parametrize("behind", ["", "\n", " \n\n"])
def test_an_end_with_white_space_behind_it_is_not_doubled(kind, behind):
    tokenizer = PLAIN[kind]
    front = "<s>" if kind in ("front", "both") else ""
    text = Renderer(tokenizer).document({"text": "c<|im_end|>" + behind})
    assert tokenizer.decode(text.ids) == front + "c<|im_end|>"
    row = {"prompt": "p ", "completion": "c<|im_end|>" + behind}
    assert counted(tokenizer, row) == "c<|im_end|>"
    row = {"prompt": "p<|im_end|>" + behind, "completion": "c"}
    assert seen(tokenizer, Renderer(tokenizer, "answers").document(row)) == (
        front + row["prompt"], "c<|im_end|>"
    )  # fmt: skip


@pytest.mark.parametrize("where", ["config", "generation config", "nowhere"])
def test_rows_end_with_what_generation_stops_at(tmp_path, where):
    """Of a tokenizer that names no end, that of the model's settings; its own goes first."""
    tokenizer = byte_tokenizer(eos=None)
    end = tokenizer.convert_tokens_to_ids("<|eot|>")
    config = LlamaConfig(vocab_size=len(tokenizer), eos_token_id=end if where == "config" else None)
    config.save_pretrained(tmp_path)
    if where == "generation config":
        GenerationConfig(eos_token_id=[9999, end, 2]).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    said = "" if where == "nowhere" else "<|eot|>"
    assert counted(loaded, {"prompt": "p", "completion": "c"}) == "c" + said
    byte_tokenizer().save_pretrained(tmp_path)
    assert counted(load_tokenizer(tmp_path), {"prompt": "p", "completion": "c"}) == "c<|im_end|>"


# Conversations

SHAPES = {
    "chatml": (CHATML, "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n", "{}<|im_end|>"),
    "marked": (MARKED, "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n", "{}<|im_end|>"),
    "trims": (TRIMS, "<s>[user] {} [assistant]", " {} <|im_end|>"),
    "tools": (
        WITH_TOOLS,
        "<s><|im_start|>system\n<|eot|><|im_start|>user\n{}<|eot|><|im_start|>assistant\n",
        "{}<|eot|>",
    ),
    "switches": (
        SWITCHES,
        "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        "{}<|im_end|>",
    ),
    "alternates": (ALTERNATES, "<s>[INST] {} [/INST]", " {}<|im_end|>"),
}


@pytest.mark.parametrize("shape", SHAPES)
@given(question=words, answer=words)
@examples(25)
def test_exactly_the_answer_and_its_end_count(shape, question, answer):
    """And everything is there once: BOS that the template writes is not put before it again."""
    template, opening, end = SHAPES[shape]
    tokenizer = byte_tokenizer(template, front=True)
    row = {"messages": [user(question), assistant(answer)]}
    document = Renderer(tokenizer, "answers").document(row)
    assert seen(tokenizer, document) == (opening.format(question), end.format(answer))
    whole = Renderer(tokenizer, "all").document(row)
    assert whole.first == 0 and whole.ids[: len(document.ids)] == document.ids
    assert tokenizer.decode(whole.ids) == tokenizer.apply_chat_template(
        row["messages"], tokenize=False
    )


@pytest.mark.parametrize("shape", SHAPES)
@given(turns=st.lists(st.tuples(words, words), min_size=2, max_size=4), extra=texts)
@examples(15)
def test_of_many_turns_the_last_answer_counts(shape, turns, extra):
    """Answers that repeat a question, or are one another, are told apart all the same."""
    template, _, end = SHAPES[shape]
    tokenizer = byte_tokenizer(template)
    turns = [*turns[:-1], (turns[-1][0], turns[0][0])]
    messages = [m for ask, say in turns for m in (user(ask), assistant(say))]
    if extra.strip() and shape not in ("switches",):
        messages.insert(0, {"role": "system", "content": extra.strip()})
    document = Renderer(tokenizer, "answers").document({"messages": messages})
    before, after = seen(tokenizer, document)
    assert after == end.format(turns[-1][1])
    for ask, say in turns[:-1]:
        assert ask in before and say in before


@pytest.mark.parametrize("trace", ["", "1+2=3"], ids=["plain", "thinking"])
@pytest.mark.parametrize("inside", [False, True], ids=["field", "content"])
def test_a_turn_opens_as_generation_opens_it(trace, inside):
    tokenizer = byte_tokenizer(SWITCHES)
    answer = assistant("3", reasoning_content=trace)
    if inside:
        answer = assistant(f"<think>\n{trace}\n</think>\n\n3" if trace else "3")
    row = {"messages": [user("1+2"), answer]}
    document = Renderer(tokenizer, "answers").document(row)
    opening = "<|im_start|>user\n1+2<|im_end|>\n<|im_start|>assistant\n"
    if trace:
        expected = (opening, "<think>\n1+2=3\n</think>\n\n3<|im_end|>")
    else:
        expected = (f"{opening}<think>\n\n</think>\n\n", "3<|im_end|>")
    assert seen(tokenizer, document) == expected


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_a_trace_may_have_any_of_its_names(name):
    tokenizer = byte_tokenizer(SWITCHES)
    row = {"messages": [user("1+2"), assistant("3", **{name: "add"})]}
    assert counted(tokenizer, row) == "<think>\nadd\n</think>\n\n3<|im_end|>"
    row["messages"][1]["reasoning_content"] = "add"
    assert counted(tokenizer, row) == "<think>\nadd\n</think>\n\n3<|im_end|>"


def test_a_row_chooses_what_its_template_lets_it_choose():
    tokenizer = byte_tokenizer(
        CHATML.replace("{% if add", "{% if style %}Be {{ style }}.{% endif %}{% if add")
        .replace("{% for", "{{ 'DEEP ' if enable_thinking else '' }}{% for", 1)
    )  # fmt: skip
    row = {"messages": [user("a"), assistant("b")]}
    renderer = Renderer(tokenizer, "all")

    def text(**more):
        return tokenizer.decode(renderer.document({**row, **more}).ids)

    assert text() == text(enable_thinking=False) == text(mood=5)
    assert text(enable_thinking=True).startswith("DEEP ")
    assert text(style="kind").endswith("Be kind.")
    options = {"enable_thinking": True, "style": "kind", "custom_instructions": "", "x": None}
    assert text(chat_template_kwargs=options) == text(enable_thinking=True, style="kind")
    with pytest.raises(RowError, match="chat_template_kwargs that are no JSON object"):
        text(chat_template_kwargs="x")
    for unread in ({"mood": "kind"}, {"chat_template_kwargs": {"mood": "kind"}}):
        with pytest.raises(RowError, match="has mood beside the messages, which would not be seen"):
            text(**unread)
    with pytest.raises(RowError, match="has custom_instructions, which the chat template does not"):
        text(chat_template_kwargs={"custom_instructions": "Speak French."})


@pytest.mark.parametrize(
    ("template", "messages", "problem"),
    [
        (CHATML, [user("a"), assistant("b"), user("SECRET")], "ends with a message of the ro"),
        (ALTERNATES, [user("a"), assistant("b"), user("c")], "ends with a message of the rol"),
        (DROPS_TRACES, [user("a"), assistant("<think>\nt\n</think>\n\nb")], "content in message 2"),
        (DROPS_TRACES, [user("a"), assistant("b")], r"does not begin as .*assistant.n<think>.n'"),
        (CHATML, [assistant("b")], "has an answer to nothing"),
        (MARKED, [assistant("b")], "has an answer to nothing"),
        (MARKED, [user("a")], "ends with a message of the role 'user'"),
        (
            CHATML + "{% if not add_generation_prompt %}{{ messages[0].content }}{% endif %}",
            [user("a"), assistant("b")],
            "the chat template does not write by itself at the end",
        ),
        (
            MARKED.replace("{{ m.content }}<|im_end|>{% end", "{{ messages[0].content }}{% end"),
            [user("a"), assistant("b")],
            "content in message 2 that the chat template leaves out",
        ),
        (
            MARKED.replace("{% generation %}", "{% generation %}{{ messages[0].content }}"),
            [user("a"), assistant("b")],
            "the chat template does not write by itself",
        ),
        (
            MARKED.replace("m.role == 'assistant'", "m.role == 'model'"),
            [user("a"), assistant("b")],
            "in which the chat template marks nothing as generated",
        ),
    ],
)  # fmt: skip
def test_an_answer_that_cannot_be_told_apart_is_refused(template, messages, problem):
    tokenizer = byte_tokenizer(template)
    with pytest.raises(RowError, match=problem):
        Renderer(tokenizer, "answers").document({"messages": messages})


def test_what_cannot_be_told_apart_may_count_whole():
    tokenizer = byte_tokenizer(CHATML)
    row = {"messages": [user("a"), assistant("b"), user("c")]}
    text = tokenizer.decode(Renderer(tokenizer, "all").document(row).ids)
    assert text == tokenizer.apply_chat_template(row["messages"], tokenize=False)
    alone = {"messages": [assistant("b")]}
    assert "b" in tokenizer.decode(Renderer(tokenizer, "all").document(alone).ids)


# Faithful or refused

TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": 'Finds "words".\nIn a book.',
        "parameters": {
            "type": "object",
            "properties": {
                "entry": {"type": "string", "description": "What to find", "enum": ["x", "y"]}
            },
            "required": ["entry"],
        },
    },
}
CALL = {
    "type": "function",
    "function": {"name": "look_up", "arguments": {"entry": 'x "y"', "n": 2}},
}
TOOL_ROW = {
    "tools": [TOOL],
    "messages": [
        user("What is x?"),
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {
            "role": "tool",
            "content": '{"found": "a letter"}',
            "tool_call_id": "1",
            "name": "look_up",
        },
        assistant("A letter."),
    ],
}


def in_call(**changes):
    """The row with its call changed, as JSON text or in other ways."""
    row = json.loads(json.dumps(TOOL_ROW))
    row["messages"][1]["tool_calls"][0]["function"].update(changes)
    return row


@pytest.mark.parametrize("template", [WITH_TOOLS, SWITCHES], ids=["json", "switches"])
def test_tools_calls_and_what_they_return_are_seen(template):
    tokenizer = byte_tokenizer(template)
    renderer = Renderer(tokenizer, "answers")
    document = renderer.document(TOOL_ROW)
    before, after = seen(tokenizer, document)
    end = "<|eot|>" if template == WITH_TOOLS else "<|im_end|>"
    assert after == f"A letter.{end}"
    for part in ("look_up", "What to find", "a letter", r"Finds \"words\".\nIn a book."):
        assert part in before, part
    assert r'{"entry": "x \"y\"", "n": 2}' in before
    # As tables and other programs write them.
    arguments = json.dumps(CALL["function"]["arguments"])
    assert renderer.document(in_call(arguments=arguments)) == document
    assert renderer.document({**TOOL_ROW, "tools": json.dumps([TOOL])}) == document
    empty = [{**m, "tool_calls": m.get("tool_calls", [])} for m in TOOL_ROW["messages"]]
    assert renderer.document({**TOOL_ROW, "messages": empty, "documents": []}) == document


def test_a_call_may_be_the_answer():
    tokenizer = byte_tokenizer(SWITCHES)
    row = {**TOOL_ROW, "messages": TOOL_ROW["messages"][:2]}
    after = counted(tokenizer, row)
    assert after.startswith('<tool>{"name": "look_up", "arguments": {"entry"')
    assert after.endswith("<|im_end|>") and "What is x?" not in after


def with_system(**more):
    return {"messages": [user("a"), assistant("b")], **more}


@pytest.mark.parametrize(
    ("template", "row", "problem"),
    [
        (CHATML, with_system(tools=[TOOL]), "has tools, which the chat template does not r"),
        (CHATML, with_system(documents=[{"text": "t"}]), "has documents, which the chat template"),
        (CHATML, with_system(functions=[TOOL]), "has functions, which"),
        (WITH_TOOLS, with_system(functions=[TOOL]), "has functions, which"),
        (WITH_TOOLS, with_system(tools=[1]), "has tools that are no list of objects"),
        (WITH_TOOLS, with_system(tools="[1"), "has tools that are no JSON list"),
        (WITH_TOOLS.replace("tool | tojson(indent=2)", "'tool'"), TOOL_ROW, "has tools that the c"),
        (SWITCHES.replace("tool | tojson", "tool.function.name"), TOOL_ROW, "has tools that the"),
        (CHATML, {"messages": TOOL_ROW["messages"]}, "has tool_calls in message 2 that the"),
        (WITH_TOOLS, in_call(name=""), None),
        (WITH_TOOLS.replace("call.arguments | tojson", "'{}'"), TOOL_ROW, "has tool_calls in mess"),
        *((CHATML, with_system(messages=[user("a"), assistant("b", **{name: "t"})]),
           f"has {name} in message 2 that the chat template leaves out")
          for name in ("reasoning_content", "reasoning", "thinking")),
        (SWITCHES, {"messages": [user("a"), assistant("b", reasoning_content="t"), user("c"),
                                 assistant("d")]}, "has reasoning_content in message 2"),
        (CHATML.replace("{{ m['content'] }}", "{{ m['content'][:9] }}"),
         with_system(messages=[user("a long question"), assistant("b")]), "content in message 1"),
        (CHATML.replace("{{ m['content'] }}", "{{ m['content'] | upper }}"), with_system(),
         "has content in message 1"),
        (CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}"),
         with_system(system="user"), "has content in message 1"),
        (CHATML, with_system(messages=[user("a"), assistant("b", name="Ada")]), "has name in me"),
        (ALTERNATES, with_system(messages=[user("a"), user("b"), assistant("c")]),
         r"refuses \(roles must alternate\); correct them"),
        (WITH_TOOLS, {"messages": [user("a"), {"role": "assistant", "tool_calls": [CALL, CALL]}]},
         r"refuses \(one call at a time\)"),
        ("{% if %}", with_system(), "the chat template cannot be read .*; write the row as prompt"),
        ("{{ nothing.at_all }}", with_system(), r"refuses \(.*undefined"),
        (None, with_system(), "has messages, but the tokenizer has no chat template; write the"),
    ],
)  # fmt: skip
def test_what_a_template_does_not_write_is_refused(template, row, problem):
    renderer = Renderer(byte_tokenizer(template), "all")
    if problem is None:
        renderer.document(row)
        return
    with pytest.raises(RowError, match=problem):
        renderer.document(row)


def test_a_system_text_becomes_a_message_where_the_template_knows_no_other_way():
    tokenizer = byte_tokenizer(CHATML)
    renderer = Renderer(tokenizer, "answers")
    first = {"role": "system", "content": "Be kind."}
    expected = renderer.document({"messages": [first, user("a"), assistant("b")]})
    for key in ("system", "system_prompt", "system_message"):
        assert renderer.document(with_system(**{key: "Be kind."})) == expected
    with pytest.raises(RowError, match="has system beside a system message; keep one of the two"):
        renderer.document({"messages": [first, user("a"), assistant("b")], "system": "Be kind."})
    reads = byte_tokenizer("{{ system }}" + CHATML)
    before, _ = seen(reads, Renderer(reads, "answers").document(with_system(system="Be kind.")))
    assert before.startswith("Be kind.<|im_start|>user")


def test_python_is_not_taught_as_json():
    """A template that prints arguments as they come means a JSON text."""
    prints = SWITCHES.replace("call.arguments | tojson", "call.arguments")
    tokenizer = byte_tokenizer(prints)
    before, _ = seen(tokenizer, Renderer(tokenizer, "answers").document(TOOL_ROW))
    assert r'{"entry": "x \"y\"", "n": 2}' in before


@given(parts=st.lists(texts, min_size=1, max_size=3))
@examples(20)
def test_contents_in_parts_are_their_text(parts):
    listed = [{"type": "text", "text": text} for text in parts]
    for template in (CHATML, PARTS):
        tokenizer = byte_tokenizer(template)
        row = {"messages": [user(listed), assistant([parts[0], {"type": "text", "text": "end"}])]}
        before, after = seen(tokenizer, Renderer(tokenizer, "answers").document(row))
        asked = "".join(parts)
        assert before == f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n"
        assert after == f"{parts[0]}end<|im_end|>"


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        (
            [user([{"type": "image_url", "image_url": "x"}]), assistant("b")],
            "a part of type 'image",
        ),
        ([user([{"type": "text"}]), assistant("b")], "a part of type 'text' in message 1"),
        ([user([3]), assistant("b")], "a part of type 'int' in message 1"),
        ([user(3), assistant("b")], "a content in message 1 that is no text"),
        ([user({"text": "a"}), assistant("b")], "a content in message 1 that is no text"),
        ([user(None), assistant("b")], "has no content in message 1"),
        ([{"from": "human", "value": "a"}], "has no role in message 1"),
        ([{"role": 1, "content": "a"}], "has no role in message 1"),
        ({"role": "user"}, "has no list of messages"),
    ],
)
def test_messages_of_other_kinds_are_refused(messages, problem):
    with pytest.raises(RowError, match=problem):
        Renderer(byte_tokenizer(CHATML), "answers").document({"messages": messages})


@pytest.mark.parametrize("shape", SHAPES)
@given(data=st.data())
@examples(25)
def test_whatever_is_accepted_was_seen(shape, data):
    """Rows of any texts, tags and marks among them: each is refused in one line, or all of its
    words are there and none of the user's count."""
    template = SHAPES[shape][0]
    tokenizer = byte_tokenizer(template)
    marks = st.sampled_from(["<think>", "</think>", "<|im_end|>", "[INST]", "\n", " ", "{{", "'"])
    content = st.lists(st.one_of(texts, marks), max_size=4).map("".join)
    roles = data.draw(st.lists(st.sampled_from(["system", "user", "assistant"]), max_size=4))
    messages = [{"role": role, "content": data.draw(content)} for role in [*roles, "assistant"]]
    if data.draw(st.booleans()):
        messages[-1]["reasoning_content"] = data.draw(content)
    for message in messages:
        if message["role"] == "user":
            message["content"] = f"QQ{message['content']}QQ"
    try:
        document = Renderer(tokenizer, "answers").document({"messages": messages})
    except RowError as error:
        assert "\n" not in str(error) and "; " in str(error)
        return
    before, after = seen(tokenizer, document)
    assert "QQ" not in after
    for message in messages:
        for key in ("content", "reasoning_content"):
            stripped = "".join(message.get(key, "").split())
            assert stripped in "".join((before + after).split())
