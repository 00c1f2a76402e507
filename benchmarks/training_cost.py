"""What a distillation step costs per token and budget: masks at full width against real slices.

    python benchmarks/training_cost.py                 # a hybrid of about 67M parameters, minutes
    python benchmarks/training_cost.py --device cuda   # one of about 100M in bf16, absolute times
    python benchmarks/training_cost.py --smoke         # the same code on a tiny model, seconds

Three ways to train three sizes (about 1 / .78 / .58 of the active parameters, as in the papers'
family) on the same tokens, interleaved in one run, medians:
    masked           each size as one-hot gates at full parent width, with a teacher forward of its
                     own: what the published reference code does. A baseline only; training never
                     runs it
    sliced           each size as a slice, with a teacher forward of its own
    shared teacher   the slices on the same tokens, one teacher forward for all
Printed beside the ratio of counted operations: 2 per used parameter and token forward, 4 backward.
Weights are random: time does not depend on them. On a GPU also tokens per second and the peak of
memory, for every way and for every size by itself.

The committed figures of a GPU (`results/training_cost_gpu.json`) were measured when experts still
multiplied in fp32 under autocast; those of a CPU have no autocast.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import LARGE, TINY, build_model, medians_in_turn

from star_elastic.axes.widths import Widths
from star_elastic.cli.terminal import at_the_command_line, command_line
from star_elastic.cost.count import CostModel, Workload
from star_elastic.models.elastic import ElasticModel
from star_elastic.nesting.gate import Mixture
from star_elastic.train.losses import linear_kl

SHARES = {"large": 1.0, "medium": 0.78, "small": 0.58}
"""Share of the hidden channels that a size keeps: active parameters follow it."""
HUNDRED = {
    **LARGE, "hybrid_override_pattern": "MEM*EMEM*EME", "moe_intermediate_size": 640,
    "chunk_size": 64, "vocab_size": 8192,
}  # fmt: skip
"""A hybrid of about 100M parameters, for a GPU."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of a step")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--smoke", action="store_true", help="tiny model, one round")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    options = parser.parse_args()
    if options.smoke:
        options.rounds, options.tokens = 1, 64
    shape = HUNDRED if options.device == "cuda" else LARGE
    config = TINY if options.smoke else shape
    machine = {"cpus": os.cpu_count(), "threads": torch.get_num_threads()}
    if options.device == "cuda":
        machine = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    result = {
        "command": command_line("benchmarks/training_cost.py"),
        "machine": machine,
        "tokens": options.tokens,
        "rounds": options.rounds,
        **measure(config, options.tokens, options.rounds, options.device),
    }
    show(result)
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def build(config: dict, seed: int, device: str) -> ElasticModel:
    """A random model of a config."""
    model: Any = build_model(config, seed).train()
    return ElasticModel(model.to(device), config)


