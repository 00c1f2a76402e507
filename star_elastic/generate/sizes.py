"""The models that engines run, by the names of their sizes, and what can be asked of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from star_elastic.errors import BudgetError, ConfigError
from star_elastic.generate.batch import Batch
from star_elastic.generate.caches import Convert
from star_elastic.generate.decode import BatchDecoder
from star_elastic.generate.prompts import EncodedPrompt, ThinkingTags
from star_elastic.generate.sequence import Request, Sequence
from star_elastic.generate.steps import StepPool, pool_for
from star_elastic.models.tokenizer import end_of_turn


class Sizes:
    """Models that share a tokenizer, such as the sizes of a family.

    `models` may build its models on access. `end_of_thinking` is the text injected when a budget
    is used up. `hand_over` says, by the names of two sizes, how the cache of one becomes that of
    the other; models that are not of one family have none. The models' own
    `max_position_embeddings` bounds prompt and new tokens.
    """

    def __init__(
        self,
        models: Mapping[str, PreTrainedModel],
        tokenizer: PreTrainedTokenizerBase,
        end_of_thinking: str,
        hand_over: Callable[[str, str], Convert] | None = None,
    ):
        self.models = models
        self.tokenizer = tokenizer
        self.tags = ThinkingTags(tokenizer, end_of_thinking)
        self._hand_over = hand_over
        self._pools: dict[str, StepPool | None] = {}
        self._converts: dict[tuple[str, str], Convert] = {}

    def model(self, size: str) -> PreTrainedModel:
        """The model of a size. Raises ConfigError naming the sizes there are."""
        if size not in self.models:
            raise ConfigError(
                f"size {size!r} is not in this family; it has {', '.join(self.models)}"
            )
        return self.models[size]

    def batch(self, size: str) -> Batch:
        """An empty batch of a size."""
        model = self.model(size)
        if size not in self._pools:
            self._pools[size] = pool_for(model)
        return Batch(size, BatchDecoder(model, self._pools[size]), self.hand_over)

    def hand_over(self, giver: str, taker: str) -> Convert:
        """How the cache of one size becomes that of another. Raises ConfigError if it cannot."""
        if self._hand_over is None:
            raise ConfigError(
                "these models are not sizes of one family, whose caches could be handed over; "
                "use switch='reprefill' or 'catch-up'"
            )
        if (giver, taker) not in self._converts:
            self._converts[giver, taker] = self._hand_over(giver, taker)
        return self._converts[giver, taker]

    def open(self, request: Request, index: int = 0) -> Sequence:
        """A request as a sequence at the start of its first phase, before any work.

        Raises ConfigError for unknown sizes, prompts that cannot be read and caches that cannot be
        handed over, BudgetError for tokens that do not fit.
        """
        plan, prompt = request.plan, request.prompt
        models = [self.model(size) for size in plan.sizes]
        if plan.switch == "hand-over":
            for pair in plan.changes:
                self.hand_over(*pair)
        if not isinstance(prompt, EncodedPrompt):
            prompt = self.tags.encode_prompt(prompt, thinking=bool(plan.trace))
        is_split = len(plan.sizes) > 1 or any(phase.budget is not None for phase in plan.trace)
        if plan.trace and not prompt.in_thinking and is_split:
            raise ConfigError(
                f"the prompt does not open {self.tags.open}, so there is no thinking to give "
                "a budget or a size of its own; use one size and no budget, or open the tag"
            )
        sequence = Sequence(request, prompt, self.tags, end_of_turn(self.tokenizer, models), index)
        if sequence.writers:  # an end of thinking, where the prompt opens what nobody asks for
            plan.require_room(len(sequence.writers))
        context = _context(models)
        room = context - sequence.num_prompt
        if room > 0:  # or else no plan fits, and that is what to say
            plan.require_room(self.tags.max_closing if plan.thinking_budget else 0, room)
        if plan.max_new_tokens > room:
            advice = f"use max_new_tokens={room} or less" if room > 0 else "shorten the prompt"
            raise BudgetError(
                f"a prompt of {sequence.num_prompt} tokens and max_new_tokens="
                f"{plan.max_new_tokens} exceed the model's context of {context}; {advice}"
            )
        self._require_embedded([*prompt.ids, *self.tags.encode(self.tags.end_of_thinking)], models)
        return sequence

    def _require_embedded(self, ids: Iterable[int], models: Iterable[PreTrainedModel]) -> None:
        """Raises ConfigError for a token of the tokenizer that the models have no embedding for."""
        num_rows, largest = min(model.config.vocab_size for model in models), max(ids)
        if largest >= num_rows:
            token = self.tokenizer.convert_ids_to_tokens(largest)
            raise ConfigError(
                f"the prompt holds the token {token!r} with id {largest}, but the model has "
                f"{num_rows} embedding rows; resize the parent's embeddings, or leave the token out"
            )


def _context(models: Iterable[PreTrainedModel]) -> float:
    """Tokens of the longest text that all models have positions for; infinite if none has any."""
    contexts: list[int | None] = []
    for model in models:
        contexts.append(getattr(model.config, "max_position_embeddings", None))
        scaling = getattr(model.config, "rope_parameters", None) or {}
        if scaling.get("rope_type") == "longrope":
            # Beyond, it turns every key of a batch otherwise, and caches keep keys as they were:
            # tokens would depend on their neighbours, and would not be those of the whole text.
            contexts.append(scaling.get("original_max_position_embeddings"))
    return min((c for c in contexts if c), default=math.inf)
