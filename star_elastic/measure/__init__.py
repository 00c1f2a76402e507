"""Measurements of whole models: divergence from the parent, perplexity, milliseconds."""
