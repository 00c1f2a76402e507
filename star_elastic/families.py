"""The former name of `architectures`, for code that was written against it."""

from star_elastic.architectures import family_of, read_config

__all__ = ["family_of", "read_config"]
