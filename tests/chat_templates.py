"""Small chat templates in the shapes that real ones have, and tokenizers to read their texts."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

MARKS = ("<pad>", "<s>", "<|im_end|>", "<|im_start|>", "<|eot|>", "<think>", "</think>", "<tool>")

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
)
"""Says itself what the assistant writes, and opens no turn for it."""
TRIMS = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content | trim }} "
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
"""As Llama 2: no token for turns, contents are trimmed, BOS and EOS from the template."""
WITH_TOOLS = (
    "{{- bos_token }}{%- if not tools is defined %}{%- set tools = none %}{%- endif %}"
    "{%- if messages[0].role == 'system' %}{%- set said = messages[0].content | trim %}"
    "{%- set messages = messages[1:] %}{%- else %}{%- set said = '' %}{%- endif %}"
    "{{- '<|im_start|>system\n' }}{%- if tools is not none %}"
    "{%- for tool in tools %}{{- tool | tojson(indent=2) + '\n' }}{%- endfor %}{%- endif %}"
    "{{- said + '<|eot|>' }}"
    "{%- for m in messages %}{%- if 'tool_calls' in m %}"
    "{%- if m.tool_calls | length != 1 %}{{- raise_exception('one call at a time') }}{%- endif %}"
    "{%- set call = m.tool_calls[0].function %}"
    '{{- \'<|im_start|>assistant\n{"name": "\' + call.name + \'", "parameters": \' }}'
    "{{- call.arguments | tojson + '}<|eot|>' }}"
    "{%- elif m.role == 'tool' %}{{- '<|im_start|>tool\n' + m.content | tojson + '<|eot|>' }}"
    "{%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content | trim + '<|eot|>' }}{%- endif %}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
"""As Llama 3.1: BOS, a system turn with tools as JSON, one call at a time."""
DROPS_TRACES = (
    "{% for m in messages %}{% set text = m['content'] %}{% if '</think>' in text %}"
    "{% set text = text.split('</think>')[-1] %}{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ text }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
"""As R1's distilled models: a trace is opened for a turn, and gone when it is finished."""
SWITCHES = (
    "{%- if tools %}{{- '<|im_start|>system\n' }}{%- for tool in tools %}"
    "{{- tool | tojson + '\n' }}{%- endfor %}{{- '<|im_end|>\n' }}{%- endif %}"
    "{%- set ns = namespace(last=0) %}{%- for m in messages %}"
    "{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for m in messages %}{%- set content = m.content if m.content is string else '' %}"
    "{{- '<|im_start|>' + m.role + '\n' }}{%- if m.role == 'assistant' %}"
    "{%- set trace = m.reasoning_content if m.reasoning_content is string else '' %}"
    "{%- if '</think>' in content %}"
    "{%- set trace = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{%- if loop.index0 > ns.last and (loop.last or trace) %}"
    "{{- '<think>\n' + trace.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}"
    "{%- else %}{{- content }}{%- endif %}"
    "{%- for call in m.tool_calls or [] %}{%- set call = call.function or call %}"
    '{{- \'<tool>{"name": "\' + call.name + \'", "arguments": \' }}'
    "{{- call.arguments if call.arguments is string else call.arguments | tojson }}{{- '}' }}"
    "{%- endfor %}{%- else %}{{- content }}{%- endif %}{{- '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}"
)
"""As Qwen 3: traces of earlier answers go, an empty one stands for not thinking, tools, calls."""
ALTERNATES = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{% set said = messages[0].content + '\n' %}{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {% if loop.index0 >= messages | length - 2 %}{{ said }}"
    "{% endif %}{{ m.content }} [/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)
"""As Mistral's: roles alternate, the system text stands in the last user's turn, no opening."""
PARTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% for part in m.content %}{{ part.text }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Knows contents in parts alone, as those of models that see images."""


def byte_tokenizer(template=None, *, front=False, back=False, eos="<|im_end|>"):
    """A token per byte and per mark; `front` puts <s> before a text, `back` EOS after it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate([*MARKS, *alphabet])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(m, special=True, normalized=False) for m in MARKS])
    single = f"{'<s> ' if front else ''}$A{f' {eos}' if back else ''}"
    special = [(token, vocab[token]) for token in ("<s>", eos) if token]
    core.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token=eos,
        chat_template=template, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def spaced_tokenizer():
    """As sentencepiece models: words begin with the space before them, and every text with one."""
    pieces = ["<pad>", "<s>", "</s>", "<0x0A>", "▁", *"abcdefghijklmnopqrstuvwxyz0123456789?:.<>x"]
    pieces += ["▁ten", "ten", "▁add", "▁a", ":a"]
    vocab = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    merges = [
        ("t", "e"),
        ("te", "n"),
        ("▁", "ten"),
        ("▁", "a"),
        ("d", "d"),
        ("▁a", "dd"),
        (":", "a"),
    ]
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    core = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    core.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1),
        ]
    )
    core.add_special_tokens(["<pad>", "<s>", "</s>"])
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocab["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
