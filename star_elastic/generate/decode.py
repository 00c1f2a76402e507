"""One size decoding a batch of rows, one token per row and step; rows that are done may leave.

Knows transformers models, caches and logits; nothing of phases and budgets. Rows are padded on the
left, so that the next token of every row stands in the last column. B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from transformers import DynamicCache, PreTrainedModel


class BatchDecoder:
    """A prefilled batch with its cache; `logits_BV` (fp32) predict each row's next token.

    `room` is the largest number of steps that will follow. Memory beyond the model is that of the
    cache alone.
    """

    def __init__(self, model: PreTrainedModel, rows: Sequence[Sequence[int]], *, room: int):
        self.model = model
        self.device = model.device
        longest = max(map(len, rows))
        ids_BT = torch.zeros(len(rows), longest, dtype=torch.long)
        mask_BT = torch.zeros(len(rows), longest + room, dtype=torch.long)
        for row, ids in enumerate(rows):
            ids_BT[row, longest - len(ids) :] = torch.tensor(ids)
            mask_BT[row, longest - len(ids) :] = 1
        self._mask_BT = mask_BT.to(self.device)
        self._columns = longest
        self._cache = DynamicCache(config=model.config)
        self._lengths_B = self._mask_BT[:, :longest].sum(-1)
        positions_BT = (self._mask_BT[:, :longest].cumsum(-1) - 1).clamp(min=0)
        self.logits_BV = self._forward(ids_BT.to(self.device), positions_BT)

    def step(self, tokens: Sequence[int]) -> None:
        """Feeds one token to every row."""
        ids_B1 = torch.tensor(tokens, device=self.device)[:, None]
        self._columns += 1
        self.logits_BV = self._forward(ids_B1, self._lengths_B[:, None])
        self._lengths_B = self._lengths_B + 1

    def keep(self, rows: Sequence[int]) -> None:
        """Drops all rows but these, with their part of the cache."""
        index = torch.tensor(rows, device=self.device)
        # The one selection over the batch that every kind of cache layer implements.
        self._cache.reorder_cache(cast(torch.LongTensor, index))
        self._mask_BT = self._mask_BT[index]
        self._lengths_B = self._lengths_B[index]
        self.logits_BV = self.logits_BV[index]

    def _forward(self, ids_BT: torch.Tensor, positions_BT: torch.Tensor) -> torch.Tensor:
        output = self.model(
            input_ids=ids_BT,
            attention_mask=self._mask_BT[:, : self._columns],
            position_ids=positions_BT,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1].float()


def pads_exactly(model: PreTrainedModel) -> bool:
    """Whether padding on the left leaves a row's logits as they are.

    transformers zeroes the padded inputs of a Mamba block but not what its input projection adds
    to them, so a projection with a bias reads padding as content.
    """
    config = model.config
    has_mamba = getattr(config, "mamba_num_heads", None) is not None
    return not (has_mamba and getattr(config, "use_bias", False))


def choose_tokens(
    logits_BV: torch.Tensor, *, temperature: float, generators: Sequence[torch.Generator]
) -> list[int]:
    """The next token of every row: the likeliest at temperature 0, else drawn.

    Each row draws one number from its own generator and inverts the cumulative distribution with
    it, so that a row's draws do not depend on the batch it is in.
    """
    if temperature == 0:
        return logits_BV.argmax(-1).tolist()
    cumulative_BV = (logits_BV.double() / temperature).softmax(-1).cumsum(-1)
    drawn = [torch.rand(1, dtype=torch.float64, generator=own) for own in generators]
    drawn_B1 = torch.stack(drawn).to(logits_BV.device) * cumulative_BV[:, -1:]
    index_B1 = torch.searchsorted(cumulative_BV, drawn_B1, right=True)
    return index_B1.clamp(max=logits_BV.shape[-1] - 1)[:, 0].tolist()
