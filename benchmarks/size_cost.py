"""Does cost follow size? Training-step and decode time per size, against FLOPs and saved slices.

    python benchmarks/size_cost.py                # a hybrid of 67M parameters, minutes
    python benchmarks/size_cost.py --smoke        # the same code on a tiny model, seconds

Compares, in one run and interleaved (medians of `--rounds`):
1. a training step (forward and backward, no optimiser) of each size inside the elastic model with
   the step of the plain parent, beside the ratio of their counted FLOPs;
2. the decode time per token of each size as views of the one copy with its saved slice loaded in
   plain transformers, and that slice loaded twice (A/A: what the machine's noise alone does).
Weights are random: time does not depend on them.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from functools import partial
from pathlib import Path

import torch
from common import LARGE, TINY, build_model, decode, medians_in_turn, widths_at

from star_elastic.cli.terminal import at_the_command_line
from star_elastic.cost.count import CostModel, Workload
from star_elastic.models.elastic import ElasticModel
from star_elastic.models.load import load_parent
from star_elastic.models.submodel import build_submodel
from star_elastic.rewrite.stream import save_model, slice_checkpoint

SHARES = {"large": 1.0, "medium": 0.75, "small": 0.5}
"""Share of the hidden, expert and shared widths that a size keeps (Mamba heads likewise)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of a training step")
    parser.add_argument("--decode-steps", type=int, default=24)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--smoke", action="store_true", help="tiny model, two rounds")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    options = parser.parse_args()
    if options.smoke:
        options.rounds, options.tokens, options.decode_steps, options.batches = 2, 64, 4, [2]
    config = TINY if options.smoke else LARGE
    elastic = ElasticModel(build_model(config), config)
    sizes = {name: widths_at(elastic.axis_map, share) for name, share in SHARES.items()}
    result = {
        "command": "python benchmarks/size_cost.py" + (" --smoke" if options.smoke else ""),
        "machine": {"cpus": os.cpu_count(), "threads": torch.get_num_threads()},
        "parameters": CostModel(elastic.axis_map).full.total,
        "training": training_steps(elastic, sizes, options.tokens, options.rounds),
        "decoding": decoding(elastic, sizes, options),
    }
    show(result)
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def training_steps(elastic: ElasticModel, sizes, tokens: int, rounds: int) -> dict:
    """Step time of each size relative to the plain parent's, and the ratio of FLOPs."""
    length = min(tokens, 256)
    ids = torch.randint(0, elastic.parent.config.vocab_size, (tokens // length, length))
    elastic.train()

    def step(model: torch.nn.Module, *size) -> None:
        elastic.zero_grad(set_to_none=True)
        logits = model(*size, input_ids=ids, use_cache=False).logits
        logits.float().log_softmax(-1).mean().backward()

    sides = {"parent": partial(step, elastic.parent)}
    sides |= {name: partial(step, elastic, widths) for name, widths in sizes.items()}
    seconds = medians_in_turn(sides, rounds)
    elastic.zero_grad(set_to_none=True)
    cost = CostModel(elastic.axis_map, Workload(context=length // 2))
    full = cost.full.flops_per_token
    return {
        name: {
            "time_ratio": seconds[name] / seconds["parent"],
            "flops_ratio": cost.count(widths).flops_per_token / full,
        }
        for name, widths in sizes.items()
    }


def decoding(elastic: ElasticModel, sizes, options) -> dict:
    """Decode time per token of views and of saved slices, for each batch size."""
    result: dict = {}
    elastic.eval()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "parent"
        extras = Path(folder) / "none"
        extras.mkdir()
        save_model(elastic.state(), elastic.model_config, extras, source, dtype=torch.float32)
        for name, widths in sizes.items():
            cut = Path(folder) / name
            slice_checkpoint(source, widths, cut)
            views = build_submodel(elastic.parent, elastic.model_config, widths)
            saved, again = load_parent(cut)[0], load_parent(cut)[0]
            for batch in options.batches:
                steps = options.decode_steps
                seconds = medians_in_turn(
                    {
                        "views": decode(views, batch, steps),
                        "slice": decode(saved, batch, steps),
                        "slice again": decode(again, batch, steps),
                    },
                    options.rounds,
                )
                result.setdefault(name, {})[str(batch)] = {
                    "views_over_slice": seconds["views"] / seconds["slice"],
                    "slice_over_slice": seconds["slice again"] / seconds["slice"],
                    "seconds_per_step": seconds["views"] / (steps + 1),
                }
    largest = result["large"]
    for by_batch in result.values():
        for batch, row in by_batch.items():
            row["of_large"] = row["seconds_per_step"] / largest[batch]["seconds_per_step"]
    for by_batch in result.values():
        for row in by_batch.values():
            del row["seconds_per_step"]  # absolute times mean nothing on a shared machine
    return result


def show(result: dict) -> None:
    print(f"hybrid of {result['parameters']:,} parameters, {result['machine']}")
    print("\ntraining step, relative to the plain parent's")
    print(f"{'size':8} {'time':>8} {'FLOPs':>8} {'time/FLOPs':>11}")
    for name, row in result["training"].items():
        share = row["time_ratio"] / row["flops_ratio"]
        print(f"{name:8} {row['time_ratio']:8.3f} {row['flops_ratio']:8.3f} {share:11.3f}")
    print("\ndecode, per token")
    print(f"{'size':8} {'batch':>6} {'of large':>9} {'views/slice':>12} {'slice/slice':>12}")
    for name, by_batch in result["decoding"].items():
        for batch, row in by_batch.items():
            print(
                f"{name:8} {batch:>6} {row['of_large']:9.3f} {row['views_over_slice']:12.3f} "
                f"{row['slice_over_slice']:12.3f}"
            )


if __name__ == "__main__":
    with at_the_command_line():
        main()
