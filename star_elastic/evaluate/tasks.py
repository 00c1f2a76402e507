"""Procedural reasoning tasks with worked traces: what the bundled parent thinks about.

Each task draws a `Problem`: a short question, the lines of a worked trace, and the answer. The
traces are state machines: a line restates all that is still needed and the next line follows from
it by one table look-up and a copy, so that a small model can learn every step and a trace cut at a
line end still carries the work done so far. Problems are split by a hash of their content, never
by seed. Pure Python; knows nothing of tokenizers or models. A conversation (`messages`) becomes
text in one place only: the chat template of the tokenizer.
"""

import hashlib
import random
import re
import string
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise

SPLITS = ("train", "validation", "test")
VALIDATION_PERCENT = 4
TEST_PERCENT = 10
MAX_DRAWS_PER_PROBLEM = 10_000
FULL_TRACE_SHARE, NO_TRACE_SHARE = 0.70, 0.20  # of training; the rest: traces cut at a line end

_KEY_TOKEN = re.compile(r"[0-9]+|[A-Za-z]+|[^\sA-Za-z0-9]")


@dataclass(frozen=True)
class Problem:
    """One question with the lines of its worked trace and its answer."""

    task: str
    question: str
    steps: tuple[str, ...]
    answer: str


# --- the tasks -------------------------------------------------------------------------------


def _add(rng: random.Random) -> Problem:
    """Add two numbers digit by digit from the right: two operands of 4 or of 5 digits. State
    `A+B+carry=step:result`, A and B reversed; the step's tens digit is the next carry."""
    num_digits = rng.randint(4, 5)
    a, b = (rng.randrange(10 ** (num_digits - 1), 10**num_digits) for _ in range(2))
    left, right, carry, result, steps = str(a)[::-1], str(b)[::-1], 0, "", []
    while left:
        step = int(left[0]) + int(right[0]) + carry
        result = f"{step % 10}{result}"
        steps.append(f"{left}+{right}+{carry}={step:02d}:{result}")
        left, right, carry = left[1:], right[1:], step // 10
    answer = f"{carry}{result}" if carry else result
    return Problem("add", f"add {a} {b}", (*steps, answer), answer)


def _subtract(rng: random.Random) -> Problem:
    """Subtract the second number from the larger first, with borrows: two operands of 4 or of 5
    digits, positive difference. State `A-B-borrow=step:result`, A and B reversed; the step is the
    next borrow and a digit."""
    num_digits = rng.randint(4, 5)
    b, a = sorted(rng.sample(range(10 ** (num_digits - 1), 10**num_digits), 2))
    left, right, borrow, result, steps = str(a)[::-1], str(b)[::-1], 0, "", []
    while left:
        difference = int(left[0]) - int(right[0]) - borrow
        next_borrow, digit = int(difference < 0), difference % 10
        result = f"{digit}{result}"
        steps.append(f"{left}-{right}-{borrow}={next_borrow}{digit}:{result}")
        left, right, borrow = left[1:], right[1:], next_borrow
    answer = result.lstrip("0")
    return Problem("subtract", f"subtract {a} {b}", (*steps, answer), answer)


def _multiply(rng: random.Random) -> Problem:
    """Multiply by one digit, digit by digit from the right with carries: 4 digits times 3 to 9.
    State `A*m+carry=step:result`, A reversed; the step's tens digit is the next carry."""
    a, m = rng.randrange(1000, 10_000), rng.randint(3, 9)
    left, carry, result, steps = str(a)[::-1], 0, "", []
    while left:
        step = int(left[0]) * m + carry
        result = f"{step % 10}{result}"
        steps.append(f"{left}*{m}+{carry}={step:02d}:{result}")
        left, carry = left[1:], step // 10
    answer = f"{carry}{result}" if carry else result
    return Problem("multiply", f"multiply {a} {m}", (*steps, answer), answer)


def _divide(rng: random.Random) -> Problem:
    """Long division by one digit without remainder: quotients of 4 digits, divisors 3 to 9. State
    `remaining/m=digit:quotient`; the digit divides the first two of the remaining."""
    quotient, m = rng.randrange(1000, 10_000), rng.randint(3, 9)
    n = quotient * m
    left, digits, steps = f"0{n}", "", []
    while len(left) > 1:
        digit, remainder = divmod(int(left[:2]), m)
        digits += str(digit)
        steps.append(f"{left}/{m}={digit}:{digits}")
        left = f"{remainder}{left[2:]}"
    return Problem("divide", f"divide {n} {m}", (*steps, str(quotient)), str(quotient))


