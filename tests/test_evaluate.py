"""Accuracy, counted cost and the Pareto plot, on a tiny model that has learnt a few problems."""

import json
import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, NemotronHConfig

from star_elastic import bundled
from star_elastic.architectures import architecture_of
from star_elastic.cost.count import CostModel, Workload
from star_elastic.errors import CheckpointError, ConfigError
from star_elastic.evaluate.accuracy import Evaluation, Trial, evaluate_plan, solve, summarise
from star_elastic.evaluate.intervals import wilson_interval
from star_elastic.evaluate.tasks import messages, sample_problems
from star_elastic.generate.engine import Generator
from star_elastic.generate.phases import ANSWERING, THINKING, think_and_answer
from star_elastic.report.charts import PlansChart, pareto_front, plot_plans

MAX_TRAIN_STEPS = 300
SIZES = ("trained", "random", "hybrid")


def train(model, tokenizer, problems) -> None:
    """Learns the problems by heart, with and without their traces."""
    talks = [messages(p, thinking=thinking) for p in problems for thinking in (True, False)]
    batch = tokenizer(
        tokenizer.apply_chat_template(talks, tokenize=False),
        padding=True,
        padding_side="right",
        return_tensors="pt",
    )
    ids = batch["input_ids"]
    # Without the question, and without whether there is a trace: the rest can be known by heart.
    opened = (ids == tokenizer.convert_tokens_to_ids("<think>")).cumsum(-1).cumsum(-1) > 2
    labels = ids.masked_fill((batch["attention_mask"] == 0) | ~opened, -100)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(MAX_TRAIN_STEPS):
        loss = model(**batch, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss.item() < 0.02:
            return
    raise AssertionError(f"not learnt: {loss.item():.3f} nats per token")


@pytest.fixture(scope="module")
def problems():
    return sample_problems(["sort", "modulo"], "train", 2, 0)


@pytest.fixture(scope="module")
def generator(problems):
    tokenizer = AutoTokenizer.from_pretrained(bundled.PARENT)
    shared = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
    }
    dense = LlamaConfig(**shared, intermediate_size=64, num_hidden_layers=2)
    hybrid = NemotronHConfig(
        **shared,
        layers_block_type=["mamba", "moe", "attention"],
        mamba_num_heads=4,
        mamba_head_dim=8,
        n_groups=2,
        ssm_state_size=8,
        chunk_size=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        moe_shared_expert_intermediate_size=16,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        configs = (dense, dense, hybrid)
        built = [AutoModelForCausalLM.from_config(config).eval() for config in configs]
    models = dict(zip(SIZES, built, strict=True))
    train(models["trained"], tokenizer, problems)
    return Generator(models, tokenizer, "\n</think>\n")


def test_what_was_learnt_is_scored_right(generator, problems):
    result = evaluate_plan(generator, problems, think_and_answer("trained", "trained"))
    assert result.per_task == {"sort": 1.0, "modulo": 1.0}
    assert (result.accuracy, result.cut_share, result.no_answer_share) == (1.0, 0.0, 0.0)
    assert result.interval == (pytest.approx(4 / (4 + 1.959964**2)), 1.0)
    count = [len(generator.tags.encode("\n".join(p.steps) + "\n")) for p in problems]
    assert result.thinking_tokens == sum(count) / len(count)
    assert result.seconds > 0
    assert json.loads(json.dumps(result.to_json()))["label"] == "trained"


def test_no_thinking_and_pairs(generator, problems):
    silent = evaluate_plan(
        generator, problems, think_and_answer("random", "trained", thinking_budget=0)
    )
    assert (silent.accuracy, silent.thinking_tokens, silent.label) == (1.0, 0.0, "trained@0")
    assert silent.kind == "single"
    options = {"thinking_budget": 8, "grace": 4, "max_new_tokens": 40}
    pair = evaluate_plan(generator, problems, think_and_answer("trained", "random", **options))
    assert (pair.accuracy, pair.cut_share, pair.label) == (0.0, 1.0, "trained>random@8")
    assert pair.kind == "pair"
    assert 8 <= pair.thinking_tokens <= 12


def test_unfinished_traces_score_nothing(generator, problems):
    """A right answer at the end of a trace is no answer."""
    plan = think_and_answer("trained", "trained", max_new_tokens=12)
    result = evaluate_plan(generator, problems, plan)
    assert (result.accuracy, result.answer_tokens, result.cut_share) == (0.0, 0.0, 1.0)


def test_cut_traces_are_scored_by_themselves(generator, problems):
    plan = think_and_answer("trained", "trained")
    outcomes, seconds = solved = solve(generator, problems, plan)
    assert summarise(plan, problems, solved, 64).cut_accuracy is None
    marks = [(True, True), (True, False), (True, False), (False, True)]
    mixed = [
        replace(outcome, is_cut=is_cut, is_right=is_right)
        for outcome, (is_cut, is_right) in zip(outcomes, marks, strict=True)
    ]
    found = summarise(plan, problems, Trial(mixed, seconds), 64)
    assert (found.cut_share, found.cut_accuracy) == (0.75, pytest.approx(1 / 3))


def test_an_interval_is_that_of_the_mean_over_tasks(generator, problems):
    """One of two right in one task, both right in the other."""
    wrong = [problems[0], *sample_problems(["sort"], "test", 1, 0), *problems[2:]]
    result = evaluate_plan(generator, wrong, think_and_answer("trained", "trained"))
    assert result.per_task == {"sort": 0.5, "modulo": 1.0}
    assert result.accuracy == 0.75
    assert result.interval == (pytest.approx(0.3006, abs=1e-4), pytest.approx(0.9544, abs=1e-4))
    # A task with more problems than another one has no more weight: 4 of 5 are right here.
    unlike = [*wrong, problems[2]]
    result = evaluate_plan(generator, unlike, think_and_answer("trained", "trained"))
    assert (result.accuracy, result.num_problems) == (0.75, 5)
    assert result.interval == pytest.approx(wilson_interval(0.75, 4 / (1 / 2 + 1 / 3)))


@pytest.mark.parametrize(("think", "answer"), [("hybrid", "hybrid"), ("hybrid", "trained")])
def test_cost_is_counted_token_by_token(generator, problems, think, answer):
    plan = think_and_answer(think, answer, thinking_budget=6, grace=3, max_new_tokens=30)
    result = evaluate_plan(generator, problems, plan, batch_size=3)
    generations = generator.generate([messages(p)[:1] for p in problems], plan, batch_size=3)
    flops, num_bytes, decoded = 0.0, 0.0, 0
    for generation in generations:
        context = 0
        for phase in generation.phases:
            if phase.prefill_tokens:
                context = 0
            for number in range(phase.prefill_tokens + phase.decode_steps):
                context += 1
                cost = count_at(generator, phase.size, context)
                predicts = number >= phase.prefill_tokens - 1
                flops += cost.flops_per_token if predicts else cost.prefill_flops_per_token
            num_bytes += phase.decode_steps * weight_bytes(generator, phase.size)
            decoded += phase.decode_steps
        num_seen = generation.prompt_tokens + len(generation.token_ids) - 1
        num_read = sum(phase.prefill_tokens + phase.decode_steps for phase in generation.phases)
        if think == answer:
            assert num_read == num_seen
        elif generation.phase(ANSWERING):
            trace = generation.phase(THINKING).tokens
            assert num_read == num_seen + generation.prompt_tokens + trace
    assert result.flops == pytest.approx(flops / len(problems), rel=1e-12)
    assert result.bytes_per_token == pytest.approx(num_bytes / decoded, rel=1e-12)


def count_at(generator, size: str, context: int):
    """The package's exact counts of a model at its own widths."""
    config = generator.models[size].config.to_dict()
    table = architecture_of(config).axis_map(config)
    return CostModel(table, Workload(context=context)).count(table.full)


def weight_bytes(generator, size: str) -> int:
    """Bytes of fp32 weights that one token needs, counted over the model itself."""
    total = 0
    for name, parameter in generator.models[size].named_parameters():
        if "embed" in name:
            continue
        routed = ".experts." in name
        total += 4 * parameter.numel() * (2 if routed else 4) // 4  # 2 of 4 experts
    return total


def test_no_problem_is_a_mistake(generator):
    with pytest.raises(ConfigError, match="there is no problem to evaluate"):
        evaluate_plan(generator, [], think_and_answer("trained", "trained"))


# --- the Pareto front ------------------------------------------------------------------------

SCORES = st.integers(0, 6).map(float)


@given(st.lists(st.tuples(SCORES, SCORES), max_size=12))
def test_front_holds_exactly_what_nothing_beats(points):
    front = pareto_front(points)

    def beats(one, other):
        return one[0] <= other[0] and one[1] >= other[1] and one != other

    best = {point for point in points if not any(beats(other, point) for other in points)}
    assert {points[i] for i in front} == best
    assert len(front) == len(best)
    assert [points[i] for i in front] == sorted(best)


def make_evaluation(label: str, seconds: float, accuracy: float) -> Evaluation:
    think, _, answer = label.partition(">")
    return Evaluation(
        label=label,
        think=think,
        answer=answer or think,
        thinking_budget=None,
        num_problems=10,
        accuracy=accuracy,
        interval=(accuracy / 2, (1 + accuracy) / 2),
        per_task={"sort": accuracy},
        thinking_tokens=10.0,
        answer_tokens=3.0,
        cut_share=0.0,
        batch_size=64,
        seconds=seconds,
        flops=seconds * 1e11,
        bytes_per_token=1e6,
    )


def test_plot_is_a_small_png(tmp_path):
    results = [
        make_evaluation(f"size{i}" if i % 2 else f"size{i}>size{i + 1}", 0.01 * (i + 1), 0.03 * i)
        for i in range(30)
    ]
    file = tmp_path / "pareto.png"
    plot_plans(results, file, title="Sizes and pairs")
    assert file.read_bytes().startswith(b"\x89PNG")
    assert 20_000 < file.stat().st_size < 300_000
    plot_plans(results[:1], file)
    assert list(tmp_path.iterdir()) == [file]


def test_error_bars_end_where_the_intervals_do():
    """Down to the lower end and up to the upper one, which lie at different distances."""
    results = [make_evaluation("size", 0.1, 0.9), make_evaluation("one>other", 0.2, 0.4)]
    panel = Figure().subplots()
    PlansChart(results, "seconds", ()).draw(panel)
    bars = [segment for c in panel.containers for segment in c.lines[2][0].get_segments()]
    found = [end for bar in bars for end in (bar[0, 1], bar[1, 1])]
    assert found == pytest.approx([0.45, 0.95, 0.2, 0.7])


def test_a_chart_of_a_page_takes_its_colours_from_the_page():
    """And its marks tell their plans, its labels can be read as text, and no two differ."""
    results = [make_evaluation("a & b", 0.1, 0.9), make_evaluation("one>other", 0.2, 0.4)]
    chart = PlansChart(results, "seconds", ["a & b"], ["one>other"])
    drawn = chart.svg()
    assert drawn == chart.svg()
    root = ElementTree.fromstring(drawn.replace("xlink:href", "href"))
    assert root.get("role") == "img" and "measured time" in root.get("aria-label")
    texts = [element.text for element in root.iter("text")]
    assert {"a & b", "one>other", "the largest size alone", "100 ms", "80%"} <= set(texts)
    assert [element.text for element in root.iter("title")] == [
        "a & b: 90.0% (45.0 to 95.0) at 100.0 ms", "one>other: 40.0% (20.0 to 70.0) at 200.0 ms",
    ]  # fmt: skip
    colours = set(re.findall(r"(?:fill|stroke): ([^;\"]+)", drawn)) - {"none"}
    assert colours == {f"var(--{name})" for name in ("soft", "line", "single", "pair", "card")}
    ids = {element.get("id") for element in root.iter() if element.get("id")}
    assert {element.get("href") for element in root.iter("use")} <= {f"#{name}" for name in ids}


def test_plot_mistakes(tmp_path):
    with pytest.raises(ConfigError, match="there is no result to plot"):
        plot_plans([], tmp_path / "pareto.png")
    with pytest.raises(CheckpointError, match="cannot be written"):
        plot_plans([make_evaluation("size", 0.1, 0.5)], tmp_path / "missing" / "pareto.png")
