"""The sequences that one size works on: they are admitted, read, written and released.

What a size remembers of a sequence that it releases is kept, thrown away or handed to the size that
goes on, as the sequence's plan says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as ListOf
from contextlib import contextmanager

import torch

from star_elastic.errors import LogitsError
from star_elastic.generate.caches import Convert
from star_elastic.generate.decode import (
    BatchDecoder,
    choose_tokens,
    entropies,
    rows_not_finite,
)
from star_elastic.generate.phases import Handed, How, Read
from star_elastic.generate.sequence import Sequence


class Batch:
    """Sequences of which each is a row of one decoder.

    `hand_over` tells how a cache of one size (the first) becomes that of another.
    """

    def __init__(self, size: str, decoder: BatchDecoder, hand_over: Callable[[str, str], Convert]):
        self.size = size
        self.sequences: list[Sequence] = []
        self._decoder, self._hand_over = decoder, hand_over

    def admit(self, sequences: ListOf[Sequence]) -> None:
        """Reads sequences up to their last token, so that the next ones can be written."""
        known = [s for s in sequences if self.size in s.caches]
        new = [s for s in sequences if self.size not in s.caches]
        if known:
            rows = [(*s.caches[self.size], s) for s in known]
            order = self._decoder.resume([(cache, n, s.ids[n:]) for cache, n, s in rows])
            for _, num_known, sequence in (rows[row] for row in order):
                del sequence.caches[self.size]
                is_handed = sequence.plan.switch == "hand-over"
                self._admit(sequence, num_known, "hand-over" if is_handed else "catch-up")
        if new:
            self._decoder.prefill([s.ids for s in new])
            for sequence in new:
                self._admit(sequence, 0, "reprefill" if sequence.reads else "fresh")

    def _admit(self, sequence: Sequence, num_known: int, how: How) -> None:
        compares = sequence.request.compares and how == "hand-over"
        divergence = self._divergence(sequence) if compares else None
        num_read = len(sequence.ids) - num_known
        sequence.stretch.prefill_tokens += num_read
        sequence.stretch.handed.append(
            Handed(self.size, len(sequence.ids), num_read, how, divergence)
        )
        sequence.reads.append(Read(self.size, num_known, num_read, at_once=True))
        self.sequences.append(sequence)

    def _divergence(self, sequence: Sequence) -> float:
        """KL of the next token, nats, from what the size says after reading all of it itself."""
        exact = BatchDecoder(self._decoder.model)
        exact.prefill([sequence.ids])
        if rows_not_finite(exact.logits_BV):
            raise LogitsError([sequence.index])
        now_V = self._decoder.logits_BV[len(self.sequences)].log_softmax(-1)
        exact_V = exact.logits_BV[0].log_softmax(-1)
        return float((exact_V.exp() * (exact_V - now_V)).sum())

    def read(self) -> None:
        """Reads the next token of every sequence."""
        lengths = self._decoder.lengths
        self._decoder.step([s.ids[n] for s, n in zip(self.sequences, lengths, strict=True)])
        for sequence in self.sequences:
            sequence.stretch.decode_steps += 1

    def write(self) -> None:
        """Chooses the next token of every sequence that is read to its end: some have injected
        tokens before them, and some are left to another size because this one is unsure.

        Raises LogitsError if there is a sequence for which none can be chosen. Whatever is raised,
        no token is taken.
        """
        logits_BV, rows = self._decoder.logits_BV, dict(enumerate(self.sequences))
        if broken := rows_not_finite(logits_BV):
            raise LogitsError([rows[row].index for row in broken])
        ready = [row for row, s in rows.items() if self._decoder.lengths[row] == len(s.ids)]
        looking = [row for row in ready if rows[row].looks]
        if looking:
            unsure = entropies(logits_BV[looking])
            for row, entropy in zip(looking, unsure, strict=True):
                if rows[row].defer(entropy):
                    ready.remove(row)
        chosen: dict[int, int] = {}
        drawing = [rows[row] for row in ready if rows[row].request.sampling.temperature]
        with _drawn_or_not([sequence.generator for sequence in drawing]):
            for sampling in dict.fromkeys(rows[row].request.sampling for row in ready):
                alike = [row for row in ready if rows[row].request.sampling == sampling]
                alike_BV = logits_BV if len(alike) == len(rows) else logits_BV[alike]
                generators = [rows[row].generator for row in alike]
                tokens = choose_tokens(alike_BV, sampling, generators)
                chosen.update(zip(alike, tokens, strict=True))
        for row, token in chosen.items():
            rows[row].accept(token)

    def release(self) -> None:
        """Lets go of the sequences that are done or that another size goes on with."""
        staying = [
            row for row, s in enumerate(self.sequences) if not s.is_done and s.size == self.size
        ]
        if len(staying) == len(self.sequences):
            return
        num_bytes, lengths = self._decoder.num_bytes // len(self.sequences), self._decoder.lengths
        for row in set(range(len(self.sequences))) - set(staying):
            sequence = self.sequences[row]
            self._close_read(row)
            kept = sum(cache.num_bytes for cache, _ in sequence.caches.values())
            sequence.cache_bytes = max(sequence.cache_bytes, num_bytes + kept)
            if sequence.is_done or sequence.plan.switch == "reprefill":
                continue
            if sequence.plan.switch == "hand-over":
                taken = self._hand_over(self.size, sequence.size)(self._decoder.take(row))
                sequence.caches[sequence.size] = taken, lengths[row]
            elif self.size in sequence.sizes_to_come:
                sequence.caches[self.size] = self._decoder.take(row), lengths[row]
        # Dropping rows costs less than one step with idle ones.
        self._decoder.keep(staying)
        self.sequences = [self.sequences[row] for row in staying]

    def _close_read(self, row: int) -> None:
        """Notes what a sequence has read token by token since it was admitted."""
        reads, length = self.sequences[row].reads, self._decoder.lengths[row]
        start = reads[-1].start + reads[-1].tokens
        if length > start:
            reads.append(Read(self.size, start, length - start, at_once=False))

    def abandon(self) -> None:
        """Lets go of all sequences after a failure, in whatever state it left the decoder. What
        they remember of other sizes stays; what this one has read of them is to be read anew."""
        for row in range(len(self.sequences)):
            self._close_read(row)
        self.sequences = []
        self._decoder.abandon()


@contextmanager
def _drawn_or_not(generators: ListOf[torch.Generator]) -> Iterator[None]:
    """Takes back what has been drawn if a failure inside loses the draws."""
    states = [generator.get_state() for generator in generators]
    try:
        yield
    except BaseException:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
        raise
