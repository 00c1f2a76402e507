"""One size decoding a batch of rows, one token per row and step; rows may join and leave.

Knows transformers models, caches and logits; nothing of phases and budgets. Rows are padded on the
left, so that the next token of every row stands in the last column. B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from transformers import DynamicCache, PreTrainedModel

from star_elastic.generate.caches import RowCache, join, layers_of, select_rows, take_row
from star_elastic.generate.phases import Sampling
from star_elastic.generate.steps import StaticStep, StepPool

Ids = Sequence[int]


class BatchDecoder:
    """Rows that one model reads and continues; `logits_BV` (fp32) predict each row's next token.

    `lengths` are the tokens that each row has read. Memory beyond the model is that of the caches.
    With `steps`, steps are run in their static memory where that is worth it.
    """

    def __init__(self, model: PreTrainedModel, steps: StepPool | None = None):
        self.model = model
        self.device = model.device
        self.lengths: list[int] = []
        self.logits_BV = torch.zeros(0, model.config.vocab_size, device=self.device)
        self._steps = steps
        self._static: StaticStep | None = None
        self._cache = DynamicCache(config=model.config)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def _columns(self) -> int:
        """Of the caches of attention layers: the longest row fills all."""
        return max(self.lengths)

    @property
    def num_bytes(self) -> int:
        """Memory of the rows' caches, padding included."""
        self.settle()
        return RowCache(layers_of(self._cache)).num_bytes

    def prefill(self, rows: Sequence[Ids]) -> None:
        """Adds rows that begin with these tokens, read all at once."""
        longest = max(map(len, rows))
        ids_BT = torch.tensor([[0] * (longest - len(ids)) + list(ids) for ids in rows])
        self._read(DynamicCache(config=self.model.config), ids_BT, list(map(len, rows)))

    def resume(self, rows: Sequence[tuple[RowCache, int, Ids]]) -> list[int]:
        """Adds rows of which a cache remembers a number of tokens, and which read these after them.

        Rows with equally many tokens to read are read together, because padding inside a row would
        change its Mamba state. So they may be added in another order, which is returned.
        """
        order = sorted(range(len(rows)), key=lambda row: len(rows[row][2]))
        for _, group in groupby(order, key=lambda row: len(rows[row][2])):
            caches, lengths, ids = zip(*(rows[row] for row in group), strict=True)
            cache = join([cache.layers for cache in caches], self.model.config, max(lengths))
            read = [n + len(own) for n, own in zip(lengths, ids, strict=True)]
            self._read(cache, torch.tensor([list(own) for own in ids]), read)
        return order

    def _read(self, cache: DynamicCache, ids_BT: torch.Tensor, lengths: list[int]) -> None:
        """Reads tokens, with which the rows of a cache are so long, and puts them beside the rows
        that are there."""
        logits_BV = self._forward(cache, ids_BT, lengths)
        self.settle()
        all_lengths = [*self.lengths, *lengths]
        if self.lengths:
            batches = [layers_of(self._cache), layers_of(cache)]
            cache = join(batches, self.model.config, max(all_lengths))
            logits_BV = torch.cat([self.logits_BV, logits_BV])
        self._cache, self.logits_BV, self.lengths = cache, logits_BV, all_lengths

    def step(self, tokens: Ids) -> None:
        """Feeds one token to every row."""
        static, lengths = self._enter_static(), [length + 1 for length in self.lengths]
        if static is not None:
            self.logits_BV = static.step(tokens)
        else:
            self.logits_BV = self._forward(self._cache, torch.tensor(tokens)[:, None], lengths)
        self.lengths = lengths

    def _enter_static(self) -> StaticStep | None:
        """Static memory with room for one more token of every row, holding what they have read."""
        if self._static is not None and self._columns < self._static.columns:
            return self._static
        self.settle()
        if self._steps is None or not self.lengths:
            return None
        static = self._steps.fetch(len(self.lengths), self._columns + 1)
        if static is not None:
            static.load(self._cache, self.lengths, self.settle)
            self._cache, self._static = DynamicCache(config=self.model.config), static
        return static

    def settle(self) -> None:
        """Takes the rows' cache back from static memory."""
        if self._static is not None:
            self._cache = self._static.unload(len(self.lengths), self._columns)
            self._static = None

    def take(self, row: int) -> RowCache:
        """A copy of what the model remembers of a row."""
        self.settle()
        return take_row(self._cache, row, self.lengths[row])

    def keep(self, rows: Sequence[int]) -> None:
        """Drops all rows but these, with their part of the cache."""
        if not rows:
            self._forget()
            return
        self.settle()
        lengths = [self.lengths[row] for row in rows]
        self.logits_BV = self.logits_BV[torch.tensor(rows, dtype=torch.long, device=self.device)]
        select_rows(self._cache, rows, max(lengths))
        self.lengths = lengths

    def abandon(self) -> None:
        """Drops all rows, in whatever state a failure left them, and the static memory of all
        decoders of the model: it is needed elsewhere, or holds what is no number."""
        self._forget()
        if self._steps is not None:
            self._steps.clear()

    def _forget(self) -> None:
        self.logits_BV, self._cache = self.logits_BV[:0], DynamicCache(config=self.model.config)
        self.lengths, self._static = [], None

    def _forward(
        self, cache: DynamicCache, ids_BT: torch.Tensor, lengths: Sequence[int]
    ) -> torch.Tensor:
        """Reads tokens, with which the rows are so long; returns logits (B, V)."""
        lengths_B1, columns = torch.tensor(lengths)[:, None], max(lengths)
        places_BT = torch.arange(columns) - (columns - lengths_B1)
        padded = bool((lengths_B1 != columns).any())
        output = self.model(
            input_ids=ids_BT.to(self.device),
            attention_mask=(places_BT >= 0).long().to(self.device) if padded else None,
            position_ids=places_BT[:, -ids_BT.shape[1] :].clamp(min=0).to(self.device),
            cache=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1].float()


