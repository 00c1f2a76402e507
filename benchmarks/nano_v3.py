"""The true shape of Nemotron 3 Nano on one GPU: sizes of 30B, 23B and 12B in one copy of 63 GB.

    python benchmarks/nano_v3.py --out results/nano_v3.json    # BF16, one GPU of 100 GB or more
    python benchmarks/nano_v3.py --smoke                       # a small model of the same layers

Prints, for random weights (time does not depend on them):
1. bytes: the parent alone, and what its three sizes hold together;
2. prefill and decode time of every size at several batches, out of the one copy and loaded alone;
   decode step by step, and as the CUDA graphs in which the run time replays its steps;
3. a switch from the 12B size to the 30B size by catch-up, reprefill and hand-over;
4. the same family in FP8 where the device multiplies it: bytes, prefill and decode.
On one stated device absolute times mean something; on the CPU (the smoke run) they do not.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from common import now
from switching import read, resume, take_over
from transformers import PreTrainedModel

from star_elastic.architectures import architecture_of
from star_elastic.axes import AxisMap
from star_elastic.axes.widths import Widths
from star_elastic.cli.terminal import at_the_command_line, command_line, print_table
from star_elastic.cost.count import CostModel
from star_elastic.files.writing import write_json
from star_elastic.generate.caches import HandOver
from star_elastic.generate.decode import BatchDecoder
from star_elastic.generate.steps import StepPool
from star_elastic.models.native import multiplies_fp8
from star_elastic.models.quantised_inputs import QuantisedInputs
from star_elastic.models.resident import count_resident, nest_in_place
from star_elastic.models.skeleton import build_skeleton
from star_elastic.models.submodel import build_submodel
from star_elastic.quant.formats import quantise
from star_elastic.quant.scheme import Scheme, make_scheme

NANO_V3 = {
    "model_type": "nemotron_h", "num_hidden_layers": 52,
    "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    "hidden_size": 2688, "num_attention_heads": 32, "num_key_value_heads": 2, "head_dim": 128,
    "mamba_num_heads": 64, "mamba_head_dim": 64, "n_groups": 8, "ssm_state_size": 128,
    "conv_kernel": 4, "chunk_size": 128, "n_routed_experts": 128, "num_experts_per_tok": 6,
    "moe_intermediate_size": 1856, "moe_shared_expert_intermediate_size": 3712,
    "vocab_size": 131072, "max_position_embeddings": 262144, "tie_word_embeddings": False,
}  # fmt: skip
SIZES = {
    "30B": {},
    "23B": {
        "hidden": 2560, "experts": 128, "expert_ffn": 1408, "ssm_heads": 56, "shared_ffn": 2048,
    },
    "12B": {
        "hidden": 2176, "experts": 104, "expert_ffn": 1024, "ssm_heads": 40, "shared_ffn": 2048,
    },
}  # fmt: skip
"""Widths of 23.03B / 2.81B and 12.04B / 2.00B total and active parameters, as the published sizes
have; theirs are not published."""
SMALL = {
    **NANO_V3, "hybrid_override_pattern": "MEM*EME", "num_hidden_layers": 7, "hidden_size": 128,
    "num_attention_heads": 8, "head_dim": 16, "mamba_num_heads": 32, "mamba_head_dim": 16,
    "ssm_state_size": 16, "chunk_size": 8, "n_routed_experts": 16, "num_experts_per_tok": 4,
    "moe_intermediate_size": 64, "moe_shared_expert_intermediate_size": 128, "vocab_size": 512,
}  # fmt: skip
SMALL_SIZES = {
    "30B": {},
    "23B": {"hidden": 112, "expert_ffn": 48, "ssm_heads": 24},
    "12B": {"hidden": 96, "experts": 12, "expert_ffn": 32, "ssm_heads": 16},
}
WORKS = ("prefill", "decode", "graph")
GB = 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32, 128])
    parser.add_argument("--prompt", type=int, default=512, help="tokens that are read")
    parser.add_argument("--steps", type=int, default=8, help="decode steps of one repeat")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--context", type=int, default=8192, help="tokens known before a switch")
    parser.add_argument("--missed", type=int, nargs="+", default=[1, 64, 512, 4096])
    parser.add_argument("--smoke", action="store_true", help="small model, also on the CPU")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    options = parser.parse_args()
    config, sizes = NANO_V3, SIZES
    if options.smoke:
        config, sizes = SMALL, SMALL_SIZES
        options.batches, options.prompt, options.steps = [2], 8, 2
        options.context, options.missed, options.repeats = 32, [1, 8], 1
    device = "cuda" if torch.cuda.is_available() else "cpu"
    bench = Bench(config, sizes, device, options)
    result = bench.describe()
    for part in (
        bench.measure_shared, bench.measure_switches, bench.measure_alone, bench.measure_fp8
    ):  # fmt: skip
        result |= part()
        # Loaded by transformers with the first model, if they are installed and work.
        result["machine"]["mamba_kernels"] = "mamba_ssm.ops.triton.ssd_combined" in sys.modules
        if options.out:
            write_json(options.out, result)
    show(result)


class Bench:
    """The parent with its sizes on one device, and what is measured of them."""

    def __init__(
        self, config: Mapping[str, Any], sizes: Mapping[str, Mapping], device: str, options
    ):
        torch.manual_seed(0)
        self.config, self.device, self.options = dict(config), device, options
        self.architecture = architecture_of(self.config)
        self.axis_map: AxisMap = self.architecture.axis_map(self.config)
        self.widths: dict[str, Widths] = {
            name: self.axis_map.complete(dict(own)) for name, own in sizes.items()
        }
        self.cost = CostModel(self.axis_map)

    def describe(self) -> dict[str, Any]:
        """Machine, versions and sizes."""
        cuda = self.device == "cuda"
        return {
            "command": command_line("benchmarks/nano_v3.py"),
            "machine": {
                "device": torch.cuda.get_device_name() if cuda else "cpu",
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            "prompt": self.options.prompt,
            "context": self.options.context,
            "sizes": {
                name: {
                    "widths": dict(widths),
                    "total": self.cost.count(widths).total,
                    "active": self.cost.count(widths).active,
                }
                for name, widths in self.widths.items()
            },
        }

    # What is measured

    def measure_shared(self) -> dict[str, Any]:
        """Bytes of the one copy, and the times of its sizes."""
        before = self._allocated()
        self.parent = self._random_model(self.axis_map.full)
        parent = self._allocated() - before
        alone = {"30B": self._measure("30B alone", self.parent)}
        nest_in_place(self.parent, self.axis_map, self.widths.values())
        full = self.axis_map.full
        self.models = {
            name: self.parent if w == full else build_submodel(self.parent, self.config, w)
            for name, w in self.widths.items()
        }
        gc.collect()
        self._empty_cache()
        together = self._allocated() - before
        counted = count_resident(self.parent, self.models)
        shared = {n: self._measure(f"{n} shared", model) for n, model in self.models.items()}
        agreement = {name: self._agreement(model) for name, model in self.models.items()}
        return {
            "bytes": {
                "parent": parent,
                "three_sizes": together,
                "counted_shared": counted.shared,
                "counted_copies": dict(counted.copies),
            },
            "shared": shared,
            "graph_against_eager": agreement,
            "alone": alone,
        }

    def measure_switches(self) -> dict[str, Any]:
        """Seconds in which the largest size takes up what the smallest has written."""
        *_, small = self.models
        large, small_model = self.parent, self.models[small]
        vocab_size, context = self.config["vocab_size"], self.options.context
        hand_over = HandOver(self.axis_map, self.widths[small], self.axis_map.full)
        with torch.inference_mode():
            known = self._ids(context, vocab_size)
            decoder = BatchDecoder(large)
            decoder.prefill([known])
            row = decoder.take(0)
            rows: list[dict[str, Any]] = []
            for missed in self.options.missed:
                new = self._ids(missed, vocab_size)
                thinker = BatchDecoder(small_model)
                thinker.prefill([known + new[:-1]])
                given = thinker.take(0)
                ways = {
                    "catch_up": partial(resume, large, row, context, new),
                    "reprefill": partial(read, large, known + new),
                    "hand_over": partial(
                        take_over, large, hand_over, given, context + missed - 1, new[-1:]
                    ),
                }
                rows.append(
                    {"missed": missed} | {way: self._time(run) for way, run in ways.items()}
                )
                print(rows[-1], flush=True)
        return {"switches": rows}

    def measure_alone(self) -> dict[str, Any]:
        """Times of the smaller sizes, each as the only model there is."""
        self.parent = None
        self.models = {}
        results = {}
        for name, widths in self.widths.items():
            if widths != self.axis_map.full:
                gc.collect()
                self._empty_cache()
                before = self._allocated()
                model = self._random_model(widths)
                results[name] = {"bytes": self._allocated() - before}
                results[name] |= self._measure(f"{name} alone", model)
                del model
        return {"alone_smaller": results}

    def measure_fp8(self) -> dict[str, Any]:
        """Bytes and times of the family whose weights and inputs are FP8."""
        scheme = make_scheme(self.axis_map, "fp8")
        if not multiplies_fp8(self.device, torch.bfloat16, scheme.format, experts=True):
            return {}
        gc.collect()
        self._empty_cache()
        before = self._allocated()
        parent = self._random_model(self.axis_map.full)
        self._to_codes(parent, scheme)
        nest_in_place(parent, self.axis_map, self.widths.values())
        models = {
            name: parent
            if widths == self.axis_map.full
            else build_submodel(parent, self.config, widths)
            for name, widths in self.widths.items()
        }
        gc.collect()
        self._empty_cache()
        held = self._allocated() - before
        times = {n: self._measure(f"{n} FP8", m, eager=False) for n, m in models.items()}
        return {"fp8": {"three_sizes": held, "sizes": times}}

    def _to_codes(self, model: PreTrainedModel, scheme: Scheme) -> None:
        """Quantises a model's weights where they are; inputs get a scale that fits them."""
        weight_scales, input_scales = {}, {}
        for name in scheme.quantised(self.axis_map):
            path, _, last = name.rpartition(".")
            module = model.get_submodule(path)
            weight = quantise(module.get_parameter(last).data, scheme.format)
            setattr(module, last, torch.nn.Parameter(weight.codes, requires_grad=False))
            weight_scales[name] = weight.scales
            input_scales[name] = torch.full((1,), 0.02, device=self.device)
        inputs = QuantisedInputs(scheme, input_scales, weight_scales)
        inputs.install(model, self.axis_map)

    def _measure(self, label: str, model: PreTrainedModel, *, eager: bool = True) -> dict[str, Any]:
        """Milliseconds of prefill and of a decode step at every batch."""
        result: dict[str, Any] = {}
        ways = [None] if self.device != "cuda" else [None, StepPool] if eager else [StepPool]
        for batch in self.options.batches:
            row = result[str(batch)] = {}
            for make_pool in ways:
                pool = make_pool(model, patience=1) if make_pool else None
                try:
                    row |= self._prefill_and_decode(model, batch, pool)
                except torch.OutOfMemoryError:
                    row["out_of_memory"] = True
                del pool
                gc.collect()
                self._empty_cache()
            print(label, batch, row, flush=True)
        return result

    @torch.inference_mode()
    def _prefill_and_decode(
        self, model: PreTrainedModel, batch: int, pool: StepPool | None
    ) -> dict[str, float]:
        """Medians: of reading prompts, and of one step of several in a row."""
        prompts = [self._ids(self.options.prompt, self.config["vocab_size"]) for _ in range(batch)]
        tokens = [row[0] for row in prompts]
        decoder, prefill, decode = BatchDecoder(model, pool), [], []
        for _ in range(1 + self.options.repeats):
            decoder.keep([])
            start = now()
            decoder.prefill(prompts)
            prefill.append(1e3 * (now() - start))
        decoder.step(tokens)  # into static memory
        for _ in range(1 + self.options.repeats):
            start = now()
            for _ in range(self.options.steps):
                decoder.step(tokens)
            decode.append(1e3 * (now() - start) / self.options.steps)
        kind = "eager" if pool is None else "graph"
        return {
            "prefill_ms": statistics.median(prefill[1:]),
            f"decode_{kind}_ms": statistics.median(decode[1:]),
        }

    @torch.inference_mode()
    def _agreement(self, model: PreTrainedModel, steps: int = 8) -> float:
        """Largest difference of logits between steps in static memory and without it, fed with the
        same tokens, relative to the largest logit."""
        pool = StepPool(model, patience=1)
        decoders = [BatchDecoder(model, pool), BatchDecoder(model)]
        prompts = [self._ids(length, self.config["vocab_size"]) for length in (64, 50, 7, 33)]
        largest = difference = 0.0
        for decoder in decoders:
            decoder.prefill(prompts)
        for _ in range(steps):
            tokens = decoders[1].logits_BV.argmax(-1).tolist()
            for decoder in decoders:
                decoder.step(tokens)
            ours, plain = (decoder.logits_BV for decoder in decoders)
            largest = max(largest, float(plain.abs().max()))
            difference = max(difference, float((ours - plain).abs().max()))
        return difference / largest

    def _time(self, run: Callable[[], None]) -> float:
        """Milliseconds, the median of some repeats after one."""
        times = []
        for _ in range(1 + self.options.repeats):
            start = now()
            run()
            times.append(1e3 * (now() - start))
        return statistics.median(times[1:])

    # Helpers

    def _random_model(self, widths: Widths) -> PreTrainedModel:
        """A model of a size with random BF16 weights of its own."""
        model: Any = build_skeleton(self.architecture.config_at(self.config, widths))
        model = model.to(torch.bfloat16).to_empty(device=self.device)
        with torch.no_grad():
            for name, value in [*model.named_parameters(), *model.named_buffers()]:
                if name.endswith(("A_log", "D", "norm.weight", "norm_f.weight")):
                    value.fill_(1.0)
                elif value.is_floating_point():
                    value.normal_(0.0, 0.02)
        for module in model.modules():
            if "e_score_correction_bias" in module._buffers:
                module.e_score_correction_bias = module.e_score_correction_bias.float()
        return model.requires_grad_(False).eval()

    def _ids(self, length: int, vocab_size: int) -> list[int]:
        return torch.randint(0, vocab_size, (length,)).tolist()

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated() if self.device == "cuda" else 0

    def _empty_cache(self) -> None:
        if self.device == "cuda":
            torch.cuda.empty_cache()


