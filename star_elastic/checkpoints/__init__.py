"""Checkpoints: reading and writing safetensors directories, and what stands beside the weights."""
