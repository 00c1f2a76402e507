"""Nesting: sort a parent, slice it, gate it, and run any of its submodels."""