def show(result: dict) -> None:
    machine, sizes = result["machine"], result["sizes"]
    print(f"\n{machine}")
    held = result["bytes"]
    if held["parent"]:
        print(
            f"parent {held['parent'] / GB:.2f} GB, three sizes together "
            f"{held['three_sizes'] / GB:.2f} GB ({held['three_sizes'] / held['parent']:.4f})"
        )
    if "fp8" in result:
        print(f"in FP8 {result['fp8']['three_sizes'] / GB:.2f} GB")
    alone = result["alone"] | result["alone_smaller"]
    codes = result.get("fp8", {}).get("sizes", {})
    rows = []
    for name, size in sizes.items():
        for batch, ours in result["shared"][name].items():
            theirs = alone[name][batch]
            rows.append(
                [name, f"{size['total'] / GB:.1f}/{size['active'] / GB:.1f}", batch]
                + [
                    "-" if value is None else f"{value:.2f}"
                    for kind in ("prefill_ms", "decode_eager_ms", "decode_graph_ms")
                    for value in (ours.get(kind), theirs.get(kind))
                ]
                + [
                    "-" if value is None else f"{value:.2f}"
                    for kind in ("prefill_ms", "decode_graph_ms")
                    for value in (codes.get(name, {}).get(batch, {}).get(kind),)
                ]
            )
    print_table(
        f"Milliseconds to read {result['prompt']} tokens per row, and of a decode step",
        [
            "size",
            "B total/active",
            "batch",
            "prefill",
            "alone",
            "decode",
            "alone",
            "graph",
            "alone",
        ],
        rows,
    )
    print_table(
        f"A switch from the smallest to the largest size after {result['context']:,} tokens, ms",
        ["tokens missed", "catch-up", "reprefill", "hand-over"],
        [
            [str(row["missed"])] + [f"{row[w]:.1f}" for w in ("catch_up", "reprefill", "hand_over")]
            for row in result["switches"]
        ],
    )


if __name__ == "__main__":
    with at_the_command_line():
        main()
