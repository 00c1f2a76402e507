"""Generation with several sizes of one model: an engine for requests that come and go, and loops
over it for prompts that are all there."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Sequence as ListOf
from contextlib import contextmanager
from functools import cache
from typing import TypedDict, Unpack, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from star_elastic.errors import BudgetError, ConfigError, LogitsError
from star_elastic.generate.batch import Batch
from star_elastic.generate.caches import Convert
from star_elastic.generate.decode import BatchDecoder, pads_exactly
from star_elastic.generate.phases import Generation, Plan, Sampling, Token
from star_elastic.generate.prompts import EncodedPrompt, Prompt, ThinkingTags
from star_elastic.generate.sequence import Request, Sequence
from star_elastic.generate.steps import pool_for
from star_elastic.models.model_config import longest_context
from star_elastic.models.tokenizer import end_of_turn

DEFAULT_BATCH_SIZE = 64
DEFAULT_BATCH_TOKENS = 65_536
"""A thousand tokens for each of 64 sequences; a cache of 8 GiB for a Llama of 8B in BF16."""

Event = Token | Generation
"""A new token, or the result of a sequence that is done."""


class Engine:
    """Runs requests that come and go, each with its own plan, sampling and seed.

    The life of a request: `add` checks it against the models that its plan names, and it waits. A
    `step` admits what waits if there is room: `batch_size` sequences at once, and no more than
    `batch_tokens` hold, each padded to the longest. A request is a `Sequence` now, at the first
    phase of its plan, and the phase names the size that is to write its next token. One size works
    at a time: it reads the sequences that stand at it, and from then on each step writes one token
    of every one. A phase ends by a tag, a line or its budget, and the next may name another size;
    then the batch releases the sequence, and what the size remembers of it is dropped, kept or
    handed over, as the plan's `switch` says. When a size has no sequence left, the one at which
    most of them stand goes on. The step that ends the model's turn returns the result, and nothing
    is held for the request any more; `cancel` brings that about at any time.

    A sequence draws by its own seed, and rows of a batch do not see each other. So its tokens are
    the same whatever runs beside it and whenever it comes, as far as rounding goes.
    """

    def __init__(
        self,
        generator: Generator,
        batch_size: int = DEFAULT_BATCH_SIZE,
        batch_tokens: int = DEFAULT_BATCH_TOKENS,
    ):
        _require_count("batch_size", batch_size, DEFAULT_BATCH_SIZE)
        _require_count("batch_tokens", batch_tokens, DEFAULT_BATCH_TOKENS)
        self._generator, self._batch_size, self._batch_tokens = generator, batch_size, batch_tokens
        self._waiting: dict[int, Sequence] = {}
        self._running: dict[int, Sequence] = {}
        self._batch: Batch | None = None
        self._is_full = False
        self._num_added = 0
        self._untold: list[tuple[int, Event]] = []

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._waiting and not self._running and not self._untold

    def add(self, request: Request) -> int:
        """Takes a request; returns its number, from 0 on. Raises what `Generator.open` does."""
        sequence = self._generator.open(request, self._num_added)
        # Where padding would change what a row reads, rows cannot share a batch.
        if not all(pads_exactly(self._generator.model(size)) for size in request.plan.sizes):
            self._batch_size = 1
        self._waiting[sequence.index] = sequence
        self._num_added += 1
        return sequence.index

    @torch.inference_mode()
    def cancel(self, index: int) -> None:
        """Forgets a request and frees what it holds; one that is done is let pass."""
        self._waiting.pop(index, None)
        self._is_full = False
        self._untold = [(number, event) for number, event in self._untold if number != index]
        sequence = self._running.pop(index, None)
        if sequence is not None and self._batch is not None:
            sequence.is_done = True
            with self._recovering():
                self._batch.release()

    @torch.inference_mode()
    def step(self) -> list[tuple[int, Event]]:
        """Lets one size write a token of each of its sequences.

        Returns what happened, by the numbers of the requests: their new tokens in order, with an
        end of thinking that was injected, and the result of each that is done.

        Whatever a step raises (memory that ran out, say), the engine goes on: the next step reads
        all sequences anew, and they have the tokens that they would have had (but for caches handed
        over, which are lost, too). Requests for which no token can be chosen are ended, and named
        by the LogitsError that is raised.
        """
        begin, coming = time.perf_counter(), self._admit()
        stretches = [sequence.stretch for sequence in self._running.values()]
        try:
            if self._running:
                with self._recovering():
                    self._work(coming)
        finally:
            elapsed = time.perf_counter() - begin
            # Every running sequence has waited for this step, also those that it did not move.
            for stretch in stretches:
                stretch.seconds += elapsed
            self._untold += self._events()
        events, self._untold = self._untold, []
        return events

    def _work(self, coming: list[Sequence]) -> None:
        """Lets the size at work, or else another, read what comes in and write a token of each."""
        if self._batch is not None and self._batch.sequences:
            self._batch.read()
        else:
            # The size at work has nobody left. Go where most of them stand: every change of size
            # costs the others a wait, and few rows at a time waste the reading of the weights.
            coming = list(self._running.values())
            self._batch = self._generator.batch(
                Counter(s.size for s in coming).most_common(1)[0][0]
            )
        self._batch.admit([s for s in coming if s.size == self._batch.size])
        self._batch.write()
        self._batch.release()

    @contextmanager
    def _recovering(self) -> Iterator[None]:
        """Forgets what work inside that fails may leave half done: all but the tokens."""
        try:
            yield
        except BaseException as error:
            batch, self._batch = self._batch, None
            if batch is not None:
                batch.abandon()
            for index in error.requests if isinstance(error, LogitsError) else ():
                self._running.pop(index, None)
            self._is_full = False
            raise

    def _admit(self) -> list[Sequence]:
        """The sequences that come in now.

        Newcomers join those that run while there is room for all, and while no sequence waits for
        another size than the one at work: that would wait for ever if they went on coming. Else
        they come in when nothing runs, or when a request that ends early leaves room.
        """
        num_working = 0 if self._batch is None else len(self._batch.sequences)
        if self._running and (self._is_full or num_working < len(self._running)):
            return []
        waiting, running = self._waiting.values(), self._running.values()
        admitted = fitting(waiting, running, self._batch_size, self._batch_tokens)
        for sequence in admitted:
            self._running[sequence.index] = self._waiting.pop(sequence.index)
        self._is_full = bool(self._waiting)
        return admitted

    def _events(self) -> Iterator[tuple[int, Event]]:
        for index, sequence in list(self._running.items()):
            if sequence.request.streams:
                yield from ((index, token) for token in sequence.new_tokens())
            if sequence.is_done:
                del self._running[index]
                yield index, sequence.result()

    def run(self) -> Iterator[tuple[int, Event]]:
        """Steps until nothing is left to do."""
        while not self.is_idle:
            yield from self.step()


def fitting(
    waiting: Iterable[Sequence], running: Iterable[Sequence], size: int, tokens: int
) -> list[Sequence]:
    """Those that may come to the running ones, so that there are at most `size` and all rows have
    room in `tokens`; `waiting` are in the order in which they came.

    To rows that run they come in that order, and nobody overtakes one for which there is no room.
    Where none runs, the one that has waited longest leads, however long it is: it is never too long
    to run alone. Prompts of like length, which need little padding, fill up behind it. So a request
    waits for one batch per request before it, at most.
    """
    queue, rooms = list(waiting), [_room(sequence) for sequence in running]
    num, longest, joins = len(rooms), max(rooms, default=0), bool(rooms)
    if queue and not joins:
        first = queue[0].num_prompt
        queue.sort(key=lambda sequence: abs(sequence.num_prompt - first))
    found: list[Sequence] = []
    for sequence in queue:
        room = max(longest, _room(sequence))
        if num and (num == size or (num + 1) * room > tokens):
            if joins or num == size:
                break
            continue
        num, longest = num + 1, room
        found.append(sequence)
    return found


def _room(sequence: Sequence) -> int:
    """The most tokens that a sequence may come to."""
    return sequence.num_prompt + sequence.plan.max_new_tokens


def _require_count(name: str, value: object, default: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name}={value!r} is not a whole number of 1 or more; use {default}")


class Options(TypedDict, total=False):
    """How the prompts of one call are run; `Generator._start` has what is left out."""

    temperature: float
    top_p: float
    seed: int
    batch_size: int
    batch_tokens: int
    compare: bool


class Generator:
    """Models of several sizes that share a tokenizer, and loops over an engine for prompts that are
    all there and share a plan.

    `models` may build its models on access. `end_of_thinking` is the text injected when a budget
    is used up. `hand_over` says, by the names of two sizes, how the cache of one becomes that of
    the other; models that are not of one family have none. The models' own
    `max_position_embeddings` bounds prompt and new tokens.

    At temperature 0 the likeliest token is taken; otherwise prompt number i draws from a generator
    of its own, seeded by (seed, i), so that batching changes no draw. `compare` measures how far
    caches that are handed over diverge from exact ones, which reads every such sequence anew.
    Raises ConfigError for unknown sizes and unreadable prompts, BudgetError for tokens that do not
    fit, before any work starts.
    """

    def __init__(
        self,
        models: Mapping[str, PreTrainedModel],
        tokenizer: PreTrainedTokenizerBase,
        end_of_thinking: str,
        hand_over: Callable[[str, str], Convert] | None = None,
    ):
        self.models, self.tokenizer = models, tokenizer
        self.tags = ThinkingTags(tokenizer, end_of_thinking)
        self._hand_over = hand_over and cache(hand_over)
        self._pool = cache(lambda size: pool_for(self.model(size)))

    def model(self, size: str) -> PreTrainedModel:
        """The model of a size. Raises ConfigError naming the sizes there are."""
        if size not in self.models:
            raise ConfigError(
                f"size {size!r} is not in this family; it has {', '.join(self.models)}"
            )
        return self.models[size]

    def batch(self, size: str) -> Batch:
        """An empty batch of a size."""
        return Batch(size, BatchDecoder(self.model(size), self._pool(size)), self.hand_over)

    def hand_over(self, giver: str, taker: str) -> Convert:
        """How the cache of one size becomes that of another. Raises ConfigError if it cannot."""
        if self._hand_over is None:
            raise ConfigError(
                "these models are not sizes of one family, whose caches could be handed over; "
                "use switch='reprefill' or 'catch-up'"
            )
        return self._hand_over(giver, taker)

    def encode(self, prompt: Prompt | EncodedPrompt, plan: Plan) -> EncodedPrompt:
        """A prompt as token ids, with an open trace if the plan has one. Raises ConfigError."""
        if isinstance(prompt, EncodedPrompt):
            return prompt
        return self.tags.encode_prompt(prompt, thinking=bool(plan.trace))

    def open(self, request: Request, index: int = 0) -> Sequence:
        """A request as a sequence at the start of its first phase, before any work.

        Raises ConfigError for unknown sizes, prompts that cannot be read and caches that cannot be
        handed over, BudgetError for tokens that do not fit.
        """
        plan, prompt = request.plan, self.encode(request.prompt, request.plan)
        models = [self.model(size) for size in plan.sizes]
        if plan.switch == "hand-over":
            for pair in plan.changes:
                self.hand_over(*pair)
        is_split = len(plan.sizes) > 1 or any(phase.budget is not None for phase in plan.trace)
        if plan.trace and not prompt.in_thinking and is_split:
            raise ConfigError(
                f"the prompt does not open {self.tags.open}, so there is no thinking to give "
                "a budget or a size of its own; use one size and no budget, or open the tag"
            )
        sequence = Sequence(request, prompt, self.tags, end_of_turn(self.tokenizer, models), index)
        if sequence.writers:  # an end of thinking, where the prompt opens what nobody asks for
            plan.require_room(len(sequence.writers))
        context = min(longest_context(model.config) or math.inf for model in models)
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

    def generate(
        self, prompts: Prompt | ListOf[Prompt], plan: Plan, **options: Unpack[Options]
    ) -> list[Generation]:
        """One result per prompt, in their order."""
        done = dict(self._start(prompts, plan, streams=False, **options).run())
        return [cast(Generation, done[index]) for index in sorted(done)]

    def stream(
        self, prompts: Prompt | ListOf[Prompt], plan: Plan, **options: Unpack[Options]
    ) -> Iterator[Event]:
        """The same token by token, as they are written; a prompt's result follows its last token.

        Closing the iterator ends the work.
        """
        engine = self._start(prompts, plan, streams=True, **options)
        return (event for _, event in engine.run())

    def _start(
        self,
        prompts: Prompt | ListOf[Prompt],
        plan: Plan,
        *,
        streams: bool,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        batch_size: int = DEFAULT_BATCH_SIZE,
        batch_tokens: int = DEFAULT_BATCH_TOKENS,
        compare: bool = False,
    ) -> Engine:
        """An engine with a request for every prompt, numbered alike."""
        engine = Engine(self, batch_size, batch_tokens)
        sampling = Sampling(temperature, top_p)
        encoded = [self.encode(prompt, plan) for prompt in _listed(prompts)]
        requests = [
            Request(prompt, plan, sampling, f"{seed}/{number}", streams=streams, compares=compare)
            for number, prompt in enumerate(encoded)
        ]
        lengths = [len(prompt.ids) for prompt in encoded]
        self.open(requests[lengths.index(max(lengths))])  # what is advised for the longest fits all
        for request in requests:
            engine.add(request)
        return engine


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
