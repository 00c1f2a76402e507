"""One size's place of work in a batch: sequences sit down, are read up to date, written, and leave.

What a size remembers of a sequence that leaves is kept, thrown away or handed to the size that goes
on, as the plan's switch says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as ListOf

from transformers import PreTrainedModel

from star_elastic.generate.caches import RowCache
from star_elastic.generate.decode import BatchDecoder, Sampling, choose_tokens, entropies
from star_elastic.generate.phases import Handed, How, Switch
from star_elastic.generate.sequence import Sequence
from star_elastic.generate.steps import StepPool

Convert = Callable[[RowCache], RowCache]
HandOvers = Callable[[str, str], Convert]
"""How the caches of one size become those of another, by their names."""


class Desk:
    """Sequences that one size works on, and its memory of those that it does not work on now."""

    def __init__(
        self,
        size: str,
        model: PreTrainedModel,
        switch: Switch,
        hand_overs: Mapping[tuple[str, str], Convert],
        *,
        steps: StepPool | None = None,
        compare: bool = False,
    ):
        self.size = size
        self._hand_overs = hand_overs
        self.switch: Switch = switch
        self.seated: list[Sequence] = []
        self._decoder = BatchDecoder(model, steps)
        self._compare = compare
        self._kept: dict[int, tuple[RowCache, int]] = {}

    def seat(self, sequences: ListOf[Sequence]) -> None:
        """Reads sequences up to their last token, so that the next ones can be written."""
        known = [s for s in sequences if s.index in self._kept]
        new = [s for s in sequences if s.index not in self._kept]
        if known:
            rows = [(*self._kept.pop(s.index), s) for s in known]
            self._decoder.resume([(cache, n, s.ids[n:]) for cache, n, s in rows])
            for _, n, sequence in rows:
                self._seat(sequence, n, "hand-over" if self.switch == "hand-over" else "catch-up")
        if new:
            self._decoder.prefill([s.ids for s in new])
            for sequence in new:
                self._seat(sequence, 0, "reprefill" if sequence.reads else "fresh")

    def _seat(self, sequence: Sequence, known: int, how: How) -> None:
        read = len(sequence.ids) - known
        compare = self._compare and how == "hand-over"
        divergence = self._divergence(sequence) if compare else None
        sequence.note_read(self.size, known, read, at_once=True)
        sequence.note_handed(Handed(self.size, len(sequence.ids), read, how, divergence))
        self.seated.append(sequence)

    def _divergence(self, sequence: Sequence) -> float:
        """KL of the next token, nats, from what the size says after reading all of it itself."""
        exact = BatchDecoder(self._decoder.model)
        exact.prefill([sequence.ids])
        now_V = self._decoder.logits_BV[len(self.seated)].log_softmax(-1)
        exact_V = exact.logits_BV[0].log_softmax(-1)
        return float((exact_V.exp() * (exact_V - now_V)).sum())

    def write(self, sampling: Sampling) -> list[tuple[Sequence, int]]:
        """Lets the size choose the next tokens; returns how many each sequence got, its end of
        thinking included. Sequences that this size is done with leave their seats."""
        ready = [row for row, s in enumerate(self.seated) if self._is_read(row, s)]
        looking = [row for row in ready if self.seated[row].looks]
        if looking:
            unsure = entropies(self._decoder.logits_BV[looking])
            for row, entropy in zip(looking, unsure, strict=True):
                if self.seated[row].defer(entropy):
                    ready.remove(row)
        written = []
        if ready:
            logits_BV = self._decoder.logits_BV
            tokens = choose_tokens(
                logits_BV if len(ready) == len(self.seated) else logits_BV[ready],
                sampling,
                [self.seated[row].generator for row in ready],
            )
            for row, token in zip(ready, tokens, strict=True):
                sequence = self.seated[row]
                before = len(sequence.ids)
                sequence.accept(token)
                written.append((sequence, len(sequence.ids) - before))
        return written

    def leave(self, desks: Mapping[str, Desk]) -> None:
        """Sends away the sequences that are done or that another size goes on with."""
        staying = [r for r, s in enumerate(self.seated) if not s.is_done and s.size == self.size]
        if len(staying) == len(self.seated):
            return
        own = self._decoder.num_bytes // len(self.seated)
        for row in set(range(len(self.seated))) - set(staying):
            sequence = self.seated[row]
            elsewhere = sum(desk._kept_bytes(sequence) for desk in desks.values())
            sequence.cache_bytes = max(sequence.cache_bytes, own + elsewhere)
            if sequence.is_done:
                for desk in desks.values():
                    desk._kept.pop(sequence.index, None)
            elif self.switch == "catch-up" and self.size in sequence.sizes_to_come:
                self._kept[sequence.index] = self._remembered(row)
            elif self.switch == "hand-over":
                cache, length = self._remembered(row)
                taken = self._hand_overs[self.size, sequence.size](cache)
                desks[sequence.size]._kept[sequence.index] = (taken, length)
        # Dropping rows costs less than one step with idle ones.
        self._decoder.keep(staying)
        self.seated = [self.seated[row] for row in staying]

    def _remembered(self, row: int) -> tuple[RowCache, int]:
        """What the size remembers of a row, and how many tokens of it."""
        return self._decoder.take(row), self._decoder.lengths[row]

    def read(self) -> None:
        """Reads the next token of every sequence that sits here."""
        for row, sequence in enumerate(self.seated):
            sequence.note_read(self.size, self._decoder.lengths[row], 1, at_once=False)
        lengths = self._decoder.lengths
        self._decoder.step([s.ids[lengths[row]] for row, s in enumerate(self.seated)])

    def _is_read(self, row: int, sequence: Sequence) -> bool:
        """Whether the next token is asked for (else injected ones are still unread)."""
        return self._decoder.lengths[row] == len(sequence.ids)

    def _kept_bytes(self, sequence: Sequence) -> int:
        """Memory of what is kept of a sequence that does not sit here."""
        return self._kept[sequence.index][0].num_bytes if sequence.index in self._kept else 0
