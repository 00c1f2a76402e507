"""The former name of `architectures`, for code that was written against it."""

from star_elastic.architectures import architecture_of as family_of
from star_elastic.architectures import read_config

__all__ = ["family_of", "read_config"]
