"""Does the chunked distillation loss save memory, and at what price in time?

    python benchmarks/kl_memory.py                # V = 131,072: minutes, several GB
    python benchmarks/kl_memory.py --smoke        # the same code on a tiny vocabulary, seconds

Compares forward and backward of the plain form (full logits of teacher and student, then
`distillation_loss` and autograd) with `linear_kl`, in fp32 and under bf16 autocast, in one run and
interleaved (medians of `--rounds`). Every measurement has a process of its own. Peak memory is
what comes on top of hidden states and heads: resident memory on a CPU, allocations on a GPU. Both
include the gradients that are the result. Both forms run at `--plain-tokens`; `linear_kl` runs once
more at `--tokens`, where the plain form need not fit.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.nn import functional as F

from star_elastic.cli.terminal import at_the_command_line, command_line
from star_elastic.train.losses import default_chunk_bytes, distillation_loss, linear_kl

PRECISIONS = ("fp32", "bf16")
PLAIN_BYTES = 32
"""Memory of the plain form per token and entry of the vocabulary, rounded up; to refuse early."""
SMOKE = {"vocab": 1024, "hidden": 64, "tokens": 64, "plain_tokens": 32, "rounds": 1}


@dataclass(frozen=True)
class Measurement:
    """What one process is to run."""

    side: str
    precision: str
    tokens: int
    vocab: int
    hidden: int


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of the chunked loss")
    parser.add_argument("--plain-tokens", type=int, default=2048, help="tokens of both forms")
    parser.add_argument("--vocab", type=int, default=131_072)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--smoke", action="store_true", help="tiny vocabulary, one round in bf16")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(Measurement(**json.loads(options.measure)))))
        return
    if options.smoke:
        vars(options).update(SMOKE)
    require_memory(options.plain_tokens, options.vocab)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    result = {
        "command": command_line("benchmarks/kl_memory.py"),
        "machine": {"cpus": os.cpu_count(), "threads": torch.get_num_threads(), "gpu": gpu},
        "vocab": options.vocab,
        "hidden": options.hidden,
        "chunk_bytes": default_chunk_bytes(torch.device("cuda" if gpu else "cpu")),
        "precisions": {
            precision: compare(options, precision)
            for precision in (PRECISIONS[-1:] if options.smoke else PRECISIONS)
        },
    }
    show(result)
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def require_memory(tokens: int, vocab: int) -> None:
    """Ends with one line if the plain form would not fit."""
    if torch.cuda.is_available():
        free = torch.cuda.mem_get_info()[0]
    else:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        free = 1024 * next(int(line.split()[1]) for line in lines if "MemAvailable" in line)
    need = PLAIN_BYTES * tokens * vocab
    if need > 0.9 * free:
        raise SystemExit(
            f"plain-tokens={tokens} may need {need / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; "
            f"use --plain-tokens {int(0.9 * free / PLAIN_BYTES / vocab)} or fewer"
        )


def compare(options: argparse.Namespace, precision: str) -> dict:
    """Peaks, and ratios of the two forms at equally many tokens."""
    shape = {"vocab": options.vocab, "hidden": options.hidden, "precision": precision}
    few, many = options.plain_tokens, options.tokens
    runs: dict[str, list[dict]] = {"plain": [], "chunked": []}
    for _ in range(options.rounds):
        for side, rows in runs.items():
            rows.append(in_fresh_process(Measurement(side=side, tokens=few, **shape)))
    plain, chunked = (
        {key: statistics.median(run[key] for run in rows) for key in rows[0]}
        for rows in runs.values()
    )
    largest = in_fresh_process(Measurement(side="chunked", tokens=many, **shape))
    return {
        "tokens": few,
        "plain_peak_mb": round(plain["peak_mb"], 1),
        "chunked_peak_mb": round(chunked["peak_mb"], 1),
        "memory_plain_over_chunked": plain["peak_mb"] / max(chunked["peak_mb"], 0.1),
        "time_chunked_over_plain": chunked["seconds"] / plain["seconds"],
        "loss_relative_difference": abs(chunked["loss"] / plain["loss"] - 1),
        "all_tokens": many,
        "all_tokens_chunked_peak_mb": round(largest["peak_mb"], 1),
        "all_tokens_fp32_logits_of_both_mb": round(2 * 4 * many * options.vocab / 1e6, 1),
    }


def in_fresh_process(cell: Measurement) -> dict:
    """Runs one measurement in a process of its own: peaks of a process never fall."""
    command = [sys.executable, __file__, "--measure", json.dumps(asdict(cell))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{cell} ended with {done.returncode}: {done.stderr.strip()[-400:]}")
    return json.loads(done.stdout)


def measure(cell: Measurement) -> dict:
    """Seconds, peak MB on top of the inputs and loss per token of one forward and backward."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    run = {"plain": plain_form, "chunked": chunked_form}[cell.side]
    # What libraries set up at their first call does not count.
    step(run, inputs(Measurement(cell.side, cell.precision, 4, 64, 32), device), cell.precision)
    tensors = inputs(cell, device)
    before = peak_bytes(device, reset=True)
    begin = time.perf_counter()
    loss = step(run, tensors, cell.precision)
    seconds = time.perf_counter() - begin
    return {
        "seconds": seconds,
        "peak_mb": (peak_bytes(device, reset=False) - before) / 1e6,
        "loss": loss,
    }


