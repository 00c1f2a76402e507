"""Evaluation: tasks, accuracy, perplexity, latency; plans compared, and told on a page."""