def rows_not_finite(logits_BV: torch.Tensor) -> list[int]:
    """The rows whose logits are no numbers, so that no token can be chosen."""
    finite_B = logits_BV.amax(-1).isfinite()
    return [] if finite_B.all() else (~finite_B).nonzero()[:, 0].tolist()


def pads_exactly(model: PreTrainedModel) -> bool:
    """Whether padding on the left leaves a row's logits as they are.

    transformers zeroes the padded inputs of a Mamba block but not what its input projection adds
    to them, so a projection with a bias reads padding as content.
    """
    config = model.config
    has_mamba = getattr(config, "mamba_num_heads", None) is not None
    return not (has_mamba and getattr(config, "use_bias", False))


def choose_tokens(
    logits_BV: torch.Tensor, sampling: Sampling, generators: Sequence[torch.Generator]
) -> list[int]:
    """The next token of every row.

    Each row draws one number from its own generator and inverts the cumulative distribution with
    it, so that a row's draws do not depend on the batch it is in.
    """
    if sampling.temperature == 0:
        return logits_BV.argmax(-1).tolist()
    logits_BV = logits_BV.double()
    # From the largest one, so that however small a temperature makes no infinity of it.
    logits_BV = logits_BV - logits_BV.amax(-1, keepdim=True)
    probs_BV = (logits_BV / sampling.temperature).softmax(-1)
    if sampling.top_p < 1:
        ranked_BV, order_BV = torch.sort(probs_BV, dim=-1, descending=True, stable=True)
        before_BV = ranked_BV.cumsum(-1) - ranked_BV
        probs_BV = probs_BV.scatter(-1, order_BV, ranked_BV * (before_BV < sampling.top_p))
    cumulative_BV = probs_BV.cumsum(-1)
    drawn = [torch.rand(1, dtype=torch.float64, generator=own) for own in generators]
    drawn_B1 = torch.stack(drawn).to(logits_BV.device) * cumulative_BV[:, -1:]
    index_B1 = torch.searchsorted(cumulative_BV, drawn_B1, right=True)
    return index_B1.clamp(max=logits_BV.shape[-1] - 1)[:, 0].tolist()


def entropies(logits_BV: torch.Tensor) -> list[float]:
    """Entropy of every row's next-token distribution, in nats."""
    log_probs_BV = logits_BV.double().log_softmax(-1)
    return (-(log_probs_BV.exp() * log_probs_BV).sum(-1)).tolist()