def inputs(cell: Measurement, device: str) -> list[torch.Tensor]:
    """Student rows and head (with gradients), teacher rows and head; logits of order 1."""
    generator = torch.Generator().manual_seed(0)
    tensors = []
    for length in (cell.tokens, cell.vocab, cell.tokens, cell.vocab):
        value = torch.randn(length, cell.hidden, generator=generator)
        tensors.append(value.mul_(cell.hidden**-0.25).to(device))
    for tensor in tensors[:2]:
        tensor.requires_grad_()
    return tensors


def step(run: Callable[..., torch.Tensor], tensors: list[torch.Tensor], precision: str) -> float:
    """One forward and backward; the mean loss."""
    with torch.autocast(tensors[0].device.type, torch.bfloat16, enabled=precision == "bf16"):
        loss = run(*tensors)
    loss.backward()
    return loss.item()


def plain_form(student_NH, head_VH, teacher_NG, teacher_head_VG) -> torch.Tensor:
    with torch.no_grad():
        teacher_NV = F.linear(teacher_NG, teacher_head_VG)
    return distillation_loss(teacher_NV, F.linear(student_NH, head_VH))


def chunked_form(student_NH, head_VH, teacher_NG, teacher_head_VG) -> torch.Tensor:
    return linear_kl(student_NH, head_VH, teacher_NG, teacher_head_VG) / len(student_NH)


def peak_bytes(device: str, *, reset: bool) -> int:
    """The peak so far; with `reset`, what is in use now, from where the peak is to count."""
    if device == "cuda":
        torch.cuda.synchronize()
        if reset:
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated()
        return torch.cuda.max_memory_allocated()
    if reset:
        pages = Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]
        return int(pages) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def show(result: dict) -> None:
    print(f"V = {result['vocab']:,}, hidden {result['hidden']}, {result['machine']}")
    print(f"{'':6} {'tokens':>7} {'plain':>10} {'chunked':>10} {'memory':>8} {'time':>7}")
    for precision, row in result["precisions"].items():
        print(
            f"{precision:6} {row['tokens']:7,} {row['plain_peak_mb']:7,.0f} MB "
            f"{row['chunked_peak_mb']:7,.0f} MB {row['memory_plain_over_chunked']:7.1f}x "
            f"{row['time_chunked_over_plain']:6.2f}x"
        )
        print(
            f"{'':6} {row['all_tokens']:7,} {'':10} {row['all_tokens_chunked_peak_mb']:7,.0f} MB "
            f"  (fp32 logits of both: {row['all_tokens_fp32_logits_of_both_mb']:,.0f} MB)"
        )


if __name__ == "__main__":
    with at_the_command_line():
        main()
