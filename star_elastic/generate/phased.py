"""Thinking and answering in batches: budgets, injected ends of thinking, hand-over between sizes.

If one size does both, all sequences go through one loop, and an injected end of thinking is read
like any other token. If two sizes share the work, sequences leave the thinking size as their traces
end; when the last one has, the answering size reads prompt, trace and end of thinking anew, which
is exact.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as ListOf
from typing import cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from star_elastic.errors import BudgetError, ConfigError
from star_elastic.generate.decode import BatchDecoder, choose_tokens, pads_exactly
from star_elastic.generate.phases import ANSWERING, THINKING, Generation, Plan
from star_elastic.generate.prompts import Prompt, ThinkingTags
from star_elastic.generate.sequence import DONE, Rules, Sequence

DEFAULT_BATCH_SIZE = 64

Models = Mapping[str, PreTrainedModel]


class PhasedGenerator:
    """Generates with any of several models that share a tokenizer, such as the sizes of a family.

    `models` may build its models on access. `end_of_thinking` is the text injected when a budget
    is used up. The models' own `max_position_embeddings` bounds prompt and new tokens.
    """

    def __init__(self, models: Models, tokenizer: PreTrainedTokenizerBase, end_of_thinking: str):
        self.models = models
        self.tokenizer = tokenizer
        self.tags = ThinkingTags(tokenizer, end_of_thinking)

    def generate(
        self,
        prompts: Prompt | ListOf[Prompt],
        plan: Plan,
        *,
        temperature: float = 0.0,
        seed: int = 0,
        batch_size: int = DEFAULT_BATCH_SIZE,
    ) -> list[Generation]:
        """One result per prompt, in their order. Prompts are batched with others of like length.

        At temperature 0 the likeliest token is taken; otherwise prompt number i draws from a
        generator of its own, seeded by (seed, i), so that batching changes no draw. Raises
        ConfigError for unknown sizes and unreadable prompts, BudgetError for tokens that do not
        fit, before any work starts.
        """
        _check_sampling(temperature, batch_size)
        models = {size: self.model(size) for size in (plan.think, plan.answer)}
        if plan.thinking_budget:
            plan.require_room(self.tags.max_closing)
        rules = Rules(plan, self.tags, self._end_of_turn(models[plan.answer]))
        sequences = [
            self._open(index, prompt, rules, seed) for index, prompt in enumerate(_listed(prompts))
        ]
        _require_context(max(s.num_prompt for s in sequences), plan, models.values())
        if not all(map(pads_exactly, models.values())):
            batch_size = 1
        results: dict[int, Generation] = {}
        by_length = sorted(sequences, key=lambda sequence: sequence.num_prompt)
        for start in range(0, len(by_length), batch_size):
            batch = by_length[start : start + batch_size]
            seconds = _run_batch(batch, plan, models, float(temperature))
            results.update({sequence.index: sequence.result(seconds) for sequence in batch})
        return [results[index] for index in range(len(sequences))]

    def _open(self, index: int, prompt: Prompt, rules: Rules, seed: int) -> Sequence:
        """A prompt as a sequence at the start of its first phase."""
        plan = rules.plan
        thinks = plan.thinking_budget != 0
        encoded = self.tags.encode_prompt(prompt, thinking=thinks)
        if thinks and not encoded.in_thinking:
            if plan.thinking_budget is not None or plan.think != plan.answer:
                raise ConfigError(
                    f"the prompt does not open {self.tags.open}, so there is no thinking to give "
                    "a budget or a size of its own; use one size and no budget, or open the tag"
                )
            thinks = False
        digest = hashlib.sha256(f"{seed}/{index}".encode()).digest()
        sequence = Sequence(
            rules=rules,
            index=index,
            ids=list(encoded.ids),
            num_prompt=len(encoded.ids),
            phase=THINKING if thinks else ANSWERING,
            generator=torch.Generator().manual_seed(int.from_bytes(digest[:8], "big")),
        )
        if encoded.in_thinking and not thinks:
            sequence.close_thinking()
        return sequence

    def model(self, size: str) -> PreTrainedModel:
        """The model of a size. Raises ConfigError naming the sizes there are."""
        if size not in self.models:
            raise ConfigError(
                f"size {size!r} is not in this family; it has {', '.join(self.models)}"
            )
        return self.models[size]

    def _end_of_turn(self, model: PreTrainedModel) -> frozenset[int]:
        """Token ids that end a turn: the tokenizer's and those of the model's own settings."""
        settings = model.generation_config
        ids = settings.eos_token_id if settings is not None else None
        ids = ids if isinstance(ids, list) else [ids]
        return frozenset(i for i in (*ids, self.tokenizer.eos_token_id) if isinstance(i, int))


@torch.inference_mode()
def _run_batch(
    batch: list[Sequence], plan: Plan, models: Models, temperature: float
) -> dict[str, float]:
    """Both phases of a batch; returns the wall seconds of each."""
    start = thought = time.perf_counter()
    thinking = [sequence for sequence in batch if sequence.phase == THINKING]
    if thinking and plan.think != plan.answer:
        thought = _decode(thinking, models[plan.think], temperature, until=ANSWERING)
    left = [sequence for sequence in batch if sequence.phase != DONE]
    if left:
        done_thinking = _decode(left, models[plan.answer], temperature, until=DONE)
        if thinking and plan.think == plan.answer:
            thought = done_thinking
    return {THINKING: thought - start, ANSWERING: time.perf_counter() - thought}


def _decode(
    batch: list[Sequence], model: PreTrainedModel, temperature: float, *, until: str
) -> float:
    """Runs sequences on one model until each has reached the phase `until` or is done.

    Returns the time at which the last of them had stopped thinking.
    """
    room = batch[0].rules.plan.max_new_tokens
    decoder = BatchDecoder(model, [sequence.prefill() for sequence in batch], room=room)
    rows, thought = list(batch), None
    while True:
        ready = [row for row, sequence in enumerate(rows) if sequence.wants_token]
        if ready:
            tokens = choose_tokens(
                decoder.logits_BV if len(ready) == len(rows) else decoder.logits_BV[ready],
                temperature=temperature,
                generators=[rows[row].generator for row in ready],
            )
            for row, token in zip(ready, tokens, strict=True):
                rows[row].accept(token)
        if thought is None and all(sequence.phase != THINKING for sequence in rows):
            thought = time.perf_counter()
        busy = [row for row, sequence in enumerate(rows) if sequence.phase not in (until, DONE)]
        if not busy:
            assert thought is not None
            return thought
        if len(busy) < len(rows):  # dropping rows costs less than one step with idle ones
            decoder.keep(busy)
            rows = [rows[row] for row in busy]
        decoder.step([sequence.read() for sequence in rows])


def _require_context(longest: int, plan: Plan, models: Iterable[PreTrainedModel]) -> None:
    """Raises BudgetError unless the longest prompt and all new tokens fit the context."""
    contexts = [getattr(model.config, "max_position_embeddings", None) for model in models]
    context = min((c for c in contexts if c), default=math.inf)
    if longest + plan.max_new_tokens > context:
        room = context - longest
        advice = f"use max_new_tokens={room} or less" if room > 0 else "shorten the prompt"
        raise BudgetError(
            f"a prompt of {longest} tokens and max_new_tokens={plan.max_new_tokens} exceed the "
            f"model's context of {context}; {advice}"
        )


def _check_sampling(temperature: float, batch_size: int) -> None:
    if not isinstance(temperature, (int, float)) or not 0 <= temperature < math.inf:
        raise ConfigError(f"temperature={temperature!r} is not a number of 0 or more; use 0")
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ConfigError(f"batch_size={batch_size!r} is not a whole number of 1 or more; use 64")


def _listed(prompts: Prompt | ListOf[Prompt]) -> list[Prompt]:
    """Prompts as a list; a text or one conversation counts as one prompt."""
    if not isinstance(prompts, str) and not prompts:
        raise ConfigError("the prompt is empty; give at least one message or text")
    is_one = isinstance(prompts, str) or isinstance(prompts[0], Mapping)
    return cast("list[Prompt]", [prompts] if is_one else list(prompts))
