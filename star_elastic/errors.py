"""The four kinds of mistake a user can make, each told in one line: what, why, what to do.

Anything else that goes wrong is a bug of ours and surfaces as an ordinary exception. What a
library raises over a user's file (transformers, tokenizers, a chat template, pyarrow) is the user's
to mend, too, whatever its type: `library_boundary` tells it in one line.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


def reason(error: BaseException, line: int = 0) -> str:
    """One line (the first, or -1: the last) of what a library's error says, or else its name."""
    lines = [text.strip() for text in str(error).splitlines() if text.strip()]
    name = type(error).__name__
    if not lines:
        return name
    # Their messages alone say nothing: a key, an attribute, an index.
    bare = (LookupError, AttributeError, TypeError, AssertionError, UnicodeError)
    return f"{name}: {lines[line]}" if isinstance(error, bare) else lines[line]


class Interrupted(Exception):
    """The user stopped a run; its state is saved. Exit code 1."""


class StarElasticError(Exception):
    """Base of all errors that the command line reports in one line with exit code 2."""


class ConfigError(StarElasticError):
    """A model config, run config or command-line option that cannot be used."""


class CheckpointError(StarElasticError):
    """A checkpoint or data file that is missing, damaged or of the wrong kind."""


class ShapeError(StarElasticError):
    """Widths that a family cannot express."""


class BudgetError(StarElasticError):
    """A budget that no allowed choice of widths (or of generated tokens) can meet."""


@contextmanager
def library_boundary(
    problem: str, remedy: str, kind: type[StarElasticError] = CheckpointError
) -> Iterator[None]:
    """Whatever a library raises inside, of any type, becomes `kind` with one line:
    "<problem> (<what the library says>); <remedy>".

    Keep the block small, around the library's call alone: a mistake of ours inside would be taken
    for the user's. Our own errors pass through. The library's exception stays attached as the
    cause; with STAR_ELASTIC_TRACEBACK=1 the command line shows it.
    """
    try:
        yield
    except StarElasticError:
        raise
    except Exception as error:
        raise kind(f"{problem} ({reason(error)}); {remedy}") from error
