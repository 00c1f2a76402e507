"""The procedural tasks: every answer recomputed, traces that lead to it, splits that never share.

The oracles below know nothing of the generators: they read the question's text and solve it anew.
"""

import inspect
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from star_elastic.evaluate.tasks import (
    SPLITS,
    TASKS,
    Problem,
    is_correct,
    messages,
    problem_key,
    sample_problems,
    split_of,
)

BUNDLED = Path(__file__).parents[1] / "star_elastic" / "bundled" / "parent"
NUM_PER_TASK = 200
MAX_SEQUENCE_TOKENS = 192


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def _solve_chain(text: str) -> str:
    program = text.split()[1]
    value = int(program[0])
    for op, operand in re.findall(r"([-+*])(\d)", program[1:]):
        value = eval(f"{value}{op}{operand}")
    return str(value % 10)


def _solve_rpn(text: str) -> str:
    stack: list[int] = []
    for token in re.findall(r"[-+*\d]", text.removeprefix("rpn ")):
        if token.isdigit():
            stack.append(int(token))
        else:
            right, left = stack.pop(), stack.pop()
            stack.append(eval(f"{left}{token}({right})"))
    (value,) = stack
    return str(value % 10)


def _solve_hops(text: str) -> str:
    *arrows, _, node, num_hops = text.split()[1:]
    target = {arrow[0]: arrow[1] for arrow in arrows}
    for _ in range(int(num_hops)):
        node = target[node]
    return node


def _solve_swaps(text: str) -> str:
    row, *swaps = text.split()[1:]
    letters = list(row)
    for x, y in swaps:
        i, j = letters.index(x), letters.index(y)
        letters[i], letters[j] = y, x
    return "".join(letters)


SOLVERS = {
    "add": lambda text: str(sum(_numbers(text))),
    "subtract": lambda text: str(_numbers(text)[0] - _numbers(text)[1]),
    "multiply": lambda text: str(_numbers(text)[0] * _numbers(text)[1]),
    "divide": lambda text: str(_numbers(text)[0] // _numbers(text)[1]),
    "modulo": lambda text: str(_numbers(text)[0] % _numbers(text)[1]),
    "chain": _solve_chain,
    "rpn": _solve_rpn,
    "sort": lambda text: "".join(sorted(text.split()[1:])),
    "hops": _solve_hops,
    "swaps": _solve_swaps,
}


# What is still to be done, read from one line of a trace, must give the answer: line by line.
def _finish_column(line: str, problem: Problem) -> str:
    if "=" not in line:
        return line
    parts = re.fullmatch(r"(\d+)([-+*])(\d+)[-+](\d)=(\d)(\d):(\d+)", line).groups()
    left, op, right, carry, next_carry, digit, result = parts
    right = right[::-1]
    back = -1 if op == "-" else 1
    first = eval(f"{int(left[0])}{op}{int(right[-1])}") + back * int(carry)
    assert first == 10 * back * int(next_carry) + int(digit)
    assert result[0] == digit
    whole = eval(f"{int(left[::-1])}{op}{int(right)}") + back * int(carry)
    return str(int(f"{whole // 10}{result}"))


def _finish_divide(line: str, problem: Problem) -> str:
    if "=" not in line:
        return line
    left, m, digit, quotient = re.fullmatch(r"(\d+)/(\d)=(\d):(\d+)", line).groups()
    assert int(left[:2]) // int(m) == int(digit) == int(quotient[-1])
    assert int(left) % int(m) == 0
    return str(int(quotient[:-1] + f"{int(left) // int(m):0{len(left) - 1}d}"))


def _finish_rpn(line: str, problem: Problem) -> str:
    stack, _, rest = line.partition("|")
    return _solve_rpn("rpn " + " ".join(stack[::-1]) + " " + rest)


def _finish_hops(line: str, problem: Problem) -> str:
    node, left = line.split(">")[1].split()
    return _solve_hops(re.sub(r"from \w \d", f"from {node} {left}", problem.question))


FINISHERS = {
    "add": _finish_column,
    "subtract": _finish_column,
    "multiply": _finish_column,
    "divide": _finish_divide,
    "modulo": lambda line, _: str(int(line.split("/")[0]) % int(line.split("/")[1])),
    "chain": lambda line, _: _solve_chain(f"chain {line}"),
    "rpn": _finish_rpn,
    "sort": lambda line, _: "".join(sorted(line.replace("|", ""))),
    "hops": _finish_hops,
    "swaps": lambda line, _: _solve_swaps(f"swaps {line}"),
}


@pytest.fixture(scope="module")
def problems() -> list[Problem]:
    return [p for split in SPLITS for p in sample_problems(TASKS, split, NUM_PER_TASK, seed=1)]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BUNDLED)


def test_answers_are_right(problems):
    for problem in problems:
        assert SOLVERS[problem.task](problem.question) == problem.answer, problem


def test_every_line_of_a_trace_leads_to_the_answer(problems):
    for problem in problems:
        for line in problem.steps:
            assert FINISHERS[problem.task](line, problem) == problem.answer, (line, problem)
        assert "\n" not in "".join(problem.steps)


