"""The four kinds of mistake a user can make, each told in one line: what, why, what to do.

Anything else that goes wrong is a bug of ours and surfaces as an ordinary exception. What a
library raises over a user's file (transformers, tokenizers, a chat template, pyarrow) is the user's
to mend, too, whatever its type: `library_boundary` tells it in one line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

LONGEST_REASON = 300
"""Characters of a library's message that are told."""
LONGEST_ROW = 600
"""Characters of a message about a row, which may quote what the row says."""


def printable(text: str, most: int) -> str:
    """A text of the user's data on one line of a message: half characters, control characters and
    line ends as escapes, and with more than about `most` characters only its two ends."""
    if len(text) > most:
        text = f"{text[: most // 2]} ... {text[-(most // 2) :]}"
    escaped = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return "".join(escaped)


def reason(error: BaseException, line: int = 0) -> str:
    """One line (the first, or -1: the last) of what a library's error says, or else its name.

    A first line that ends with a colon says nothing without the next one, which is added.
    """
    lines = [text.strip()[:LONGEST_REASON] for text in str(error).splitlines() if text.strip()]
    name = type(error).__name__
    if not lines:
        return name
    if line == 0 and lines[0].endswith(":") and len(lines) > 1:
        lines[0] = f"{lines[0]} {lines[1]}"
    # Their messages alone say nothing: a key, an attribute, an index.
    bare = (LookupError, AttributeError, TypeError, AssertionError, UnicodeError)
    return f"{name}: {lines[line]}" if isinstance(error, bare) else lines[line]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: Python's, a GPU's or that of torch's allocator on a CPU (torch's
    class by its name, because it may not be imported)."""
    of_torch = type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error)
    return isinstance(error, MemoryError) or of_torch


class Interrupted(Exception):
    """The user stopped a run; its state is saved. Exit code 1."""


class StarElasticError(Exception):
    """Base of all errors that the command line reports in one line with exit code 2."""


class ConfigError(StarElasticError):
    """A model config, run config or command-line option that cannot be used."""


class CheckpointError(StarElasticError):
    """A checkpoint or data file that is missing, damaged or of the wrong kind."""


class RowError(CheckpointError):
    """A row of data that cannot be read as it was written: "<what is wrong>; <what to do>", with
    the place of the row in front once it is known. Whatever the row says and is quoted of it, the
    message is one line that can be printed."""

    def __init__(self, problem: str, place: str = ""):
        self.problem = printable(problem, LONGEST_ROW)
        super().__init__(f"{place} {self.problem}" if place else self.problem)

    def at(self, place: str) -> RowError:
        """The same, naming the row."""
        return RowError(self.problem, place)


class LogitsError(CheckpointError):
    """Logits from which no token can be chosen; `requests` are the numbers of the requests."""

    def __init__(self, requests: Sequence[int]):
        self.requests = tuple(requests)
        named = f"request{'s'[: len(requests) > 1]} {', '.join(map(str, requests))}"
        super().__init__(str(not_finite(f"the model's logits for {named} are")))


class ShapeError(StarElasticError):
    """Widths that a family cannot express."""


class BudgetError(StarElasticError):
    """A budget that no allowed choice of widths (or of generated tokens) can meet."""


def not_finite(what: str) -> CheckpointError:
    """What is to be raised where a model computes no numbers; `what` with its verb."""
    return CheckpointError(
        f"{what} not finite; the weights are damaged or overflow in this dtype: restore the "
        "checkpoint or load it in float32"
    )


@contextmanager
def library_boundary(
    problem: str, remedy: str | Callable[[], str], kind: type[StarElasticError] = CheckpointError
) -> Iterator[None]:
    """Whatever a library raises inside, of any type, becomes `kind` with one line:
    "<problem> (<what the library says>); <remedy>". A remedy that is a function is asked for only
    then.

    Keep the block small, around the library's call alone: a mistake of ours inside would be taken
    for the user's. Our own errors pass through. The library's exception stays attached as the
    cause; with STAR_ELASTIC_TRACEBACK=1 the command line shows it.
    """
    try:
        yield
    except StarElasticError:
        raise
    except BaseException as error:
        # Rust libraries (tokenizers, safetensors) panic with an exception that is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        advice = remedy if isinstance(remedy, str) else remedy()
        raise kind(f"{problem} ({reason(error)}); {advice}") from error
