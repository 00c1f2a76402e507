"""Evaluation: procedural tasks, accuracy, perplexity, latency."""
