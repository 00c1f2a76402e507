"""What a native FP8 product is worth on a GPU: layers of Nemotron 3 Nano, whole and as slices.

    python benchmarks/fp8_products.py --out results/fp8_products.json   # a GPU of 8.9 or later

For the largest linear layers and the experts, at the widths of three sizes cut as views out of one
full-width weight, and several numbers of tokens: the BF16 product, and the FP8 product with one
scale per tensor, its input's quantisation included. Medians of captured repeats, so that launches
do not count.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from star_elastic.cli.terminal import at_the_command_line, print_table
from star_elastic.errors import Interrupted
from star_elastic.files.writing import write_json
from star_elastic.quant.formats import E4M3, E4M3_MAX

HIDDEN, EXPERTS, TOP_K = 2688, 128, 6
LAYERS = {"mamba in_proj": 10304, "shared up_proj": 3712, "head": 131072}
"""Rows of the weights; columns are the hidden channels."""
SIZES = {"30B": (2688, 128, 1856), "23B": (2560, 128, 1408), "12B": (2176, 104, 1024)}
"""Hidden channels, experts, neurons of an expert."""
TOKENS = (1, 32, 128, 4096)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise Interrupted("there is no CUDA device here")
    torch.manual_seed(0)
    rows = [*linear_rows(options.repeats), *expert_rows(options.repeats)]
    result = {
        "command": "python benchmarks/fp8_products.py",
        "machine": {"device": torch.cuda.get_device_name(), "torch": torch.__version__},
        "rows": rows,
    }
    print_table(
        f"{result['machine']}: microseconds",
        ["layer", "size", "tokens", "BF16", "FP8", "FP8 / BF16"],
        [[r["layer"], r["size"], str(r["tokens"]), f"{r['bf16_us']:.1f}", f"{r['fp8_us']:.1f}",
          f"{r['fp8_us'] / r['bf16_us']:.2f}"] for r in rows],
    )  # fmt: skip
    if options.out:
        write_json(options.out, result)


def quantise(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Values in FP8 with one scale."""
    return (values / scale).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)


def linear_rows(repeats: int) -> list[dict[str, Any]]:
    """Linear layers whose input channels are cut."""
    found = []
    for layer, out in LAYERS.items():
        weight = torch.randn(out, HIDDEN, device="cuda", dtype=torch.bfloat16) * 0.02
        scale = (weight.abs().max().float() / E4M3_MAX).reshape(1)
        codes = quantise(weight, scale)
        for size, (hidden, _, _) in SIZES.items():
            dense, small = weight[:, :hidden], codes[:, :hidden]
            for tokens in TOKENS:
                x = torch.randn(tokens, hidden, device="cuda", dtype=torch.bfloat16)
                x_scale = (x.abs().max().float() / E4M3_MAX).reshape(1)

                def bf16(x=x, dense=dense) -> torch.Tensor:
                    return F.linear(x, dense)

                def fp8(x=x, small=small, x_scale=x_scale, scale=scale) -> torch.Tensor:
                    return torch._scaled_mm(
                        quantise(x, x_scale), small.t(), scale_a=x_scale, scale_b=scale,
                        out_dtype=torch.bfloat16,
                    )  # fmt: skip

                found.append(compare(layer, size, tokens, bf16, fp8, repeats))
        del weight, codes
    return found


def expert_rows(repeats: int) -> list[dict[str, Any]]:
    """The first product of the routed experts, tokens spread evenly."""
    full = SIZES["30B"][2]
    weight = torch.randn(EXPERTS, full, HIDDEN, device="cuda", dtype=torch.bfloat16) * 0.02
    scale = (weight.abs().max().float() / E4M3_MAX).reshape(1)
    codes = quantise(weight, scale)
    found = []
    for size, (hidden, experts, neurons) in SIZES.items():
        dense, small = (w[:experts, :neurons, :hidden] for w in (weight, codes))
        for tokens in TOKENS:
            pairs = tokens * TOP_K
            chosen = torch.arange(pairs, device="cuda") % experts
            counts = torch.bincount(chosen, minlength=experts)
            ends = counts.cumsum(0).to(torch.int32)
            x = torch.randn(pairs, hidden, device="cuda", dtype=torch.bfloat16)
            x_scale = (x.abs().max().float() / E4M3_MAX).reshape(1)
            by_row, by_channel = x_scale.expand(pairs).contiguous(), scale.expand(experts, neurons)
            by_channel = by_channel.contiguous()

            def bf16(x=x, dense=dense, ends=ends) -> torch.Tensor:
                return torch._grouped_mm(x, dense.transpose(1, 2), offs=ends)

            def fp8(
                x=x, small=small, ends=ends, s=x_scale, rows=by_row, channels=by_channel
            ) -> torch.Tensor:
                return torch._scaled_grouped_mm(
                    quantise(x, s), small.transpose(1, 2), rows, channels, offs=ends,
                    out_dtype=torch.bfloat16,
                )  # fmt: skip

            found.append(compare("routed up_proj", size, tokens, bf16, fp8, repeats))
    return found


def compare(
    layer: str, size: str, tokens: int, bf16: Callable, fp8: Callable, repeats: int
) -> dict[str, Any]:
    """Both products, interleaved, and how far their results are apart."""
    row: dict[str, Any] = {"layer": layer, "size": size, "tokens": tokens}
    try:
        exact, ours = bf16().float(), fp8().float()
        row["difference"] = float((ours - exact).norm() / exact.norm())
        row["bf16_us"], row["fp8_us"] = interleaved([bf16, fp8], repeats)
    except RuntimeError as error:
        row |= {"bf16_us": float("nan"), "fp8_us": float("nan"), "error": str(error)[:200]}
    return row


def interleaved(works: list[Callable], repeats: int, calls: int = 8) -> list[float]:
    """Median microseconds of a call, each captured several times in a row."""
    graphs = []
    for work in works:
        work()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                work()
        graphs.append(graph)
    times: list[list[float]] = [[] for _ in works]
    for _ in range(repeats):
        for graph, own in zip(graphs, times, strict=True):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            own.append(1e3 * start.elapsed_time(end) / calls)
    return [statistics.median(own) for own in times]


if __name__ == "__main__":
    with at_the_command_line():
        main()
