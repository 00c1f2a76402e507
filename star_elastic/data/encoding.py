"""Text as token ids, as a model of this tokenizer meets it: with the special tokens at its ends.

Generation puts before a plain prompt what the tokenizer puts there (BOS, with most Llamas) and ends
at EOS; so do rows. Nothing here knows of rows or chat templates.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from star_elastic.errors import CheckpointError, RowError, library_boundary

HALF_CHARACTER = re.compile("[\ud800-\udfff]")


def half_character(text: str) -> str | None:
    """The first half of a character in a text, as an escape: JSON may hold one (of an emoji that
    was cut in the middle), but no tokenizer encodes it and no file holds it. None if there is none.
    """
    found = HALF_CHARACTER.search(text)
    return ascii(found[0]) if found else None


class Encoder:
    """One tokenizer, and how many embedding rows its model has (None: not known).

    `front` and `back` are the ids that the tokenizer itself puts around a text. Raises
    CheckpointError for a tokenizer of which they cannot be told, or that ends every text with ids
    beyond the embeddings. The methods raise RowError for texts that cannot be encoded and for ids
    beyond the embeddings.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, num_embeddings: int | None = None):
        self.tokenizer = tokenizer
        self.num_embeddings = num_embeddings
        eos = tokenizer.eos_token_id
        self.eos = eos if isinstance(eos, int) else None
        with library_boundary("the tokenizer encodes no text", "restore its files"):
            self.front, self.back = self._ends()
        ends = [*self.front, *self.back, *([] if self.eos is None else [self.eos])]
        if beyond := self._beyond(ends):
            raise CheckpointError(
                f"every text begins or ends with {beyond}; resize the embeddings, or restore the "
                "tokenizer that the model was trained with"
            )

    def _ends(self) -> tuple[list[int], list[int]]:
        """The ids that the tokenizer puts before a text and after it, told from the first text
        whose own ids stand once in what it makes of it."""
        for text in self._probes():
            plain, whole = self._ids(text, special=False), self._ids(text, special=True)
            starts = range(len(whole) - len(plain) + 1)
            found = [n for n in starts if whole[n : n + len(plain)] == plain]
            if plain and len(found) == 1:
                return whole[: found[0]], whole[found[0] + len(plain) :]
        raise CheckpointError(
            "the tokenizer encodes no text of its own tokens, so that what it puts around one "
            "cannot be told; restore its files"
        )

    def _probes(self) -> Iterator[str]:
        """Texts to encode: a letter, and whatever the vocabulary holds, which may be digits or
        nucleotides alone."""
        yield "a"
        special = set(self.tokenizer.all_special_ids)
        own: Any = self.tokenizer
        for token in sorted(set(own.get_vocab().values()) - special):
            text = self._read([token])
            if text.strip():
                yield text

    def _ids(self, text: str, *, special: bool) -> list[int]:
        # Length is no concern here; transformers would warn of it once.
        return list(self.tokenizer.encode(text, add_special_tokens=special, verbose=False))

    def encode(self, text: str) -> list[int]:
        """The ids of a text as it stands, with no special tokens around it."""
        if half := half_character(text):
            raise RowError(
                f"has half of a character, {half}, which no tokenizer encodes; correct the text"
            )
        with library_boundary(
            "has a text that the tokenizer cannot encode", "correct the text", RowError
        ):
            ids = self._ids(text, special=False)
        self.require_embedded(ids)
        return ids

    def require_embedded(self, ids: Sequence[int]) -> None:
        """Raises RowError for ids that the model has no embedding of."""
        if beyond := self._beyond(ids):
            raise RowError(
                f"has {beyond}; take the token out, or resize the embeddings before another run"
            )

    def _beyond(self, ids: Sequence[int]) -> str:
        """The first of some ids that the model has no embedding of, in words; empty if none."""
        if self.num_embeddings is None or not ids or max(ids) < self.num_embeddings:
            return ""
        first = next(i for i in ids if i >= self.num_embeddings)
        return (
            f"the token {self.tokenizer.convert_ids_to_tokens(first)!r} with id {first}, but the "
            f"model has {self.num_embeddings} embedding rows"
        )

    def text(self, text: str) -> list[int]:
        """A whole text: what the tokenizer puts before it, its ids, what it puts after it, EOS.

        None of these is doubled where the text itself has it, nor is EOS where only white space
        follows the text's own; an empty text has no ids.
        """
        ids = self.encode(text)
        if not ids:
            return []
        ids = self._opened(self.closed_at(ids))
        if self.back and ids[-len(self.back) :] != self.back:
            ids = ids + self.back
        return self._closed(ids)

    def completion(self, prompt: str, completion: str) -> tuple[list[int], int]:
        """A plain prompt as generation reads it, its completion, and EOS; how many of the ids are
        the prompt's. An empty pair has no ids."""
        if not prompt and not completion:
            return [], 0
        own = self.encode(prompt)
        head = self._opened(own)
        rest = self.closed_at(self.after(own, prompt, completion))
        return self._closed(head + rest), len(head)

    def after(self, head: Sequence[int], opening: str, rest: str) -> list[int]:
        """The ids of `rest` behind an `opening` whose own ids are `head`.

        Those of both together, where these begin with `head`. Where a token runs across the border,
        which generation could not write, `rest` is encoded by itself, without the space that some
        tokenizers put before every text.
        """
        if not head:
            return self.encode(rest)
        head, whole = list(head), self.encode(opening + rest)
        if whole[: len(head)] == head:
            return whole[len(head) :]
        line, alone = self.encode("\n"), self.encode(rest)
        behind_line = self.encode("\n" + rest)
        if behind_line[: len(line)] == line and self._read(head + alone) != self._read(whole):
            return behind_line[len(line) :]
        return alone

    def closed_at(self, ids: Sequence[int]) -> list[int]:
        """An answer up to its EOS, if only white space follows it."""
        ids = list(ids)
        if self.eos in ids:
            end = len(ids) - ids[::-1].index(self.eos)
            if not self._read(ids[end:]).strip():
                return ids[:end]
        return ids

    def _opened(self, ids: list[int]) -> list[int]:
        return ids if ids[: len(self.front)] == self.front else self.front + ids

    def _closed(self, ids: list[int]) -> list[int]:
        if self.eos is None or (ids and ids[-1] == self.eos):
            return ids
        return [*ids, self.eos]

    def _read(self, ids: list[int]) -> str:
        text = self.tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str), type(text)
        return text
