"""A tiny elastic family of two sizes, with a tokenizer of single characters."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import star_elastic
from star_elastic.architectures import architecture_of, read_config
from star_elastic.axes.widths import Widths
from star_elastic.checkpoints.manifest import Manifest, Size, save_manifest
from star_elastic.generate.phases import Generation, Plan
from star_elastic.generate.prompts import ThinkingTags
from tests.architectures import DISTINCT, LIVELY, ROWS
from tests.thinking import make_sequence

END = "\n</think>\n"
TEMPLATE = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{%- endfor %}{{- '<|im_start|>a\n' }}"
    "{{- '<think>\n' if enable_thinking is not defined or enable_thinking else '<think></think>' }}"
)
ALWAYS_THINKS = TEMPLATE.replace("'<think></think>'", "'<think>\n'")
LEAVES_TAG_TO_MODEL = TEMPLATE.replace("'<think>\n'", "''")
NEVER_THINKS = LEAVES_TAG_TO_MODEL.replace("'<think></think>'", "''")
PROMPTS = ["1+2", "30+41 =", "9", "5+5+5", "12+7+1", "8 8"]
WIDTHS = {model_type: row.cut for model_type, row in LIVELY.items()}
"""Of the small size."""


def make_tokenizer(template: str | None = TEMPLATE, *, tags: bool = True):
    """One token per character and per tag: so few that every phase end occurs by chance. Bytes
    without merges: for some model types transformers takes a tokenizer to be of that kind."""
    marks = ["<pad>", "<|im_start|>", "<|im_end|>", *(["<think>", "</think>"] if tags else [])]
    tokens = [*marks, "\u010a", "\u0120", *"123456789+=?a</thinkuser>0"]  # newline, space, ...
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(marks[:3])
    tokenizer.add_tokens(marks[3:])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<|im_end|>",
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )


def make_config(model_type: str, vocab_size: int, **changes):
    """A tiny config with every kind of block; weights large enough for lively greedy text."""
    shared = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "initializer_range": 0.4,
        "max_position_embeddings": 384,
        "tie_word_embeddings": False,
        "eos_token_id": 2,
    }
    own = {k: v for k, v in LIVELY[model_type].config.items() if k != "model_type"}
    return AutoConfig.for_model(model_type, **shared, **own, **changes)


def make_model(config):
    with torch.random.fork_rng():
        torch.manual_seed(LIVELY[config.model_type].seed)
        return AutoModelForCausalLM.from_config(config).eval()


def make_checkpoint(path, model_type: str, **changes):
    """Writes an elastic checkpoint with the sizes large and small; returns its path. `changes` are
    fields of its config."""
    tokenizer = make_tokenizer()
    make_model(make_config(model_type, len(tokenizer), **changes)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    axis_map = architecture_of(read_config(path)).axis_map(read_config(path))
    small = axis_map.complete(Widths(WIDTHS[model_type]))
    save_manifest(
        Manifest(model_type, {}, {"large": Size(axis_map.full), "small": Size(small)}), path
    )
    return path


@pytest.fixture(scope="module", params=sorted({ROWS[kind].model_type for kind in DISTINCT}))
def tiny_checkpoint(request, tmp_path_factory):
    """An elastic checkpoint with two sizes."""
    return make_checkpoint(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def family(tiny_checkpoint):
    """Loaded once per module; sizes large and small."""
    return star_elastic.load(tiny_checkpoint)


TOKENIZER = make_tokenizer()
TAGS = ThinkingTags(TOKENIZER, END)
CLOSE = TOKENIZER.convert_tokens_to_ids("</think>")
NEWLINE = TOKENIZER.convert_tokens_to_ids("\u010a")
EOS = TOKENIZER.eos_token_id


def play(tokens, plan: Plan) -> Generation:
    """A sequence whose models want to write `tokens` (round and round)."""
    sequence = make_sequence(plan, TAGS, ids=[5, 6, 7], ends=[EOS])
    for step in range(1000):
        sequence.accept(tokens[step % len(tokens)])
        if sequence.is_done:
            return sequence.result()
    raise AssertionError("the sequence does not end")
