"""Training batches of the bundled parent, drawn on the fly from seeds; nothing is stored.

Micro-batch `index` of a seed is a pure function of (seed, index), so a resumed run and any number
of ranks see the same data. Sequences of similar length share a micro-batch and are padded on the
right, which no causal layer can see; documents never share a row.
"""

import random
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from star_elastic.evaluate.tasks import draw_conversation

TASK_WEIGHTS = {  # how often a task is drawn; the others: 1
    "add": 1.5,
    "subtract": 1.5,
    "divide": 1.5,
    "chain": 1.5,
    "modulo": 0.8,
    "sort": 0.8,
    "swaps": 0.7,
    "hops": 0.5,
}
IGNORED = -100
LENGTH_STEP = 16


@dataclass(frozen=True)
class MicroBatch:
    """Rows of one micro-batch: ids and labels (B, T), labels IGNORED where no loss is taken."""

    ids_BT: torch.Tensor
    labels_BT: torch.Tensor

    @property
    def num_targets(self) -> int:
        """Positions that carry loss."""
        return int((self.labels_BT != IGNORED).sum())


def step_batches(
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    step: int,
    sequences_per_step: int,
    rows_per_micro_batch: int,
) -> list[MicroBatch]:
    """All micro-batches of one optimiser step, over all ranks, longest sequences last."""
    rng = random.Random(f"{seed}/{step}")
    conversations = [draw_conversation(rng, TASK_WEIGHTS) for _ in range(sequences_per_step)]
    rows = [split_conversation(tokenizer, conversation) for conversation in conversations]
    prompts = tokenizer([prompt for prompt, _ in rows])["input_ids"]
    answers = tokenizer([answer for _, answer in rows])["input_ids"]
    order = sorted(range(len(rows)), key=lambda row: len(prompts[row]) + len(answers[row]))
    return [
        pad_rows(
            [prompts[row] for row in order[start : start + rows_per_micro_batch]],
            [answers[row] for row in order[start : start + rows_per_micro_batch]],
            tokenizer.pad_token_id,
        )
        for start in range(0, len(order), rows_per_micro_batch)
    ]


def split_conversation(
    tokenizer: PreTrainedTokenizerBase, conversation: list[dict[str, str]]
) -> tuple[str, str]:
    """The text of the prompt and the text of the assistant's turn after it."""
    whole = tokenizer.apply_chat_template(conversation, tokenize=False)
    prompt = tokenizer.apply_chat_template(
        conversation[:-1],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking="reasoning_content" in conversation[-1],
    )
    assert whole.startswith(prompt), (prompt, whole)
    return prompt, whole[len(prompt) :]


def pad_rows(prompts: list[list[int]], answers: list[list[int]], pad_id: int) -> MicroBatch:
    """Right-padded rows to a multiple of LENGTH_STEP; loss on the assistant's tokens only."""
    longest = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    width = -(-longest // LENGTH_STEP) * LENGTH_STEP
    ids_BT = torch.full((len(prompts), width), pad_id)
    labels_BT = torch.full((len(prompts), width), IGNORED)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        end = len(prompt) + len(answer)
        ids_BT[row, :end] = torch.tensor(prompt + answer)
        labels_BT[row, len(prompt) : end] = torch.tensor(answer)
    return MicroBatch(ids_BT, labels_BT)
