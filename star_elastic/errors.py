"""The four kinds of mistake a user can make, each told in one line: what, why, what to do.

Anything else that goes wrong is a bug of ours and surfaces as an ordinary exception.
"""


def reason(error: BaseException, line: int = 0) -> str:
    """One line (the first, or -1: the last) of what a library's error says, or else its name."""
    lines = [text.strip() for text in str(error).splitlines() if text.strip()]
    return lines[line] if lines else type(error).__name__


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
