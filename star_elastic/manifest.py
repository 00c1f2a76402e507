"""The former place of `checkpoints.manifest`, for code that was written against it."""

from star_elastic.checkpoints.manifest import Manifest, Size, save_manifest

__all__ = ["Manifest", "Size", "save_manifest"]
