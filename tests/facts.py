"""Sentences of README.md and docs/results.md with figures in them, and where tables stand.

Every sentence is made from the file in results/ that its figures are of, and must stand there
letter by letter (test_figures.py).
"""

from __future__ import annotations

from tests import figures
from tests import figures_measured as measured
from tests.figures import NESTED_SIZES, SIZES, Rows, pct, read


def results_tables() -> dict[str, list[Rows]]:
    """The tables of docs/results.md by the heading they stand under, from the top."""
    nano_formats = ["true Nano v3, 30B / 23B / 12B (counted)"]
    return {
        "The demo": [figures.sizes_of_recipe("demo"), figures.widths_of_recipe("demo")],
        "The hour": [
            figures.sizes_of_recipe("hour"),
            figures.widths_of_recipe("hour"),
            figures.plans_of_recipe("hour"),
        ],
        "Budget control": [figures.budget_control(), figures.who_answers(), figures.handed_over()],
        "Nested against separate": [
            figures.nested_accuracy(),
            figures.nested_kl(),
            figures.nested_minus(),
        ],
        "The papers' ablations": [figures.ablations()],
        "Memory of the divergence": [measured.kl_memory()],
        "Latency tables": [measured.latency_table()],
        "Each axis alone": [figures.axes_alone()],
        "Planted axes": [measured.planted_axes()],
        "Cost follows size": [measured.training_follows_size(), measured.decoding_follows_size()],
        "One resident copy": [measured.resident_memory(), measured.resident_times()],
        "Switching": [measured.switching()],
        "What a training step costs": [measured.training_cost()],
        # Of the second table's last row the sizes are counted, not measured: no file has them.
        "Quantised sizes": [
            measured.quantised(),
            [measured.quantised_bytes(), nano_formats],
            measured.quantising(),
        ],
        "On a GPU: the true Nano v3 shape": [
            measured.nano_bytes(),
            measured.nano_times(),
            measured.nano_switches(),
            measured.fp8_products(),
        ],
        "On a GPU: training": [measured.gpu_training(), measured.gpu_training_by_size()],
        "SmolLM2-135M, real weights": [measured.smollm2()],
    }  # fmt: skip


def less(ratio: str, digits: int = 0) -> str:
    """`26 %` of a ratio that is shown as 0.74."""
    return pct(1 - float(ratio), digits)


def readme_facts() -> list[str]:
    """Sentences of README.md, beside its table."""
    hour = read("hour")
    medium, mixed = map(figures.relative, ("medium", "small~medium 5%"))
    tests = figures.tests_of_plans()
    minus = read("nested_vs_separate")["nested_minus"]
    nested = [100 * minus["separate T/N"][size]["accuracy"][0] for size in NESTED_SIZES]
    behind = -100 * minus["separate T"]["tiny"]["accuracy"][0]
    shared, gpu_shared = (
        read(name)["ways"]["shared teacher"] for name in ("training_cost", "training_cost_gpu")
    )
    resident, nano = read("resident")["families"]["hybrid"], read("nano_v3")
    slowest = max(float(row[7]) for row in measured.nano_times())
    arms_of = read("quantised")["arms"]
    fp8 = [100 * arms_of["FP8 PTQ"][size]["of_bf16"]["mean"] for size in SIZES]
    nvfp4 = [100 * arms_of["NVFP4 QAD"][size]["of_bf16"]["mean"] for size in SIZES]
    assert tests["medium"]["accuracy"] == tests["small~medium 5%"]["accuracy"]
    return [
        f"({hour['training']['seconds']:,.0f} s of training;",
        f"({hour['parent']['total'] / 1e6:.1f}M parameters, ten procedural tasks, "
        f"{hour['evaluations'][0]['num_problems']} held-out problems, 95 % intervals)",
        "nested beats three separate runs by "
        f"{nested[0]:.0f}, {nested[1]:.0f} and {nested[2]:.0f} points (70, 50 and 35 % of",
        f"{behind:.0f} points behind at 35 %.",
        f"A step with a shared teacher costs {shared['time_ratio']:.2f} of one with full-width "
        f"masks on CPU, {gpu_shared['time_ratio']:.2f} on an H200",
        f"{tests['large']['num_problems']:,} problems are solved as well as by the large size "
        f"alone ({100 * tests['small~medium 5%']['accuracy']:.1f} against "
        f"{pct(tests['large']['accuracy'])}) for {less(mixed['operations'])} fewer operations and "
        f"{less(mixed['weight bytes'])} fewer weight bytes.",
        f"The medium size alone solves as many, for {less(medium['operations'])} and "
        f"{less(medium['weight bytes'])} fewer.",
        f"Three sizes of a {resident['parameters'] / 1e6:.0f}M hybrid hold "
        f"{resident['memory']['family']['pss'] / resident['memory']['parent']['pss']:.3f} times "
        "the memory of its parent;",
        f"{nano['bytes']['three_sizes'] / 1e9:.1f} GB on a GPU in BF16 (30B alone: "
        f"{nano['bytes']['parent'] / 1e9:.1f}), {nano['fp8']['three_sizes'] / 1e9:.1f} in FP8, "
        f"decoding within {pct(slowest - 1)} of each alone.",
        f"FP8 after training keeps {min(fp8):.1f} to {max(fp8):.1f} % of BF16's accuracy;",
        "NVFP4 healed by distillation " + " / ".join(f"{share:.1f}" for share in nvfp4)
        + " % (large / medium / small, three seeds)",
    ]  # fmt: skip