def _modulo(rng: random.Random) -> Problem:
    """Remainder of a long number by one digit: 6 or 7 digits modulo 6 to 9. State `remaining/m`;
    the first two digits of the remaining become their remainder."""
    num_digits = rng.randint(6, 7)
    n, m = rng.randrange(10 ** (num_digits - 1), 10**num_digits), rng.randint(6, 9)
    left = f"0{n}"
    steps = [f"{left}/{m}"]
    while len(left) > 1:
        left = f"{int(left[:2]) % m}{left[2:]}"
        steps.append(f"{left}/{m}")
    return Problem("modulo", f"modulo {n} {m}", tuple(steps), left)


def _apply_mod_10(a: int, op: str, b: int) -> int:
    """`a op b` modulo 10."""
    return {"+": a + b, "-": a - b, "*": a * b}[op] % 10


def _chain(rng: random.Random) -> Problem:
    """Run a program of +, - and * from left to right, all modulo 10: 6 to 8 operations;
    multiplications by 3, 7, 9. State: the program with its first operation already applied to the
    value."""
    value = rng.randrange(10)
    program = []
    for _ in range(rng.randint(6, 8)):
        op = rng.choice("+-*")
        program.append((op, rng.choice((3, 7, 9)) if op == "*" else rng.randint(1, 9)))
    question = f"chain {value}" + "".join(f"{op}{operand}" for op, operand in program)
    steps = []
    for position, (op, operand) in enumerate(program, start=1):
        value = _apply_mod_10(value, op, operand)
        steps.append(f"{value}" + "".join(f"{o}{x}" for o, x in program[position:]))
    return Problem("chain", question, tuple(steps), str(value))


def _rpn(rng: random.Random) -> Problem:
    """Evaluate reverse Polish notation with a stack, all modulo 10: 5 or 6 digits, 4 or 5
    operations. State `stack|rest`, top of the stack first: each step pushes a digit or applies an
    op."""
    num_digits = rng.randint(5, 6)
    tokens, depth, digits_left, ops_left = [], 0, num_digits, num_digits - 1
    while digits_left or ops_left:
        can_apply = depth >= 2 and ops_left > 0
        if digits_left and (not can_apply or rng.random() < 0.5):
            tokens.append(str(rng.randrange(10)))
            digits_left, depth = digits_left - 1, depth + 1
        else:
            tokens.append(rng.choice("+-*"))
            ops_left, depth = ops_left - 1, depth - 1
    stack, steps = "", []
    for position, token in enumerate(tokens, start=1):
        if token.isdigit():
            stack = token + stack
        else:
            stack = f"{_apply_mod_10(int(stack[1]), token, int(stack[0]))}{stack[2:]}"
        rest = _join_rpn(tokens[position:])
        steps.append(f"{stack}|{rest}" if rest else stack)
    return Problem("rpn", f"rpn {_join_rpn(tokens)}", tuple(steps), stack)


def _join_rpn(tokens: list[str]) -> str:
    """Tokens without spaces, except between two digits."""
    return re.sub(r"(?<=\d)(?=\d)", " ", "".join(tokens))


def _sort(rng: random.Random) -> Problem:
    """Sort letters by repeated selection: 6 or 7 different letters. State `sorted|rest`: the
    smallest letter of the rest moves to the end of the sorted."""
    rest = rng.sample(string.ascii_uppercase, rng.randint(6, 7))
    question = "sort " + " ".join(rest)
    done, steps = "", []
    while rest:
        smallest = min(rest)
        rest = [letter for letter in rest if letter != smallest]
        done += smallest
        steps.append(f"{done}|{''.join(rest)}" if rest else done)
    return Problem("sort", question, tuple(steps), done)


def _hops(rng: random.Random) -> Problem:
    """Follow arrows between letters for a number of hops: 8 arrows, 5 to 7 hops. State `from>to
    left`: the arrow that leaves the present letter and the hops left after it."""
    nodes = rng.sample(string.ascii_uppercase, 8)
    num_hops = rng.randint(5, 7)
    path = nodes[: num_hops + 1]
    target = dict(pairwise(path))
    for node in nodes[num_hops:]:
        target[node] = rng.choice([other for other in nodes if other != node])
    arrows = [f"{source}{target[source]}" for source in rng.sample(nodes, len(nodes))]
    question = f"hops {' '.join(arrows)} from {path[0]} {num_hops}"
    steps = [
        f"{source}>{target[source]} {num_hops - hop}"
        for hop, source in enumerate(path[:-1], start=1)
    ]
    return Problem("hops", question, tuple(steps), path[-1])