def measure(config: dict, tokens: int, rounds: int, device: str) -> dict:
    """Time and operations of each way relative to the masked one."""
    student, teacher = build(config, 0, device), build(config, 1, device)
    teacher.eval().requires_grad_(False)
    axis_map = student.axis_map
    full = axis_map.full
    step = 16 if full["hidden"] >= 256 else 8
    sizes = {
        name: full.replace(hidden=round(full["hidden"] * share / step) * step)
        for name, share in SHARES.items()
    }
    length = min(tokens, 1024 if device == "cuda" else 256)
    ids = torch.randint(0, config["vocab_size"], (tokens // length, length), device=device)

    inputs = {"input_ids": ids, "seq_idx": torch.zeros_like(ids)}  # one document a row

    def autocast():
        """As runs are by default where it pays: bf16 products on a GPU."""
        return torch.autocast(device, torch.bfloat16, enabled=device == "cuda")

    @torch.no_grad()
    def ask_teacher() -> tuple[torch.Tensor, torch.Tensor]:
        with autocast():
            states, head = teacher.hidden_states(full, **inputs)
        return states.flatten(0, 1), head

    def learn(divergence: Callable, size, **options) -> None:
        with autocast():
            states, head = student.hidden_states(size, **inputs, **options)
            loss = divergence(states.flatten(0, 1), head)
        loss.backward()

    def live(answer: tuple[torch.Tensor, torch.Tensor]) -> Callable:
        return lambda states, head: linear_kl(states, head, *answer)

    def masked() -> None:
        for widths in sizes.values():
            learn(live(ask_teacher()), one_hot(widths, full, device), slice_at=full)

    def sliced() -> None:
        for widths in sizes.values():
            learn(live(ask_teacher()), widths)

    def shared() -> None:
        divergence = live(ask_teacher())
        for widths in sizes.values():
            learn(divergence, widths)

    ways = {"masked": masked, "sliced": sliced, "shared teacher": shared}
    seconds = medians_in_turn({name: fresh(student, way) for name, way in ways.items()}, rounds)
    absolute = {}
    if device == "cuda":  # on a shared machine absolute times mean nothing
        absolute["absolute"] = {
            name: {
                "tokens_per_second": len(sizes) * tokens / seconds[name],
                "peak_bytes": peak_bytes(fresh(student, way)),
            }
            for name, way in ways.items()
        }
        divergence = live(ask_teacher())
        for size, widths in sizes.items():
            each = {
                "masked": partial(learn, divergence, one_hot(widths, full, device), slice_at=full),
                "sliced": partial(learn, divergence, widths),
            }
            own = medians_in_turn({n: fresh(student, way) for n, way in each.items()}, rounds)
            for name, way in each.items():
                absolute["absolute"][f"{size}, {name}, without the teacher"] = {
                    "tokens_per_second": tokens / own[name],
                    "peak_bytes": peak_bytes(fresh(student, way)),
                }
    cost = CostModel(axis_map, Workload(context=length // 2))
    whole = cost.count(full).flops_per_token
    slices = sum(cost.count(widths).flops_per_token for widths in sizes.values())
    flops = {
        "masked": len(sizes) * 4 * whole,
        "sliced": len(sizes) * whole + 3 * slices,
        "shared teacher": whole + 3 * slices,
    }
    return {
        "parameters": cost.count(full).total,
        "sizes": {
            name: cost.count(widths).active / cost.count(full).active
            for name, widths in sizes.items()
        },
        "ways": {
            name: {
                "time_ratio": seconds[name] / seconds["masked"],
                "flops_ratio": flops[name] / flops["masked"],
                "gflop_per_token_and_budget": flops[name] / len(sizes) / 1e9,
            }
            for name in ways
        },
        **absolute,
    }


def peak_bytes(run: Callable[[], None]) -> int:
    """The most memory that the GPU held meanwhile."""
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def one_hot(widths: Widths, full: Widths, device: str) -> dict[str, Mixture]:
    """Gates that leave open what a slice keeps."""
    hidden = int(full["hidden"]), int(widths["hidden"])
    choices = tuple(sorted(set(hidden), reverse=True))
    weights = torch.tensor([float(c == hidden[1]) for c in choices], device=device)
    return {"hidden": Mixture(choices, weights)}


def fresh(student: ElasticModel, way: Callable[[], None]) -> Callable[[], None]:
    """A step that begins with no gradients."""

    def run() -> None:
        student.zero_grad(set_to_none=True)
        way()

    return run


def show(result: dict) -> None:
    sizes = ", ".join(f"{name} {share:.0%}" for name, share in result["sizes"].items())
    print(f"hybrid of {result['parameters']:,} parameters; active: {sizes}; {result['machine']}")
    print(f"{'way':16} {'time/masked':>12} {'FLOPs/masked':>13} {'GFLOP/(token, budget)':>22}")
    for name, row in result["ways"].items():
        print(
            f"{name:16} {row['time_ratio']:12.3f} {row['flops_ratio']:13.3f} "
            f"{row['gflop_per_token_and_budget']:22.3f}"
        )
    for name, row in result.get("absolute", {}).items():
        print(
            f"{name:40} {row['tokens_per_second']:12,.0f} tokens/s "
            f"{row['peak_bytes'] / 1e9:8.2f} GB at the peak"
        )


if __name__ == "__main__":
    with at_the_command_line():
        main()
