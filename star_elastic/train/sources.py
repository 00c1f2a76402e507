"""The former place of `data.sources`, for code that was written against it."""

from star_elastic.data.sources import ShuffledEpochs, Source

__all__ = ["ShuffledEpochs", "Source"]
