"""Greedy accuracy of a model on procedural problems, with and without thinking, in big batches."""

from collections import defaultdict
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from star_elastic.evaluate.tasks import Problem, is_correct, messages

MAX_NEW_TOKENS = 144
MAX_ANSWER_TOKENS = 12


@torch.no_grad()
def greedy_completions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    *,
    thinking: bool,
    batch_size: int,
) -> list[str]:
    """What the model writes after each question, in the order of the problems."""
    prompts = [
        tokenizer.apply_chat_template(
            messages(problem)[:1],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=thinking,
        )
        for problem in problems
    ]
    order = sorted(range(len(prompts)), key=lambda row: (len(prompts[row]), row))
    texts = [""] * len(prompts)
    was_training = model.training
    model.eval()
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = tokenizer(
            [prompts[row] for row in rows],
            return_tensors="pt",
            padding=True,
            padding_side="left",
            return_token_type_ids=False,
        )
        out_BT = model.generate(
            **batch,
            do_sample=False,
            max_new_tokens=MAX_NEW_TOKENS if thinking else MAX_ANSWER_TOKENS,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        new_BT = out_BT[:, batch["input_ids"].shape[1] :]
        decoded = tokenizer.batch_decode(new_BT, skip_special_tokens=True)
        for row, text in zip(rows, decoded, strict=True):
            texts[row] = text
    model.train(was_training)
    return texts


def num_correct_by_task(problems: Sequence[Problem], completions: Sequence[str]) -> dict[str, int]:
    """Right answers per task."""
    counts: dict[str, int] = defaultdict(int)
    for problem, text in zip(problems, completions, strict=True):
        counts[problem.task] += is_correct(problem, text)
    return dict(counts)
