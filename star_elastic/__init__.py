"""Star Elastic: one language model, many nested sizes inside a single checkpoint.

`load` and the names below are imported on first use, so that importing the package is cheap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from star_elastic.generate.family import ElasticFamily, load

__version__ = "0.1.0"
__all__ = ["ElasticFamily", "load"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from star_elastic.generate import family

        return getattr(family, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
