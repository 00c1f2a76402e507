"""The cached teacher: what the frozen parent says about a document, drawn once and kept on disk.

Full distributions would need V numbers per token. Drawing S ids from the teacher's distribution
keeps the distillation gradient unbiased with a few bytes ("Sparse Logit Sampling", Anshumann et
al., ACL 2025). Different from there on purpose: draw s comes from the s-th of S equal parts of the
distribution function (stratified), which is unbiased, too, and never noisier.

A document is known by its source and a digest of all its ids: a row that has been corrected is
another document, a row that has moved is the same. Windows respect document boundaries, so what the
teacher says does not depend on how documents were packed; models are causal, so a document cut to a
shorter context is a prefix.

Shapes: N positions of all documents, L of one, C of a chunk, S draws per position, M different
ids, D documents of a shard, B rows and T positions of a packed batch, G width of the teacher,
V vocabulary.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from star_elastic.checkpoints.tensors import save_tensors
from star_elastic.errors import CheckpointError, ConfigError
from star_elastic.files.writing import write_json
from star_elastic.measure.chunks import chunks
from star_elastic.router.router import seed_for
from star_elastic.train.losses import Head, SampledTargets, default_chunk_bytes, starts_of

INDEX_NAME = "cache.json"
FORMAT = 2
"""In format 1 documents were known by the numbers of their rows."""
MAX_SAMPLES = 255
"""A count is one byte."""
SMALL_VOCAB = 1 << 16
"""Ids below this are stored in two bytes."""
COLUMNS = "source digest num_positions num_ids"
"""Columns of a shard's table of documents, (D, 4) int64."""
TENSORS = ("ids", "counts", "lengths", "entropy")
"""The others: per id, per id, per position (ids of it, uint8) and per position."""


Documents = Sequence[Sequence[tuple[int, int, int, int]]]
"""For each of the B rows of a packed batch, its documents as (source, digest, start, length):
positions [start, start + length) hold the first `length` tokens of that document."""


@torch.no_grad()
def sample_targets(
    teacher_NG: torch.Tensor,
    teacher_weight_VG: torch.Tensor,
    num_samples: int,
    documents: Sequence[tuple[int, int, int]],
    *,
    seed: int,
    chunk_bytes: int | None = None,
) -> SampledTargets:
    """Draws `num_samples` ids from the teacher's distribution at each of N positions.

    The rows are whole documents or prefixes, one after the other: (source, digest, length) each, N
    in sum. Draws depend on (seed, source, digest, position) alone, up to the logits' rounding.
    The result is on the CPU; at most `chunk_bytes` (as in `linear_kl`) are in use.
    Raises CheckpointError if the logits are not finite.
    """
    assert 1 <= num_samples <= MAX_SAMPLES, num_samples
    assert sum(length for *_, length in documents) == len(teacher_NG), (documents, len(teacher_NG))
    head = Head(teacher_NG, teacher_weight_VG)
    if chunk_bytes is None:
        chunk_bytes = default_chunk_bytes(teacher_NG.device)
    uniform_NS = torch.cat([torch.empty(0, num_samples), *_uniform(documents, num_samples, seed)])
    options = {"dtype": head.precision, "device": teacher_NG.device}
    row_bytes = len(teacher_weight_VG) * (2 * head.precision.itemsize + torch.float64.itemsize)
    parts = []
    with torch.autocast(teacher_NG.device.type, enabled=False):
        for chunk in chunks(len(teacher_NG), row_bytes, chunk_bytes):
            buffers = torch.empty(2, chunk.stop - chunk.start, len(teacher_weight_VG), **options)
            log_p_CV, work_CV = buffers
            head.log_probs(chunk, log_p_CV, work_CV)
            parts.append(_draw(log_p_CV, work_CV, uniform_NS[chunk].to(teacher_NG.device)))
    targets = SampledTargets.join([_empty(len(teacher_weight_VG)), *parts])
    if not targets.entropy.isfinite().all():
        raise CheckpointError(
            "the teacher's logits are not finite, so nothing can be drawn from them; restore the "
            "parent's weights and start another run in another directory"
        )
    return targets


