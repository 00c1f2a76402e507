"""Every figure of README.md and docs/results.md, made from the file in results/ that it is of.

`TABLES` has the rows of the tables by the heading they stand under, `FACTS` the sentences with
numbers in them. What is computed here from a file must stand there letter by letter, bold aside.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from star_elastic.evaluate.wilson import effective_count, wilson_interval

ROOT = Path(__file__).parent.parent
Rows = list[list[str]]


@cache
def read(name: str) -> Any:
    """The content of a file in results/."""
    return json.loads((ROOT / "results" / f"{name}.json").read_text(encoding="utf-8"))


def pct(share: float, digits: int = 1) -> str:
    """`99.4 %`."""
    return f"{100 * share:.{digits}f} %"


def interval(accuracy: float, counts: Sequence[int]) -> str:
    """`99.4 % (98.3 to 99.8)` of an accuracy on so many problems of each task."""
    low, high = wilson_interval(accuracy, effective_count(counts))
    return f"{pct(accuracy)} ({100 * low:.1f} to {100 * high:.1f})"


def plus_minus(mean_and_std: Sequence[float], digits: int = 1) -> str:
    """`99.1 ± 0.4 %` of shares."""
    mean, std = mean_and_std
    return f"{100 * mean:.{digits}f} ± {100 * std:.{digits}f} %"


def millions(count: float) -> str:
    return f"{count / 1e6:.2f}M"


# --- recipes of the whole road ---------------------------------------------------------------


def sizes_of_recipe(name: str) -> Rows:
    """The sizes beside their parent."""
    report = read(name)
    per_task = [report["recipe"]["problems_per_task"]] * 10
    parent = report["parent"]
    rows = [
        ["parent", millions(parent["active"]), millions(parent["total"]), "",
         interval(parent["accuracy"], per_task), ""]
    ]  # fmt: skip
    for size, own in report["sizes"].items():
        untrained = own["untrained_accuracy"]
        rows.append([
            size,
            f"{millions(own['active'])} ({pct(own['active_share'])})",
            f"{millions(own['total'])} ({pct(own['total_share'])})",
            f"{own['kl_to_parent']:.4f}",
            interval(own["accuracy"], per_task),
            "" if untrained is None else pct(untrained),
        ])  # fmt: skip
    return rows


def widths_of_recipe(name: str) -> Rows:
    """What the router chose, and what had to be moved."""
    axes = ("hidden", "experts", "expert_ffn", "shared_ffn", "ssm_heads")
    return [
        [
            size,
            *(str(own["widths"][axis]) for axis in axes),
            ", ".join(f"{cost} {share}" for cost, share in own["budgets"].items()),
            pct(own["budget_miss"], 2),
            ", ".join(f"{axis} {step:+d}" for axis, step in own["repair"].items()) or "none",
        ]
        for size, own in read(name)["sizes"].items()
    ]  # fmt: skip


def plans_of_recipe(name: str) -> Rows:
    return [
        [
            own["label"], pct(own["accuracy"]), f"{own['flops'] / 1e6:.0f}",
            f"{own['bytes_per_token'] / 1e6:.2f}", f"{own['thinking_tokens']:.0f}",
            pct(own["cut_share"], 0),
        ]
        for own in sorted(read(name)["evaluations"], key=lambda own: own["flops"])
    ]  # fmt: skip


# --- budget control --------------------------------------------------------------------------


def tests_of_plans() -> dict[str, Any]:
    return {plan["label"]: plan["test"] for plan in read("budget_control")["plans"]}


def points(difference: Mapping[str, float]) -> str:
    """`+0.2 (-0.4 to +0.8)`."""
    mean, low, high = (100 * difference[key] + 0.0 for key in ("difference", "low", "high"))
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"


SHOWN_PLANS = (
    "large", "medium", "small", "large>medium", "large>small", "medium>large", "medium>small",
    "small>large", "small>medium", "medium~large 5%", "medium~large 5% lines", "small~large 5%",
    "small~large 5% lines", "small~medium 5%", "small~medium 5% lines", "large@72", "medium@72",
    "small@72", "small~medium 5%@72", "small~large 5%@72", "small>large@72", "large@56",
    "medium@56", "small@56", "small~medium 5%@56", "small~large 5%@56", "small>large@56",
)  # fmt: skip


def relative(label: str) -> dict[str, str]:
    """The costs of a plan over those of the large size alone without a budget."""
    tests, large = tests_of_plans(), tests_of_plans()["large"]
    replayed = {plan["label"]: plan["time_replayed"] for plan in read("replay")["plans"]}
    names = {"operations": "flops", "weight bytes": "weight_bytes", "in batches": "seconds"}
    found = {
        name: f"{tests[label][cost] / large[cost]:.2f}" for name, cost in names.items()
    }
    return {**found, "replayed": f"{replayed[label]:.2f}" if label in replayed else ""}


def budget_control() -> Rows:
    plans = {plan["label"]: plan for plan in read("budget_control")["plans"]}
    rows = []
    for label in SHOWN_PLANS:
        costs = relative(label)
        alone = label.partition("@")[0] == "large"
        rows.append([
            label, pct(plans[label]["test"]["accuracy"]),
            "" if alone else points(plans[label]["difference"]),
            costs["operations"], costs["weight bytes"], costs["replayed"], costs["in batches"],
        ])  # fmt: skip
    return rows


SIZES = ("large", "medium", "small")


def who_answers() -> Rows:
    tests = tests_of_plans()
    rows = []
    for think in SIZES:
        for budget in (56, 72, None):
            at = "" if budget is None else f"@{budget}"
            own = [
                tests[f"{think}{at}" if think == answer else f"{think}>{answer}{at}"]
                for answer in SIZES
            ]
            cut = [test["cut_accuracy"] if budget else None for test in own]
            rows.append([
                f"{think}, {budget or 'none'}", *(pct(test["accuracy"]) for test in own),
                pct(own[0]["cut_share"]), *("" if c is None else pct(c) for c in cut),
            ])  # fmt: skip
    return rows


def handed_over() -> Rows:
    rows = []
    for study in read("budget_control")["reuse"]:
        at = "" if study["budget"] is None else f"@{study['budget']}"
        cosines = [like["cosine"] for like in study["likeness"]]
        rows.append([
            f"{study['think']}>{study['answer']}{at}", pct(study["exact_accuracy"]),
            pct(study["handed_accuracy"]), pct(study["same_answers"]),
            f"{study['median_divergence']:.1e}", f"{study['mean_divergence']:.4f}",
            f"{min(cosines):.2f} to {max(cosines):.2f}",
        ])  # fmt: skip
    return rows


# --- nested against separate, ablations, axes ------------------------------------------------

NESTED_SIZES = ("medium", "small", "tiny")


def cells(name: str) -> dict[tuple[str, str], Any]:
    return {(row["arm"], row["size"]): row for row in read(name)["table"]}


def arms(name: str) -> list[str]:
    return list(dict.fromkeys(row["arm"] for row in read(name)["table"]))


def nested_accuracy() -> Rows:
    found = cells("nested_vs_separate")
    return [
        [
            arm, str(found[arm, "medium"]["runs"]), millions(found[arm, "medium"]["tokens"]),
            f"{found[arm, 'medium']['flops'] / 1e12:.1f}",
            *(plus_minus(found[arm, size]["accuracy"]) for size in NESTED_SIZES),
        ]
        for arm in arms("nested_vs_separate")
    ]  # fmt: skip


def nested_kl() -> Rows:
    found = cells("nested_vs_separate")
    return [
        [arm, *("{:.4f} ± {:.4f}".format(*found[arm, size]["kl"]) for size in NESTED_SIZES)]
        for arm in arms("nested_vs_separate")
    ]


def nested_minus() -> Rows:
    rows = []
    for arm, sizes in read("nested_vs_separate")["nested_minus"].items():
        spreads = [sizes[size]["accuracy"] for size in NESTED_SIZES]
        told = [f"{100 * mean:+.1f} ± {100 * std:.1f}" for mean, std in spreads]
        rows.append([arm, "accuracy, points", *told])
        spreads = [sizes[size]["kl"] for size in NESTED_SIZES]
        rows.append([arm, "KL", *(f"{mean:+.4f} ± {std:.4f}" for mean, std in spreads)])
    return rows


def ablations() -> Rows:
    found = cells("ablations")
    return [
        [
            arm,
            *(plus_minus(found[arm, size]["accuracy"]) for size in NESTED_SIZES),
            *(f"{found[arm, size]['kl'][0]:.4f}" for size in NESTED_SIZES),
        ]
        for arm in arms("ablations")
    ]  # fmt: skip


def axes_alone() -> Rows:
    return [
        [
            cut["name"], cut["metric"], pct(cut["saved"]), f"{cut['kl_untrained']:.4f}",
            f"{cut['kl_trained']:.4f}", pct(cut["accuracy_untrained"]),
            pct(cut["accuracy_trained"]),
        ]
        for cut in read("axes_alone")["cuts"]
    ]  # fmt: skip


# --- benchmarks on the CPU -------------------------------------------------------------------


def kl_memory() -> Rows:
    return [
        [
            precision, f"{own['tokens']:,}", f"{own['plain_peak_mb']:,.0f} MB",
            f"{own['chunked_peak_mb']:,.0f} MB", f"{own['time_chunked_over_plain']:.2f}",
            f"{own['all_tokens_chunked_peak_mb']:,.0f} MB",
        ]
        for precision, own in read("kl_memory")["precisions"].items()
    ]  # fmt: skip


def latency_table() -> Rows:
    return [
        [
            own["phase"], str(own["batch"]), str(own["context"]), str(own["grid_points"]),
            pct(own["median_error"]), pct(own["worst_error"]),
        ]
        for own in read("latency_table")["workloads"]
    ]  # fmt: skip


def training_follows_size() -> Rows:
    return [
        [
            size, f"{own['time_ratio']:.3f}", f"{own['flops_ratio']:.3f}",
            f"{own['time_ratio'] / own['flops_ratio']:.2f}",
        ]
        for size, own in read("size_cost")["training"].items()
    ]  # fmt: skip


def decoding_follows_size() -> Rows:
    return [
        [
            size, batch,
            *(f"{own[name]:.3f}" for name in ("of_large", "views_over_slice", "slice_over_slice")),
        ]
        for size, by_batch in read("size_cost")["decoding"].items()
        for batch, own in by_batch.items()
    ]  # fmt: skip


def resident_memory() -> Rows:
    rows = []
    for family, own in read("resident")["families"].items():
        pss = {name: memory["pss"] for name, memory in own["memory"].items()}
        parent = pss["parent"]
        rows.append([
            family, f"{own['megabytes']:.0f}", f"{parent / 2**20:.1f}",
            f"{pss['family'] / 2**20:.1f}", f"{pss['family'] / parent:.4f}", str(own["limit"]),
            f"{pss['gathered'] / parent:.3f}", f"{pss['slices'] / parent:.3f}",
            f"{pss['two processes'] / 2**20:.0f}",
        ])  # fmt: skip
    return rows


def resident_times() -> Rows:
    rows = []
    for family, found in read("resident")["families"].items():
        for size, own in found["sizes"].items():
            times = []
            for work in ("decode, batch 1", "decode, batch 16", "prefill of 512"):
                times += [own[work]["family over slice"], own[work]["slice again over slice"]]
            logits = own["logits_max_difference"] / own["logits_max"]
            rows.append([family, size, *(f"{time:.3f}" for time in times), f"{logits:.0e}"])
    return rows


def switching() -> Rows:
    return [
        [
            f"{own['missed']:,}", f"{own['share_of_text']:.3f}",
            *(f"{own[how]:.3f}" for how in ("catch-up", "reprefill", "hand-over")),
        ]
        for own in read("switching")["one_switch"]
    ]  # fmt: skip


def training_cost() -> Rows:
    return [
        [
            way, f"{own['time_ratio']:.3f}", f"{own['flops_ratio']:.3f}",
            f"{own['gflop_per_token_and_budget']:.3f}",
        ]
        for way, own in read("training_cost")["ways"].items()
    ]  # fmt: skip


# --- quantised -------------------------------------------------------------------------------


def quantised() -> Rows:
    rows = []
    for arm, sizes in read("quantised")["arms"].items():
        own = [sizes[size] for size in SIZES]
        of_bf16 = ["", "", ""]
        if arm != "BF16":
            of_bf16 = [plus_minus((s["of_bf16"]["mean"], s["of_bf16"]["std"])) for s in own]
        rows.append([
            arm, *(plus_minus((s["accuracy"], s["accuracy_std"])) for s in own), *of_bf16,
            *(f"{s['kl']:.4f}" for s in own),
        ])  # fmt: skip
    return rows


def quantised_bytes() -> list[str]:
    """Of the bundled family: the row of bytes."""
    found = read("quantised")["arms"]
    whole = [found["BF16"][size]["bytes"] for size in SIZES]
    row = ["bundled family, large / medium / small"]
    row.append(" / ".join(f"{count / 1e6:.2f}" for count in whole) + " MB")
    for arm in ("FP8 PTQ", "NVFP4 PTQ"):
        own = [found[arm][size]["bytes"] for size in SIZES]
        row.append(" / ".join(f"{a / b:.2f}" for a, b in zip(own, whole, strict=True)))
    return [*row, ""]


def quantising() -> Rows:
    formats = read("quantize")["formats"]
    plain = formats["unquantised"]
    rows = []
    for name, own in formats.items():
        made = ["", ""]
        if name != "unquantised":
            made = [
                f"{own['quantise_seconds'] / plain['slice_seconds']:.1f}",
                f"{own['quantise_peak_bytes'] / 2**20:.0f} MB",
            ]
        rows.append([
            name, f"{own['bytes'] / plain['bytes']:.3f}", *made,
            f"{own['slice_seconds'] / plain['slice_seconds']:.2f}",
            f"{own['slice_peak_bytes'] / 2**20:.0f} MB",
        ])  # fmt: skip
    return rows


# --- on a GPU --------------------------------------------------------------------------------


def nano_bytes() -> Rows:
    found = read("nano_v3")
    parent, shared = found["bytes"]["parent"], found["bytes"]["three_sizes"]
    apart = parent + sum(own["bytes"] for own in found["alone_smaller"].values())
    return [
        ["the 30B parent alone", f"{parent / 1e9:.2f} GB"],
        ["three sizes in one copy", f"{shared / 1e9:.2f} GB ({shared / parent:.4f})"],
        ["three models side by side", f"{apart / 1e9:.2f} GB"],
        ["three sizes in one copy, FP8", f"{found['fp8']['three_sizes'] / 1e9:.2f} GB"],
    ]


def nano_times() -> Rows:
    found = read("nano_v3")
    alone = {**found["alone"], **found["alone_smaller"]}
    rows = []
    for size, by_batch in found["shared"].items():
        for batch, own in by_batch.items():
            single, fp8 = alone[size][batch], found["fp8"]["sizes"][size][batch]
            ratio = own["decode_graph_ms"] / single["decode_graph_ms"]
            rows.append([
                size, batch, f"{own['prefill_ms']:.0f}", f"{single['prefill_ms']:.0f}",
                f"{own['decode_eager_ms']:.1f}", f"{own['decode_graph_ms']:.2f}",
                f"{single['decode_graph_ms']:.2f}", f"{ratio:.3f}", f"{fp8['prefill_ms']:.0f}",
                f"{fp8['decode_graph_ms']:.2f}",
            ])  # fmt: skip
    return rows


def nano_switches() -> Rows:
    return [
        [f"{own['missed']:,}", *(f"{own[how]:.1f}" for how in ("catch_up", "reprefill",
                                                               "hand_over"))]
        for own in read("nano_v3")["switches"]
    ]  # fmt: skip


def fp8_products() -> Rows:
    names = {
        "mamba in_proj": "Mamba's in_proj", "shared up_proj": "shared experts' up_proj",
        "head": "LM head (kept in BF16)", "routed up_proj": "routed experts' up_proj",
    }  # fmt: skip
    rows = [row for row in read("fp8_products")["rows"] if row["size"] == "30B"]
    return [
        [name, *(f"{r['fp8_us'] / r['bf16_us']:.2f}" for r in rows if r["layer"] == layer)]
        for layer, name in names.items()
    ]


def gpu_training() -> Rows:
    found = read("training_cost_gpu")
    return [
        [
            way, f"{own['time_ratio']:.3f}", f"{own['flops_ratio']:.3f}",
            f"{found['absolute'][way]['tokens_per_second']:,.0f}",
            f"{found['absolute'][way]['peak_bytes'] / 1e9:.2f} GB",
        ]
        for way, own in found["ways"].items()
    ]  # fmt: skip


def gpu_training_by_size() -> Rows:
    found = read("training_cost_gpu")
    rows = []
    for size, share in found["sizes"].items():
        row = [f"{size} ({pct(share, 0)}{' active' if size == 'large' else ''})"]
        for how in ("masked", "sliced"):
            own = found["absolute"][f"{size}, {how}, without the teacher"]
            row += [f"{own['tokens_per_second']:,.0f}", f"{own['peak_bytes'] / 1e9:.2f} GB"]
        rows.append(row)
    return rows


# --- SmolLM2 ---------------------------------------------------------------------------------


def smollm2() -> Rows:
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for cut in read("smollm2_cuts")["cuts"]:
        key = cut["axes"].replace("+", ", "), pct(cut["removed"])
        order = "random" if cut["order"].startswith("random") else cut["order"]
        found.setdefault(key, {}).setdefault(order, []).append(cut["perplexity"])
    orders = ("importance", "magnitude", "random")
    return [
        [*key, *(f"{sum(own[order]) / len(own[order]):,.1f}" for order in orders)]
        for key, own in found.items()
    ]
