"""Rows as documents: token ids, and from where on they count in the loss.

What a row says is what a model sees, in the terms in which the model meets it when it runs: a plain
prompt with the special tokens that the tokenizer puts before a text, a conversation through its own
template, an end that it can learn to stop at. What cannot be written so is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from star_elastic.data.conversations import Conversations
from star_elastic.data.encoding import Encoder
from star_elastic.data.notes import first_unseen
from star_elastic.errors import RowError, library_boundary

LossOn = Literal["all", "answers"]
FORMS = (("text",), ("prompt", "completion"), ("messages",))


@dataclass(frozen=True, slots=True)
class Document:
    """A tokenised row: its `ids`, and `first`, the first position whose next token counts in the
    loss. All later ones count, too, to the last: that of the token before the last id."""

    ids: list[int]
    first: int

    @property
    def fed(self) -> list[int]:
        """What a model reads of it: the last id is only predicted."""
        return self.ids[:-1]

    def teaches(self, context: int) -> bool:
        """Whether anything of it counts within `context` tokens."""
        return self.first < min(len(self.ids) - 1, context)


class Renderer:
    """Makes documents of rows with one tokenizer.

    `loss_on="answers"`: only the completion, or the last message, counts; a text counts whole.
    `num_embeddings`: embedding rows of the model, None if they are not known. `notes`: keys that
    nobody need see.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        loss_on: LossOn = "all",
        num_embeddings: int | None = None,
        notes: Collection[str] = (),
    ):
        self.loss_on, self.notes = loss_on, frozenset(notes)
        self._encoder = Encoder(tokenizer, num_embeddings)
        self._conversations = Conversations(tokenizer)

    def document(self, row: Mapping[str, Any]) -> Document:
        """A row as a document, uncut; without ids if the row is empty. Raises RowError, which says
        what about the row is wrong but not where it stands; and nothing else, because a row that
        nobody foresaw must not end a run which may leave it out."""
        with library_boundary("cannot be read", "correct the row, or take it out", RowError):
            return self._document(row)

    def _document(self, row: Mapping[str, Any]) -> Document:
        given = row
        row = {k: v for k, v in given.items() if v is not None and k not in self.notes}
        found = [form for form in FORMS if row.keys() >= set(form)]
        if not found:
            empty = [key for form in FORMS for key in form if given.get(key, "") is None]
            if empty:
                raise RowError(f"has a {empty[0]} that is null; write a text, or take the row out")
            keys = f"the keys {', '.join(sorted(row))}" if row else "no keys"
            raise RowError(f"has {keys}; give text, prompt and completion, or messages")
        if len(found) > 1:
            raise RowError(
                f"has {' and '.join(found[0])} and also {' and '.join(found[1])}; keep one of them"
            )
        (form,) = found
        if form == ("messages",):
            return self._conversation(row)
        for key in form:
            if not isinstance(row[key], str):
                raise RowError(f"has a {key} that is no text; write it as text, or messages")
        beside = {key: value for key, value in row.items() if key not in form}
        unseen = first_unseen(beside, "\n".join(row[key] for key in form))
        if unseen is not None:
            raise RowError(
                f"has {unseen} beside {' and '.join(form)}, which would not be seen; put it "
                f"into the {form[0]}, write the row as messages, take it out, or name it in "
                "data.notes"
            )
        if form == ("text",):
            return Document(self._encoder.text(row["text"]), 0)
        ids, num_prompt = self._encoder.completion(row["prompt"], row["completion"])
        return self._counted(ids, num_prompt)

    def _conversation(self, row: Mapping[str, Any]) -> Document:
        """Templates write their own special tokens, so none are added."""
        answers = self.loss_on == "answers"
        written = self._conversations.write(row, answers=answers)
        head = self._encoder.encode(written.opening)
        if not answers:
            rest = self._encoder.after(head, written.opening, written.answer + written.end)
            return Document(head + rest, 0)
        # What the template writes behind an answer is no part of it, nor what follows its EOS.
        answer = self._encoder.after(head, written.opening, written.answer)
        return self._counted(head + self._encoder.closed_at(answer), len(head))

    def _counted(self, ids: list[int], num_prompt: int) -> Document:
        first = num_prompt - 1 if self.loss_on == "answers" else 0
        return Document(ids, max(first, 0))
