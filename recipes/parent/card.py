"""Measure the exported parent on held-out problems and write its card: card.json and README.md.

The weights are the bfloat16 ones as shipped, loaded in fp32. Accuracy is greedy and exact, on
problems of the test split, which no training batch contains.

    python recipes/parent/card.py --run RUN_DIR --model star_elastic/bundled/parent
"""

import argparse
import inspect
import json
import os
from collections import Counter
from pathlib import Path

import torch
from accuracy import greedy_completions, num_correct_by_task
from data import TASK_WEIGHTS, pad_rows, split_conversation
from safetensors import safe_open
from train_parent import RouterLoad, micro_batch_loss
from transformers import AutoModelForCausalLM, AutoTokenizer, NemotronHForCausalLM

from star_elastic.evaluate.tasks import TASKS, Problem, messages, sample_problems

EVAL_SEED = 2026
LOAD_ROWS = 32

TEMPLATE = """\
# The bundled parent

A NemotronH-type hybrid (Mamba-2, attention, mixture of experts) of {num_parameters:,} parameters,
trained from scratch by `recipes/parent/`. It solves the ten procedural tasks below, thinking in
`<think>...</think>` or answering at once, and nothing else: it is a model to cut, train and measure
nested sizes on in minutes, not an assistant.

## Accuracy

Greedy, exact match, on {num_problems} test problems per task (split by a hash of the problem;
never trained on). Weights as shipped (bfloat16), computed in fp32. The standard error of a task's
accuracy is at most {max_error:.1f} points.

| task | what | difficulty | commonest answer | trace tokens | without thinking | with thinking |
|---|---|---|---|---|---|---|
{rows}
| **mean** | | | {majority:.1f} % | {trace_tokens:.0f} | {without:.1f} % | **{thinking:.1f} %** |

## Model

Layers `{pattern}` (M Mamba-2, * attention, E experts), hidden {hidden_size}, untied embeddings.

| part | size |
|---|---|
| Mamba-2 | {mamba_num_heads} heads of {mamba_head_dim}, {n_groups} groups, state {ssm_state_size} |
| attention | {num_attention_heads} query heads over {num_key_value_heads} KV heads of {head_dim} |
| experts | {n_routed_experts} of width {moe_intermediate_size}, {num_experts_per_tok} per token |
| shared expert | one of width {moe_shared_expert_intermediate_size} |
| tokenizer | byte-level BPE, {vocab_size} ids; one token per digit, capital, symbol |

Chat template: ChatML turns; `enable_thinking=False` closes the thinking at once. A conversation:

```
{example}
```

## Training

- Data: problems drawn on the fly from the training split of `star_elastic.evaluate.tasks`, seed
  {seed}: {full_percent:.0f} % with the full trace, {no_percent:.0f} % answered without thinking,
  {cut_percent:.0f} % with the trace cut at a random line end, so that a thinking budget degrades
  gracefully. Tasks drawn with weights {task_weights} (the others 1). No other text. Loss on the
  assistant's turns only.
- {steps:,} steps of {sequences_per_step} conversations, {tokens:,} tokens, {targets:,} of them
  with loss; {minutes:.0f} minutes on {hardware}.
- AdamW, peak learning rate {peak_lr}, warm-up, constant, linear decay to zero over the last
  {decay_percent:.0f} %; fp32 weights, bfloat16 autocast.
- Experts balanced without an auxiliary loss (correction biases, kept in fp32). Load of the busiest
  expert over the mean, per layer, on test conversations: {loads}.
{note}
## Limits

Only these tasks, in exactly this wording and difficulty. Arithmetic of the tasks `chain` and `rpn`
is modulo 10. Apache-2.0, like the package.
"""


def measure_load(model: NemotronHForCausalLM, tokenizer, problems: list[Problem]) -> list[float]:
    """Busiest expert over mean expert, per expert layer, on solved conversations."""
    load = RouterLoad(model)
    with torch.no_grad():
        for start in range(0, len(problems), LOAD_ROWS):
            pairs = [
                split_conversation(tokenizer, messages(problem))
                for problem in problems[start : start + LOAD_ROWS]
            ]
            prompts, answers = (
                tokenizer(list(part))["input_ids"] for part in zip(*pairs, strict=True)
            )
            batch = pad_rows(prompts, answers, tokenizer.pad_token_id)
            micro_batch_loss(model, batch, load, num_targets=1)
    return [round(x, 2) for x in (load.counts_LE.amax(1) / load.counts_LE.mean(1)).tolist()]


