"""The former place of `axes.widths`, for code that was written against it."""

from star_elastic.axes.widths import Widths

__all__ = ["Widths"]
