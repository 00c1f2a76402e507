"""Generation through the phases of a plan, in batches: one size writes, then another, to the token.

Sequences of a batch move from size to size as their phases end, each by itself. The size that most
of them wait for works until it is done with all of them, then the next does; so sizes take turns,
and no sequence waits for others inside a turn of its own.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from collections.abc import Sequence as ListOf
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from star_elastic.errors import BudgetError, ConfigError
from star_elastic.generate.decode import Sampling, pads_exactly
from star_elastic.generate.desk import Convert, Desk, HandOvers
from star_elastic.generate.phases import Generation, Plan, Token
from star_elastic.generate.prompts import Prompt, ThinkingTags
from star_elastic.generate.sequence import Rules, Sequence
from star_elastic.generate.steps import StepPool, pool_for
from star_elastic.generate.tokens import TokenStream
from star_elastic.models.tokenizer import end_of_turn

DEFAULT_BATCH_SIZE = 64
DEFAULT_BATCH_TOKENS = 65_536
"""A thousand tokens for each of 64 sequences; a cache of 8 GiB for a Llama of 8B in BF16."""

Models = Mapping[str, PreTrainedModel]


class PhasedGenerator:
    """Generates with any of several models that share a tokenizer, such as the sizes of a family.

    `models` may build its models on access. `end_of_thinking` is the text injected when a budget
    is used up. `hand_over` makes one size's cache another's, where the models are sizes of one
    family. The models' own `max_position_embeddings` bounds prompt and new tokens.
    """

    def __init__(
        self,
        models: Models,
        tokenizer: PreTrainedTokenizerBase,
        end_of_thinking: str,
        hand_over: HandOvers | None = None,
    ):
        self.models = models
        self.tokenizer = tokenizer
        self.tags = ThinkingTags(tokenizer, end_of_thinking)
        self._hand_over = hand_over
        self._pools: dict[str, StepPool | None] = {}

    def generate(
        self,
        prompts: Prompt | ListOf[Prompt],
        plan: Plan,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        batch_size: int = DEFAULT_BATCH_SIZE,
        batch_tokens: int = DEFAULT_BATCH_TOKENS,
        compare: bool = False,
    ) -> list[Generation]:
        """One result per prompt, in their order.

        Prompts are batched with others of like length: at most `batch_size` at once, and no more
        than have room in `batch_tokens`, each with the longest prompt among them and all its new
        tokens (one prompt is never too long for a batch of its own).

        At temperature 0 the likeliest token is taken; otherwise prompt number i draws from a
        generator of its own, seeded by (seed, i), so that batching changes no draw. `compare`
        measures how far caches that are handed over diverge from exact ones, which reads every such
        sequence anew. Raises ConfigError for unknown sizes and unreadable prompts, BudgetError for
        tokens that do not fit, before any work starts.
        """
        sampling, limits = Sampling(temperature, top_p), BatchLimits(batch_size, batch_tokens)
        work = self._run(prompts, plan, sampling, seed, limits, compare=compare)
        done = {s.index: result for s, result in work if isinstance(result, Generation)}
        return [done[index] for index in sorted(done)]

    def stream(
        self,
        prompts: Prompt | ListOf[Prompt],
        plan: Plan,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        batch_size: int = DEFAULT_BATCH_SIZE,
        batch_tokens: int = DEFAULT_BATCH_TOKENS,
    ) -> Iterator[Token | Generation]:
        """The same token by token, as they are written; a prompt's result follows its last token.

        Closing the iterator ends the work.
        """
        sampling, limits = Sampling(temperature, top_p), BatchLimits(batch_size, batch_tokens)
        work = self._run(prompts, plan, sampling, seed, limits)
        return _tokens(work)

    def _run(
        self,
        prompts: Prompt | ListOf[Prompt],
        plan: Plan,
        sampling: Sampling,
        seed: int,
        limits: BatchLimits,
        *,
        compare: bool = False,
    ) -> Iterator[Event]:
        """Checks everything first, then yields what happens: each sequence with the number of its
        newest tokens as they are written, and with its result once its batch is done."""
        models = {size: self.model(size) for size in plan.sizes}
        hand_overs = self._hand_overs(plan)
        rules = Rules(plan, self.tags, end_of_turn(self.tokenizer, models.values()))
        sequences = [
            self._open(index, prompt, rules, seed) for index, prompt in enumerate(_listed(prompts))
        ]
        longest = max(sequence.num_prompt for sequence in sequences)
        closing = self.tags.max_closing if plan.thinking_budget else 0
        room = _context(models.values()) - longest
        if room > 0:  # or else no plan fits, and that is what to say
            plan.require_room(closing, room)
        _require_context(longest, plan, models.values())
        self._require_embedded(sequences, models.values())
        if not all(map(pads_exactly, models.values())):
            limits = BatchLimits(1, limits.tokens)
        for size, model in models.items():
            if size not in self._pools:
                self._pools[size] = pool_for(model)
        desks = partial(_make_desks, models, plan, hand_overs, self._pools, compare)
        return _run_batches(limits.batches(sequences), desks, sampling)

    def _hand_overs(self, plan: Plan) -> dict[tuple[str, str], Convert]:
        """How caches change hands wherever the plan says so, by who gives and who takes."""
        if plan.switch != "hand-over" or len(plan.sizes) == 1:
            return {}
        if self._hand_over is None:
            raise ConfigError(
                "these models are not sizes of one family, whose caches could be handed over; "
                "use switch='reprefill' or 'catch-up'"
            )
        pairs = {(giver, taker) for giver, taker in plan.changes if giver != taker}
        return {pair: self._hand_over(*pair) for pair in pairs}

    def _open(self, index: int, prompt: Prompt, rules: Rules, seed: int) -> Sequence:
        """A prompt as a sequence at the start of its first phase."""
        plan = rules.plan
        encoded = self.tags.encode_prompt(prompt, thinking=plan.thinks)
        first = 0
        if plan.end_of_thinking is not None and not encoded.in_thinking:
            trace = plan.phases[: plan.end_of_thinking + 1]
            if len(plan.sizes) > 1 or any(phase.budget is not None for phase in trace):
                raise ConfigError(
                    f"the prompt does not open {self.tags.open}, so there is no thinking to give "
                    "a budget or a size of its own; use one size and no budget, or open the tag"
                )
            first = plan.end_of_thinking + 1
        digest = hashlib.sha256(f"{seed}/{index}".encode()).digest()
        sequence = Sequence(
            rules=rules,
            index=index,
            ids=list(encoded.ids),
            num_prompt=len(encoded.ids),
            generator=torch.Generator().manual_seed(int.from_bytes(digest[:8], "big")),
            phase=first,
            has_tags=encoded.has_tags,
        )
        if encoded.in_thinking and not plan.thinks:
            sequence.close_thinking()
            plan.require_room(len(sequence.writers))
        return sequence

    def _require_embedded(
        self, sequences: Iterable[Sequence], models: Iterable[PreTrainedModel]
    ) -> None:
        """Raises ConfigError for a token of the tokenizer that the models have no embedding for."""
        num_rows = min(model.config.vocab_size for model in models)
        ids = {*self.tags.encode(self.tags.end_of_thinking)}
        ids.update(*(sequence.ids for sequence in sequences))
        if max(ids) >= num_rows:
            token = self.tokenizer.convert_ids_to_tokens(max(ids))
            raise ConfigError(
                f"the prompt holds the token {token!r} with id {max(ids)}, but the model has "
                f"{num_rows} embedding rows; resize the parent's embeddings, or leave the token out"
            )

    def model(self, size: str) -> PreTrainedModel:
        """The model of a size. Raises ConfigError naming the sizes there are."""
        if size not in self.models:
            raise ConfigError(
                f"size {size!r} is not in this family; it has {', '.join(self.models)}"
            )
        return self.models[size]


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """How many sequences may run together: so many, and no more than hold so many tokens. Raises
    ConfigError."""

    size: int = DEFAULT_BATCH_SIZE
    tokens: int = DEFAULT_BATCH_TOKENS

    def __post_init__(self) -> None:
        for name, value in (("batch_size", self.size), ("batch_tokens", self.tokens)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                default = DEFAULT_BATCH_SIZE if name == "batch_size" else DEFAULT_BATCH_TOKENS
                raise ConfigError(
                    f"{name}={value!r} is not a whole number of 1 or more; use {default}"
                )

    def batches(self, sequences: Iterable[Sequence]) -> Iterator[list[Sequence]]:
        """The sequences from the shortest prompt to the longest, as many at once as may be."""
        batch: list[Sequence] = []
        for sequence in sorted(sequences, key=lambda sequence: sequence.num_prompt):
            # All are padded to the longest, which is the last to come in.
            row = sequence.num_prompt + sequence.rules.plan.max_new_tokens
            if batch and (len(batch) == self.size or (len(batch) + 1) * row > self.tokens):
                yield batch
                batch = []
            batch.append(sequence)
        if batch:
            yield batch


Event = tuple[Sequence, int | Generation]


def _tokens(work: Iterable[Event]) -> Iterator[Token | Generation]:
    """The events of a run as tokens with their text."""
    writing: dict[int, TokenStream] = {}
    for sequence, event in work:
        if isinstance(event, Generation):
            yield event
            continue
        if sequence.index not in writing:
            writing[sequence.index] = TokenStream(sequence)
        for place in range(len(sequence.writers) - event, len(sequence.writers)):
            yield writing[sequence.index].token(place)


def _make_desks(
    models: Models,
    plan: Plan,
    hand_overs: Mapping[tuple[str, str], Convert],
    pools: Mapping[str, StepPool | None],
    compare: bool,
) -> dict[str, Desk]:
    """A desk for every size, all empty."""
    return {
        size: Desk(size, model, plan.switch, hand_overs, steps=pools[size], compare=compare)
        for size, model in models.items()
    }


def _run_batches(
    batches: Iterable[list[Sequence]],
    make_desks: Callable[[], Mapping[str, Desk]],
    sampling: Sampling,
) -> Iterator[Event]:
    """Runs one batch after the other."""
    for batch in batches:
        for sequence in batch:
            if sequence.writers:  # an end of thinking injected before anything is written
                yield sequence, len(sequence.writers)
        seconds = yield from _run_batch(batch, make_desks(), sampling)
        for sequence in batch:
            yield sequence, sequence.result(seconds)


def _run_batch(
    batch: list[Sequence], desks: Mapping[str, Desk], sampling: Sampling
) -> Generator[tuple[Sequence, int], None, list[float]]:
    """Runs sequences through all their phases; yields each with the number of its newest tokens.

    Returns the wall seconds of each phase, which lasts until the last sequence has left it. Time
    that the reader of the events takes is not in them.
    """
    seconds = [0.0] * len(batch[0].rules.plan.phases)
    last, phase = time.perf_counter(), min(s.phase for s in batch)
    while waiting := Counter(s.size for s in batch if not s.is_done):
        desk = desks[waiting.most_common(1)[0][0]]
        with torch.inference_mode():
            desk.seat([s for s in batch if not s.is_done and s.size == desk.size])
        while desk.seated:
            with torch.inference_mode():
                written = desk.write(sampling)
            now = time.perf_counter()
            seconds[phase] += now - last
            phase = min((s.phase for s in batch if not s.is_done), default=phase)
            yield from written
            last = time.perf_counter()
            with torch.inference_mode():
                desk.leave(desks)
                if desk.seated:
                    desk.read()
    return seconds


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


def _require_context(longest: int, plan: Plan, models: Iterable[PreTrainedModel]) -> None:
    """Raises BudgetError unless the longest prompt and all new tokens fit the context."""
    context = _context(models)
    if longest + plan.max_new_tokens > context:
        room = context - longest
        advice = f"use max_new_tokens={room} or less" if room > 0 else "shorten the prompt"
        raise BudgetError(
            f"a prompt of {longest} tokens and max_new_tokens={plan.max_new_tokens} exceed the "
            f"model's context of {context}; {advice}"
        )


def _listed(prompts: Prompt | ListOf[Prompt]) -> list[Prompt]:
    """Prompts as a list; a text or one conversation counts as one prompt."""
    if not isinstance(prompts, (str, ListOf)):
        raise ConfigError(
            f"prompts of type {type(prompts).__name__} cannot be read; "
            "give a text, a conversation, or a list of them"
        )
    if not isinstance(prompts, str) and not prompts:
        raise ConfigError("the prompt is empty; give at least one message or text")
    is_one = isinstance(prompts, str) or isinstance(prompts[0], Mapping)
    return cast("list[Prompt]", [prompts] if is_one else list(prompts))
