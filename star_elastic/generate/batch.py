"""The sequences that one size works on: they are admitted, read, written and released.

What a size remembers of a sequence that it releases is kept, thrown away or handed to the size that
goes on, as the sequence's plan says.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as ListOf

from star_elastic.generate.caches import Convert
from star_elastic.generate.decode import BatchDecoder, choose_tokens, entropies
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
            rows = [(*s.caches.pop(self.size), s) for s in known]
            order = self._decoder.resume([(cache, n, s.ids[n:]) for cache, n, s in rows])
            for _, num_known, sequence in (rows[row] for row in order):
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
        now_V = self._decoder.logits_BV[len(self.sequences)].log_softmax(-1)
        exact_V = exact.logits_BV[0].log_softmax(-1)
        return float((exact_V.exp() * (exact_V - now_V)).sum())

    def read(self) -> None:
        """Reads the next token of every sequence."""
        for sequence in self.sequences:
            sequence.stretch.decode_steps += 1
        lengths = self._decoder.lengths
        self._decoder.step([s.ids[n] for s, n in zip(self.sequences, lengths, strict=True)])

    def write(self) -> None:
        """Chooses the next token of every sequence that is read to its end: some have injected
        tokens before them, and some are left to another size because this one is unsure."""
        logits_BV, rows = self._decoder.logits_BV, dict(enumerate(self.sequences))
        ready = [row for row, s in rows.items() if self._decoder.lengths[row] == len(s.ids)]
        looking = [row for row in ready if rows[row].looks]
        if looking:
            unsure = entropies(logits_BV[looking])
            for row, entropy in zip(looking, unsure, strict=True):
                if rows[row].defer(entropy):
                    ready.remove(row)
        for sampling in dict.fromkeys(rows[row].request.sampling for row in ready):
            alike = [row for row in ready if rows[row].request.sampling == sampling]
            alike_BV = logits_BV if len(alike) == len(rows) else logits_BV[alike]
            tokens = choose_tokens(alike_BV, sampling, [rows[row].generator for row in alike])
            for row, token in zip(alike, tokens, strict=True):
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
            start = sequence.reads[-1].start + sequence.reads[-1].tokens
            if lengths[row] > start:
                num_steps = lengths[row] - start
                sequence.reads.append(Read(self.size, start, num_steps, at_once=False))
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
