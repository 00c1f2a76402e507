"""Entry point of the `star-elastic` command.

Light on purpose: from its first line on Ctrl-C and SIGTERM end the command in one line. While
something is imported, a KeyboardInterrupt would be lost, or leave half a module behind.
"""

from __future__ import annotations

from collections.abc import Sequence

from star_elastic.signals import ending_on_signals


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command that the arguments name; by default those of the process."""
    with ending_on_signals():
        from star_elastic.cli.commands import program
        from star_elastic.cli.terminal import at_the_command_line, run_program

        with at_the_command_line():
            run_program(program, arguments)