def _uniform(
    documents: Iterable[tuple[int, int, int]], num_samples: int, seed: int
) -> Iterable[torch.Tensor]:
    """Points (L, S) of each document in [0, 1), the s-th of a position in the s-th of S parts.

    A generator fills its tensors in order, so that a prefix of a document has the same points.
    """
    for source, digest, length in documents:
        generator = torch.Generator().manual_seed(seed_for(seed, "teacher", source, digest))
        within_LS = torch.rand(length, num_samples, generator=generator, dtype=torch.float64)
        yield (torch.arange(num_samples) + within_LS) / num_samples


def _draw(
    log_p_CV: torch.Tensor, work_CV: torch.Tensor, uniform_CS: torch.Tensor
) -> SampledTargets:
    """Inverts the distribution function, in float64: in fp32 a long sum would lose the tail.
    `work_CV` is overwritten."""
    vocab = log_p_CV.shape[1]
    reached_CV = torch.exp(log_p_CV, out=work_CV).double().cumsum_(-1)
    # Strictly more than the point: an id with no probability is never drawn.
    drawn_CS = torch.searchsorted(reached_CV, uniform_CS * reached_CV[:, -1:], right=True)
    drawn_CS.clamp_(max=vocab - 1)  # the last point may round up to the end
    entropy_C = -log_p_CV.gather(1, drawn_CS).mean(1)
    # Points ascend within a position, and so do the ids drawn: equal ones are neighbours.
    key_CS = drawn_CS + vocab * torch.arange(len(drawn_CS), device=drawn_CS.device)[:, None]
    key_M, count_M = torch.unique_consecutive(key_CS.flatten(), return_counts=True)
    lengths_C = torch.bincount(key_M // vocab, minlength=len(drawn_CS))
    return SampledTargets(
        (key_M % vocab).cpu().to(_id_dtype(vocab)),
        count_M.cpu().to(torch.uint8),
        starts_of(lengths_C.cpu()),
        entropy_C.cpu().float(),
    )


def _id_dtype(vocab_size: int) -> torch.dtype:
    return torch.uint16 if vocab_size <= SMALL_VOCAB else torch.int32


def _empty(vocab_size: int) -> SampledTargets:
    """The targets of no positions."""
    ids = torch.empty(0, dtype=_id_dtype(vocab_size))
    counts = torch.empty(0, dtype=torch.uint8)
    return SampledTargets(ids, counts, torch.zeros(1, dtype=torch.int64), torch.empty(0))


class _Shard:
    """A file of whole documents: their table in memory, the rest read as needed."""

    def __init__(self, file: Path):
        self.file = file
        self.num_bytes = file.stat().st_size
        try:
            self._handle: Any = safe_open(file, framework="pt")
            self.table_D4: torch.Tensor = self._handle.get_tensor("documents")
            sizes = [self._handle.get_slice(name).get_shape() for name in TENSORS]
        except (SafetensorError, OSError) as error:
            raise self.damaged(error) from None
        _, _, self.num_positions, num_ids = self.table_D4.sum(0).tolist()
        if sizes != [[num_ids], [num_ids], [self.num_positions], [self.num_positions]]:
            raise self.damaged(f"its table promises {num_ids} ids and {self.num_positions} rows")

    def damaged(self, reason: object) -> CheckpointError:
        """The error to raise when the file is not what it should be."""
        return CheckpointError(
            f"{self.file} is damaged ({reason}); remove it, its documents are drawn again"
        )

    def part(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Entries [start, stop) of one of its tensors."""
        return self._handle.get_slice(name)[start:stop]


class _Entry(NamedTuple):
    """Where a document lies: its first position and its first id in a shard."""

    shard: _Shard
    length: int
    position: int
    first: int


class TeacherCache:
    """Sampled targets of documents, in memory until `flush`, then in shards on disk.

    A directory holds `cache.json` (what the draws depend on) and shards of whole documents,
    `shard-<writer>-<number>.safetensors`, each renamed into place when complete: a killed run
    loses what it had not flushed and no more. Several processes may share a directory if each has
    a `writer` number of its own. Threads may share one cache.

    `parent` names the teacher (a digest of its files). Raises CheckpointError if the directory was
    made with other values than these or holds a damaged shard; ConfigError if `num_samples` is not
    in 1 to 255.
    """

    def __init__(
        self,
        directory: str | Path,
        num_samples: int,
        vocab_size: int,
        *,
        parent: str,
        seed: int,
        writer: int = 0,
    ):
        if not 1 <= num_samples <= MAX_SAMPLES:
            raise ConfigError(
                f"num_samples={num_samples} does not fit into one byte; use 1 to {MAX_SAMPLES}"
            )
        self.directory = Path(directory)
        self.num_samples = num_samples
        self.vocab_size = vocab_size
        self.seed = seed
        self.writer = writer
        self._pending: dict[tuple[int, int], SampledTargets] = {}
        self._entries: dict[tuple[int, int], _Entry] = {}
        self._shards: dict[str, _Shard] = {}
        self._lock = threading.Lock()
        given = {"vocab_size": vocab_size, "num_samples": num_samples, "seed": seed}
        self._check({"format": FORMAT, "parent": parent, **given})
        self.refresh()

    def _check(self, fingerprint: dict[str, int | str]) -> None:
        """Compares with `cache.json`, or writes it into a new directory."""
        file = self.directory / INDEX_NAME
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            if not file.exists() and not self._files():
                write_json(file, fingerprint)
        except OSError as error:
            raise CheckpointError(
                f"{self.directory} cannot be written ({error.strerror}); make room there"
            ) from None
        try:
            stored = dict(json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, TypeError, OSError):
            raise CheckpointError(
                f"{file} is missing or damaged; remove its directory, the targets are drawn again"
            ) from None
        for name, value in fingerprint.items():
            if stored.get(name) != value:
                raise CheckpointError(
                    f"{self.directory} holds targets of {name}={stored.get(name)!r}, not {value!r};"
                    " remove it, the targets are drawn again"
                )

    def _files(self, writer: str = "*") -> list[Path]:
        return sorted(self.directory.glob(f"shard-{writer}-*.safetensors"))

    def refresh(self) -> None:
        """Indexes the shards that have appeared, of this writer or another."""
        with self._lock:
            for file in self._files():
                if file.name not in self._shards:
                    self._index(file)

    def _index(self, file: Path) -> None:
        shard = self._shards[file.name] = _Shard(file)
        position = first = 0
        for source, digest, length, num_ids in shard.table_D4.tolist():
            known = self._entries.get((source, digest))
            if known is None or known.length < length:
                self._entries[source, digest] = _Entry(shard, length, position, first)
            position += length
            first += num_ids

    @property
    def bytes_per_token(self) -> float:
        """Bytes on disk per flushed position, everything counted; 0 before the first flush."""
        num_positions = sum(shard.num_positions for shard in self._shards.values())
        return sum(s.num_bytes for s in self._shards.values()) / max(num_positions, 1)

    def has(self, source: int, digest: int, length: int) -> bool:
        """Whether the first `length` positions of a document are known, flushed or not."""
        pending, entry = self._pending.get((source, digest)), self._entries.get((source, digest))
        known = max(len(pending) if pending else 0, entry.length if entry else 0)
        return length <= known

    def add(self, source: int, digest: int, targets: SampledTargets) -> None:
        """Keeps the targets of a document's first positions, unless as many are known."""
        assert targets.ids.dtype == _id_dtype(self.vocab_size), targets.ids.dtype
        with self._lock:
            if not self.has(source, digest, len(targets)):
                self._pending[source, digest] = targets

    def get(self, source: int, digest: int, length: int) -> SampledTargets:
        """Targets of the first `length` positions of a document.

        Raises CheckpointError if they are not known or the shard is damaged.
        """
        pending, entry = self._pending.get((source, digest)), self._entries.get((source, digest))
        if pending is not None and length <= len(pending):
            return pending.rows(0, length)
        if entry is None or length > entry.length:
            raise CheckpointError(
                f"{self.directory} lacks {length} positions of document {digest} of source "
                f"{source}; remove it, the targets are drawn again"
            )
        return self._read(entry, length)

    def _read(self, entry: _Entry, length: int) -> SampledTargets:
        shard, end = entry.shard, entry.position + length
        starts = starts_of(shard.part("lengths", entry.position, end))
        last = entry.first + int(starts[-1])
        ids = shard.part("ids", entry.first, last)
        counts = shard.part("counts", entry.first, last)
        if int(counts.sum(dtype=torch.int64)) != length * self.num_samples:
            raise shard.damaged("its counts do not add up")
        if length and int(ids.to(torch.int64).max()) >= self.vocab_size:
            raise shard.damaged("its ids are outside of the vocabulary")
        return SampledTargets(ids, counts, starts, shard.part("entropy", entry.position, end))

    def flush(self) -> Path | None:
        """Writes what is new as one shard and returns its path; None if nothing is."""
        with self._lock:
            if not self._pending:
                return None
            writer = f"{self.writer:04d}"
            numbers = [int(file.stem.rpartition("-")[2]) for file in self._files(writer)]
            number = max(numbers, default=-1) + 1
            file = self.directory / f"shard-{writer}-{number:06d}.safetensors"
            targets = list(self._pending.values())
            joined = SampledTargets.join(targets)
            table = [
                (*key, len(part), len(part.ids))
                for key, part in zip(self._pending, targets, strict=True)
            ]
            try:
                save_tensors(
                    file,
                    {
                        "documents": torch.tensor(table, dtype=torch.int64),
                        "ids": joined.ids,
                        "counts": joined.counts,
                        "lengths": joined.starts.diff().to(torch.uint8),
                        "entropy": joined.entropy,
                    },
                    {"columns": COLUMNS},
                )
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{file} cannot be written ({error}); free space and resume"
                ) from None
            self._index(file)
            self._pending.clear()
            return file

    def covers(self, documents: Documents) -> bool:
        """Whether every document of a packed batch is known at its length."""
        return all(self.has(s, r, length) for row in documents for s, r, _, length in row)

    def sample(
        self,
        documents: Documents,
        teacher_BTG: torch.Tensor,
        teacher_weight_VG: torch.Tensor,
        *,
        chunk_bytes: int | None = None,
    ) -> None:
        """Draws and keeps the targets of those documents of a packed batch that are not known."""
        assert len(teacher_weight_VG) == self.vocab_size, (teacher_weight_VG.shape, self.vocab_size)
        missing = [
            (source, digest, length, states_TG[start : start + length])
            for states_TG, placed in zip(teacher_BTG, documents, strict=True)
            for source, digest, start, length in placed
            if not self.has(source, digest, length)
        ]
        if not missing:
            return
        targets = sample_targets(
            torch.cat([states_LG for *_, states_LG in missing]),
            teacher_weight_VG,
            self.num_samples,
            [(source, digest, length) for source, digest, length, _ in missing],
            seed=self.seed,
            chunk_bytes=chunk_bytes,
        )
        start = 0
        for source, digest, length, _ in missing:
            self.add(source, digest, targets.rows(start, start + length))
            start += length

    def gather(self, documents: Documents, predicts_BT: torch.Tensor) -> SampledTargets:
        """Targets of the positions where `predicts` is True, in the order of `logits[predicts]`.

        Every such position must lie in one of the documents. Raises CheckpointError as `get`.
        """
        parts = [_empty(self.vocab_size)]
        for predicts_T, placed in zip(predicts_BT.cpu(), documents, strict=True):
            for source, digest, start, length in sorted(placed, key=lambda document: document[2]):
                mask_L = predicts_T[start : start + length]
                assert len(mask_L) == length, (source, digest, start, length, len(predicts_T))
                if mask_L.any():
                    parts.append(self.get(source, digest, length).select(mask_L))
        targets = SampledTargets.join(parts)
        assert len(targets) == int(predicts_BT.sum()), "a predicted position is in no document"
        return targets