def measure(model_dir: Path, run_dir: Path, *, num_problems: int, hardware: str) -> dict:
    """Everything the card states, as plain data."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    problems = sample_problems(TASKS, "test", num_problems, EVAL_SEED)
    correct = {
        thinking: num_correct_by_task(
            problems,
            greedy_completions(model, tokenizer, problems, thinking=thinking, batch_size=256),
        )
        for thinking in (True, False)
    }
    tasks = {}
    for name, draw in TASKS.items():
        said = " ".join((inspect.getdoc(draw) or "").split()).partition(". State")[0]
        description, _, difficulty = said.partition(": ")
        mine = [problem for problem in problems if problem.task == name]
        traces = tokenizer(["\n".join(problem.steps) for problem in mine])["input_ids"]
        most_common = Counter(problem.answer for problem in mine).most_common(1)[0][1]
        tasks[name] = {
            "description": description[:1].lower() + description[1:],
            "difficulty": difficulty,
            "num_test_problems": num_problems,
            "majority_accuracy": round(most_common / num_problems, 4),
            "mean_trace_tokens": round(sum(map(len, traces)) / num_problems, 1),
            "accuracy_thinking": round(correct[True][name] / num_problems, 4),
            "accuracy_without_thinking": round(correct[False][name] / num_problems, 4),
        }
    with safe_open(run_dir / "checkpoint.safetensors", "pt") as file:
        metadata = file.metadata()
    return {
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "eval_seed": EVAL_SEED,
        "example": tokenizer.apply_chat_template(messages(problems[0]), tokenize=False),
        "tasks": tasks,
        "training": {
            **json.loads(metadata["position"]),
            **json.loads(metadata["run"]),
            "task_weights": TASK_WEIGHTS,
            "hardware": hardware,
        },
        "load_max_over_mean": measure_load(
            model, tokenizer, problems[:: max(1, num_problems // 30)]
        ),
    }


def render(card: dict, config: dict) -> str:
    """The card as Markdown."""
    tasks = card["tasks"].values()

    def mean(field: str) -> float:
        return sum(task[field] for task in tasks) / len(tasks)

    rows = "\n".join(
        f"| {name} | {task['description']} | {task['difficulty']} "
        f"| {task['majority_accuracy']:.1%} | {task['mean_trace_tokens']:.0f} "
        f"| {task['accuracy_without_thinking']:.1%} | {task['accuracy_thinking']:.1%} |"
        for name, task in card["tasks"].items()
    ).replace("%", " %")
    training = card["training"]
    num_problems = next(iter(tasks))["num_test_problems"]
    return TEMPLATE.format(
        **{key: value for key, value in config.items() if isinstance(value, int)},
        num_parameters=card["num_parameters"],
        pattern=config["hybrid_override_pattern"],
        num_problems=num_problems,
        max_error=100 * (0.25 / num_problems) ** 0.5,
        rows=rows,
        example=card["example"],
        note=f"- {training['note']}\n" if training["note"] else "",
        task_weights=", ".join(f"{k} {v}" for k, v in training["task_weights"].items()),
        majority=100 * mean("majority_accuracy"),
        trace_tokens=mean("mean_trace_tokens"),
        without=100 * mean("accuracy_without_thinking"),
        thinking=100 * mean("accuracy_thinking"),
        minutes=training["seconds"] / 60,
        full_percent=100 * training["full_trace_share"],
        no_percent=100 * training["no_trace_share"],
        cut_percent=100 * (1 - training["full_trace_share"] - training["no_trace_share"]),
        decay_percent=100 * training["decay_share"],
        steps=training["step"],
        loads=", ".join(f"{x:.2f}" for x in card["load_max_over_mean"]),
        **{
            key: training[key]
            for key in ("seed", "sequences_per_step", "tokens", "targets", "hardware", "peak_lr")
        },
    )


def main() -> None:
    """Parse the command line, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--run", type=Path, required=True, help="the training run's directory")
    parser.add_argument("--model", type=Path, required=True, help="the exported model")
    parser.add_argument("--num-problems", type=int, default=300, help="test problems per task")
    parser.add_argument("--hardware", default="2 CPU cores", help="the machine, for the card")
    parser.add_argument("--note", default="", help="what else was particular about the run")
    args = parser.parse_args()
    card = measure(args.model, args.run, num_problems=args.num_problems, hardware=args.hardware)
    card["training"]["note"] = args.note
    config = json.loads((args.model / "config.json").read_text())
    for name, text in (
        ("card.json", json.dumps(card, indent=2) + "\n"),
        ("README.md", render(card, config)),
    ):
        partial = args.model / f"{name}.partial"
        partial.write_text(text)
        os.replace(partial, args.model / name)
    print(render(card, config))


if __name__ == "__main__":
    main()
