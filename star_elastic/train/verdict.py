"""The verdict on a run: every size beside its parent on rows that training never saw.

Everything is read back from disk: what is judged is what leaves. A run is judged against its
parent, a quantised family against the family that it was made from.
"""

from __future__ import annotations

import itertools
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from star_elastic.checkpoints.elastic import ElasticCheckpoint
from star_elastic.checkpoints.manifest import Size
from star_elastic.data.sources import Document
from star_elastic.files.writing import write_json
from star_elastic.measure.divergence import Divergence, Reading, compare, continue_greedily, read
from star_elastic.models.load import load_parent
from star_elastic.models.submodel import build_submodel, sort_in_place
from star_elastic.models.tokenizer import end_of_turn, load_tokenizer
from star_elastic.progress import Progress

VERDICT = "verdict.json"
PROMPT_TOKENS, SAMPLE_TOKENS = 64, 32
LEFT = 0.01
"""KL in nats per token from which a size that costs what its parent does has left it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SizeVerdict:
    """One size: how far it is from its reference, how far the same widths were from it before
    training (None: the widths are the reference's, or nobody knows), and where the widths come
    from."""

    trained: Divergence
    untrained: Divergence | None = None
    widths_from: str = ""
    is_full: bool = False

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {
            **self.trained.to_json(),
            "untrained": self.untrained.to_json() if self.untrained else None,
            "widths_from": self.widths_from,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A held-out prompt, and how the reference and every size go on greedily."""

    prompt: str
    reference: str
    sizes: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What became of the sizes. `reference`: what they are compared with, in words."""

    elastic: Path
    reference: str
    rows: int
    sizes: Mapping[str, SizeVerdict]
    sample: Sample
    next_command: str

    @property
    def tokens(self) -> int:
        """Counted tokens of the rows."""
        return next(iter(self.sizes.values())).trained.tokens

    def remarks(self) -> Iterator[str]:
        """What the numbers mean where they mean trouble, each with what to do."""
        for name, size in self.sizes.items():
            found = size.trained
            beside = f"{found.perplexity:.4g} beside {found.reference_perplexity:.4g}"
            if size.is_full and (found.kl > LEFT or found.is_worse):
                why = (
                    f"reads worse than {self.reference} (perplexity {beside})"
                    if found.is_worse
                    else f"has left {self.reference} (KL {found.kl:.4f} nats/token, over {LEFT})"
                )
                yield (
                    f"{name} costs what {self.reference} does and {why}; lower "
                    "stages.learning_rate, or give it more weight in stages.size_weights"
                )
            if size.untrained is not None and found.kl >= size.untrained.kl:
                yield (
                    f"training has brought {name} no nearer to {self.reference} (KL "
                    f"{found.kl:.4f} nats/token, {size.untrained.kl:.4f} untrained); raise "
                    "stages.tokens, or lower stages.learning_rate"
                )
            if size.widths_from == "budget":
                yield (
                    f"the widths of {name} come from its budget, not from the data: the router had "
                    "not learned what to cut; begin with the parent and give the router more steps "
                    "(stages.tokens, router.commit_at)"
                )

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "elastic": str(self.elastic),
            "reference": self.reference,
            "held_out_rows": self.rows,
            "tokens": self.tokens,
            "sizes": {name: size.to_json() for name, size in self.sizes.items()},
            "sample": asdict(self.sample),
            "remarks": list(self.remarks()),
            "next": self.next_command,
        }

    def save(self, file: Path) -> None:
        """Writes it as JSON."""
        write_json(file, self.to_json())


def judge_run(
    parent: Path,
    elastic: Path,
    held_out: Sequence[Document],
    progress: Progress,
    *,
    quantised: Path | None = None,
    device: str = "cpu",
) -> Verdict:
    """The sizes of a run against the parent: those in `elastic`, or the same ones in `quantised`.

    `elastic` also tells how the parent was sorted, so that the same widths are cut from the parent
    as it was. One model is in memory at a time. Raises CheckpointError for what cannot be loaded.
    """
    family, judged = _Family(elastic), _Family(quantised or elastic)
    cut = {n: s.widths for n, s in family.sizes.items() if not family.is_full(s)}
    if not family.orders:  # whoever made the family did not say
        cut = {}
    judge = _Judge(held_out, load_tokenizer(parent), progress, 1 + len(cut) + len(family.sizes))
    model, config = load_parent(parent, device=device)
    reference, going_on = judge.read(model).apart(), judge.go_on(model)
    untrained: dict[str, Divergence] = {}
    if cut:
        sort_in_place(model, family.axis_map, family.orders, family.basis)
        for name, widths in cut.items():
            reading = judge.read(build_submodel(model, config, widths))
            untrained[name] = compare(reference, reading, held_out)
    del model
    known = {
        name: {
            "untrained": untrained.get(name),
            "widths_from": size.widths_from,
            "is_full": quantised is None and judged.is_full(size),
        }
        for name, size in judged.sizes.items()
    }
    references = dict.fromkeys(judged.sizes, reference)
    return judge.verdict(judged, device, "its parent", references, going_on, known)


def judge_quantised(
    elastic: Path,
    quantised: Path,
    held_out: Sequence[Document],
    progress: Progress,
    *,
    device: str = "cpu",
) -> Verdict:
    """The sizes of a quantised family, each against the same size before. Raises CheckpointError
    for what cannot be loaded."""
    family, judged = _Family(elastic), _Family(quantised)
    judge = _Judge(held_out, load_tokenizer(elastic), progress, 2 * len(family.sizes))
    before: dict[str, Reading] = {}
    going_on = ""
    for name, submodel in family.models(device):
        before[name] = judge.read(submodel)
        going_on = going_on or judge.go_on(submodel)
    return judge.verdict(judged, device, "itself unquantised", before, going_on, {})


def free_name(folder: Path, name: str) -> Path:
    """A path in a folder where nothing is yet: of this name, or of one like it."""
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return next(folder / own for own in names if not os.path.lexists(folder / own))


class _Family(ElasticCheckpoint):
    """A family, and the models of its sizes one after the other."""

    @property
    def sizes(self) -> Mapping[str, Size]:
        """From the largest to the smallest."""
        return self.manifest.sizes

    def is_full(self, size: Size) -> bool:
        """Whether a size has all of the parent's units."""
        return size.widths == self.axis_map.full

    def models(self, device: str) -> Iterator[tuple[str, PreTrainedModel]]:
        """The model of every size in turn, over one copy of the weights."""
        whole, config = load_parent(self.path, device=device)
        for name, size in self.sizes.items():
            if self.is_full(size):
                yield name, whole
                continue
            scales = self.input_scales(name)
            yield name, build_submodel(whole, config, size.widths, input_scales=scales)

    def next_command(self) -> str:
        """What to do with the smallest size."""
        smallest = list(self.sizes)[-1]
        folder = free_name(self.path.parent, smallest)
        words = ["slice", str(self.path), "--size", smallest, "--out", str(folder)]
        if self.manifest.per_layer:  # which no plain checkpoint can hold
            words = ["generate", str(self.path), "--size", smallest, "..."]
        return shlex.join(["star-elastic", *words])


class _Judge:
    """Reads so many models on the same held-out documents, and lets them go on from the same
    prompt: what stands before the answer of a document, or the first half of a text."""

    def __init__(
        self,
        held_out: Sequence[Document],
        tokenizer: PreTrainedTokenizerBase,
        progress: Progress,
        num_models: int,
    ):
        assert held_out, "there is nothing to judge on"
        self.documents, self.tokenizer, self.progress = held_out, tokenizer, progress
        self._done = 0
        document = next((d for d in held_out if d.first > 0), held_out[0])
        half = min(PROMPT_TOKENS, max(len(document.ids) // 2, 1))
        self.prompt = document.ids[: document.first + 1 if document.first > 0 else half]
        progress.stage("judge", num_models * len(held_out))

    def read(self, model: PreTrainedModel) -> Reading:
        """What a model makes of the documents."""

        def advance() -> None:
            self._done += 1
            self.progress.advance(self._done)

        return read(model, self.documents, advance)

    def go_on(self, model: PreTrainedModel) -> str:
        """How a model goes on from the prompt."""
        ends = end_of_turn(self.tokenizer, [model])
        ids = continue_greedily(model, self.prompt, ends, SAMPLE_TOKENS)
        return str(self.tokenizer.decode(ids))

    def verdict(
        self,
        judged: _Family,
        device: str,
        reference: str,
        references: Mapping[str, Reading],
        going_on: str,
        known: Mapping[str, Mapping[str, Any]],
    ) -> Verdict:
        """Every size of a family beside its own of some `references`, called `reference`, which
        goes on so; with what else is `known` of the sizes."""
        sizes: dict[str, SizeVerdict] = {}
        said: dict[str, str] = {}
        for name, submodel in judged.models(device):
            found = compare(references[name], self.read(submodel), self.documents)
            sizes[name] = SizeVerdict(trained=found, **known.get(name, {}))
            said[name] = self.go_on(submodel)
        prompt = str(self.tokenizer.decode(self.prompt))
        return Verdict(
            elastic=judged.path,
            reference=reference,
            rows=len(self.documents),
            sizes=sizes,
            sample=Sample(prompt=prompt, reference=going_on, sizes=said),
            next_command=judged.next_command(),
        )
