"""Generation with several sizes of one model: an engine for requests that come and go, and loops
over it for prompts that are there from the start."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Sequence as ListOf
from dataclasses import dataclass, replace
from typing import TypedDict, Unpack, cast

import torch

from star_elastic.errors import ConfigError
from star_elastic.generate.batch import Batch
from star_elastic.generate.decode import pads_exactly
from star_elastic.generate.phases import Generation, Plan, Sampling, Token
from star_elastic.generate.prompts import Prompt
from star_elastic.generate.sequence import Request, Sequence
from star_elastic.generate.sizes import Sizes

DEFAULT_BATCH_SIZE = 64
DEFAULT_BATCH_TOKENS = 65_536
"""A thousand tokens for each of 64 sequences; a cache of 8 GiB for a Llama of 8B in BF16."""

Event = Token | Generation
"""A new token, or the result of a sequence that is done."""


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """How many sequences may run together: so many, and no more than hold so many tokens. Raises
    ConfigError."""

    size: int = DEFAULT_BATCH_SIZE
    tokens: int = DEFAULT_BATCH_TOKENS

    def __post_init__(self) -> None:
        defaults = {"batch_size": DEFAULT_BATCH_SIZE, "batch_tokens": DEFAULT_BATCH_TOKENS}
        for (name, default), value in zip(defaults.items(), (self.size, self.tokens), strict=True):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(
                    f"{name}={value!r} is not a whole number of 1 or more; use {default}"
                )

    def admit(self, waiting: Iterable[Sequence], running: Iterable[Sequence]) -> list[Sequence]:
        """Those that may come to the running ones, from the shortest prompt on. One is never too
        long to run alone."""
        rows = [s.num_prompt + s.plan.max_new_tokens for s in running]
        admitted: list[Sequence] = []
        for sequence in sorted(waiting, key=lambda sequence: sequence.num_prompt):
            # Rows of a batch are padded to the longest.
            rows.append(sequence.num_prompt + sequence.plan.max_new_tokens)
            if len(rows) > 1 and (len(rows) > self.size or len(rows) * max(rows) > self.tokens):
                break
            admitted.append(sequence)
        return admitted


class Engine:
    """Runs requests that come and go, each with its own plan, sampling and seed.

    The life of a request: `add` checks it against the models that its plan names and lets it wait.
    A `step` admits what waits as soon as there is room (`BatchLimits`); it is a `Sequence` now, at
    the first phase of its plan, which names the size that is to write its next token. One size
    works at a time: it reads the sequences that stand at it, and from then on every step writes one
    token of each and reads it. Where a phase ends, by a tag, a line or its budget, the next one may
    name another size; then the batch releases the sequence, and what the size remembers of it is
    dropped, kept or handed over, as the plan's `switch` says. When a size has no sequence left, the
    one at which most of them stand goes on. The step that ends the turn of the model tells the
    result, and all that was held for the request is freed. `cancel` frees it at any time.

    A sequence draws from its own seed, and rows of a batch do not see each other; so its tokens are
    the same whatever runs beside it and whenever it comes, as far as rounding goes.
    """

    def __init__(self, sizes: Sizes, limits: BatchLimits = BatchLimits()):
        self._sizes, self._limits = sizes, limits
        self._waiting: dict[int, Sequence] = {}
        self._running: dict[int, Sequence] = {}
        self._batch: Batch | None = None
        self._is_full = False
        self._num_added = 0

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._waiting and not self._running

    def add(self, request: Request) -> int:
        """Takes a request; returns its number, the first being 0. Raises what `Sizes.open` does."""
        sequence = self._sizes.open(request, self._num_added)
        if not all(pads_exactly(self._sizes.model(size)) for size in request.plan.sizes):
            self._limits = replace(self._limits, size=1)
        self._waiting[self._num_added] = sequence
        self._num_added += 1
        return sequence.index

    @torch.inference_mode()
    def cancel(self, index: int) -> None:
        """Forgets a request and frees what it holds; one that is done is let pass."""
        self._waiting.pop(index, None)
        sequence = self._running.pop(index, None)
        if sequence is not None and self._batch is not None:
            sequence.is_done = True
            self._batch.release()

    @torch.inference_mode()
    def step(self) -> list[tuple[int, Event]]:
        """Lets one size write a token of each of its sequences.

        Returns what happened, by the numbers of the requests: their new tokens in order, with an
        end of thinking that was injected, and the result of each that is done.
        """
        begin, coming = time.perf_counter(), self._admit()
        if not self._running:
            return []
        stretches = [sequence.stretch for sequence in self._running.values()]
        if self._batch is not None and self._batch.sequences:
            self._batch.read()
        else:
            coming = list(self._running.values())
            self._batch = self._sizes.batch(Counter(s.size for s in coming).most_common(1)[0][0])
        self._batch.admit([s for s in coming if s.size == self._batch.size])
        self._batch.write()
        self._batch.release()
        elapsed = time.perf_counter() - begin
        for stretch in stretches:
            stretch.seconds += elapsed
        return list(self._events())

    def _admit(self) -> list[Sequence]:
        """The sequences that come in now.

        Newcomers join those that run while there is room for all, and while no sequence waits for
        another size than the one at work: that would never be done if they went on coming. Else
        they come in when nothing runs, prompts of like length together, which need little padding.
        """
        num_working = 0 if self._batch is None else len(self._batch.sequences)
        if self._running and (self._is_full or num_working < len(self._running)):
            return []
        admitted = self._limits.admit(self._waiting.values(), self._running.values())
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


class Options(TypedDict, total=False):
    """How the prompts of one call are run; what is left out is as in `Generator._start`."""

    temperature: float
    top_p: float
    seed: int
    batch_size: int
    batch_tokens: int
    compare: bool


class Generator(Sizes):
    """Sizes with loops over an engine, for prompts that are all there and have one plan.

    Prompts are batched with others of like length: at most `batch_size` at once, and no more than
    have room in `batch_tokens`, each with the longest prompt among them and all its new tokens (one
    prompt is never too long for a batch of its own).

    At temperature 0 the likeliest token is taken; otherwise prompt number i draws from a generator
    of its own, seeded by (seed, i), so that batching changes no draw. `compare` measures how far
    caches that are handed over diverge from exact ones, which reads every such sequence anew.
    Raises ConfigError for unknown sizes and unreadable prompts, BudgetError for tokens that do not
    fit, before any work starts.
    """

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
        engine = Engine(self, BatchLimits(batch_size, batch_tokens))
        sampling = Sampling(temperature, top_p)
        encoded = [
            self.tags.encode_prompt(prompt, thinking=bool(plan.trace))
            for prompt in _listed(prompts)
        ]
        requests = [
            Request(
                prompt=prompt, plan=plan, sampling=sampling, seed=f"{seed}/{number}",
                streams=streams, compares=compare,
            )
            for number, prompt in enumerate(encoded)
        ]  # fmt: skip
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
