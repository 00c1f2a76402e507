"""Tables of docs/results.md made from the files in results/: benchmarks, formats, GPUs, SmolLM2."""

from __future__ import annotations

from typing import Any

from tests.figures import SIZES, Rows, pct, plus_minus, read

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


def planted_axes() -> Rows:
    return [
        [
            steps,
            *(f"{own[name]} of {own['cases']}" for name in ("argmax_right", "widths_right")),
            f"{own['from_data']} of {own['cases']}",
        ]
        for steps, own in read("planted_axes")["summary"].items()
    ]


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