def test_splits_share_no_key(problems):
    keys = {split: set() for split in SPLITS}
    for problem in problems:
        keys[split_of(problem)].add(problem_key(problem))
    assert not keys["train"] & keys["test"]
    assert not keys["train"] & keys["validation"]
    assert not keys["validation"] & keys["test"]
    assert all(len(found) == NUM_PER_TASK * len(TASKS) for found in keys.values())


def test_shares_of_the_splits():
    counts = dict.fromkeys(SPLITS, 0)
    rng = random.Random(0)
    for _ in range(4000):
        counts[split_of(TASKS["add"](rng))] += 1
    assert abs(counts["test"] / 4000 - 0.10) < 0.02
    assert abs(counts["validation"] / 4000 - 0.04) < 0.02


def test_reordered_operands_and_spacing_share_a_key():
    pair = [Problem("add", f"add {text}", (), "7") for text in ("12 345", " 345  12")]
    assert problem_key(pair[0]) == problem_key(pair[1])
    assert problem_key(pair[0]) != problem_key(Problem("add", "add 123 45", (), "7"))
    assert problem_key(pair[0]) != problem_key(Problem("modulo", "add 12 345", (), "7"))


def test_samples_are_the_same_in_another_process():
    code = (
        "from star_elastic.evaluate.tasks import *\n"
        "for p in sample_problems(TASKS, 'test', 5, 3): print(p)"
    )
    lines = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(BUNDLED.parents[1])},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    here = "".join(f"{problem}\n" for problem in sample_problems(TASKS, "test", 5, 3))
    assert lines == {here}


def test_smaller_samples_are_prefixes_and_tasks_are_independent():
    many = sample_problems(["chain"], "test", 20, seed=5)
    assert sample_problems(["add", "chain"], "test", 5, seed=5)[5:] == many[:5]


def test_held_out_problems_abound():
    for name in TASKS:
        assert len(sample_problems([name], "test", 400, seed=9)) == 400


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="split='dev' is not one of train"):
        sample_problems(TASKS, "dev", 1, 0)
    with pytest.raises(ValueError, match="task='adding' is unknown"):
        sample_problems(["adding"], "test", 1, 0)


def test_scoring_reads_what_follows_the_thinking():
    problem = Problem("add", "add 1 2", ("3",), "3")
    assert is_correct(problem, "1 2 0\n3\n</think>\n3")
    assert is_correct(problem, " 3\n")
    assert not is_correct(problem, "3\n</think>\n4")
    assert not is_correct(problem, "3\n</think>\n")
    assert not is_correct(problem, "3 or so")


def test_conversations_through_the_chat_template(problems, tokenizer):
    for problem in problems[:: NUM_PER_TASK // 10]:
        for thinking in (True, False):
            solved = messages(problem, thinking=thinking)
            whole = tokenizer.apply_chat_template(solved, tokenize=False)
            prompt = tokenizer.apply_chat_template(
                solved[:1], tokenize=False, add_generation_prompt=True, enable_thinking=thinking
            )
            trace = "\n".join(problem.steps)
            assert prompt.endswith(
                "<|im_start|>assistant\n" + ("<think>\n" if thinking else "<think></think>")
            )
            completion = (f"{trace}\n</think>\n" if thinking else "") + problem.answer
            assert whole == prompt + completion + "<|im_end|>"
            apart = tokenizer(prompt)["input_ids"] + tokenizer(completion)["input_ids"]
            ids = tokenizer(whole)["input_ids"]
            assert ids == [*apart, tokenizer.eos_token_id]
            assert len(ids) <= MAX_SEQUENCE_TOKENS
            assert (
                tokenizer.decode(
                    ids[len(apart) - len(tokenizer(completion)["input_ids"]) :],
                    skip_special_tokens=True,
                )
                == completion
            )
            assert is_correct(problem, completion)


def test_a_cut_trace_keeps_whole_lines(problems, tokenizer):
    problem = problems[0]
    text = tokenizer.apply_chat_template(messages(problem, num_steps=2), tokenize=False)
    assert f"<think>\n{problem.steps[0]}\n{problem.steps[1]}\n</think>\n{problem.answer}" in text


def test_tokenizer_is_small_and_splits_digits(tokenizer):
    assert len(tokenizer) <= 512 and len(tokenizer) % 64 == 0
    assert len(tokenizer("0123456789")["input_ids"]) == 10
    assert tokenizer.decode(tokenizer("naïve 50 % ok\n")["input_ids"]) == "naïve 50 % ok\n"
    for token in ("<|pad|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"):
        assert len(tokenizer(token)["input_ids"]) == 1
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token == "<|pad|>"


def test_docstrings_are_what_the_card_says_of_the_tasks():
    told = json.loads((BUNDLED / "card.json").read_text(encoding="utf-8"))["tasks"]
    for name, draw in TASKS.items():
        said = " ".join((inspect.getdoc(draw) or "").split())
        card = f"{told[name]['description']}: {told[name]['difficulty']}. State"
        assert said.startswith(card[:1].upper() + card[1:])