def results_facts() -> list[str]:
    """Sentences of docs/results.md."""
    hour, demo, replay = read("hour"), read("demo"), read("replay")
    control = read("budget_control")
    tests = figures.tests_of_plans()
    medium, small, mixed, helped = map(
        figures.relative, ("medium", "small", "small~medium 5%", "small~large 5%")
    )
    lost = tests["small"]["accuracy"] - tests["large"]["accuracy"]
    cheap = tests["small"]["flops"] / tests["large@72"]["flops"]
    cut = [test["cut_accuracy"] for label, test in tests.items()
           if "@" in label and "~" not in label]  # fmt: skip
    silent = [e["accuracy"] for e in hour["evaluations"] if e["thinking_budget"] == 0]
    shared = [test["seconds"] / tests["large"]["seconds"] for label, test in tests.items()
              if "~" in label and "@" not in label]  # fmt: skip
    nested = {row["arm"]: row for row in read("nested_vs_separate")["table"]}
    minus = read("nested_vs_separate")["nested_minus"]
    equal = [100 * minus["separate T/N"][size]["accuracy"][0] for size in NESTED_SIZES]
    resident = read("resident")["families"]
    loaded = {name: own["memory"]["family"]["pss_loaded"] / 2**20 for name, own in resident.items()}
    within = [
        own[work]["family over slice"] < 1.03
        or own[work]["family over slice"] < own[work]["slice again over slice"]
        for found in resident.values()
        for own in found["sizes"].values()
        for work in ("decode, batch 1", "decode, batch 16", "prefill of 512")
    ]
    plain = read("kl_memory")["precisions"]["fp32"]
    turns = read("switching")["back_and_forth"]
    shares = read("training_cost")["sizes"]
    quant = read("quantised")["arms"]

    def gain(ours: str, theirs: str) -> list[str]:
        return [
            f"{100 * (quant[ours][size]['accuracy'] - quant[theirs][size]['accuracy']):+.1f}"
            for size in SIZES
        ]

    def decoding(own: dict) -> list[float]:
        return [by_batch["decode_graph_ms"] for by_batch in own.values()]

    nano = {size: decoding(own) for size, own in read("nano_v3")["shared"].items()}
    fp8 = decoding(read("nano_v3")["fp8"]["sizes"]["30B"])
    speed = [small / large for small, large in zip(nano["12B"], nano["30B"], strict=True)]
    faster = [whole / codes for whole, codes in zip(nano["30B"], fp8, strict=True)][1:]
    run = read("nested_run")
    one = run["one_size_a_step"]
    smol = read("smollm2_cuts")
    return [
        f"`make demo`: {demo['training']['steps']} steps, "
        f"{demo['training']['tokens_per_size'] / 1e6:.2f}M tokens per size, "
        f"{demo['training']['seconds']:.0f} s of training",
        f"{len(demo['evaluations'])} plans on {demo['evaluations'][0]['num_problems']} held-out "
        "problems",
        f"{hour['training']['steps']:,} steps, "
        f"{hour['training']['tokens_per_size'] / 1e6:.2f}M tokens per size, "
        f"{hour['training']['seconds']:,.0f} s of training on two cores,",
        f"{hour['evaluations'][0]['num_problems']} held-out problems (`results/hour.json`)",
        f"{len(control['plans'])} plans on {sum(control['problems']['test'].values()):,} test "
        f"problems, chosen on {sum(control['problems']['validation'].values())} others",
        f"as accurate as large alone ({100 * tests['small~medium 5%']['accuracy']:.1f} against "
        f"{pct(tests['large']['accuracy'])}) for {less(mixed['operations'])} fewer operations and "
        f"{less(mixed['weight bytes'])} fewer weight bytes.",
        f"as accurate ({pct(tests['medium']['accuracy'])}), {less(medium['operations'])} fewer "
        f"operations, {less(medium['weight bytes'])} fewer bytes, and no policy.",
        f"read again by a hybrid of {replay['parameters'] / 1e6:.0f}M parameters with random "
        "weights.",
        f"takes {less(mixed['replayed'])} less than large alone, medium alone "
        f"{less(medium['replayed'])} less; the small size alone, {less(small['replayed'])} less, "
        f"loses {-100 * lost:.1f} points.",
        f"it is {less(helped['operations'])} fewer operations, {less(helped['weight bytes'])} "
        f"fewer bytes and {less(helped['replayed'])} less time.",
        f"bound the gain here at {control['sizes']['small']['bandwidth_bound']:.1f} times at batch "
        f"1, and this small size alone, with {small['weight bytes']} of the bytes, reaches "
        f"{1 / float(small['replayed']):.2f} on this machine.",
        f"{pct(tests['small~medium 5%']['accuracy'])} against "
        f"{100 * tests['large@72']['accuracy']:.1f} / {pct(tests['large@56']['accuracy'])}:",
        f"small alone ({pct(tests['small']['accuracy'])}) takes {pct(1 - cheap, 0)} fewer "
        "operations.",
        f"(small alone {small['in batches']}, medium alone {medium['in batches']})",
        f"the choice by difficulty takes {min(shared):.1f} to {max(shared):.1f} times as long as "
        f"large alone (*small~medium 5%*: {mixed['in batches']}).",
        f"{100 * min(cut):.0f} to {pct(max(cut), 0)} are right whoever answers (and without any "
        f"trace {100 * min(silent):.0f} to {pct(max(silent), 0)}, see the hour)",
        "nested is better at every size, by {:.0f}, {:.0f} and {:.0f} points.".format(*equal),
        f"for {nested['nested']['flops'] / 1e12:.1f} instead of "
        f"{nested['separate T/N']['flops'] / 1e12:.1f} TFLOP.",
        f"behind by {-100 * minus['separate T']['tiny']['accuracy'][0]:.1f} points",
        f"({nested['nested']['flops'] / 1e12:.1f} against "
        f"{nested['separate T']['flops'] / 1e12:.1f} TFLOP)",
        f"would hold {plain['all_tokens_fp32_logits_of_both_mb']:,.0f} MB for the two logits alone",
        f"{loaded['hybrid']:.0f} MiB (hybrid, all axes) and {loaded['llama']:.0f} MiB (llama) "
        "where it has.",
        f"{sum(within)} of the {len(within)} are within 3 % or A/A.",
        f"cost {turns['catch-up']:.2f} of reading the text once in each size in as many pieces; by "
        f"reprefill {turns['reprefill']:.2f}.",
        "three sizes (" + " / ".join(f"{100 * share:.0f}" for share in shares.values())
        + " % of the active parameters,",
        "**QAD over PTQ** in NVFP4: {}, {} and {} points".format(*gain("NVFP4 QAD", "NVFP4 PTQ")),
        "**QAD over QAT**: {}, {} and {} points".format(*gain("NVFP4 QAD", "NVFP4 QAT")),
        "QAD does not hurt FP8: {}, {} and {} points".format(*gain("FP8 QAD", "BF16")),
        "12B over 30B {:.2f} / {:.2f} / {:.2f} at batch 1 / 32 / 128".format(*speed),
        f"30B decodes {min(faster):.2f} to {max(faster):.2f} times as fast at batch 32 and 128;",
        f"{run['stages'][0]['tokens_per_second']:,.0f} tokens/s while the router learns and "
        f"{run['stages'][1]['tokens_per_second']:,.0f} as slices",
        " / ".join(f"{one[size]['tokens_per_second']:,.0f}" for size in SIZES)
        + " tokens/s (large / medium / small);",
        f"{run['peak_bytes'] / 1e9:.1f} GB at the peak.",
        f"Parent: perplexity {smol['parent']['perplexity']:.1f} (bfloat16, "
        f"{smol['evaluation']['predicted_tokens']:,} Wikipedia tokens).",
    ]  # fmt: skip


def commands() -> list[str]:
    """What made the files, as docs/results.md has it, up to where the result goes."""
    own = [
        "axes_alone", "ablations", "kl_memory", "latency_table", "nested_vs_separate",
        "fp8_products", "nano_v3", "nested_run", "quantize", "replay", "size_cost", "switching",
        "training_cost", "training_cost_gpu",
    ]  # fmt: skip
    return [read("budget_control")["command"], *(read(name)["command"] for name in own),
            *read("resident")["command"]]  # fmt: skip
