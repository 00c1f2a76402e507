"""Files on disk: what stands at a path, and writing it whole or not at all."""
