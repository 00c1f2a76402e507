"""Tokenizers that write tags in one token or in many, templates, and models that follow a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from star_elastic.generate.engine import Generator
from star_elastic.generate.phases import Generation, Plan, Token
from star_elastic.generate.prompts import EncodedPrompt, ThinkingTags
from star_elastic.generate.sequence import Request
from star_elastic.generate.sequence import Sequence as Sequence_

CLOSING = "\n</think>\n"
MARKS = ("<pad>", "<|start|>", "<|end|>")
TURNS = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\nOPENING{% endif %}"
)
SWITCH = "{% if enable_thinking is not defined or enable_thinking %}ON{% else %}OFF{% endif %}"


def turns(on: str, off: str, base: str = TURNS) -> str:
    """A chat template that opens a turn with `on`, or with `off` where thinking is off."""
    return base.replace("OPENING", SWITCH.replace("ON", on).replace("OFF", off) if on + off else "")


OPENS = turns("<think>\n", "<think></think>")
PLAIN = turns("", "")
TEMPLATES = {
    "opens": OPENS,
    "always opens": turns("<think>\n", "<think>\n"),
    "leaves the tag to the model": turns("", "<think>\n\n</think>\n\n"),
    "never opens": PLAIN,
    "trims": turns(
        "<think>\n", "", TURNS.replace("m['content']", "m['content'] | trim")
    ),
    "mentions the tag before": "<|start|>system\nThink first, from <think> on.<|end|>\n" + PLAIN,
    "mentions the tag after": turns(
        "", "", TURNS.replace("<|start|>assistant", "<|start|>system\nBegin with <think>.<|end|>\n"
        "<|start|>assistant"),
    ),
    "knows no generation prompt": OPENS.replace("{% if add_generation_prompt %}", "{% if true %}"),
    "forgets old traces": OPENS.replace(
        "{{ m['content'] }}",
        "{{ m['content'].split('</think>')[-1] if m['role'] == 'assistant' else m['content'] }}",
    ),
    "repeats the first message": OPENS.replace(
        "{% if add_generation_prompt %}",
        "{{ messages[0]['content'] }}\n{% if add_generation_prompt %}",
    ),
}  # fmt: skip


def make_tokenizer(
    template: str | None = OPENS, *, tags: Sequence[str] = ("<think>", "</think>"),
    pieces: Sequence[str] = (),
) -> PreTrainedTokenizerFast:  # fmt: skip
    """One token per byte, per mark, and per tag if any are given; `pieces` are tokens that only a
    model writes, because no merge leads to them."""
    special = [*MARKS, *tags]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*special, *alphabet, *pieces])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(m, special=True, normalized=False) for m in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<|end|>", chat_template=template,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def table_model(tokenizer: PreTrainedTokenizerFast, follow: Mapping[str, str]) -> LlamaForCausalLM:
    """A model whose next token depends on the present one only, by `follow`; else it ends the turn.

    Attention and MLP write nothing; the embedding is the identity and the head reads the table.
    """
    size = len(tokenizer)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=size, hidden_size=size, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, head_dim=8, max_position_embeddings=512,
        tie_word_embeddings=False, eos_token_id=tokenizer.eos_token_id,
    )).eval()  # fmt: skip
    table = {one(tokenizer, token): one(tokenizer, after) for token, after in follow.items()}
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "norm" not in name:
                value.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        for token in range(size):
            model.lm_head.weight[table.get(token, tokenizer.eos_token_id), token] = 10.0
    return model


def one(tokenizer: PreTrainedTokenizerFast, text: str) -> int:
    """The id of a text that is one token."""
    (token,) = tokenizer.encode(text, add_special_tokens=False)
    return token


def table_generator(
    follow: Mapping[str, str], template: str | None = OPENS, **options
) -> Generator:
    """A generator of two sizes that follow one table."""
    tokenizer = make_tokenizer(template, **options)
    model = table_model(tokenizer, follow)
    return Generator({"small": model, "large": model}, tokenizer, CLOSING)


def make_sequence(
    plan: Plan, tags: ThinkingTags, *, ids: Sequence[int] = (5,), ends: Sequence[int] = (),
    has_tags: bool = True, index: int = 0,
) -> Sequence_:  # fmt: skip
    """A sequence after a prompt of these ids, which opens a trace if the plan asks for one."""
    prompt = EncodedPrompt(tuple(ids), bool(plan.trace), has_tags)
    return Sequence_(Request(prompt=prompt, plan=plan), prompt, tags, frozenset(ends), index)


def play(
    tags: ThinkingTags, script: Sequence[int], plan: Plan, *, has_tags: bool = True
) -> tuple[Generation, list[Token]]:
    """What becomes of a sequence whose models want to write a script (then end the turn), and the
    stream of its tokens. A token that a budget throws away is lost."""
    end, tokens = tags.tokenizer.eos_token_id, []
    ids = [one(tags.tokenizer, "q")]
    sequence = make_sequence(plan, tags, ids=ids, ends=[end], has_tags=has_tags)
    for token in [*script, *[end] * (plan.max_new_tokens + 9)]:
        sequence.accept(token)
        tokens += sequence.new_tokens()
        if sequence.is_done:
            return sequence.result(), tokens
    raise AssertionError("the sequence does not end")


def parts_streamed(tokens: Sequence[Token]) -> list[tuple[str, str]]:
    """Phase and text of every streamed token, after tokens have been recalled."""
    parts = []
    for token in tokens:
        for place in range(len(parts) - token.recalled, len(parts)):
            parts[place] = ("thinking", parts[place][1])
        parts.append((token.phase, token.text))
    return parts
