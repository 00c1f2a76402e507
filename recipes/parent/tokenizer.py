"""The bundled parent's tokenizer: a small byte-level BPE with ChatML turns and a thinking switch.

Trained on questions and traces drawn from seeds; written as a plain Hugging Face tokenizer. Every
digit, upper-case letter, symbol and white-space character is a token of its own, so a prompt
tokenises alike alone and with its completion; only lower-case words are merged.

    python recipes/parent/tokenizer.py --out star_elastic/bundled/parent
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from star_elastic.evaluate.tasks import TASKS, sample_problems

PAD, TURN_START, TURN_END = "<|pad|>", "<|im_start|>", "<|im_end|>"
THINK_START, THINK_END = "<think>", "</think>"
VOCAB_SIZE = 320
CONTEXT_TOKENS = 512
PROBLEMS_PER_TASK, SEED = 50, 0
ROLES = "system user assistant "  # seen with every problem, so that each becomes one token

CHAT_TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' %}
{%- if message.reasoning_content %}
{{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n' }}
{%- elif '<think>' not in message.content %}
{{- '<think></think>' }}
{%- endif %}
{%- endif %}
{{- message.content + '<|im_end|>' + ('' if loop.last and not add_generation_prompt else '\\n') }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{{- '<think>\\n' if enable_thinking is not defined or enable_thinking else '<think></think>' }}
{%- endif %}"""


def train_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer, the same on every run."""
    tokenizer = Tokenizer(models.BPE())
    pieces = Regex(r" ?[a-z]+|[^a-z]")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pieces, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    num_reserved = 2  # the thinking tags: added afterwards, so that decoding may keep them
    trainer.vocab_size = VOCAB_SIZE - num_reserved
    tokenizer.train_from_iterator(_texts(), trainer)
    tokenizer.add_tokens([THINK_START, THINK_END])
    assert tokenizer.get_vocab_size() == VOCAB_SIZE, tokenizer.get_vocab_size()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=TURN_END,
        additional_special_tokens=[TURN_START],
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT_TOKENS,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def _texts() -> Iterator[str]:
    """Role names, questions and traces."""
    for problem in sample_problems(TASKS, "train", PROBLEMS_PER_TASK, SEED):
        yield ROLES
        yield problem.question
        yield "\n".join(problem.steps)


def main() -> None:
    """Write the tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    train_tokenizer().save_pretrained(parser.parse_args().out)


if __name__ == "__main__":
    main()