def _swaps(rng: random.Random) -> Problem:
    """Apply exchanges of two letters to a row of letters, one after the other: 5 letters, 4 or 5
    exchanges. State `row swaps`: the first of the swaps still to do exchanges its two letters."""
    row = "".join(rng.sample("ABCDE", 5))
    swaps = ["".join(sorted(rng.sample("ABCDE", 2))) for _ in range(rng.randint(4, 5))]
    question = f"swaps {row} {' '.join(swaps)}"
    steps = []
    while swaps:
        x, y = swaps.pop(0)
        row = row.translate(str.maketrans({x: y, y: x}))
        steps.append(" ".join([row, *swaps]))
    return Problem("swaps", question, tuple(steps), row)


TASKS: dict[str, Callable[[random.Random], Problem]] = {
    draw.__name__.removeprefix("_"): draw
    for draw in (
        _add, _subtract, _multiply, _divide, _modulo, _chain, _rpn, _sort, _hops, _swaps,
    )
}  # fmt: skip
"""How to draw a problem of each task. A docstring says what the task is, how hard it gets (after
the colon), and how a line of its traces reads (its state)."""


# --- splits and samples ----------------------------------------------------------------------


def problem_key(problem: Problem) -> str:
    """The task and the sorted multiset of the question's numbers, words and symbols.

    Reordered operands and other spacing give the same key, so near-copies share a split.
    """
    return " ".join([problem.task, *sorted(_KEY_TOKEN.findall(problem.question))])


def split_of(problem: Problem) -> str:
    """The problem's split by the SHA-256 of its key: 86 % train, 4 % validation, 10 % test."""
    digest = hashlib.sha256(problem_key(problem).encode()).digest()
    percent = int.from_bytes(digest[:8], "big") % 100
    if percent < TEST_PERCENT:
        return "test"
    return "validation" if percent < TEST_PERCENT + VALIDATION_PERCENT else "train"


def sample_problems(
    tasks: Iterable[str], split: str, num_per_task: int, seed: int
) -> list[Problem]:
    """`num_per_task` problems of each task from one split, no key twice, the same in any process.

    A task's problems depend on its name, the split and the seed only, not on the other tasks; a
    smaller `num_per_task` gives a prefix.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is not one of {', '.join(SPLITS)}; use one of them")
    problems: list[Problem] = []
    for name in tasks:
        if name not in TASKS:
            raise ValueError(f"task={name!r} is unknown; use {', '.join(TASKS)}")
        rng = random.Random(f"{name}/{split}/{seed}")  # str seeds go through SHA-512, not hash()
        keys: set[str] = set()
        in_vain = 0
        while len(keys) < num_per_task and in_vain < MAX_DRAWS_PER_PROBLEM:
            problem = TASKS[name](rng)
            key = problem_key(problem)
            in_vain += 1
            if split_of(problem) == split and key not in keys:
                keys.add(key)
                problems.append(problem)
                in_vain = 0
        if len(keys) < num_per_task:
            raise ValueError(
                f"num_per_task={num_per_task} is more than task {name!r} has in {split!r}; "
                f"use at most {len(keys)}"
            )
    return problems


# --- conversations and scoring ---------------------------------------------------------------


def messages(
    problem: Problem, *, thinking: bool = True, num_steps: int | None = None
) -> list[dict[str, str]]:
    """The solved conversation, for a chat template; drop the last turn to pose the question.

    With `thinking` the assistant's turn carries its trace as `reasoning_content`: all of it, or
    the first `num_steps` lines. Without, the turn is the answer alone.
    """
    turn = {"role": "assistant", "content": problem.answer}
    if thinking:
        turn["reasoning_content"] = "\n".join(problem.steps[:num_steps])
    return [{"role": "user", "content": problem.question}, turn]


def draw_conversation(
    rng: random.Random, task_weights: Mapping[str, float] | None = None
) -> list[dict[str, str]]:
    """A solved training problem: with its full trace, without thinking, or with a cut trace.

    Cut traces teach a model to answer when its thinking budget ends early. `task_weights` says how
    often a task is drawn (default 1 each).
    """
    weights = [(task_weights or {}).get(name, 1.0) for name in TASKS]
    draw = TASKS[rng.choices(list(TASKS), weights)[0]]
    problem = draw(rng)
    while split_of(problem) != "train":
        problem = draw(rng)
    share = rng.random()
    if share < FULL_TRACE_SHARE:
        return messages(problem)
    if share < FULL_TRACE_SHARE + NO_TRACE_SHARE:
        return messages(problem, thinking=False)
    return messages(problem, num_steps=rng.randint(1, len(problem.steps) - 1))


def is_correct(problem: Problem, completion_text: str) -> bool:
    """Whether the text after `</think>`, or all of it if there is none, is exactly the answer."""
    return completion_text.rpartition("</think>")[2].strip() == problem.answer
