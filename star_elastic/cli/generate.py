"""`star-elastic generate`: one size thinks, another answers."""

import sys
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from typer import Argument, Option

from star_elastic.cli.options import AsJson, Device, Dtype, Elastic
from star_elastic.cli.terminal import show
from star_elastic.errors import ConfigError, Interrupted
from star_elastic.generate.phases import (
    DEFAULT_GRACE,
    DEFAULT_MAX_NEW_TOKENS,
    THINKING,
    ByDifficulty,
    Generation,
    Plan,
    Token,
    parse_phases,
)
from star_elastic.signals import interrupting

COLOURS = ("cyan", "yellow", "green", "magenta")


def generate(
    elastic: Elastic,
    prompt: str = Argument(help="The user's message."),
    size: str = Option("", help="One size for both phases."),
    think: str = Option("", help="The size that thinks."),
    answer: str = Option("", help="The size that answers."),
    thinking_budget: int | None = Option(None, help="Tokens of thinking."),
    grace: int | None = Option(None, help="Tokens to finish the line at the budget (32)."),
    unsure: float | None = Option(
        None, help="Entropy (nats) above which the answering size helps the thinking one."
    ),
    phases: str = Option("", help="Or any phases: large:budget:16,small:end_of_thinking:64,large."),
    switch: str = Option("reprefill", help="reprefill, catch-up or hand-over."),
    max_new_tokens: int = Option(DEFAULT_MAX_NEW_TOKENS, help="Tokens in all."),
    stop: list[str] | None = Option(None, help="Ends the text; may be repeated."),
    temperature: float = Option(0.0, help="0 is greedy."),
    top_p: float = Option(1, help="Draw from the likeliest that hold this much."),
    seed: int = Option(0, help="Seed of the sampling."),
    stream: bool = Option(False, "--stream", help="Print tokens as they come."),
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Elastic budget control: one size thinks, another answers."""
    _require_one_way(size, think, answer, unsure, phases, thinking_budget, grace)
    if stream and as_json:
        raise ConfigError("--stream prints tokens and --json one object; use one of them")
    from star_elastic.generate.family import load

    own: Any = {"max_new_tokens": max_new_tokens, "switch": switch, "stop": tuple(stop or ())}
    family = load(elastic, dtype, device)
    if phases:
        plan = Plan(parse_phases(phases), **own)
    else:
        thinks = think or size or None
        if unsure is not None:
            thinks = ByDifficulty(small=think, large=answer, threshold=unsure)
        plan = family.plan(
            thinks, answer or size or None, thinking_budget=thinking_budget,
            grace=DEFAULT_GRACE if grace is None else grace, **own,
        )  # fmt: skip
    sampling = {"temperature": temperature, "top_p": top_p, "seed": seed}
    console = Console()
    if stream:
        events = family.generator.stream([prompt], plan, **sampling)
        result = print_stream(events, console, list(family))
    else:
        (result,) = family.generator.generate([prompt], plan, **sampling)
        if as_json:
            show(True, result.to_json())
            return
        _print_text(console, result)
    _print_phases(console, result)


def _require_one_way(
    size: str, think: str, answer: str, unsure: float | None, phases: str,
    thinking_budget: int | None, grace: int | None,
) -> None:  # fmt: skip
    """Raises ConfigError unless the options name who thinks and who answers in one way."""
    if phases and (thinking_budget is not None or grace is not None):
        raise ConfigError(
            "--phases gives every phase a budget of its own; leave out --thinking-budget, --grace"
        )
    if sum(map(bool, (size, think or answer or unsure is not None, phases))) > 1:
        raise ConfigError(
            "--size is one size for all, --think and --answer are two, --phases any; use one way"
        )
    if unsure is not None and not (think and answer):
        raise ConfigError("--unsure needs --think (the smaller size) and --answer (the larger)")


def print_stream(
    events: Iterator[Token | Generation], console: Console, sizes: Sequence[str]
) -> Generation:
    """Prints tokens as they come, the trace dim, in a colour for each size; returns the result.

    Where some were printed as the answer and turned out to be thinking, the answer comes once more
    by itself. Ctrl-C ends the line at hand.
    """
    texts: list[str] = []
    is_recalled = False
    try:
        with interrupting():
            for event in events:
                if isinstance(event, Generation):
                    _say(console, "")
                    if is_recalled:
                        _say(console, "[a part of this was still thinking; the answer is:]", "dim")
                        _say(console, event.answer)
                    return event
                place = sizes.index(event.size) if event.size else None
                colour = "white" if place is None else COLOURS[place % len(COLOURS)]
                style = f"dim {colour}" if event.phase == THINKING else colour
                _say(console, event.text, style, end="")
                sys.stdout.flush()
                is_recalled |= any(texts[len(texts) - event.recalled :])
                texts.append(event.text)
    except KeyboardInterrupt:
        _say(console, "")
        raise Interrupted("stopped; what is written above is not all") from None
    raise AssertionError("a stream ends with its result")


def _print_text(console: Console, result: Generation) -> None:
    """A result's text as it was written, its trace dim."""
    text = result.text.rstrip()
    if text.endswith(result.answer):
        _say(console, text.removesuffix(result.answer), "dim", end="")
    else:  # some thinking comes last, or stands between parts of the answer
        _say(console, result.thinking, "dim")
    _say(console, result.answer)


def _print_phases(console: Console, result: Generation) -> None:
    """A line for each phase."""
    for phase in result.phases:
        shares = ", ".join(f"{name} {count}" for name, count in phase.by_size.items())
        _say(
            console,
            f"[{phase.name}: {phase.size}, {phase.tokens} tokens ({shares}), "
            f"{phase.seconds:.2f} s, {phase.ended}]",
            "dim",
        )


def _say(console: Console, text: str, style: str | None = None, end: str = "\n") -> None:
    """Text on stdout, verbatim; with a style on a terminal, where control codes are left out."""
    if console.is_terminal:
        console.out(text, style=style, highlight=False, end=end)
    else:
        sys.stdout.write(text + end)
