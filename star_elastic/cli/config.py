"""`star-elastic config`: the reference of the run config."""

import sys


def config_reference() -> None:
    """Every key of the run config: type, default, what it does, what to start with."""
    from star_elastic.train.reference import reference

    sys.stdout.write(reference())
