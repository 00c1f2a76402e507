"""What a switch between sizes costs: catch-up in proportion to what was missed, ten in sum no more.

    python benchmarks/switching.py --out results/switching.json    # a hybrid of 67M parameters
    python benchmarks/switching.py --smoke                         # the same code, seconds

Compares, in one run and interleaved (medians of `--rounds`), on the larger size of two:
1. taking up a sequence of which it has missed the last m tokens, for several m: by catch-up (those
   tokens alone), by reprefill (all), by hand-over (the smaller size's cache, and one token);
2. ten switches back and forth, k tokens by turns: what both sizes then read by catch-up, against
   reading the same text once in each size in ten pieces, and against ten reprefills.
Weights are random: time does not depend on them.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from common import LARGE, TINY, build_model, medians_in_turn, widths_at
from transformers import DynamicCache, PreTrainedModel

from star_elastic.cli.terminal import at_the_command_line, print_table
from star_elastic.cost.count import CostModel
from star_elastic.files.writing import write_json
from star_elastic.generate.caches import HandOver
from star_elastic.generate.decode import BatchDecoder
from star_elastic.models.elastic import ElasticModel
from star_elastic.models.submodel import build_submodel

SWITCHES = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--context", type=int, default=1024, help="tokens known before")
    parser.add_argument("--missed", type=int, nargs="+", default=[1, 16, 64, 256, 1024])
    parser.add_argument("--turn", type=int, default=32, help="tokens between two switches")
    parser.add_argument("--smoke", action="store_true", help="tiny model, two rounds")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    options = parser.parse_args()
    if options.smoke:
        options.rounds, options.context, options.missed, options.turn = 2, 32, [1, 8], 4
    config = TINY if options.smoke else LARGE
    large = build_model(config)
    elastic = ElasticModel(large, config)
    widths = widths_at(elastic.axis_map, 0.5)
    small = build_submodel(large, config, widths)
    full = elastic.axis_map.full
    hand_over = HandOver(elastic.axis_map, widths, full)
    cost = CostModel(elastic.axis_map)
    result = {
        "command": "python benchmarks/switching.py" + (" --smoke" if options.smoke else ""),
        "machine": {"cpus": os.cpu_count(), "threads": torch.get_num_threads()},
        "parameters": cost.count(full).total,
        "small_over_large_flops": cost.count(widths).flops_per_token
        / cost.count(full).flops_per_token,
        "context": options.context,
        "turn": options.turn,
        "one_switch": one_switch(large, small, hand_over, options),
        "back_and_forth": back_and_forth(large, small, options),
    }
    show(result)
    if options.out:
        write_json(options.out, result)


@torch.inference_mode()
def one_switch(
    large: PreTrainedModel, small: PreTrainedModel, hand_over: HandOver, options
) -> list[dict]:
    """Seconds of each way to take a sequence up, relative to reading the context once."""
    vocab_size = large.config.vocab_size
    context = torch.randint(0, vocab_size, (options.context,)).tolist()
    known = BatchDecoder(large)
    known.prefill([context])
    row = known.take(0)
    sides: dict[str, Callable[[], None]] = {"context": partial(read, large, context)}
    for missed in options.missed:
        new = torch.randint(0, vocab_size, (missed,)).tolist()
        thinker = BatchDecoder(small)
        thinker.prefill([context + new[:-1]])
        given = thinker.take(0)
        sides[f"catch-up {missed}"] = partial(resume, large, row, len(context), new)
        sides[f"reprefill {missed}"] = partial(read, large, context + new)
        sides[f"hand-over {missed}"] = partial(
            take_over, large, hand_over, given, len(context) + missed - 1, new[-1:]
        )
    seconds = medians_in_turn(sides, options.rounds)
    return [
        {
            "missed": missed,
            "share_of_text": missed / (options.context + missed),
            **{
                way: seconds[f"{way} {missed}"] / seconds["context"]
                for way in ("catch-up", "reprefill", "hand-over")
            },
        }
        for missed in options.missed
    ]


@torch.inference_mode()
def read(model: PreTrainedModel, ids: list[int]) -> None:
    BatchDecoder(model).prefill([ids])


@torch.inference_mode()
def resume(model: PreTrainedModel, row, length: int, ids: list[int]) -> None:
    BatchDecoder(model).resume([(row, length, ids)])


@torch.inference_mode()
def take_over(model: PreTrainedModel, hand_over: HandOver, row, length: int, ids) -> None:
    BatchDecoder(model).resume([(hand_over(row), length, ids)])


@torch.inference_mode()
def back_and_forth(large: PreTrainedModel, small: PreTrainedModel, options) -> dict:
    """Seconds that ten switches take, relative to reading the whole text once in each size."""
    total = options.context + SWITCHES * options.turn
    ids = torch.randint(0, large.config.vocab_size, (total,)).tolist()
    ends = [options.context + options.turn * (turn + 1) for turn in range(SWITCHES)]

    @torch.inference_mode()
    def catch_up() -> None:
        """Each size in turn reads what was written since it last did."""
        kept: dict[int, tuple] = {}
        for turn, end in enumerate(ends):
            model = (large, small)[turn % 2]
            decoder = BatchDecoder(model)
            if turn % 2 in kept:
                row, length = kept[turn % 2]
                decoder.resume([(row, length, ids[length:end])])
            else:
                decoder.prefill([ids[:end]])
            kept[turn % 2] = (decoder.take(0), end)

    def reprefill() -> None:
        for turn, end in enumerate(ends):
            read((large, small)[turn % 2], ids[:end])

    @torch.inference_mode()
    def once() -> None:
        """Each size reads the text in as many pieces, without a cache taken apart in between."""
        for which, model in enumerate((large, small)):
            cache, start = DynamicCache(config=model.config), 0
            for end in ends[which::2]:
                model(
                    input_ids=torch.tensor([ids[start:end]]), cache=cache,
                    use_cache=True, logits_to_keep=1,
                )  # fmt: skip
                start = end

    seconds = medians_in_turn({"once": once, "catch-up": catch_up, "reprefill": reprefill},
                          options.rounds)  # fmt: skip
    return {way: seconds[way] / seconds["once"] for way in ("catch-up", "reprefill")}


def show(result: dict) -> None:
    print(f"hybrid of {result['parameters']:,} parameters, {result['machine']}")
    rows = [
        [str(row["missed"]), f"{row['share_of_text']:.3f}", f"{row['catch-up']:.3f}",
         f"{row['reprefill']:.3f}", f"{row['hand-over']:.3f}"]
        for row in result["one_switch"]
    ]  # fmt: skip
    print_table(
        f"One switch, time relative to reading the context of {result['context']:,} tokens once",
        ["tokens missed", "share of the text", "catch-up", "reprefill", "hand-over"], rows,
    )  # fmt: skip
    turns = result["back_and_forth"]
    print(
        f"{SWITCHES} switches, {result['turn']} tokens apart, relative to reading the text once in "
        f"each size: catch-up {turns['catch-up']:.2f}, reprefill {turns['reprefill']:.2f}"
    )


if __name__ == "__main__":
    with at_the_command_line():
        main()
