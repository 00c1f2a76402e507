"""Rows in chunks, so that their logits over a whole vocabulary are never held at once."""

from __future__ import annotations

from itertools import pairwise

CHUNK_BYTES = 256 * 1024**2
"""Memory for the logits of a chunk, at least; 170 tokens of a live teacher at V = 131,072."""


def chunks(num_rows: int, row_bytes: int, chunk_bytes: int) -> list[slice]:
    """Consecutive slices of `num_rows` rows with at most `chunk_bytes` each, or one row."""
    size = max(chunk_bytes // row_bytes, 1)
    edges = [*range(0, num_rows, size), num_rows]
    return [slice(start, stop) for start, stop in pairwise(edges)]
